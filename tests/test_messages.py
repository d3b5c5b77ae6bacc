"""Dispatch and combine against DeepEP's published tables, traffic against loops, ledgers of the real runtime."""

import json

import numpy as np
import pytest

from minidsv3.accounting.predictions import deepep_measurements
from minidsv3.autograd import Tensor
from minidsv3.config import ModelConfig, data_file
from minidsv3.hardware.messages import (
    LIMITED_TO_FOUR,
    Links,
    Measurement,
    Traffic,
    distinct_groups,
    fit,
    ledger_seconds,
    logical_bandwidth,
    low_latency_seconds,
    normal_seconds,
    read_measurements,
    row_bytes,
    straggler_seconds,
    traffic_of,
    uniform_traffic,
)
from minidsv3.hardware.specs import quantity
from minidsv3.ops.routing import select_experts
from minidsv3.parallel.comm import SimCommunicator
from minidsv3.parallel.dispatcher import AllToAllTokenDispatcher
from minidsv3.parallel.ledger import Ledgered, LedgerRow
from minidsv3.parallel.ranks import Ranks


@pytest.mark.parametrize("m", deepep_measurements(), ids=lambda m: f"{m.kernel}-{m.ranks}-{m.operation}")
def test_deepep_tables_are_met(m):
    """Normal kernels within 3 % (EP16 to 64), low-latency ones within 8 %."""
    assert m.predicted(Links()) == pytest.approx(m.value, rel=0.03 if m.kernel == "normal" else 0.08)


def test_default_links_are_the_fit_to_the_published_table():
    assert len(deepep_measurements()) == 18
    found, links = fit(deepep_measurements()), Links()
    for name in ("infiniband_bytes_per_second", "nvlink_bytes_per_second", "low_latency_seconds"):
        assert getattr(links, name) == pytest.approx(getattr(found, name), rel=2e-3)


def test_fit_finds_the_constants_that_made_the_data_from_far_away():
    true = Links(27e9, 210e9, 11e-6)
    made = [m._replace(value=m.predicted(true)) for m in deepep_measurements()]
    found = fit(made, Links(60e9, 80e9, 50e-6))
    assert found.infiniband_bytes_per_second == pytest.approx(27e9, rel=1e-3)
    assert found.nvlink_bytes_per_second == pytest.approx(210e9, rel=1e-3)
    assert found.low_latency_seconds == pytest.approx(11e-6, rel=1e-3)


def test_fit_wants_both_kernels():
    with pytest.raises(ValueError, match="normal and low-latency"):
        fit([m for m in deepep_measurements() if m.kernel == "normal"])


def test_row_bytes_are_those_of_the_benchmark():
    assert (row_bytes(7168, True), row_bytes(7168, False)) == (7392, 14336)


@pytest.mark.parametrize(
    "groups, expected", [(2, 1.993), (4, 3.614), (8, 5.295), (16, 6.523), (64, 7.676), (128, 7.890)]
)
def test_distinct_groups_closed_form(groups, expected):
    """256 experts, 8 chosen; values of another program."""
    assert distinct_groups(groups, 256, 8) == pytest.approx(expected, abs=5e-4)


def test_distinct_groups_refuses_uneven_groups():
    with pytest.raises(ValueError, match="groups=3"):
        distinct_groups(3, 256, 8)


