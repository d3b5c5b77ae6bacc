"""Low-precision gemms against textbook forms: quantise, dequantise, multiply in float64."""

import numpy as np
import pytest

from minidsv3.autograd import Tensor, backward
from minidsv3.ops.linear import Gemm, GroupedLinearFunction, LinearFunction, grouped_linear, linear
from minidsv3.ops.norm import rms_norm
from minidsv3.ops.routing import permute
from minidsv3.ops.swiglu import swiglu
from minidsv3.quant.blockwise import Quantized, dequantize, quantize_blocks, quantize_mx, quantize_tiles, quantized
from minidsv3.quant.comparison import MXGemm, TensorwiseGemm
from minidsv3.quant.formats import BF16, E5M2, E5M6, round_to
from minidsv3.quant.gemm import BF16Gemm, FP8Gemm, FP8Store, fake_quantized

RNG = np.random.default_rng(0)
N, D_IN, D_OUT = 150, 200, 140
X, W, DY = (RNG.standard_normal(shape).astype(np.float32) for shape in ((N, D_IN), (D_OUT, D_IN), (N, D_OUT)))
GEMMS = {
    "bf16": BF16Gemm(), "fp8": FP8Gemm(), "fp8 exact": FP8Gemm(exact=True), "E5M6 kept": FP8Gemm(kept=E5M6),
    "x ue8m0": FP8Gemm(x_scale="ue8m0"), "dy ue8m0": FP8Gemm(dy_scale="ue8m0"), "dy blocks": FP8Gemm(dy_rows=128),
    "dy blocks exact": FP8Gemm(dy_rows=128, exact=True), "tensorwise": TensorwiseGemm(),
    "tensorwise exact": TensorwiseGemm(exact=True), "mx": MXGemm(),
}  # fmt: skip


def tiles(x, kind="fp32", axis=1):
    return dequantize(*quantize_tiles(x, kind, axis=axis), *((1, 128) if axis else (128, 1)))


def one_scale(x, fmt="e4m3"):
    return dequantize(*quantized(x, *x.shape, "fp32", fmt), *x.shape)


def mx(x):
    return dequantize(*quantize_mx(x, "e4m3", "rceil"), 1, 32)


W_BLOCKS = dequantize(*quantize_blocks(W))
E5M6_X = dequantize(*quantized(X, 1, 128, "ue8m0", E5M6), 1, 128)
# operands of fprop, dgrad and wgrad as the recipes say, in the textbook form
DY_DOWN, X_DOWN = tiles(DY, axis=0), tiles(tiles(X), axis=0)
DY_BLOCKS = dequantize(*quantize_blocks(DY))
X16, W16, DY16 = (round_to(m, BF16) for m in (X, W, DY))
OPERANDS = {
    "bf16": ((X16, W16), (DY16, W16), (DY16, X16)),
    "fp8": ((tiles(X), W_BLOCKS), (tiles(DY), W_BLOCKS), (DY_DOWN, X_DOWN)),
    "E5M6 kept": ((tiles(X), W_BLOCKS), (tiles(DY), W_BLOCKS), (DY_DOWN, tiles(E5M6_X, "ue8m0", axis=0))),
    "x ue8m0": (
        (tiles(X, "ue8m0"), W_BLOCKS), (tiles(DY), W_BLOCKS), (DY_DOWN, tiles(tiles(X, "ue8m0"), "ue8m0", axis=0)),
    ),
    "dy ue8m0": ((tiles(X), W_BLOCKS), (tiles(DY, "ue8m0"), W_BLOCKS), (tiles(DY, "ue8m0", axis=0), X_DOWN)),
    "dy blocks": ((tiles(X), W_BLOCKS), (DY_BLOCKS, W_BLOCKS), (DY_BLOCKS, X_DOWN)),
    "tensorwise": (
        (one_scale(X), one_scale(W)), (one_scale(DY, E5M2), one_scale(W)), (one_scale(DY, E5M2), one_scale(X)),
    ),
    "mx": ((mx(X), mx(W)), (mx(DY), mx(W.T).T), (mx(DY.T).T, mx(X.T).T)),
}  # fmt: skip
for exact, fast in (("fp8 exact", "fp8"), ("dy blocks exact", "dy blocks"), ("tensorwise exact", "tensorwise")):
    OPERANDS[exact] = OPERANDS[fast]


