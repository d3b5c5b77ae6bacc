"""Work of a layer against parameter counts and accounting, times against the roofline written out."""

import dataclasses

import pytest

from minidsv3.accounting.flops import training_flops_per_token
from minidsv3.config import ModelConfig
from minidsv3.hardware.kernels import (
    FITTED_ON,
    PARTS,
    Efficiencies,
    Gemm,
    attention_gemms,
    gemm_seconds,
    layer_work,
    mlp_gemms,
    seconds,
    shape_of,
)
from minidsv3.hardware.specs import H800

CONFIG = ModelConfig.preset("deepseek-v3")
V3 = shape_of(CONFIG)
T = 4096
MLA, EXPERT, DENSE = 187_105_280, 44_040_192, 396_361_728  # weights of the matrices, from the checkpoint


def flops(work):
    return sum(g.flops for g in work.gemms)


def test_gemms_of_a_layer_are_its_weights():
    routed, dense = layer_work(V3, T, True, 4), layer_work(V3, T, False, 4)
    for kind in "FBW":
        assert flops(routed[f"attention {kind}"]) == 2 * T * MLA
        assert flops(routed[f"mlp {kind}"]) == 2 * T * 9 * EXPERT
        assert flops(dense[f"mlp {kind}"]) == 2 * T * DENSE


def test_all_layers_and_the_head_make_the_flops_of_the_paper():
    """Forward and backward of 61 layers, causal attention three times forward: 249.8 GFLOP a token."""
    routed, dense = layer_work(V3, T, True, 4), layer_work(V3, T, False, 4)
    total = sum(3 * flops(dense[p]) + 58 * flops(routed[p]) for p in PARTS)
    total += 3 * 61 * routed["attention F"].attention_flops
    total += 3 * 2 * T * V3.hidden_size * V3.vocab_size
    assert total / T == pytest.approx(training_flops_per_token(CONFIG, T, "causal"), rel=1e-12)


def test_backward_attention_is_five_products_for_two():
    work = layer_work(V3, 512, True, 4)
    assert work["attention F"].attention_flops == 2 * 128 * (192 + 128) * 512 * 512 / 2
    assert work["attention B"].attention_flops == 2.5 * work["attention F"].attention_flops
    assert work["attention W"].attention_flops == work["mlp F"].attention_flops == 0


def test_efficiencies_are_the_published_kernel_rates():
    """Four layers, forward and backward: 75.6 ms of FP8 gemms; 8 ms a layer pair of memory-bound kernels; 556, 455."""
    eff, share, work = Efficiencies(), 112 / 132, layer_work(V3, T, True, 4)
    rate = eff.fp8_gemm * H800.fp8_flops_per_second * share
    assert 4 * sum(flops(w) for w in work.values()) / rate == pytest.approx(75.6e-3, rel=0.002)
    through = sum(w.bytes for w in work.values()) / (eff.memory * H800.memory_bytes_per_second)
    assert through == pytest.approx(8e-3, rel=0.005)
    bf16 = H800.bf16_flops_per_second * share
    assert (eff.attention_forward * bf16, eff.attention_backward * bf16) == pytest.approx((556e12, 455e12))


def test_every_efficiency_says_what_it_was_fitted_on():
    assert {f.name for f in dataclasses.fields(Efficiencies)} == FITTED_ON.keys()


def test_gemm_is_the_slower_of_computing_and_moving():
    eff = dataclasses.replace(Efficiencies(), fp8_gemm=0.5, memory=0.25)
    few, many = Gemm(3, 700, 500), Gemm(30_000, 7000, 5000)
    moved = 700 * 500 + 3 * 700 + 2 * 3 * 500
    assert gemm_seconds(few, H800, eff) == pytest.approx(moved / (0.25 * 3.35e12))
    assert gemm_seconds(many, H800, eff, 0.8) == pytest.approx(2 * 30_000 * 7000 * 5000 / (0.5 * 1979e12 * 0.8))


def test_weights_of_several_experts_are_read_once_each():
    assert Gemm(6, 10, 20, 5).bytes(1) == 5 * 200 + 60 + 240
    up, down = mlp_gemms(V3, 1, True, 8, 2)[2:]
    assert (up.weights, up.rows, up.outer, down.inner) == (2, 8, 4096, 2048)


def test_sms_matter_to_arithmetic_and_not_to_memory():
    work = layer_work(V3, T, True, 4)["mlp F"]
    whole, half = (seconds(work, H800, Efficiencies(), share) for share in (1.0, 0.5))
    arithmetic = flops(work) / (Efficiencies().fp8_gemm * H800.fp8_flops_per_second)
    assert half - whole == pytest.approx(arithmetic)


def test_bf16_gemms_take_longer_and_a_busy_rank_too():
    even = layer_work(V3, T, True, 4)["mlp F"]
    busy = layer_work(V3, T, True, 4, busiest=1.5)["mlp F"]
    assert flops(busy) - flops(even) == 0.5 * 2 * T * 8 * EXPERT
    assert seconds(even, H800, Efficiencies(), fp8=False) > 1.2 * seconds(even, H800, Efficiencies())


def test_shape_without_query_compression_has_one_query_projection():
    plain = shape_of(dataclasses.replace(CONFIG, q_lora_rank=None))
    queries, *others = attention_gemms(plain, 1)
    assert (queries.inner, queries.outer, len(others)) == (7168, 128 * 192, 3)
