"""The clock: published step within its bounds, and every change moves it by what the composition implies."""

import dataclasses
import math

import pytest

from minidsv3.config import ModelConfig
from minidsv3.hardware.chunks import OVERLAPPED, Clock, Op, Setup, in_streams, spread
from minidsv3.hardware.clock import constants, optimizer_seconds, step
from minidsv3.hardware.kernels import PARTS, shape_of
from minidsv3.hardware.messages import Traffic
from minidsv3.parallel.schedules import build
from minidsv3.parallel.timeline import timeline

V3 = shape_of(ModelConfig.preset("deepseek-v3"))
SETUP = Setup(V3)
INFINITE = dataclasses.replace(SETUP, links=SETUP.links.faster(math.inf, math.inf), hop_latency_seconds=0.0)


def predict(setup, name="dualpipe"):
    return step(setup, build(name, setup.pipeline_ranks, 120), timeline)


def test_step_and_its_overlapped_part_are_near_table_4():
    """Insights into DeepSeek-V3, Table 4: 19.926 s within 10 %, 13.95 s within 8 %; nothing is fitted on them."""
    result = predict(SETUP)
    assert result.seconds == pytest.approx(19.926, rel=0.10)
    assert result.parts["1F1B"] == pytest.approx(13.95, rel=0.08)


def test_pair_of_chunks_is_near_the_profile():
    """129.0 ms for four layers; kernel rates are from the same profile, the length of the pair is not used."""
    assert Clock(SETUP).duration("FB", 1, 2) == pytest.approx(0.129, rel=0.05)


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_parts_add_up_to_the_step(name):
    result = predict(SETUP, name)
    assert sum(result.parts.values()) == pytest.approx(result.seconds)
    assert (result.parts["1F1B"] > 0) == name.startswith("dualpipe")


def test_halving_infiniband_doubles_the_messages_and_bounds_the_pair():
    slow = dataclasses.replace(SETUP, links=SETUP.links.faster(infiniband=0.5))
    before, after = Clock(SETUP), Clock(slow)
    for kind in OVERLAPPED:
        assert after.message(kind, True) == pytest.approx(2 * before.message(kind, True))
    messages = 4 * (before.message("dispatch", True) + before.message("combine", True))
    assert after.duration("F", 1) - before.duration("F", 1) == pytest.approx(messages)
    busy = 4 * sum(after.message(kind, False) for kind in ("dispatch", "combine", "cached dispatch", "combine"))
    assert busy < after.duration("FB", 1, 2) < 1.1 * busy  # now the network is what a pair takes
    assert predict(slow).seconds > 1.1 * predict(SETUP).seconds


def test_infinite_network_leaves_the_computation():
    clock = Clock(INFINITE)
    compute = {k: 4 * sum(clock.part(p, True) for p in PARTS if p.endswith(k)) for k in "FBW"}
    assert clock.duration("F", 1) == pytest.approx(compute["F"])
    assert clock.duration("Bi", 1) == pytest.approx(compute["B"])
    assert clock.duration("FB", 1, 2) == pytest.approx(sum(compute.values()))
    assert clock.hop == 0
    assert compute == pytest.approx(
        {k: 4 * sum(Clock(SETUP).part(p, True) for p in PARTS if p.endswith(k)) for k in "FBW"}
    )


def test_doubling_the_gemm_rate_halves_the_gemms_and_nothing_else():
    eff = SETUP.efficiencies
    fast = dataclasses.replace(SETUP, efficiencies=dataclasses.replace(eff, fp8_gemm=2 * eff.fp8_gemm))
    saved = Clock(SETUP).part("mlp W", True) - Clock(fast).part("mlp W", True)
    rate = eff.fp8_gemm * 1979e12 * 112 / 132
    assert saved == pytest.approx(2 * 4096 * 9 * 44_040_192 / rate / 2)
    assert Clock(fast).message("combine", True) == Clock(SETUP).message("combine", True)
    assert predict(fast).seconds < 0.85 * predict(SETUP).seconds


def test_eight_nodes_a_token_lengthen_messages_by_their_number():
    wide = dataclasses.replace(SETUP, traffic=Traffic(5.295, 7.676))
    assert Clock(wide).message("combine", True) == pytest.approx(5.295 / 3.96 * Clock(SETUP).message("combine", True))
    assert predict(wide).seconds > predict(SETUP).seconds


def test_without_overlap_a_pair_is_its_two_halves():
    apart = Clock(dataclasses.replace(SETUP, overlap=False))
    assert apart.duration("FB", 1, 2) == apart.duration("F", 1) + apart.duration("B", 2)
    assert apart.duration("FB", 1, 2) > 1.2 * Clock(SETUP).duration("FB", 1, 2)