def products(gemm):
    kept, weight = gemm.keep(X), gemm.load(W)
    return gemm.fprop(X, weight, kept=kept), gemm.dgrad(DY, weight), gemm.wgrad(DY, kept)


@pytest.mark.parametrize("name", GEMMS)
def test_gemm_equals_its_operands_multiplied_in_float64(name):
    (x, w), (dy, w2), (dy3, x3) = (tuple(a.astype(np.float64) for a in pair) for pair in OPERANDS[name])
    pairs = (x, w.T), (dy, w2), (dy3.T, x3)
    # Of the sum of magnitudes, BLAS loses some 2^-24 a term; a tensor core cuts each of 33 addends 13 bits below the
    # largest, which is some 2^-13 of it all. Then half a step of BF16, 2^-8.
    loss = 2.0**-12 if "exact" in name else 1e-6
    for got, (a, b), output in zip(products(GEMMS[name]), pairs, (2.0**-8, 2.0**-8, 0)):
        expected, magnitudes = a @ b, np.abs(a) @ np.abs(b)
        assert got.dtype == np.float32
        assert (np.abs(got - expected) <= np.abs(expected) * output * 1.001 + loss * magnitudes).all()


@pytest.mark.parametrize("name", GEMMS)
def test_outputs_are_bf16_and_weight_gradients_are_not(name):
    y, dx, dw = products(GEMMS[name])
    for z, is_bf16 in ((y, True), (dx, True), (dw, False)):
        assert (round_to(z, BF16) == z).all() == is_bf16


@pytest.mark.parametrize("name", GEMMS)
def test_fprop_and_dgrad_take_a_plain_weight_too(name):
    gemm = GEMMS[name]
    np.testing.assert_array_equal(gemm.fprop(X, W), products(gemm)[0])
    np.testing.assert_array_equal(gemm.dgrad(DY, W), products(gemm)[1])


@pytest.mark.parametrize("name", GEMMS)
def test_gemm_writes_into_out_and_takes_float64(name):
    gemm, out = GEMMS[name], np.empty((N, D_OUT), dtype=np.float64)
    assert gemm.fprop(X.astype(np.float64), W.astype(np.float64), out=out) is out
    np.testing.assert_array_equal(out, products(gemm)[0])
    assert gemm.dgrad(DY.astype(np.float64), W).dtype == np.float64


@pytest.mark.parametrize("name", GEMMS)
def test_gemm_without_rows_gives_zero_gradients(name):
    gemm = GEMMS[name]
    assert gemm.fprop(X[:0], W).shape == (0, D_OUT) and gemm.dgrad(DY[:0], W).shape == (0, D_IN)
    assert (
        gemm.wgrad(DY[:0], gemm.keep(X[:0])).shape == (D_OUT, D_IN) and not gemm.wgrad(DY[:0], gemm.keep(X[:0])).any()
    )


