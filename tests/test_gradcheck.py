"""The gradient checker finds wrong gradients: each op below has one mistake, as it is made in practice."""

import numpy as np
import pytest
from test_ops_gradients import EXAMPLES

from minidsv3.autograd import Tensor
from minidsv3.gradcheck import GradientError, check_gradients
from minidsv3.ops.attention import AttentionFunction
from minidsv3.ops.linear import GroupedLinearFunction, LinearFunction
from minidsv3.ops.loss import CrossEntropyFunction, SequenceBalanceLossFunction
from minidsv3.ops.norm import RMSNormFunction
from minidsv3.ops.rope import RopeFunction
from minidsv3.ops.routing import GateScoreFunction, GateWeightFunction, PermuteFunction, UnpermuteFunction
from minidsv3.ops.shape import SplitFunction, add
from minidsv3.ops.swiglu import SwiGLUFunction


class FlippedSign(LinearFunction):
    def backward(self, dy):
        dx, dw = super().backward(dy)
        return -dx, dw


class TransposedWeightGradient(LinearFunction):
    """Goes unnoticed by shapes when the weight is square."""

    def backward(self, dy):
        dx, dw = super().backward(dy)
        return dx, lambda: np.ascontiguousarray(dw().T)


class ExpertsSwapped(GroupedLinearFunction):
    def backward(self, dy):
        dx, dw = super().backward(dy)
        return dx, lambda: dw()[::-1].copy()


class NormWithoutItsOwnDerivative(RMSNormFunction):
    """Treats the root mean square as a constant."""

    def backward(self, dy):
        _, w, r = self.saved
        return dy * w * r, super().backward(dy)[1]


class SiluLikeSigmoid(SwiGLUFunction):
    """d silu(a) = sigmoid(a): the term a s (1 - s) is dropped."""

    def backward(self, dy):
        (gate_up,) = self.saved
        F = gate_up.shape[-1] // 2
        dx = super().backward(dy)
        dx[..., :F] = dy * gate_up[..., F:] / (1 + np.exp(-gate_up[..., :F]))
        return dx


class TurnedTheSameWay(RopeFunction):
    def backward(self, dy):
        return self.forward(dy, rotation=self._rotation, interleave=self._interleave)


class KeysWithoutScale(AttentionFunction):
    def backward(self, do):
        dq, dkv, dk_rope = super().backward(do)
        return dq, dkv, dk_rope / self._scale


class QueriesWithoutSoftmaxTerm(AttentionFunction):
    """Drops rowsum(dP P), the part of the softmax derivative that keeps rows summing to one."""

    def backward(self, do):
        queries, keys, v, o, reciprocal, *exponentials = self.saved
        self._saved = (queries, keys, v, np.zeros_like(o), reciprocal, *exponentials)
        return super().backward(do)


class NotAveraged(CrossEntropyFunction):
    def backward(self, dy):
        return super().backward(dy) * self._count