def traffic_by_loop(topk_idx, experts, ranks, gpus_per_node):
    nodes, places, load = [], [], [0] * ranks
    for token in topk_idx.reshape(-1, topk_idx.shape[-1]).tolist():
        held = [e // (experts // ranks) for e in token if e >= 0]
        places.append(len(set(held)))
        nodes.append(len({r // gpus_per_node for r in held}))
        for r in held:
            load[r] += 1
    return sum(nodes) / len(nodes), sum(places) / len(places), max(load) * ranks / sum(load)


def test_traffic_of_a_trace_equals_a_loop():
    rng = np.random.default_rng(4)
    topk_idx = np.stack([rng.permutation(24)[:5] for _ in range(60)]).reshape(3, 20, 5)
    topk_idx[0, 3, 2:] = -1
    empty = np.concatenate([topk_idx, np.full((1, 20, 5), -1)])  # places without a token change nothing
    assert traffic_of(empty.astype(np.int16), 24, 12, 3) == traffic_of(topk_idx, 24, 12, 3)
    assert tuple(traffic_of(topk_idx, 24, 12, 3)) == pytest.approx(traffic_by_loop(topk_idx, 24, 12, 3))
    with pytest.raises(ValueError, match="ranks=7"):
        traffic_of(topk_idx, 24, 7, 3)
    with pytest.raises(ValueError, match="exceeds"):
        traffic_of(topk_idx + 1, 24, 12, 3)


def test_traffic_of_v3s_gate_on_even_scores():
    """Four nodes of eight: 3.96 nodes and 7.48 ranks of 64; without the limit the closed form."""
    cfg, rng = ModelConfig.preset("deepseek-v3"), np.random.default_rng(9)
    scores = rng.random((6000, 256), dtype=np.float32)
    found = []
    for limit in (4, 8):
        chosen = select_experts(scores, np.zeros(256, dtype=np.float32), top_k=8, n_group=8, topk_group=limit,
                                method=cfg.topk_method)  # fmt: skip
        found.append(traffic_of(chosen, 256, 64, 8))
    assert found[0][:2] == pytest.approx(LIMITED_TO_FOUR[:2], abs=0.02)
    assert found[1][:2] == pytest.approx(uniform_traffic(64, 8, 256, 8)[:2], abs=0.05)


def test_normal_kernels_wait_for_the_slower_link():
    links = Links(40e9, 100e9, 1e-6)
    assert normal_seconds(10, 1000, Traffic(4, 7), 64, links) == pytest.approx(10 * 4 * 7 / 8 * 1000 / 40e9)
    assert normal_seconds(10, 1000, Traffic(1, 7), 64, links) == pytest.approx(10 * 7 * 1000 / 100e9)
    assert normal_seconds(10, 1000, Traffic(1, 5), 8, links) == pytest.approx(10 * 5 * 1000 / 100e9)  # one node
    assert normal_seconds(10, 1000, Traffic(4, 7, 1.5), 64, links) == 1.5 * normal_seconds(
        10, 1000, Traffic(4, 7), 64, links
    )


def test_low_latency_kernels_send_every_copy():
    links = Links(40e9, 100e9, 3e-6)
    assert low_latency_seconds(10, 500, 6, 32, links) == pytest.approx(3e-6 + 10 * 6 * 500 * 3 / 4 / 40e9)
    assert low_latency_seconds(10, 500, 6, 8, links) == pytest.approx(3e-6 + 10 * 6 * 500 * 7 / 8 / 100e9)


def test_logical_bandwidth_exceeds_the_wire():
    """58 GB/s over a 50 GB/s card: the own node's tokens are counted."""
    m = Measurement("normal", "dispatch", 32, 0)
    assert m.predicted(Links()) == pytest.approx(Links().infiniband_bytes_per_second * 4 / 3)
    assert logical_bandwidth(10, 100, Traffic(3, 5), 2.0) == 1500


def test_faster_links_may_be_infinite():
    links = Links().faster(float("inf"), float("inf"))
    assert normal_seconds(4096, 7392, LIMITED_TO_FOUR, 64, links) == 0


def test_ledger_seconds_wait_for_the_busiest_rank_and_the_latest():
    rows = [
        LedgerRow("dispatch", 0, 2, "InfiniBand", 1, 400), LedgerRow("dispatch", 1, 2, "InfiniBand", 1, 300),
        LedgerRow("dispatch", 0, 1, "NVLink", 1, 2000), LedgerRow("dispatch", 0, 0, "local", 1, 10**9),
        LedgerRow("combine", 2, 0, "InfiniBand", 1, 100), LedgerRow("combine", 3, 3, "local", 0, 0, 7.0),
    ]  # fmt: skip
    seconds = ledger_seconds(rows, Links(100.0, 1000.0))
    assert seconds == {"dispatch": 700 / 100, "combine": 100 / 100 + 7.0}
    assert straggler_seconds(rows) == 7.0


def test_ledger_of_the_runtime_takes_the_time_of_the_model():
    """16 ranks on 2 nodes dispatch for real; bytes of the busiest rank against the closed form with what was routed."""
    R, T, E, K, D = 16, 96, 64, 6, 40
    rng = np.random.default_rng(2)
    chosen = [np.sort(np.stack([rng.permutation(E)[:K] for _ in range(T)])) for _ in range(R)]
    ranks = Ranks(Ledgered(SimCommunicator(R, 8)))
    dispatcher = AllToAllTokenDispatcher(ranks, E)

    def program(rank):
        x = Tensor(np.ones((T, D), dtype=np.float32))
        return dispatcher.dispatch(x, chosen[rank], Tensor(np.ones((T, K), dtype=np.float32)))

    ranks.run(program)
    links = Links(40e9, 1e15)
    traffic = traffic_of(np.stack(chosen), E, R, 8)._replace(busiest=1.0)
    expected = normal_seconds(T, 4 * D, traffic, R, links)
    found = ledger_seconds(ranks.comm.ledger.rows(), links)["dispatch"]
    assert expected <= found < 1.15 * expected  # the busiest of 16 ranks, a little above the mean


@pytest.mark.parametrize("entry, named", [
    ({"kernel": "fast"}, "operation"),
    ({"kernel": "fast", "operation": "dispatch", "ranks": 8, "value": "1 us"}, "fast"),
    ({"kernel": "normal", "operation": "dispatch", "ranks": 8, "value": "1 us"}, "unit"),
    ({"kernel": "normal", "operation": "dispatch", "ranks": 1, "value": "1 GB/s"}, "2 ranks"), (7, "measurement 0"),
])  # fmt: skip
def test_measurements_with_a_mistake_are_refused(entry, named):
    with pytest.raises(ValueError, match=named):
        read_measurements([entry], quantity)


def test_published_file_holds_the_readme_table():
    content = json.loads(data_file("published/deepep_kernels.json").read_text(encoding="utf-8"))
    found = read_measurements(content["measurements"], quantity)
    assert Measurement("low-latency", "combine", 64, pytest.approx(314e-6)) in found
    assert Measurement("normal", "dispatch", 32, 58e9) in found