@pytest.mark.parametrize("name", GEMMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gemm_lets_nan_and_infinity_through_as_not_finite(name, bad):
    """A step must see that its loss is not finite; nothing may hide it."""
    x = X.copy()
    x[3, 130] = bad
    with np.errstate(invalid="ignore", over="ignore"):
        y = GEMMS[name].fprop(x, W)
        dw = GEMMS[name].wgrad(DY, GEMMS[name].keep(x))
    assert not np.isfinite(y[3]).any() and not np.isfinite(dw[:, 130]).any()


@pytest.mark.parametrize(
    "name, low, high", [("fp8", 1.03, 1.05), ("bf16", 2, 2), ("E5M6 kept", 2, 2.1), ("mx", 1.03, 1.05)]
)
def test_keep_takes_this_many_bytes_a_number(name, low, high):
    x = np.ones((128, 256), dtype=np.float32)
    assert low <= GEMMS[name].keep(x).nbytes / x.size <= high


@pytest.mark.parametrize("name", GEMMS)
@pytest.mark.parametrize("D_out", [128, 100])
def test_grouped_linear_equals_each_expert_alone(name, D_out):
    """With what is kept, and with x computed again."""
    gemm, rows = GEMMS[name], np.array([70, 0, 30, 50])
    w = RNG.standard_normal((4, D_out, D_IN)).astype(np.float32)
    dy = RNG.standard_normal((N, D_out)).astype(np.float32)
    x, weight = Tensor(X, requires_grad=True), Tensor(w, requires_grad=True)
    y = grouped_linear(x, weight, rows, gemm)
    dx, thunk = y._op.backward(dy)
    again = GroupedLinearFunction.apply(x, weight, rows_per_expert=rows, gemm=gemm, again=lambda: X)
    dw, dw_again = thunk(), again._op.backward(dy)[1]()
    starts = np.cumsum([0, *rows])
    assert not dw[1].any()
    np.testing.assert_array_equal(dw_again, dw)
    for e in (0, 2, 3):
        part = slice(starts[e], starts[e + 1])
        alone = linear(Tensor(X[part].copy(), requires_grad=True), Tensor(w[e], requires_grad=True), gemm)
        dx_alone, dw_alone = alone._op.backward(dy[part].copy())
        np.testing.assert_array_equal(y.data[part], alone.data)
        np.testing.assert_array_equal(dx[part], dx_alone)
        np.testing.assert_array_equal(dw[e], dw_alone())


@pytest.mark.parametrize("name", GEMMS)
def test_linear_uses_the_three_products(name):
    """`forward` is keep, load and fprop in one; the weight gradient of x computed again is that of x kept."""
    x, w = Tensor(X, requires_grad=True), Tensor(W, requires_grad=True)
    plain, again = linear(x, w, GEMMS[name]), LinearFunction.apply(x, w, gemm=GEMMS[name], again=lambda: X)
    y, dx, dw = products(GEMMS[name])
    for z in (plain, again):
        got_dx, thunk = z._op.backward(DY)
        for got, want in ((z.data, y), (got_dx, dx), (thunk(), dw)):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["fp8", "E5M6 kept", "fp8 exact"])
def test_groups_take_float64_and_no_rows_at_all(name):
    w, rows = RNG.standard_normal((2, D_OUT, D_IN)), np.array([90, 60])
    x, dy = X.astype(np.float64), DY.astype(np.float64)
    single = grouped_linear(Tensor(X), Tensor(w.astype(np.float32), requires_grad=True), rows, GEMMS[name])
    double = grouped_linear(Tensor(x), Tensor(w, requires_grad=True), rows, GEMMS[name])
    for got, want in zip((double.data, double._op.backward(dy)[1]()), (single.data, single._op.backward(DY)[1]())):
        assert got.dtype == np.float64
        np.testing.assert_array_equal(got, want)
    none = grouped_linear(Tensor(X[:0]), Tensor(w.astype(np.float32), requires_grad=True), rows * 0, GEMMS[name])
    dx, thunk = none._op.backward(DY[:0])
    assert none.shape == (0, D_OUT) and dx.shape == (0, D_IN) and not thunk().any()


