"""Every op of the package against central differences in float64; a new op without an example here fails the suite."""

import importlib
import pkgutil

import numpy as np
import pytest

import minidsv3.model
import minidsv3.ops
from minidsv3.autograd import Checkpoint, Function, Tensor
from minidsv3.gradcheck import check_gradients
from minidsv3.ops.attention import QUERY_BLOCK, AttentionFunction
from minidsv3.ops.linear import EmbeddingFunction, GroupedLinearFunction, LinearFunction
from minidsv3.ops.loss import CrossEntropyFunction, SequenceBalanceLossFunction
from minidsv3.ops.norm import RMSNormFunction, rms_norm
from minidsv3.ops.plain import PLAIN_FORMS
from minidsv3.ops.rope import RopeFunction, rotation_table
from minidsv3.ops.routing import GateScoreFunction, GateWeightFunction, PermuteFunction, UnpermuteFunction
from minidsv3.ops.shape import (
    AddFunction,
    ConcatFunction,
    PositionsFunction,
    ReshapeFunction,
    RoundFunction,
    SplitFunction,
)
from minidsv3.ops.swiglu import SwiGLUFunction, swiglu

RNG = np.random.default_rng(11)


def normal(*shape):
    return RNG.standard_normal(shape)


def rotation(positions, d_r):
    return rotation_table(np.arange(3, 3 + positions), d_r, 100.0, None, np.float64)


def route(T, K, E):
    """token_of_row and row_of_slot of a random routing, found by walking expert by expert."""
    topk_idx = np.sort(np.argsort(RNG.random((T, E)), axis=1)[:, :K], axis=1)
    slots = [(t, k) for e in range(E) for t in range(T) for k in range(K) if topk_idx[t, k] == e]
    row_of_slot = np.empty((T, K), dtype=np.int64)
    for row, slot in enumerate(slots):
        row_of_slot[slot] = row
    return topk_idx, dict(token_of_row=np.array([t for t, _ in slots]), row_of_slot=row_of_slot)


TOPK_IDX, ROUTE = route(T=10, K=3, E=7)
TARGETS = np.array([[4, -100, 0, 10, 4], [1, 2, -100, -100, 7]])

# op -> (name, positional inputs, constants), sizes pairwise different
EXAMPLES = {
    LinearFunction: [("3 axes", (normal(2, 5, 4), normal(7, 4)), {})],
    GroupedLinearFunction: [
        ("one expert empty", (normal(9, 5), normal(4, 7, 5)), dict(rows_per_expert=np.array([3, 0, 4, 2]))),
        ("one has all", (normal(6, 5), normal(3, 4, 5)), dict(rows_per_expert=np.array([0, 6, 0]))),
    ],
    EmbeddingFunction: [
        ("repeated tokens", (normal(7, 4),), dict(tokens=np.array([[6, 1, 1, 0, 6], [2, 1, 6, 6, 5]])))
    ],
    AttentionFunction: [
        ("short", (normal(2, 5, 3, 10), normal(2, 5, 3, 11), normal(2, 5, 6)), dict(scale=0.4)),
        ("all rope", (normal(2, 5, 3, 6), normal(2, 5, 3, 7), normal(2, 5, 6)), dict(scale=0.4)),
        (
            "two query blocks",
            (normal(1, QUERY_BLOCK + 5, 2, 7), normal(1, QUERY_BLOCK + 5, 2, 8), normal(1, QUERY_BLOCK + 5, 4)),
            dict(scale=0.3),
        ),
    ],
    CrossEntropyFunction: [
        ("some ignored", (normal(2, 5, 11),), dict(targets=TARGETS)),
        ("all ignored", (normal(4, 3),), dict(targets=np.full(4, -100, dtype=np.int64))),
    ],
    SequenceBalanceLossFunction: [
        ("two sequences", (RNG.random((10, 7)) + 0.1,), dict(topk_idx=TOPK_IDX, batch=2)),
    ],
    RMSNormFunction: [("3 axes", (normal(2, 5, 4), normal(4)), dict(eps=1e-3))],
    RopeFunction: [
        ("neighbours", (normal(2, 5, 3, 10),), dict(rotation=rotation(5, 6), interleave=True)),
        ("halves", (normal(2, 5, 3, 10),), dict(rotation=rotation(5, 6), interleave=False)),
        ("odd content width", (normal(2, 5, 3, 9),), dict(rotation=rotation(5, 6), interleave=True)),
        ("no content", (normal(2, 5, 1, 6),), dict(rotation=rotation(5, 6), interleave=True)),
    ],
    GateScoreFunction: [
        ("sigmoid", (normal(5, 7),), dict(scoring_func="sigmoid")),
        ("softmax", (normal(5, 7),), dict(scoring_func="softmax")),
    ],
    GateWeightFunction: [
        ("normalised", (RNG.random((10, 7)) + 0.1,), dict(topk_idx=TOPK_IDX, normalize=True, scale=2.5)),
        ("not normalised", (RNG.random((10, 7)) + 0.1,), dict(topk_idx=TOPK_IDX, normalize=False, scale=16.0)),
        ("one expert", (RNG.random((10, 7)) + 0.1,), dict(topk_idx=TOPK_IDX[:, :1], normalize=True, scale=2.5)),
    ],
    PermuteFunction: [("top 3 of 7", (normal(10, 4),), ROUTE)],
    UnpermuteFunction: [("top 3 of 7", (normal(30, 4), RNG.random((10, 3))), ROUTE)],
    ReshapeFunction: [("3 axes to 2", (normal(2, 5, 4),), dict(shape=(10, -1)))],
    # the straight-through gradient is exact where the rounding only moves the numbers
    RoundFunction: [("a shift", (normal(2, 5),), dict(rounding=lambda x: x + x.dtype.type(0.25)))],
    SplitFunction: [("three pieces", (normal(2, 5, 9),), dict(sizes=(2, 3, 4)))],
    ConcatFunction: [("three pieces", (normal(5, 2), normal(5, 3), normal(5, 4)), {})],
    PositionsFunction: [("inner", (normal(2, 7, 3),), dict(start=1, stop=5))],
    AddFunction: [
        ("two", (normal(2, 5), normal(2, 5)), {}),
        ("three weighted", (normal(2, 5), normal(2, 5), normal(2, 5)), dict(weights=(1.0, 0.3, -2.0))),
        ("one", (normal(2, 5),), {}),
    ],
    SwiGLUFunction: [("3 axes", (normal(2, 5, 6),), {})],
    Checkpoint: [("norm and swiglu", (normal(5, 6), normal(6)), dict(run=lambda x, w: swiglu(rms_norm(x, w, 1e-3))))],
}
EXAMPLES |= {plain: EXAMPLES[fast] for fast, plain in PLAIN_FORMS.items()}
CASES = [
    pytest.param(op, *case[1:], id=f"{op.__name__}: {case[0]}") for op, cases in EXAMPLES.items() for case in cases
]


