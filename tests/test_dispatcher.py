"""The all-to-all dispatcher: equal to the local one where it must be, to loops where numbers are rounded on the way."""

import numpy as np
import pytest
from many_ranks import Case, Dot
from reference_model import odd_config

from minidsv3.autograd import Checkpoint, GradientBuffer, Tensor, backward
from minidsv3.model.moe import LocalTokenDispatcher, MoE
from minidsv3.ops.routing import select_experts
from minidsv3.parallel.comm import RankError, SimCommunicator
from minidsv3.parallel.dispatcher import AllToAllTokenDispatcher
from minidsv3.parallel.ledger import Ledgered
from minidsv3.parallel.ranks import Ranks
from minidsv3.parallel.wire import EXACT, LOW_LATENCY, NORMAL
from minidsv3.quant.blockwise import dequantize, quantize_tiles
from minidsv3.quant.formats import to_bf16

NAMES = ("rows", "y", "dx", "dweight")
CASES = {
    "one rank": (dict(tokens=[9], E=6, K=2, D=5), 1),
    "two ranks, two nodes": (dict(tokens=[5, 7], E=8, K=3, D=6), 1),
    "uneven, some without tokens": (dict(tokens=[5, 0, 3, 4, 9, 0, 2, 6], E=24, K=5, D=7), 4),
    "top-k above the ranks": (dict(tokens=[4, 3, 6, 5], E=12, K=11, D=3), 2),
    "one expert a token": (dict(tokens=[4, 2, 6, 5, 1, 3], E=6, K=1, D=3), 3),
    "64 ranks": (dict(tokens=[3] * 64, E=128, K=8, D=4), 8),
    "all to one rank": (dict(tokens=[4, 5, 3, 2], E=12, K=3, D=5, idx=np.tile([6, 7, 8], (14, 1))), 2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exact_wire_equals_the_local_dispatcher_to_the_bit(name, dtype):
    settings, gpus_per_node = CASES[name]
    case = Case(**settings, dtype=dtype)
    got, _ = case.on_ranks(gpus_per_node)
    for what, ours, expected in zip(NAMES, got, case.local()):
        np.testing.assert_array_equal(ours, expected, err_msg=what)
        assert ours.dtype == dtype


def test_number_of_workers_changes_nothing():
    case = Case([5, 0, 3, 4], 8, 3, 6)
    for wire in (EXACT, NORMAL, LOW_LATENCY):
        one, two = case.on_ranks(2, wire)[0], case.on_ranks(2, wire, workers=2)[0]
        for a, b in zip(one, two):
            np.testing.assert_array_equal(a, b)


def fp8(x):
    """A row as it comes out of the FP8 wire."""
    return dequantize(*quantize_tiles(x[None]), rows=1)[0]


def bf16(x):
    return to_bf16(x).astype(np.float32)


def normal_in_loops(case, gpus_per_node, values_of_entry):
    """Sums of ranks, nodes and tokens as the kernels take them, one token at a time; all float32."""
    per_rank = case.E // len(case.tokens)
    out = np.zeros_like(case.x)
    for t, experts in enumerate(case.idx):
        node_sums = []
        ranks = sorted({e // per_rank for e in experts.tolist()})
        for node in sorted({r // gpus_per_node for r in ranks}):
            rank_sums = []
            for rank in (r for r in ranks if r // gpus_per_node == node):
                terms = [values_of_entry(t, k) for k, e in enumerate(experts) if e // per_rank == rank]
                rank_sums.append(bf16(sum(terms[1:], terms[0])))
            node_sums.append(bf16(sum(rank_sums[1:], rank_sums[0])))
        out[t] = bf16(sum(node_sums[1:], node_sums[0]))
    return out


@pytest.mark.parametrize("tokens, E, K, D, gpus", [
    ([5, 0, 3, 4, 9, 0, 2, 6], 16, 5, 140, 4), ([4, 3, 6, 5], 12, 11, 7, 2), ([3, 7, 2], 9, 4, 128, 1),
])  # fmt: skip
def test_normal_wire_equals_its_three_roundings_in_loops(tokens, E, K, D, gpus):
    case = Case(tokens, E, K, D)
    (rows, y, dx, dweight), _ = case.on_ranks(gpus, NORMAL)
    factor = case.factor.astype(np.float32)
    seen, dy_seen = (np.array([fp8(row) for row in a]) for a in (case.x, case.dy))

    def output(t, k):
        return seen[t] * factor[case.idx[t, k]] * case.weight[t, k]

    def gradient(t, k):
        return dy_seen[t] * case.weight[t, k] * factor[case.idx[t, k]]

    np.testing.assert_array_equal(y, normal_in_loops(case, gpus, output))
    np.testing.assert_array_equal(dx, normal_in_loops(case, gpus, gradient))
    expected = [[dy_seen[t] @ (seen[t] * factor[e]) for e in case.idx[t]] for t in range(len(case.x))]
    np.testing.assert_allclose(dweight, expected, rtol=2e-5, atol=1e-4)  # dot products in another order of sums
    order = [t for e in range(E) for t in range(len(case.x)) if e in case.idx[t]]
    np.testing.assert_array_equal(rows, seen[order])


def test_low_latency_wire_sums_at_the_source_in_order_of_k():
    case = Case([5, 0, 3, 4], 8, 3, 140)
    (_, y, dx, _), _ = case.on_ranks(2, LOW_LATENCY)
    factor = case.factor.astype(np.float32)
    for t, experts in enumerate(case.idx):
        terms = [bf16(fp8(case.x[t]) * factor[e]) * case.weight[t, k] for k, e in enumerate(experts)]
        np.testing.assert_array_equal(y[t], sum(terms[1:], terms[0]))
        terms = [bf16(fp8(case.dy[t] * case.weight[t, k]) * factor[e]) for k, e in enumerate(experts)]
        np.testing.assert_array_equal(dx[t], sum(terms[1:], terms[0]))


@pytest.mark.parametrize("wire", [NORMAL, LOW_LATENCY])
def test_rounding_wires_stay_within_their_formats_errors(wire):
    """E4M3 has 3 fraction bits: about 2.6 % RMS of a normal row; BF16 adds 0.2 %."""
    case = Case([40, 30, 20, 50], 16, 4, 256)
    got, _ = case.on_ranks(2, wire)
    for name, ours, expected in zip(NAMES, got, case.local()):
        error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
        assert 0.002 < error < (0.05 if name == "dweight" else 0.03), (name, error)  # dweight has FP8 on both sides


def counted(wire, D, K=8, E=256, R=64, gpus=8, tokens=32, limit=8, method="noaux_tc"):
    """A ledger of one dispatch and combine at V3's gate with `limit` groups; and the routing."""
    scores = np.random.default_rng(1).random((R * tokens, E)).astype(np.float32)
    idx = select_experts(scores, None, top_k=K, n_group=8, topk_group=limit, method=method)
    case = Case([tokens] * R, E, K, D, idx=idx)
    _, comm = case.on_ranks(gpus, wire)
    return comm.ledger, idx


@pytest.mark.parametrize("limit, nodes, ranks", [(4, 3.954, 7.48), (8, 5.295, 7.68)])
def test_ledger_counts_a_row_for_each_node_and_each_rank(limit, nodes, ranks):
    """Exactly the distinct ones of this routing, counted the slow way; on average what is known of V3's gate."""
    ledger, idx = counted(NORMAL, 256, limit=limit)
    T, row = len(idx), 256 + 2 * 4
    source = np.arange(T) // 32
    remote = inside = 0
    for t in range(T):
        node_set = {e // 32 for e in idx[t].tolist()}
        remote += len(node_set - {source[t] // 8})
        for rank in {e // 4 for e in idx[t].tolist()}:
            forwarder = rank // 8 * 8 + source[t] % 8
            inside += rank != forwarder
    assert ledger.total_bytes("dispatch", "InfiniBand") == remote * row
    assert ledger.total_bytes("dispatch", "NVLink") == inside * row
    assert ledger.total_bytes("combine", "InfiniBand") == remote * 512
    assert ledger.total_bytes("combine", "NVLink") == inside * 512
    assert remote / T == pytest.approx(nodes * 7 / 8, rel=0.01)
    assert np.mean([len({e // 4 for e in row.tolist()}) for row in idx]) == pytest.approx(ranks, rel=0.01)


def test_unlimited_gate_meets_the_closed_form_within_sampling_error():
    """n (1 - C(E - E/n, k) / C(E, k)) distinct nodes: 5.295 for 8 nodes; an eighth of the rows stay at home."""
    from math import comb, sqrt

    ledger, idx = counted(EXACT, 3, limit=1, method="greedy")
    expected = 8 * (1 - comb(224, 8) / comb(256, 8))
    assert expected == pytest.approx(5.295, abs=5e-4)
    rows = ledger.total_bytes("dispatch", "InfiniBand") / 12
    assert rows / len(idx) == pytest.approx(expected * 7 / 8, abs=4 * 1.0 / sqrt(len(idx)))


@pytest.mark.parametrize("wire, dispatch_row, combine_row", [(NORMAL, 7392, 14336), (LOW_LATENCY, 7408, 14336)])
def test_rows_of_7168_take_the_published_bytes(wire, dispatch_row, combine_row):
    case = Case([1, 1], 2, 1, 7168, idx=np.array([[1], [0]]))
    _, comm = case.on_ranks(1, wire)
    assert comm.ledger.bytes_of_pair("dispatch")[0, 1] == dispatch_row
    assert comm.ledger.bytes_of_pair("combine")[1, 0] == combine_row


def test_low_latency_sends_a_message_for_each_token_and_expert():
    case = Case([5, 3, 4, 2], 8, 3, 6)
    _, comm = case.on_ranks(2, LOW_LATENCY)
    for operation in ("dispatch", "combine"):
        assert comm.ledger.total_messages(operation) == 14 * 3
    assert "dispatch routing" not in comm.ledger.operations  # the header says it


def test_exact_wire_counts_rows_as_closed_forms_say():
    """All tokens to the experts of rank 3: one row to its node, one forwarded, K rows back over both hops."""
    case = Case([6, 6, 6, 6], 8, 2, 5, idx=np.tile([6, 7], (24, 1)))
    _, comm = case.on_ranks(2, EXACT)
    ledger, row = comm.ledger, 5 * 4
    assert ledger.total_bytes("dispatch", "InfiniBand") == 12 * row  # of ranks 0 and 1
    assert ledger.total_bytes("dispatch", "NVLink") == 12 * row  # GPU 2 forwards what came to its slot: ranks 0 and 2
    assert ledger.total_bytes("combine", "InfiniBand") == 2 * 12 * row
    assert ledger.total_bytes("combine", "NVLink") == 2 * 12 * row


class DropsARow:
    """An engine that loses the last row of one rank's dispatch."""

    def __init__(self, engine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def all_to_all_v(self, send, operation, row_messages=False):
        if operation == "dispatch":
            rows, counts = send[1]
            counts = counts.copy()
            counts[np.flatnonzero(counts)[-1]] -= 1
            send = {**send, 1: type(send[1])(rows[:-1], counts)}
        return self._engine.all_to_all_v(send, operation, row_messages)


def test_a_lost_row_is_noticed_and_not_counted():
    case = Case([5, 7], 4, 2, 6)
    ledgers = []
    for wrap in (lambda engine: engine, DropsARow):
        comm = Ledgered(SimCommunicator(2, 2))
        ranks = Ranks(wrap(comm))
        dispatcher = AllToAllTokenDispatcher(ranks, 4)

        def program(rank, dispatcher=dispatcher):
            dispatcher.dispatch(Tensor(case.x[case.slices[rank]]), case.idx[case.slices[rank]], Tensor(case.weight))

        if wrap is DropsARow:
            with pytest.raises(RankError, match=r"rank 1 sent \d+ rows to rank \d in dispatch, where the routing has"):
                ranks.run(program)
        else:
            ranks.run(program)
        ledgers.append(comm.ledger)
    whole, short = (ledger.bytes_of_pair("dispatch")[1].sum() for ledger in ledgers)
    assert short < whole and (whole - short) % 24 == 0


def moe_pair(R, gpus, wire, **changes):
    """The same MoE layer alone and on ranks, float64, with gradient buffers."""
    cfg = odd_config(n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, **changes)
    ranks = Ranks(Ledgered(SimCommunicator(R, gpus)))
    dispatcher = AllToAllTokenDispatcher(ranks, 16, wire)
    layers = []
    for where in (None, dispatcher):
        layer = MoE(cfg, dispatcher=where)
        layer.init_weights(np.random.default_rng(3), np.float64, std=0.3)
        layers.append(layer)
    return *layers, ranks, dispatcher


@pytest.mark.parametrize("recompute", [False, True])
def test_moe_layer_on_ranks_gives_outputs_and_expert_gradients_of_the_local_one(recompute):
    R, D = 4, 14
    alone, spread, ranks, dispatcher = moe_pair(R, 2, EXACT)
    rng = np.random.default_rng(9)
    x, dy = rng.standard_normal((2, R, 5, D))
    y, _ = alone(Tensor(x, True))
    backward(Dot.apply(y, dy=dy))

    def program(rank):
        mine = dispatcher.experts_of(rank)
        buffer = GradientBuffer({p: np.zeros(p.shape) for p in spread.experts.held(mine)})
        others = [p for p in spread.parameters() if p not in (spread.experts.gate_up, spread.experts.down)]
        buffer |= {p: np.zeros(p.shape) for p in others}
        shard = Tensor(x[rank : rank + 1], True)
        if recompute:
            y = Checkpoint.apply(shard, run=lambda t: spread(t)[0])
        else:
            y, _ = spread(shard)
        backward(Dot.apply(y, dy=dy[rank : rank + 1]), into=buffer)
        return y.data, shard.grad, [buffer[p] for p in spread.experts.held(mine)]

    outputs, _, experts = zip(*ranks.run(program))
    np.testing.assert_allclose(np.concatenate(outputs), y.data, rtol=1e-12, atol=1e-12)
    for i, parameter in enumerate((alone.experts.gate_up, alone.experts.down)):
        np.testing.assert_allclose(np.concatenate([e[i] for e in experts]), parameter.grad, rtol=1e-11, atol=1e-11)


def test_outside_of_a_rank_the_local_dispatcher_serves():
    ranks = Ranks(SimCommunicator(2))
    case = Case([5], 4, 2, 6)
    dispatcher = AllToAllTokenDispatcher(ranks, 4, alone=LocalTokenDispatcher(4))
    for ours, expected in zip(case.program(dispatcher, slice(None), case.factor), case.local()):
        np.testing.assert_array_equal(ours, expected)
    with pytest.raises(ValueError, match="belong in a rank's program"):
        AllToAllTokenDispatcher(ranks, 4).dispatch(Tensor(case.x), case.idx, Tensor(case.weight))


def test_group_of_ranks_shares_experts_among_itself():
    """Two groups of two ranks, as two pipeline stages have them: each equals a local dispatcher over its tokens."""
    cases = [Case([5, 3], 6, 2, 4, seed=s) for s in range(2)]
    comm = Ledgered(SimCommunicator(4, 2))
    ranks = Ranks(comm)
    groups = [AllToAllTokenDispatcher(ranks, 6, comm=group) for group in comm.split([0, 0, 1, 1])]

    def program(rank):
        case = cases[rank // 2]
        return case.program(groups[rank // 2], case.slices[rank % 2], case.factor)

    results = ranks.run(program)
    for g, case in enumerate(cases):
        for ours, expected in zip(zip(*results[2 * g : 2 * g + 2]), case.local()):
            np.testing.assert_array_equal(np.concatenate(ours), expected)
    assert comm.ledger.total_bytes(link="InfiniBand") == 0


def test_experts_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="n_routed_experts=6 is not a multiple of ranks=4"):
        AllToAllTokenDispatcher(Ranks(SimCommunicator(4)), 6)


@pytest.mark.parametrize("bad", [-1, 4])
def test_expert_ids_outside_of_the_range_are_refused(bad):
    ranks = Ranks(SimCommunicator(2))
    dispatcher = AllToAllTokenDispatcher(ranks, 4)
    idx = np.array([[0, bad]])
    with pytest.raises(ValueError, match="exceeds 4 experts"):
        ranks.run(lambda rank: dispatcher.dispatch(Tensor(np.zeros((1, 3))), idx, Tensor(np.ones((1, 2)))))