@pytest.mark.parametrize("name", GEMMS)
@pytest.mark.parametrize("maker", ["norm", "swiglu", "permute"])
def test_input_that_can_be_made_again_is_not_kept(maker, name):
    """The same gradient bits as of a layer that keeps its input, before and after the maker has gone."""
    T, D, rows = 50, 2 * D_IN if maker == "swiglu" else D_IN, np.array([28, 0, 22])
    order = RNG.permutation(T)
    source = Tensor(RNG.standard_normal((T, D)).astype(np.float32), requires_grad=True)
    made = {
        "norm": lambda: rms_norm(source, Tensor(np.linspace(0.5, 2, D, dtype=np.float32), requires_grad=True), 1e-6),
        "swiglu": lambda: swiglu(source),
        "permute": lambda: permute(source, order, np.argsort(order)[:, None]),
    }[maker]()
    w, dy = RNG.standard_normal((3, D_OUT, D_IN)).astype(np.float32), RNG.standard_normal((T, D_OUT)).astype(np.float32)
    one, many = Tensor(w[0], requires_grad=True), Tensor(w, requires_grad=True)
    ops = [linear(made, one, GEMMS[name])._op, grouped_linear(made, many, rows, GEMMS[name])._op]
    kept = Tensor(made.data, requires_grad=True)
    keepers = [linear(kept, one, GEMMS[name])._op, grouped_linear(kept, many, rows, GEMMS[name])._op]
    assert [len(op.saved) for op in keepers] == [2, 4] and [len(op.saved) for op in ops] == [1, 2]
    for op, keeper in zip(ops, keepers):
        made._op.backward(made.data)  # SwiGLU shares with it what it made again
        np.testing.assert_array_equal(op.backward(dy)[1](), keeper.backward(dy)[1]())


def test_exact_gemm_of_the_ops_has_the_same_interface():
    names = ("keep", "load", "fprop", "dgrad", "wgrad", "forward", "forward_groups", "dgrad_groups", "wgrad_groups")
    for gemm in (Gemm(), *GEMMS.values()):
        assert all(callable(getattr(gemm, name)) for name in names)


def test_store_gives_back_tiles():
    kept = FP8Store().keep(X.reshape(3, 50, D_IN))
    assert isinstance(kept, Quantized)
    np.testing.assert_array_equal(FP8Store().load(kept), tiles(X))


def test_fake_quantized_keeps_shape_and_dtype():
    x = X.reshape(3, 50, D_IN).astype(np.float64)
    got = fake_quantized(x)
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, tiles(X).reshape(3, 50, D_IN))


def test_backward_through_a_low_precision_linear_reaches_the_weight():
    w = Tensor(W[:1, :].copy(), requires_grad=True)
    backward(linear(Tensor(X[:1]), w, FP8Gemm()))
    assert w.grad.shape == (1, D_IN) and np.corrcoef(w.grad[0], X[0])[0, 1] > 0.99


class Coarse(Gemm):
    """Keeps x in whole numbers, and multiplies with what it keeps: the interface as an exercise uses it."""

    def keep(self, x):
        return np.round(x)

    def load(self, w):
        return 2 * w

    def fprop(self, x, w, out=None, kept=None):
        return np.matmul(self.keep(x) if kept is None else kept, w.T, out=out)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("grouped", [False, True], ids=["linear", "grouped"])
def test_a_gemm_of_ones_own_decides_what_every_product_sees(grouped, again):
    rng = np.random.default_rng(3)
    rows = np.array([4, 0, 3]) if grouped else np.array([7])
    x, w, dy = rng.normal(size=(7, 5)) * 4, rng.normal(size=(len(rows), 6, 5)), rng.normal(size=(7, 6))
    op = (GroupedLinearFunction if grouped else LinearFunction)()
    op._needs = (True, True)
    constants = {"gemm": Coarse(), **({"rows_per_expert": rows} if grouped else {})}
    y = op.forward(x, w if grouped else w[0], **constants, **({"again": lambda: x} if again else {}))
    dx, thunk = op.backward(dy)
    stops = np.cumsum(rows)
    for e, (a, b) in enumerate(zip(stops - rows, stops)):
        np.testing.assert_allclose(y[a:b], np.round(x[a:b]) @ (2 * w[e]).T, rtol=1e-12)
        np.testing.assert_allclose(dx[a:b], dy[a:b] @ (2 * w[e]), rtol=1e-12)
        np.testing.assert_allclose(thunk()[e] if grouped else thunk(), dy[a:b].T @ np.round(x[a:b]), rtol=1e-12)
