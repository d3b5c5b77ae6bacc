"""Multi-head latent attention: what the latent is, what position is made of, and what a cache has to keep."""

import numpy as np
import pytest
from reference_model import YARN, Reference, odd_model

from minidsv3.autograd import Tensor, no_grad
from minidsv3.model.record import record
from minidsv3.ops.rope import rotation_table

X = np.random.default_rng(41).standard_normal((2, 7, 14))
VARIANTS = {
    "V3": {},
    "no query latent": dict(q_lora_rank=None),
    "YaRN": dict(rope_scaling=YARN),
    "halves": dict(rope_interleave=False),
}


def mla_of(**changes):
    model = odd_model(**changes)
    return model, model.layers[0].self_attn, model.rotation(0, X.shape[1])


def attend(mla, x, rotation):
    with no_grad():
        return mla(Tensor(x), rotation).data


@pytest.mark.parametrize("changes", [{}, dict(q_lora_rank=None)], ids=["V3", "no query latent"])
def test_mla_equals_the_equations_in_loops(changes):
    model, mla, rotation = mla_of(**changes)
    reference = Reference(model)
    expected = [reference.attend("model.layers.0.self_attn", list(row)) for row in X]
    np.testing.assert_allclose(attend(mla, X, rotation), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_explained_weights_and_values_give_the_fused_output(changes):
    """softmax(content + position) times the values, through o_proj, is what the model computes."""
    model, mla, rotation = mla_of(**changes)
    scores, cfg = mla.explain(X, rotation), model.config
    kv = (scores.latent @ mla.kv_b_proj.weight.data.T).reshape(2, 7, 3, -1)
    o = np.einsum("bhij,bjhd->bihd", scores.weights, kv[..., cfg.qk_nope_head_dim :])
    y = o.reshape(2, 7, -1) @ mla.o_proj.weight.data.T
    np.testing.assert_allclose(y, attend(mla, X, rotation), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_explained_total_is_content_plus_position_and_causal(changes):
    _, mla, rotation = mla_of(**changes)
    scores, seen = mla.explain(X, rotation), np.tri(7, dtype=bool)
    np.testing.assert_array_equal(scores.total[..., seen], (scores.content + scores.position)[..., seen])
    assert np.isneginf(scores.total[..., ~seen]).all()


def test_explained_weights_sum_to_one_and_see_no_future():
    _, mla, rotation = mla_of()
    weights = mla.explain(X, rotation).weights
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-14)
    assert not weights[..., ~np.tri(7, dtype=bool)].any()


def test_explained_latent_and_key_are_all_that_a_cache_keeps():
    """Pitfalls 12 and 13: r_kv + d_r numbers a token and layer, not keys and values of every head."""
    model, mla, rotation = mla_of()
    scores = mla.explain(X, rotation)
    kept = scores.latent.shape[-1] + scores.k_rope.shape[-1]
    assert kept == model.config.kv_lora_rank + model.config.qk_rope_head_dim == 15


def test_content_scores_know_nothing_of_position():
    """Decoupled RoPE: only the d_r rotated channels see a shift of all positions ... and their product does not."""
    model, mla, rotation = mla_of()
    cfg = model.config
    shifted = rotation_table(np.arange(50, 57), cfg.qk_rope_head_dim, cfg.rope_theta, None, np.float64)
    here, there = mla.explain(X, rotation), mla.explain(X, shifted)
    np.testing.assert_array_equal(here.content, there.content)
    np.testing.assert_allclose(here.position, there.position, rtol=1e-9, atol=1e-12)  # angles of 50 lose two digits
    assert abs(here.k_rope - there.k_rope).max() > 0.1


def test_k_rope_is_made_from_x_not_from_the_latent():
    """Pitfall 16: with the latent's rows of W^DKV at zero the latent vanishes, the rotated key stays."""
    model, mla, rotation = mla_of()
    before = mla.explain(X, rotation).k_rope
    mla.kv_a_proj_with_mqa.weight.data[: model.config.kv_lora_rank] = 0
    scores = mla.explain(X, rotation)
    assert not scores.latent.any()
    np.testing.assert_array_equal(scores.k_rope, before)


def test_k_rope_is_x_times_its_own_matrix_turned():
    model, mla, rotation = mla_of()
    rows = mla.kv_a_proj_with_mqa.weight.data[model.config.kv_lora_rank :]
    reference = Reference(model)
    expected = [[reference.turn(rows @ x, m) for m, x in enumerate(row)] for row in X]
    np.testing.assert_allclose(mla.explain(X, rotation).k_rope, expected, rtol=1e-13, atol=1e-14)


def test_k_rope_passes_no_norm():
    """Twice the weight, twice the key; the latent passes its norm and does not change."""
    _, mla, rotation = mla_of()
    mla.kv_a_proj_with_mqa.weight.data *= 1e6  # beside this the norm's epsilon is nothing
    before = mla.explain(X, rotation)
    mla.kv_a_proj_with_mqa.weight.data *= 2
    after = mla.explain(X, rotation)
    np.testing.assert_allclose(after.k_rope, 2 * before.k_rope, rtol=1e-14)
    np.testing.assert_allclose(after.latent, before.latent, rtol=1e-13)


def test_query_latent_is_used_in_the_forward_pass():
    """Pitfall 16: the query's compression is part of the model, not of its training."""
    _, mla, rotation = mla_of()
    with record() as r:
        attend(mla, X, rotation)
    assert r["model.layers.0.self_attn.q_a_proj"].output.shape == (2, 7, 10)


def test_without_query_latent_there_is_one_projection():
    _, mla, _ = mla_of(q_lora_rank=None)
    names = [name for name, _ in mla.named_parameters()]
    assert names[0] == "q_proj.weight" and not any(name.startswith("q_a") for name in names)


@pytest.mark.parametrize("changed", [1, 4, 6])
def test_later_token_leaves_earlier_outputs_equal_to_the_bit(changed):
    _, mla, rotation = mla_of()
    other = X.copy()
    other[:, changed:] += 1
    np.testing.assert_array_equal(attend(mla, X, rotation)[:, :changed], attend(mla, other, rotation)[:, :changed])


def test_yarn_sharpens_scores_by_mscale_squared():
    """Pitfall 15, seen where it acts: content scores of one model with and without mscale_all_dim."""
    yarn = {k: v for k, v in YARN.items() if not k.startswith("mscale")}
    _, plain, rotation = mla_of(rope_scaling=yarn)
    _, scaled, _ = mla_of(rope_scaling={**yarn, "mscale": 1.0, "mscale_all_dim": 1.0})
    ratio = (0.1 * np.log(4) + 1) ** 2
    expected = plain.explain(X, rotation).content * ratio
    np.testing.assert_allclose(scaled.explain(X, rotation).content, expected, rtol=1e-13)


def test_explain_takes_tensors_and_leaves_no_tape():
    _, mla, rotation = mla_of()
    x = Tensor(X, requires_grad=True)
    np.testing.assert_array_equal(mla.explain(x, rotation).total, mla.explain(X, rotation).total)
    assert x.grad is None