def test_bf16_moves_twice_the_bytes_of_a_dispatch_and_as_many_of_a_combine():
    plain = dataclasses.replace(SETUP, fp8=False)
    assert Clock(plain).message("dispatch", True) == pytest.approx(
        14336 / 7392 * Clock(SETUP).message("dispatch", True)
    )
    assert Clock(plain).message("combine", True) == Clock(SETUP).message("combine", True)


def test_layers_of_v3_are_spread_as_said():
    stages = Clock(SETUP).stages
    assert [len(s.layers) for s in stages] == [4] * 15 + [2]  # the last: one layer and the MTP module
    assert stages[0].layers == (False, False, False, True)
    assert [s.heads for s in stages] == [0] * 15 + [2]


@pytest.mark.parametrize("stages", [1, 2, 7, 16, 32, 61])
def test_spread_keeps_every_layer_and_balances(stages):
    cut = spread(V3, stages, head=1.3)
    assert sum(len(s.layers) for s in cut) == 61 + 1
    assert all(s.layers for s in cut)
    sizes = [len(s.layers) for s in cut[:-1]]
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert [kind for s in cut for kind in s.layers] == [False] * 3 + [True] * 59


def test_spread_refuses_more_stages_than_layers():
    with pytest.raises(ValueError, match="61 layers"):
        spread(V3, 63, head=1.3)


def test_streams_keep_order_and_wait():
    placed = {p.op.name: (p.start, p.end) for p in in_streams([
        Op("a", "compute", 3), Op("m", "communication", 2, ("a",)), Op("b", "compute", 1),
        Op("c", "compute", 4, ("m",)), Op("n", "communication", 1, ("nobody",)),
    ])}  # fmt: skip
    assert placed == {"a": (0, 3), "m": (3, 5), "b": (3, 4), "c": (5, 9), "n": (5, 6)}


def test_pair_never_beats_its_busier_stream_and_holds_every_op():
    clock = Clock(SETUP)
    placed = clock.pair(1, 2)
    busy = {s: sum(p.op.seconds for p in placed if p.op.stream == s) for s in ("compute", "communication")}
    end = max(p.end for p in placed)
    assert max(busy.values()) <= end <= sum(busy.values())
    assert len(placed) == 4 * 10
    assert busy["compute"] == pytest.approx(4 * sum(clock.part(p, True) for p in PARTS))
    at = {p.op.name: p for p in placed}
    for layer in range(4):
        assert at[f"mlp F{layer}"].start >= at[f"dispatch F{layer}"].end >= at[f"attention F{layer}"].end
        assert at[f"attention B{layer}"].start >= at[f"dispatch B{layer}"].end >= at[f"mlp B{layer}"].end


def test_dense_layers_send_nothing():
    names = [op.name for op in Clock(SETUP).forward(0)]
    assert names.count("dispatch") == names.count("combine") == 1  # stage 0: three dense layers, one with experts


def test_hop_carries_the_activations_of_a_chunk():
    expected = SETUP.hop_latency_seconds + 2 * 7168 * 4096 / SETUP.links.infiniband_bytes_per_second
    assert Clock(SETUP).hop == pytest.approx(expected)


def test_optimizer_moves_less_when_links_are_faster_and_twice_with_two_copies():
    clock = Clock(SETUP)
    assert 1.5 < optimizer_seconds(clock, 2, 2) / optimizer_seconds(clock, 1, 1) < 3  # more copies to sum over
    assert optimizer_seconds(Clock(INFINITE), 2, 2) < 0.05 * optimizer_seconds(clock, 2, 2)


def test_constants_name_their_source():
    named = {name: source for name, _, _, source in constants()}
    assert len(named) == 12
    assert all("Table 4" not in source and len(source) > 20 for source in named.values())


@pytest.mark.parametrize("changes, rule", [
    ({"gpus": 2000}, "gpus=2000"), ({"expert_ranks": 48, "gpus": 768}, "256"),
    ({"expert_ranks": 144, "gpus": 2304, "redundant_experts": 31}, "redundant"),
])  # fmt: skip
def test_layouts_that_do_not_divide_are_refused(changes, rule):
    with pytest.raises(ValueError, match=rule):
        dataclasses.replace(SETUP, **changes)


def test_schedule_of_other_ranks_is_refused():
    with pytest.raises(ValueError, match="8 ranks"):
        step(SETUP, build("dualpipe", 8, 120), timeline)
