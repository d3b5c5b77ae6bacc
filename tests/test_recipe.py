"""Recipes: what is in the tables, and that models use it."""

import numpy as np
import pytest

from minidsv3.autograd import backward, trace
from minidsv3.config import PRECISIONS, ModelConfig, TrainConfig
from minidsv3.model.transformer import Transformer
from minidsv3.quant.gemm import BF16Gemm, FP8Gemm, FP8Store
from minidsv3.quant.recipe import GEMMS, LINEAR, RECIPES, ROWS, recipe_for

TOKENS = np.random.default_rng(0).integers(0, 257, (2, 17))


def model(precision, accumulate="fast"):
    m = Transformer(ModelConfig.preset("nano"), recipe_for(precision, accumulate))
    m.init_weights(np.random.default_rng(1))
    return m


def gradient(m):
    losses = m.loss(TOKENS[:, :-1], TOKENS[:, 1:])
    backward(losses.total)
    return float(losses.total), np.concatenate([p.grad.reshape(-1) for p in m.parameters()])


def test_config_knows_exactly_the_recipes():
    assert tuple(RECIPES) == PRECISIONS


@pytest.mark.parametrize("name", RECIPES)
def test_every_table_has_every_row(name):
    assert set(RECIPES[name]) == set(ROWS)
    for row in (*LINEAR, "lm_head", "gate"):
        assert RECIPES[name][row] in GEMMS


def test_model_asks_for_the_rows_of_the_table_only():
    """Each name that a model asks for is a row, and each row is asked for by some model."""
    asked = set()

    class Asking:
        def gemm(self, layer):
            asked.add(layer)

        def rounding(self, place):
            asked.add(place)

        def store(self, op):
            asked.add(op)

    for preset in ("nano", "deepseek-v2-lite"):
        Transformer(ModelConfig.preset(preset), Asking())
    assert asked | {"moments"} == set(ROWS)


def test_fp8_is_the_reports_table():
    recipe = recipe_for("fp8")
    assert all(isinstance(recipe.gemm(row), FP8Gemm) for row in LINEAR)
    assert isinstance(recipe.gemm("lm_head"), BF16Gemm) and recipe.gemm("gate") is None
    assert recipe.rounding("attention") is None and recipe.rounding("embed_tokens") is None
    assert isinstance(recipe.store("swiglu"), FP8Store) and recipe.moments_dtype == "bfloat16"
    x = np.ones((3, 128), dtype=np.float32)
    assert recipe.gemm("o_proj").keep(x).codes.dtype == np.uint16  # E5M6
    powers = np.log2(recipe.gemm("o_proj").keep(x * 0.3).scales)
    assert (powers == np.round(powers)).all()
    powers = np.log2(recipe.gemm("experts.gate_up").keep(x * 0.3).scales)
    assert (powers == np.round(powers)).all()


def test_plain_fp32_needs_no_recipe():
    assert recipe_for("fp32") is None


def test_fp32_with_a_changed_row_changes_only_that():
    m = model("fp32:lm_head=bf16")
    assert isinstance(m.lm_head._gemm, BF16Gemm)
    h = np.random.default_rng(2).standard_normal((1, 5, 64)).astype(np.float32)
    assert np.abs(m.head(h) - model("fp32").head(h)).max() > 0


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "fp32"])
def test_loss_and_gradient_are_near_those_of_float32(precision):
    loss, exact = gradient(model("fp32"))
    low_loss, low = gradient(model(precision))
    assert low_loss == pytest.approx(loss, rel=3e-3)
    cosine = float(low @ exact) / np.linalg.norm(low) / np.linalg.norm(exact)
    # one rounding of E4M3 is 3 %, of BF16 0.2 %; routing may flip for a token or two
    assert 1 - cosine < (1e-3 if precision == "bf16" else 0.05) and cosine < 1


@pytest.mark.parametrize(
    "precision, accumulate", [("bf16", "fast"), ("fp8", "fast"), ("fp8", "exact"), ("mxfp8", "fast")]
)
def test_the_same_weights_give_the_same_bits(precision, accumulate):
    first, second = (gradient(model(precision, accumulate)) for _ in range(2))
    assert first[0] == second[0] and first[1].tobytes() == second[1].tobytes()


def test_fp8_gradient_with_recomputation_has_the_same_bits():
    m, again = model("fp8"), model("fp8")
    _, plain = gradient(m)
    losses = again.loss(TOKENS[:, :-1], TOKENS[:, 1:], recompute=True)
    backward(losses.total)
    assert np.concatenate([p.grad.reshape(-1) for p in again.parameters()]).tobytes() == plain.tobytes()


@pytest.mark.parametrize("row", ["lm_head", "gate", "embed_tokens", "attention", "o_proj", "swiglu"])
def test_changing_a_row_changes_the_gradient(row):
    other = "fp32" if row == "swiglu" else "fp8"
    assert gradient(model(f"fp8:{row}={other}"))[1].tobytes() != gradient(model("fp8"))[1].tobytes()


def test_saved_bytes_of_the_linear_layers_shrink():
    """w: 4 bytes in float32, a little over 1 in FP8; x where no norm made it: E5M6 in 2 behind the attention."""
    saved = {}
    for precision in ("fp32", "fp8"):
        with trace() as records:
            model(precision).loss(TOKENS[:, :-1], TOKENS[:, 1:])
        saved[precision] = {r.scope: r.saved_bytes for r in records if r.name == "LinearFunction"}
    a, b = (saved[p]["model.layers.1.self_attn.q_a_proj"] for p in ("fp32", "fp8"))
    assert a == 4 * 32 * 64 and b == 32 * 64 + 4
    cfg, D = ModelConfig.preset("nano"), 64
    width = cfg.num_attention_heads * cfg.v_head_dim
    a, b = (saved[p]["model.layers.1.self_attn.o_proj"] for p in ("fp32", "fp8"))  # attention made this x
    assert a == 4 * (32 * width + width * D) and b == (2 * 32 * width + 4 * 32) + (width * D + 4)


@pytest.mark.parametrize("precision, accumulate, message", [
    ("fp9", "fast", "precision='fp9' is not one of fp32, bf16"), ("fp8", "slow", "accumulate='slow'"),
    ("bf16", "exact", "which precision='bf16' does not use"), ("mxfp8", "exact", "does not use"),
    ("fp8:head=fp8", "fast", "'head' is not one of the rows"),
    ("fp8:lm_head=fp7", "fast", "lm_head='fp7' is not one of"),
    ("fp8:attention=bf16", "fast", "attention='bf16' is not one of fp32, fp8"),
    ("fp8:moments=fp8", "fast", "moments='fp8' is not one of fp32, bf16"),
])  # fmt: skip
def test_recipe_for_refuses(precision, accumulate, message):
    with pytest.raises(ValueError, match=message):
        recipe_for(precision, accumulate)


@pytest.mark.parametrize("setting", [dict(precision="fp9"), dict(accumulate="slow")])
def test_config_refuses(setting):
    with pytest.raises(ValueError, match="is not one of"):
        TrainConfig(**setting)
