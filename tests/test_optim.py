"""AdamW against the textbook, one tensor at a time in float64; flat buffers; the sum over shards."""

import math

import ml_dtypes
import numpy as np
import pytest
from small_runs import model_config, new_model, train_config

from minidsv3.autograd import Parameter
from minidsv3.model.module import Module
from minidsv3.quant.formats import BF16
from minidsv3.train import optim
from minidsv3.train.optim import BLOCK, AdamW, FlatParameters, sum_gradients


class Weights(Module):
    """A matrix and a vector of chosen sizes."""

    def __init__(self, rows, columns, vector):
        self.vector, self.matrix = Parameter((vector,)), Parameter((rows, columns))


def weights(rows=3, columns=5, vector=4, dtype=np.float64):
    model = Weights(rows, columns, vector)
    model.init_weights(np.random.default_rng(0), dtype, std=1.0)
    return model


def textbook(w, gradients, cfg, learning_rate, decay):
    """Algorithm 2 of Loshchilov & Hutter 2019, written out, in float64."""
    w = w.astype(np.float64)
    m = v = np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m = cfg.adam_beta1 * m + (1 - cfg.adam_beta1) * g
        v = cfg.adam_beta2 * v + (1 - cfg.adam_beta2) * g**2
        m_hat, v_hat = m / (1 - cfg.adam_beta1**t), v / (1 - cfg.adam_beta2**t)
        w = w - learning_rate * (m_hat / (np.sqrt(v_hat) + cfg.adam_eps) + decay * w)
    return w


def trained(model, cfg, learning_rate=0.05, steps=7, scale=1.0):
    """Expected (textbook) and got weights of `model` after some steps on random gradients."""
    rng = np.random.default_rng(1)
    start = {name: p.data.astype(np.float64) for name, p in model.named_parameters()}
    gradients = {name: [rng.normal(size=w.shape) for _ in range(steps)] for name, w in start.items()}
    flat = FlatParameters(model)
    adam = AdamW(flat, cfg)
    for t in range(steps):
        buffer = flat.new_gradient()
        for name, p in model.named_parameters():
            buffer.into[p][...] = gradients[name][t]
        adam.step(buffer.data, t + 1, learning_rate, scale)
    expected = {
        name: textbook(w, [scale * g for g in gradients[name]], cfg, learning_rate, cfg.weight_decay * (w.ndim > 1))
        for name, w in start.items()
    }
    return expected, {name: p.data for name, p in model.named_parameters()}


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_adamw_is_the_textbook_in_float64(scale):
    expected, got = trained(weights(), train_config(weight_decay=0.3), scale=scale)
    for name, w in expected.items():
        np.testing.assert_allclose(got[name], w, rtol=1e-12, atol=1e-14)  # the same sums in another order


def test_adamw_is_the_textbook_in_float32():
    expected, got = trained(weights(dtype=np.float32), train_config())
    for name, w in expected.items():
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], w, rtol=1e-5, atol=1e-6)  # seven steps of a few float32 roundings


def test_adamw_first_step_is_the_learning_rate_in_each_coordinate():
    model = weights()
    before = model.matrix.data.copy()
    flat = FlatParameters(model)
    gradient = flat.new_gradient()
    gradient.data[:] = np.random.default_rng(2).choice([-3.0, 0.5, 20.0], size=gradient.data.size)
    AdamW(flat, train_config(weight_decay=0.0)).step(gradient.data, 1, 0.01, 1.0)
    moved = model.matrix.data - before
    np.testing.assert_allclose(moved, -0.01 * np.sign(gradient.into[model.matrix]), rtol=1e-6)  # eps of 1e-8 / 0.5


def test_adamw_decays_matrices_only():
    model = weights()
    vector, matrix = model.vector.data.copy(), model.matrix.data.copy()
    flat = FlatParameters(model)
    AdamW(flat, train_config(weight_decay=0.5)).step(flat.new_gradient().data, 1, 0.1, 1.0)
    np.testing.assert_array_equal(model.vector.data, vector)
    np.testing.assert_allclose(model.matrix.data, matrix * (1 - 0.1 * 0.5), rtol=1e-15)


def test_adamw_spares_exactly_the_norm_weights_of_the_model():
    model = new_model()
    flat = FlatParameters(model)
    before = flat.data.copy()
    AdamW(flat, train_config(weight_decay=0.5)).step(flat.new_gradient().data, 1, 0.1, 1.0)
    views = flat.views(before)
    still = {p for p in model.parameters() if np.array_equal(views[p], p.data)}
    assert still == {module.weight for _, module in model.named_modules() if type(module).__name__ == "RMSNorm"}


