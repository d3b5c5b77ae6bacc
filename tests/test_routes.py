"""Routes: what each step of a plan holds, against the routing itself."""

import numpy as np
import pytest

from minidsv3.parallel.comm import Parts, RankError, SimCommunicator
from minidsv3.parallel.routes import _exchange, back, inverse, multicast, plan, sum_back, sum_rows, there

R, GPUS, E, K = 6, 2, 12, 5
TOKENS = [4, 0, 3, 5, 1, 2]


@pytest.fixture
def routing():
    rng = np.random.default_rng(3)
    return {r: np.sort(np.argsort(rng.random((n, E)), axis=1)[:, :K], axis=1) for r, n in enumerate(TOKENS)}


@pytest.fixture
def routes(routing):
    return plan(SimCommunicator(R, GPUS), routing, E // R, "routing")[0]


def pairs(routing, key):
    """All (rank, token, key of an expert) of a routing."""
    return {(r, t, key(e)) for r, idx in routing.items() for t in range(len(idx)) for e in idx[t].tolist()}


def test_rows_that_depart_are_the_distinct_nodes_and_ranks(routing, routes):
    nodes, ranks = (sum(int(route.hops[n].rows_out.sum()) for route in routes.values()) for n in (0, 1))
    assert nodes == len(pairs(routing, lambda e: e // (E // R) // GPUS))
    assert ranks == len(pairs(routing, lambda e: e // (E // R)))


def test_first_hop_keeps_the_slot_and_second_the_node(routes):
    for r, route in routes.items():
        across, inside = route.hops
        assert all(d % GPUS == r % GPUS for d in np.flatnonzero(across.rows_out))
        assert all(d // GPUS == r // GPUS for d in np.flatnonzero(inside.rows_out))


def test_direct_route_sends_every_entry(routing):
    payload = {r: np.full((n, 3), r, dtype=np.uint8) for r, n in enumerate(TOKENS)}
    routes, arrived = plan(SimCommunicator(R, GPUS), routing, E // R, "routing", payload)
    assert sum(len(a) for a in arrived.values()) == sum(TOKENS) * K
    assert all(len(route.hops) == 1 for route in routes.values())
    for r, route in routes.items():
        sources = np.repeat(np.arange(R), route.hops[0].rows_in)
        np.testing.assert_array_equal(arrived[r][:, 0], sources)


def test_rows_arrive_where_their_experts_are(routing, routes):
    """Each row is (rank, token): the n-th expert row must be of a token that chose that expert, sources ascending."""
    rows = {r: np.stack([np.full(n, r), np.arange(n)], axis=1) for r, n in enumerate(TOKENS)}
    arrived = multicast(SimCommunicator(R, GPUS), rows, routes, "x")
    for r, route in routes.items():
        got = arrived[r][route.row_of_entry].tolist()
        expected = [
            [s, t] for e in (2 * r, 2 * r + 1) for s in range(R) for t in range(TOKENS[s]) if e in routing[s][t]
        ]
        assert got == expected
        assert route.rows_per_expert.tolist() == [sum(e in row for idx in routing.values() for row in idx.tolist())
                                                  for e in (2 * r, 2 * r + 1)]  # fmt: skip


def test_back_undoes_there(routes):
    comm, rng = SimCommunicator(R, GPUS), np.random.default_rng(0)
    values = {r: rng.random((n * K, 2)) for r, n in enumerate(TOKENS)}
    returned = back(comm, there(comm, values, routes, "x"), routes, "x")
    for r in range(R):
        np.testing.assert_array_equal(returned[r], values[r])


def test_sum_back_is_the_transpose_of_multicast(routes):
    """<multicast(x), y> = <x, sum_back(y)>."""
    comm, rng = SimCommunicator(R, GPUS), np.random.default_rng(1)
    x = {r: rng.standard_normal((n, 3)) for r, n in enumerate(TOKENS)}
    spread = multicast(comm, x, routes, "x")
    y = {r: rng.standard_normal(a.shape) for r, a in spread.items()}
    summed = sum_back(comm, y, routes, "x", lambda a: a, lambda a: a)
    left = sum(float((spread[r] * y[r]).sum()) for r in range(R))
    assert left == pytest.approx(sum(float((x[r] * summed[r]).sum()) for r in range(R)), rel=1e-12)


def test_sum_rows_adds_in_order_and_leaves_zeros_where_nothing_goes():
    values = np.array([[1e8], [3], [-1e8], [5], [1]], dtype=np.float32)
    got = sum_rows(values, np.array([2, 0, 2, 0, 2]), 4)
    assert got.reshape(-1).tolist() == [8, 0, 1, 0]  # 1e8 - 1e8 + 1
    assert sum_rows(values[:0], np.zeros(0, dtype=np.int64), 3).tolist() == [[0], [0], [0]]


def test_inverse_of_a_permutation():
    order = np.array([2, 0, 3, 1])
    assert order[inverse(order)].tolist() == [0, 1, 2, 3]


def test_unexpected_sizes_name_both_ranks(routes):
    comm = SimCommunicator(R, GPUS)
    send = {r: Parts(np.zeros((R, 1)), np.ones(R, dtype=int)) for r in range(R)}
    expected = {r: np.ones(R, dtype=int) for r in range(R)}
    expected[4] = np.array([1, 1, 1, 2, 1, 1])
    with pytest.raises(RankError, match="rank 3 sent 1 rows to rank 4 in combine, where the routing has 2"):
        _exchange(comm, send, expected, "combine")