def ops_of_the_package():
    """Every op that autograd, ops and model define, found without naming one."""
    for package in (minidsv3.ops, minidsv3.model):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    found, waiting = set(), [Function]
    while waiting:
        subclasses = waiting.pop().__subclasses__()
        found.update(subclasses)
        waiting.extend(subclasses)
    ours = ("minidsv3.ops.", "minidsv3.model.", "minidsv3.autograd")
    return {op for op in found if op.__module__.startswith(ours)}


def test_every_op_has_an_example():
    missing = ops_of_the_package() - set(EXAMPLES)
    assert not missing, f"no gradient example for {sorted(op.__name__ for op in missing)}"


@pytest.mark.parametrize("op, arrays, constants", CASES)
def test_op_gradient_agrees_with_central_differences(op, arrays, constants):
    inputs = [Tensor(array.copy(), requires_grad=True) for array in arrays]
    check_gradients(lambda *tensors: op.apply(*tensors, **constants), inputs, samples=40)


@pytest.mark.parametrize("op, arrays, constants", CASES)
def test_op_keeps_float32(op, arrays, constants):
    """Constants too: a float64 rotation would be a caller's error."""
    constants = {k: v.astype(np.complex64) if k == "rotation" else v for k, v in constants.items()}
    inputs = [Tensor(array.astype(np.float32), requires_grad=True) for array in arrays]
    outputs = op.apply(*inputs, **constants)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    dxs = outputs[0]._op.backward(*(np.ones_like(t.data) for t in outputs))
    dxs = [dx() if callable(dx) else dx for dx in (dxs if isinstance(dxs, tuple) else (dxs,))]
    assert {a.dtype for a in [*(t.data for t in outputs), *dxs]} == {np.dtype(np.float32)}