class SharesUnnormalised(SequenceBalanceLossFunction):
    """Treats the sum over experts in Eq. 19 as a constant."""

    def backward(self, dy):
        f, share, total = self.saved
        return np.repeat(f * (dy / len(share)), len(share) // len(f), axis=0) / total


class SigmoidWithoutComplement(GateScoreFunction):
    def backward(self, dscores):
        return dscores * self.saved[0]


class ConstantNormaliser(GateWeightFunction):
    def backward(self, dweights):
        topk_idx, _, total = self.saved
        dscores = np.zeros(self._shape, dtype=dweights.dtype)
        np.put_along_axis(dscores, topk_idx, dweights * self._scale / total, axis=1)
        return dscores


class LastExpertForgotten(PermuteFunction):
    def backward(self, drows):
        self._saved = (self.saved[0][:, :-1],)
        return super().backward(drows)


class SlotsReversed(UnpermuteFunction):
    def backward(self, dy):
        drows, dweights = super().backward(dy)
        return drows, dweights[:, ::-1].copy()


class PiecesInTheWrongOrder(SplitFunction):
    def backward(self, *dys):
        return np.concatenate(dys[::-1], axis=-1)


MUTATIONS = [  # (wrong op, argument whose gradient is wrong, name of the example it is checked on)
    (FlippedSign, 0, "3 axes"),
    (ExpertsSwapped, 1, "one expert empty"),
    (NormWithoutItsOwnDerivative, 0, "3 axes"),
    (SiluLikeSigmoid, 0, "3 axes"),
    (TurnedTheSameWay, 0, "neighbours"),
    (KeysWithoutScale, 2, "short"),
    (QueriesWithoutSoftmaxTerm, 0, "short"),
    (NotAveraged, 0, "some ignored"),
    (SharesUnnormalised, 0, "two sequences"),
    (SigmoidWithoutComplement, 0, "sigmoid"),
    (ConstantNormaliser, 0, "normalised"),
    (LastExpertForgotten, 0, "top 3 of 7"),
    (SlotsReversed, 1, "top 3 of 7"),
    (PiecesInTheWrongOrder, 0, "three pieces"),
]


def check(op, arrays, constants, **options):
    inputs = [Tensor(a.copy(), requires_grad=True) for a in arrays]
    check_gradients(lambda *tensors: op.apply(*tensors, **constants), inputs, **options)


@pytest.mark.parametrize("op, argument, example", MUTATIONS)
def test_checker_finds_the_mistake_and_names_the_argument(op, argument, example):
    arrays, constants = next(case[1:] for case in EXAMPLES[op.__base__] if case[0] == example)
    with pytest.raises(GradientError, match=rf"argument {argument} \(shape .*\) at index \(.*\): got .*, expected "):
        check(op, arrays, constants)


def test_checker_finds_a_transposed_square_gradient():
    rng = np.random.default_rng(2)
    with pytest.raises(GradientError, match="argument 1"):
        check(TransposedWeightGradient, (rng.standard_normal((5, 4)), rng.standard_normal((4, 4))), {})


class OneNumberOff(LinearFunction):
    def backward(self, dy):
        dx, dw = super().backward(dy)

        def weight_gradient():
            wrong = dw()
            wrong[2, 1] += 0.5
            return wrong

        return dx, weight_gradient


X, W = np.arange(10.0).reshape(5, 2) / 10, np.arange(6.0).reshape(3, 2)


def test_checker_names_the_index_got_and_expected():
    with pytest.raises(GradientError) as error:
        check_gradients(
            lambda x, w: OneNumberOff.apply(x, w), [Tensor(X, requires_grad=True), Tensor(W, requires_grad=True)]
        )
    dw = np.random.default_rng(0).standard_normal((5, 3)).T @ X  # the output weights are drawn from seed 0
    text = str(error.value)
    assert text.startswith("argument 1 (shape (3, 2)) at index (2, 1): got ")
    got, expected = (float(part.split()[-1]) for part in text.split(":")[1].split(", "))
    assert (got, expected) == pytest.approx((dw[2, 1] + 0.5, dw[2, 1]), abs=1e-8)  # h^2 and rounding / h


def test_checker_leaves_its_inputs_as_they_were():
    x, w = Tensor(X.copy(), requires_grad=True), Tensor(W.copy(), requires_grad=True)
    check_gradients(LinearFunction.apply, [x, w])
    np.testing.assert_array_equal(np.concatenate([x.data, w.data]), np.concatenate([X, W]))


def test_checker_finds_a_gradient_that_never_arrives():
    x = Tensor(X, requires_grad=True)
    with pytest.raises(GradientError, match=r"argument 0 .* got 0, expected"):
        check_gradients(lambda x: LinearFunction.apply(x.data, Tensor(W, requires_grad=True)), [x])


def test_checker_takes_float64_only():
    with pytest.raises(ValueError, match="argument 1 is float32: central differences need float64"):
        check(LinearFunction, (X, W.astype(np.float32)), {})


def test_checker_looks_at_as_many_coordinates_as_asked():
    calls = []

    def f(x, w):
        calls.append(None)
        return LinearFunction.apply(x, w)

    check_gradients(f, [Tensor(X.copy(), requires_grad=True), Tensor(W.copy(), requires_grad=True)], samples=3)
    assert len(calls) == 1 + 2 * (3 + 3)


def test_checker_takes_scalars_and_empty_arrays():
    check_gradients(
        lambda x, _: add(x, x), [Tensor(np.array(2.0), requires_grad=True), Tensor(X[:0], requires_grad=True)]
    )
