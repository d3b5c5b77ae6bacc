"""FLOPs: the published figures, and the tape of a model that really runs."""

import dataclasses

import numpy as np
import pytest
from small_runs import batch, model_config, new_model

from minidsv3 import LatentCache, ModelConfig
from minidsv3.accounting import flops
from minidsv3.autograd import backward, trace

V3 = ModelConfig.preset("deepseek-v3")
STEP_TOKENS = 15360 * 4096


@pytest.mark.parametrize(
    ("attention", "gflop", "tflops", "mfu"), [("causal", 249.81, 385, 38.94), ("full", 280.51, 432, 43.73)]
)
def test_v3_training_is_the_published_efficiency(attention, gflop, tflops, mfu):
    per_token = flops.training_flops_per_token(V3, 4096, attention)
    done = flops.achieved_flops(per_token, STEP_TOKENS, 19.926, 2048)
    assert round(per_token / 1e9, 2) == gflop
    assert (round(done / 1e12), round(100 * done / 989e12, 2)) == (tflops, mfu)


def test_v3_multi_rail_column_too():
    per_token = [flops.training_flops_per_token(V3, 4096, attention) for attention in ("causal", "full")]
    done = [flops.achieved_flops(n, STEP_TOKENS, 19.946, 2048) for n in per_token]
    assert [round(n / 1e12) for n in done] == [385, 432]
    assert [round(100 * n / 989e12, 2) for n in done] == [38.90, 43.68]


def test_counted_parameters_leave_out_gates_and_norms():
    norms, gates = (2 * 61 + 1) * 7168 + 61 * (1536 + 512), 58 * 256 * 7168
    attention = 3 * 61 * 2 * 128 * 320 * 2048
    assert flops.training_flops_per_token(V3, 4096) == 6 * (36_625_603_584 - norms - gates) + attention


@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": None}, {"num_nextn_predict_layers": 2}, {"n_shared_experts": 2, "num_nextn_predict_layers": 0},
     {"first_k_dense_replace": 2, "num_nextn_predict_layers": 0}, {"tie_word_embeddings": True}],
)  # fmt: skip
def test_formula_equals_the_tape(changes):
    cfg, (B, S) = model_config(**changes), (2, 69)  # more than a block of queries
    tokens, targets = batch(B, S)
    with trace() as records:
        backward(new_model(cfg).loss(tokens, targets).total)
    ran = {phase: sum(r.flops for r in records if r.phase == phase) for phase in ("forward", "backward")}
    expected = B * sum(flops.forward_flops(cfg, S, "exact").values())
    assert (ran["forward"], ran["backward"]) == (expected, 2 * expected)


def test_parts_are_where_the_tape_has_them():
    cfg, (B, S) = model_config(), (3, 70)
    tokens, targets = batch(B, S)
    with trace() as records:
        new_model(cfg).loss(tokens, targets)
    ran = dict.fromkeys(flops.forward_flops(cfg, S), 0)
    heads = 0
    for r in records:
        if r.scope == "lm_head":  # first for the main model, then for the MTP module
            part, heads = ("mtp" if heads else "lm_head"), heads + (r.flops > 0)
        elif ".layers.2" in r.scope:
            part = "mtp"
        elif r.name == "AttentionFunction":
            part = "attention"
        else:
            places = {"self_attn": "projections", "mlp.gate": "gate", "mlp.experts": "routed_experts",
                      "mlp.shared_experts": "shared_experts", "layers.0.mlp": "dense_ffn"}  # fmt: skip
            part = next((p for place, p in places.items() if place in r.scope), None)
        if r.flops:
            ran[part] += r.flops
    assert ran == {part: B * n for part, n in flops.forward_flops(cfg, S, "exact").items()}


def test_conventions_of_attention_are_in_order():
    S = 128
    parts = {name: flops.forward_flops(V3, S, name)["attention"] for name in flops.ATTENTION}
    assert parts["full"] == 2 * parts["causal"]
    assert parts["exact"] / parts["causal"] == pytest.approx((S + 1) / S)


def test_decoding_equals_the_tape_but_for_the_absorbed_attention():
    cfg, context = model_config(num_nextn_predict_layers=0), 9
    model, cache = new_model(cfg), LatentCache(cfg, 1, np.float32)
    prompt = np.arange(context - 1, dtype=np.int64)[None]
    model.decode(prompt, cache)
    cache.extend(context - 1)
    with trace() as records:
        h = model.decode(np.array([[5]]), cache)
        model.lm_head(h)
    expected = flops.decode_flops(cfg, context)
    assert sum(r.flops for r in records) == sum(n for part, n in expected.items() if part != "attention")


def test_decoding_attention_is_absorbed():
    H, r, d_r, up, context = 128, 512, 64, 256, 5000
    by_hand = 61 * (2 * H * up * r + 2 * context * H * (2 * r + d_r))
    assert flops.decode_flops(V3, context)["attention"] == by_hand


def test_a_context_beyond_the_positions_is_refused():
    cfg = dataclasses.replace(V3, max_position_embeddings=100)
    for context in (0, 101):
        with pytest.raises(ValueError, match=f"context of {context} tokens"):
            flops.forward_flops(cfg, context)


def test_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="attention='half' is not one of 'full', 'causal', 'exact'"):
        flops.forward_flops(V3, 10, "half")


@pytest.mark.parametrize(("seconds", "gpus"), [(0.0, 1), (-1.0, 1), (1.0, 0)])
def test_impossible_step_is_refused(seconds, gpus):
    with pytest.raises(ValueError, match="must be positive"):
        flops.achieved_flops(1, 1, seconds, gpus)


def test_curves_are_the_totals_of_each_context():
    curves = flops.flops_of_contexts(V3, [100, 4096])
    for n, context in enumerate((100, 4096)):
        forward = curves["matrices"][n] + curves["attention"][n]
        assert forward == pytest.approx(flops.forward_flops_per_token(V3, context), rel=1e-12)
        decoded = flops.decode_flops(V3, context)
        assert curves["decode"][n] == sum(decoded[part] for part in flops.COUNTED)