# a matrix that ends before, at and after a block's end, so that blocks are cut at the end of the decayed part too
@pytest.mark.parametrize("columns", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_adamw_blocks_change_nothing(columns, monkeypatch):
    results = []
    for block in (BLOCK, 1 << 30):
        monkeypatch.setattr(optim, "BLOCK", block)
        _, got = trained(weights(1, columns, 5, np.float32), train_config(), steps=2)
        results.append(b"".join(w.tobytes() for w in got.values()))
    assert results[0] == results[1]


def test_adamw_bfloat16_moments_are_bfloat16():
    adam = AdamW(FlatParameters(weights(dtype=np.float32)), train_config(moments_dtype="bfloat16"))
    adam.step(np.ones_like(adam.flat.data), 1, 0.01, 1.0)
    assert adam.exp_avg.dtype == adam.exp_avg_sq.dtype == BF16 == np.dtype(ml_dtypes.bfloat16)
    assert adam.exp_avg.nbytes == 2 * adam.flat.data.size


def test_adamw_bfloat16_moments_are_the_rounded_ones():
    adam = AdamW(FlatParameters(weights(dtype=np.float32)), train_config(moments_dtype="bfloat16"))
    g = np.random.default_rng(3).normal(size=adam.flat.data.size).astype(np.float32)
    adam.step(g, 1, 0.01, 1.0)
    np.testing.assert_array_equal(adam.exp_avg, (np.float32(1 - 0.9) * g).astype(ml_dtypes.bfloat16))


def test_adamw_bfloat16_moments_stay_close_to_float32():
    learning_rate, steps = 0.05, 7
    exact = trained(weights(dtype=np.float32), train_config(), learning_rate, steps)[1]
    rounded = trained(weights(dtype=np.float32), train_config(moments_dtype="bfloat16"), learning_rate, steps)[1]
    for name in exact:
        difference = np.abs(exact[name] - rounded[name]).max()
        assert 0 < difference < 0.02 * learning_rate * steps  # a moment is off by 2^-9 a step, a step moves by lr


def test_flat_parameters_share_memory_with_the_model():
    model = new_model()
    flat = FlatParameters(model)
    assert all(np.shares_memory(p.data, flat.data) for p in model.parameters())
    assert all(np.shares_memory(p.data, flat.data) for _, p in model.named_parameters())


def test_flat_parameters_keep_every_number():
    before = {name: p.data.copy() for name, p in new_model().named_parameters()}
    model = new_model()
    FlatParameters(model)
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(p.data, before[name])


def test_flat_parameters_hold_each_number_once():
    model = new_model(model_config(tie_word_embeddings=True))
    assert FlatParameters(model).data.size == sum(p.data.size for _, p in model.named_parameters())


def test_flat_gradient_views_share_memory_with_the_whole():
    flat = FlatParameters(weights())
    gradient = flat.new_gradient()
    for number, view in enumerate(gradient.into.values(), start=1):
        view[...] = number
    assert sorted(set(gradient.data.tolist())) == [1.0, 2.0]


def test_named_moments_are_views_under_released_names():
    model = new_model()
    adam = AdamW(FlatParameters(model), train_config())
    moments = dict(adam.named_moments(model))
    names = [name for name, _ in model.named_parameters()]
    assert list(moments) == [f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in names]
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert all(moments[f"exp_avg_sq.{name}"].shape == shape for name, shape in shapes.items())
    assert all(np.shares_memory(m, adam.exp_avg) for name, m in moments.items() if name.startswith("exp_avg."))


def test_sum_gradients_adds_in_order():
    a, b, c = (np.full(5, x, dtype=np.float32) for x in (1e8, 1.0, -1e8))
    forward, other = [a.copy(), b, c], [a.copy(), c, b]
    sum_gradients(forward)
    sum_gradients(other)
    assert forward[0].tolist() == [0.0] * 5  # (1e8 + 1) - 1e8 in float32
    assert other[0].tolist() == [1.0] * 5


@pytest.mark.parametrize("size", [7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_sum_gradients_is_the_sum_and_its_norm(size):
    parts = [np.random.default_rng(i).normal(size=size) for i in range(3)]
    expected = parts[0] + parts[1] + parts[2]
    total = [part.copy() for part in parts]
    norm = sum_gradients(total)
    np.testing.assert_array_equal(total[0], expected)
    assert norm == pytest.approx(math.sqrt(math.fsum(expected**2)), rel=1e-12)  # float64 sums of 1e5 squares


def test_sum_gradients_leaves_the_other_shards_alone():
    parts = [np.arange(5.0) for _ in range(3)]
    sum_gradients(parts)
    assert parts[1].tolist() == parts[2].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_sum_gradients_norm_shows_what_is_not_finite(bad):
    assert not math.isfinite(sum_gradients([np.array([1.0, bad, 2.0])]))
