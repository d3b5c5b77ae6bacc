"""Redundant experts: each token to one replica of each of its experts, the same output, replicas that stay equal."""

import numpy as np
import pytest
from many_ranks import Case, Dot

from minidsv3.autograd import GradientBuffer, Parameter, Tensor, backward
from minidsv3.model.moe import LocalTokenDispatcher
from minidsv3.ops.linear import grouped_linear
from minidsv3.parallel.comm import SimCommunicator
from minidsv3.parallel.dispatcher import AllToAllTokenDispatcher
from minidsv3.parallel.ledger import Ledgered
from minidsv3.parallel.placement import Placement, load_of_gpu, place, sum_replica_gradients
from minidsv3.parallel.ranks import Ranks
from minidsv3.parallel.wire import EXACT, NORMAL

E, R, K, D = 8, 4, 3, 6
TOKENS = [9, 0, 14, 7]


def skewed(T, seed=0):
    """Experts of T tokens, of which most want experts 2 and 5."""
    rng = np.random.default_rng(seed)
    wish = rng.random((T, E)) + np.where(np.isin(np.arange(E), (2, 5)), 0.5, 0)
    return np.sort(np.argsort(-wish, axis=1)[:, :K], axis=1)


@pytest.fixture
def case():
    return Case(TOKENS, E, K, D, idx=skewed(sum(TOKENS)))


@pytest.fixture
def placement(case):
    load = np.bincount(case.idx.reshape(-1), minlength=E)
    return place(load[None], 16, 2, 2, R)[0]


def test_each_token_goes_to_one_replica_of_each_of_its_experts(case, placement):
    physical = placement.physical_of_token(case.idx)
    np.testing.assert_array_equal(placement.expert_of_physical[physical], case.idx)
    assert placement.replicas.max() > 2  # or the test would say little


def test_tokens_are_spread_evenly_over_the_replicas(case, placement):
    physical = np.bincount(placement.physical_of_token(case.idx).reshape(-1), minlength=16)
    load = np.bincount(case.idx.reshape(-1), minlength=E)
    for e in range(E):
        mine = physical[placement.expert_of_physical == e]
        assert mine.sum() == load[e] and mine.max() - mine.min() <= 1


def test_replica_numbers_are_those_of_the_map(placement):
    replica = placement.replica_of_physical()
    for p in range(16):
        assert placement.physical_of_replica[placement.expert_of_physical[p], replica[p]] == p


@pytest.mark.parametrize("wire, tolerance", [(EXACT, 1e-6), (NORMAL, 0.03)])
def test_output_is_that_without_replicas(case, placement, wire, tolerance):
    _, y, dx, dweight = case.local()
    (_, *got), _ = case.on_ranks(2, wire, placement=placement)
    for ours, expected in zip(got, (y, dx, dweight)):
        error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
        assert error <= (tolerance if expected is not dweight else 2 * tolerance)


def test_load_of_gpus_falls_where_experts_have_replicas(case, placement):
    load = np.bincount(case.idx.reshape(-1), minlength=E)[None]
    before = load.reshape(R, -1).sum(axis=1)
    after = load_of_gpu(load, placement.expert_of_physical[None], placement.replicas[None], R)[0]
    assert after.sum() == pytest.approx(load.sum())
    assert after.max() / after.mean() < 1.1 < before.max() / before.mean()


def test_replica_gradients_are_added_in_replica_order():
    """Float32 values of very different size: another order gives other bits."""
    placement = Placement(
        np.array([0, 1, 0, 2, 1, 0]), np.array([[2, 0, 5], [1, 4, -1], [3, -1, -1]]), np.array([3, 2, 1])
    )
    gradient = np.array([[1e8], [3], [1], [7], [2], [-1e8]], dtype=np.float32)
    comm = SimCommunicator(3)
    sums = sum_replica_gradients(comm, {r: gradient[2 * r : 2 * r + 2] for r in range(3)}, placement)
    first = np.float32(np.float32(gradient[2] + gradient[0]) + gradient[5])  # physical 2, 0, 5
    assert np.concatenate([sums[r] for r in range(3)]).reshape(-1).tolist() == [first, 5, first, 7, 5, first]
    assert first != np.float32(np.float32(gradient[0] + gradient[5]) + gradient[2])


def test_replicas_stay_equal_through_training_and_equal_to_plain_training(case, placement):
    """Three steps of gradient descent on weights of which each rank has its own copies."""
    rng = np.random.default_rng(4)
    start = rng.standard_normal((E, D, D)).astype(np.float32)

    plain = Parameter(start.shape)
    plain.data, local = start.copy(), LocalTokenDispatcher(E)
    comm = Ledgered(SimCommunicator(R, 2))
    ranks = Ranks(comm)
    dispatcher = AllToAllTokenDispatcher(ranks, E, EXACT, placement=placement)
    held = []
    for rank in range(R):
        held.append(Parameter((4, D, D)))
        held[rank].data = start[dispatcher.experts_of(rank)]

    def program(rank):
        s, into = case.slices[rank], GradientBuffer({held[rank]: np.zeros((4, D, D), dtype=np.float32)})
        rows, handle = dispatcher.dispatch(Tensor(case.x[s], True), case.idx[s], Tensor(case.weight[s]))
        y = dispatcher.combine(grouped_linear(rows, held[rank], handle.rows_per_expert), handle)
        backward(Dot.apply(y, dy=case.dy[s]), into=into)
        return into[held[rank]]

    for _ in range(3):
        gradients = sum_replica_gradients(comm, dict(enumerate(ranks.run(program))), placement)
        for rank in range(R):
            held[rank].data = held[rank].data - np.float32(0.01) * gradients[rank]
        rows, handle = local.dispatch(Tensor(case.x, True), case.idx, Tensor(case.weight))
        plain.zero_grad()
        y = local.combine(grouped_linear(rows, plain, handle.rows_per_expert), handle)
        backward(Dot.apply(y, dy=case.dy))
        plain.data = plain.data - np.float32(0.01) * plain.grad
    weights = np.concatenate([p.data for p in held])
    for e in range(E):
        first, *others = weights[placement.expert_of_physical == e]
        assert all(np.array_equal(first, other) for other in others)
        np.testing.assert_allclose(first, plain.data[e], rtol=2e-5, atol=1e-5)
    assert not np.allclose(weights[0], start[placement.expert_of_physical[0]])
    assert comm.ledger.total_bytes("replica gradients", "NVLink") > 0