@pytest.mark.parametrize("op, arrays, constants", CASES)
def test_op_writes_neither_inputs_nor_output_gradients(op, arrays, constants):
    arrays = [array.copy() for array in arrays]
    kept = [array.copy() for array in arrays]
    outputs = op.apply(*(Tensor(a, requires_grad=True) for a in arrays), **constants)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    dys = [np.ones_like(t.data) for t in outputs]
    for dy in dys:
        dy.flags.writeable = False
    dxs = outputs[0]._op.backward(*dys)
    for dx in dxs if isinstance(dxs, tuple) else (dxs,):
        _ = dx() if callable(dx) else dx
    assert all(np.array_equal(a, b) for a, b in zip(arrays, kept))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: LinearFunction.apply(normal(2, 4), normal(7, 5)),
            r"Linear: weight has shape \(7, 5\), expected \(any, 4\)",
        ),
        (
            lambda: GroupedLinearFunction.apply(normal(5, 4), normal(2, 3, 4), rows_per_expert=np.array([3, 3])),
            r"GroupedLinear: x has shape \(5, 4\), expected \(6, any\)",
        ),
        (
            lambda: GroupedLinearFunction.apply(normal(6, 4), normal(2, 3, 4), rows_per_expert=np.array([3, 2, 1])),
            r"GroupedLinear: weight has shape \(2, 3, 4\), expected \(3, any, 4\)",
        ),
        (
            lambda: EmbeddingFunction.apply(normal(7, 4), tokens=np.array([3, 7])),
            r"tokens 3\.\.7 exceed a vocabulary of 7",
        ),
        (lambda: EmbeddingFunction.apply(normal(7, 4), tokens=np.array([-1, 2])), r"tokens -1\.\.2 exceed"),
        (
            lambda: AttentionFunction.apply(normal(2, 5, 3, 8), normal(2, 5, 4, 8), normal(2, 5, 4), scale=1.0),
            r"Attention: kv has shape \(2, 5, 4, 8\), expected \(2, 5, 3, any\)",
        ),
        (
            lambda: AttentionFunction.apply(normal(2, 5, 3, 8), normal(2, 5, 3, 8), normal(2, 6, 4), scale=1.0),
            r"Attention: k_rope has shape \(2, 6, 4\), expected \(2, 5, any\)",
        ),
        (
            lambda: AttentionFunction.apply(normal(2, 5, 3, 8), normal(2, 5, 3, 8), normal(2, 5, 9), scale=1.0),
            "Attention: k_rope has 9 of 8 query channels",
        ),
        (
            lambda: CrossEntropyFunction.apply(normal(2, 5), targets=np.array([1, 2, 3])),
            r"CrossEntropy: targets has shape \(3,\), expected \(2\)",
        ),
        (
            lambda: CrossEntropyFunction.apply(normal(2, 5), targets=np.array([1, 5])),
            "neither -100 nor in a vocabulary of 5",
        ),
        (
            lambda: SequenceBalanceLossFunction.apply(normal(10, 7), topk_idx=TOPK_IDX, batch=3),
            "10 tokens do not make 3 sequences",
        ),
        (
            lambda: RMSNormFunction.apply(normal(2, 4), normal(5), eps=1e-6),
            r"RMSNorm: weight has shape \(5,\), expected \(4\)",
        ),
        (
            lambda: RopeFunction.apply(normal(2, 5, 3, 4), rotation=rotation(6, 4)),
            r"RoPE: x has shape .*expected \(any, 6,",
        ),
        (
            lambda: RopeFunction.apply(normal(2, 5, 3, 4), rotation=rotation(5, 6)),
            "RoPE: rotation of 6 channels exceeds the head's 4",
        ),
        (lambda: GateScoreFunction.apply(normal(2, 4), scoring_func="relu"), "GateScore: scoring_func='relu'"),
        (
            lambda: GateWeightFunction.apply(normal(4, 7), topk_idx=TOPK_IDX, normalize=True, scale=1.0),
            r"GateWeight: topk_idx has shape \(10, 3\), expected \(4, any\)",
        ),
        (
            lambda: PermuteFunction.apply(normal(4, 5), **ROUTE),
            r"Permute: row_of_slot has shape \(10, 3\), expected \(4, any\)",
        ),
        (
            lambda: UnpermuteFunction.apply(normal(30, 4), normal(10, 2), **ROUTE),
            r"Unpermute: weights has shape \(10, 2\), expected \(10, 3\)",
        ),
        (lambda: SplitFunction.apply(normal(2, 9), sizes=(4, 4)), r"Split: x has shape \(2, 9\), expected \(2, 8\)"),
        (
            lambda: ConcatFunction.apply(normal(2, 9), normal(3, 9)),
            r"Concat: input has shape \(3, 9\), expected \(2, any\)",
        ),
        (
            lambda: PositionsFunction.apply(normal(2, 5), start=2, stop=6),
            "Positions: 2:6 does not lie in a sequence of 5",
        ),
        (lambda: AddFunction.apply(normal(2, 5), normal(2, 1)), r"Add: term has shape \(2, 1\), expected \(2, 5\)"),
        (lambda: SwiGLUFunction.apply(normal(2, 5)), "SwiGLU: last axis of .* is not even"),
    ],
)
def test_op_names_itself_argument_got_and_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_attention_example_spans_blocks_unevenly():
    longest = max(arrays[0].shape[1] for _, arrays, _ in EXAMPLES[AttentionFunction])
    assert longest > QUERY_BLOCK and longest % QUERY_BLOCK
