"""Fast forms equal their textbook forms, forward and backward: op by op, and under a whole model."""

import numpy as np
import pytest
from reference_model import V2_ROUTING, odd_model, odd_tokens
from test_ops_gradients import EXAMPLES

from minidsv3.autograd import Function, Tensor, backward, replacing, trace
from minidsv3.ops.attention import QUERY_BLOCK, SAFE_SCORE, AttentionFunction
from minidsv3.ops.plain import PLAIN_FORMS, PlainAttention, using_plain_ops
from minidsv3.ops.swiglu import SwiGLUFunction, sigmoid

RNG = np.random.default_rng(17)
PAIRS = [
    pytest.param(fast, plain, *case[1:], id=f"{fast.__name__}: {case[0]}")
    for fast, plain in PLAIN_FORMS.items()
    for case in EXAMPLES[fast]
]
# float64: both orders of summation round within about 50 terms of 1e-16. float32: eps is 6e-8, sums of about 70 terms.
TOLERANCE = {np.float64: 1e-12, np.float32: 2e-5}


def run(op, arrays, constants, dtype):
    """Output and input gradients of one call, for an output gradient that is the same in both forms."""
    constants = {
        k: v.astype(np.complex128 if dtype == np.float64 else np.complex64) if k == "rotation" else v
        for k, v in constants.items()
    }
    inputs = [Tensor(a.astype(dtype), requires_grad=True) for a in arrays]
    y = op.apply(*inputs, **constants)
    dy = np.asarray(np.random.default_rng(1).standard_normal(y.shape), dtype=dtype)
    dxs = y._op.backward(dy)
    return [y.data, *(dx() if callable(dx) else dx for dx in (dxs if isinstance(dxs, tuple) else (dxs,)))]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("fast, plain, arrays, constants", PAIRS)
def test_fast_op_equals_its_plain_form(fast, plain, arrays, constants, dtype):
    tolerance = TOLERANCE[dtype]
    for got, expected in zip(run(fast, arrays, constants, dtype), run(plain, arrays, constants, dtype), strict=True):
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("S", [1, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK, 2 * QUERY_BLOCK + 3])
def test_attention_equals_its_plain_form_around_block_edges(S):
    arrays = [RNG.standard_normal(shape) for shape in ((2, S, 3, 10), (2, S, 3, 9), (2, S, 6))]
    for got, expected in zip(
        *(run(op, arrays, dict(scale=0.3), np.float64) for op in (AttentionFunction, PlainAttention))
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)  # sums of up to 131 terms


@pytest.mark.parametrize("size", [1e-3, 1.0, 2.0, 3.0, 10.0, 1e3])
def test_attention_equals_its_plain_form_with_and_without_the_row_maximum(size):
    """Scores of about 3 size^2: the fast form subtracts the row maximum only where exp could overflow."""
    arrays = [size * RNG.standard_normal(shape) for shape in ((1, 5, 2, 6), (1, 5, 2, 7), (1, 5, 4))]
    for got, expected in zip(
        *(run(op, arrays, dict(scale=1.0), np.float64) for op in (AttentionFunction, PlainAttention))
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12 * size**2)  # a score of 1e6 rounds by 1e-10


def test_attention_stays_finite_for_huge_scores():
    """Scores of +-1e6: without subtracting the row maximum exp overflows."""
    arrays = [1e3 * RNG.standard_normal(shape) for shape in ((1, 5, 2, 6), (1, 5, 2, 7), (1, 5, 4))]
    assert all(np.isfinite(a).all() for a in run(AttentionFunction, arrays, dict(scale=1.0), np.float32))


def test_attention_stays_finite_just_below_its_safe_score():
    """All scores of a row at -SAFE_SCORE: exp must not underflow to a row sum of zero."""
    q, kv = np.zeros((1, 5, 2, 6)), np.zeros((1, 5, 2, 7))
    q[..., 0], kv[..., 0] = 1, -0.999 * SAFE_SCORE
    kv[..., 2:] = RNG.standard_normal((1, 5, 2, 5))
    y, *_ = run(AttentionFunction, [q, kv, np.zeros((1, 5, 4))], dict(scale=1.0), np.float32)
    running_mean = np.cumsum(kv[..., 2:], axis=1) / np.arange(1, 6)[None, :, None, None]
    np.testing.assert_allclose(y, running_mean, rtol=1e-5, atol=1e-6)  # equal scores: the mean of what is seen


def test_swiglu_is_right_to_float32_over_its_whole_range():
    """Against float64 with the exponential: 2e-7 of |gate up| on both sides, exact where the gate is open or shut."""
    gate = np.concatenate([np.linspace(-30, 30, 601), [-1e30, -1e4, 1e4, 1e30]])
    up = np.resize([1.5, -0.75, 2.0], gate.shape)
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate)) * up
    got = SwiGLUFunction().forward(np.concatenate([gate, up]).astype(np.float32)[None])[0]
    assert np.all(np.abs(got - expected) <= 2e-7 * np.abs(gate * up) + 1e-30)
    np.testing.assert_array_equal(got[-4:-2], [0, 0])
    np.testing.assert_allclose(got[-2:], expected[-2:], rtol=3e-7)


def test_sigmoid_has_exact_limits_without_a_warning():
    x = np.array([-np.inf, -1e4, 0, 1e4, np.inf], dtype=np.float32)
    np.testing.assert_array_equal(sigmoid(x), np.array([0, 0, 0.5, 1, 1], dtype=np.float32))


@pytest.mark.parametrize("op", [*PLAIN_FORMS, *PLAIN_FORMS.values()])
def test_plain_and_fast_form_are_functions(op):
    assert issubclass(op, Function)


def test_using_plain_ops_replaces_every_fast_op():
    model = odd_model()
    with trace() as records, using_plain_ops():
        model.loss(odd_tokens(), odd_tokens(seed=6))
    names = {r.name for r in records}
    assert names >= {plain.__name__ for plain in PLAIN_FORMS.values()}
    assert not names & {fast.__name__ for fast in PLAIN_FORMS}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, V2_ROUTING, dict(q_lora_rank=None, rope_interleave=False)], ids=["V3", "V2", "no q"]
)
def test_model_with_plain_ops_has_the_same_loss_and_gradients(changes, recompute):
    length = QUERY_BLOCK + 3
    loss, gradients = loss_and_gradients(length, recompute, **changes)
    with using_plain_ops():
        assert_same(loss, gradients, *loss_and_gradients(length, recompute, **changes))


@pytest.mark.parametrize("fast", PLAIN_FORMS)
def test_model_with_one_op_replaced_has_the_same_loss_and_gradients(fast):
    """A replacement is handed what it knows: nothing is made again behind its back."""
    loss, gradients = loss_and_gradients(9)
    with replacing(fast, PLAIN_FORMS[fast]):
        assert_same(loss, gradients, *loss_and_gradients(9))


def loss_and_gradients(length, recompute=False, **changes):
    model, tokens, targets = odd_model(**changes), odd_tokens(2, length), odd_tokens(2, length, seed=6)
    losses = model.loss(tokens, targets, recompute=recompute)
    backward(losses.total)
    return float(losses.total), {name: p.grad.copy() for name, p in model.named_parameters()}


def assert_same(loss, gradients, plain_loss, plain_gradients):
    assert loss == pytest.approx(plain_loss, rel=1e-12)
    for name, gradient in gradients.items():  # three layers amplify the rounding of one op
        np.testing.assert_allclose(gradient, plain_gradients[name], rtol=1e-9, atol=1e-11, err_msg=name)
