"""The check of any op of the package: ``check("op:SwiGLUFunction", Mine)``.

Whoever rewrites an op (another formula, another memory plan, a compiled loop) asks the same three things as in the op
exercises: values, number types, gradients. One generator of cases an op, small to large, sizes pairwise different. It
is also what finds a wrong gradient in the package itself: handing in the package's own op is allowed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..autograd import Checkpoint, Function, Tensor
from ..ops.attention import AttentionFunction
from ..ops.linear import EmbeddingFunction, GroupedLinearFunction, LinearFunction
from ..ops.loss import CrossEntropyFunction, SequenceBalanceLossFunction
from ..ops.norm import RMSNormFunction, rms_norm
from ..ops.rope import RopeFunction, rotation_table
from ..ops.routing import GateScoreFunction, GateWeightFunction, PermuteFunction, UnpermuteFunction
from ..ops.shape import (
    AddFunction,
    ConcatFunction,
    PositionsFunction,
    ReshapeFunction,
    RoundFunction,
    SplitFunction,
)
from ..ops.swiglu import SwiGLUFunction, swiglu
from .exercise import Exercise, sizes
from .gradients import Case, op_properties

Rng = np.random.Generator


def rms_norm_cases(rng: Rng) -> list[Case]:
    B, S, D = sizes(rng, 3)
    return [
        ((rng.standard_normal((*lead, D)), rng.standard_normal(D)), dict(eps=eps))
        for lead, eps in (((1,), 0.5), ((S,), 1e-6), ((B, S), 0.1))
    ]


def cross_entropy_cases(rng: Rng) -> list[Case]:
    N, V = sizes(rng, 2, 3, 12)
    some = rng.integers(0, V, N)
    some[::3] = -100
    return [
        ((rng.standard_normal((N, V)),), dict(targets=rng.integers(0, V, N))),
        ((3 * rng.standard_normal((N, V)),), dict(targets=some)),
        ((900 + rng.standard_normal((N, V)),), dict(targets=some)),
        ((rng.standard_normal((N, V)),), dict(targets=np.full(N, -100, dtype=np.int64))),
    ]


def sequence_loss_cases(rng: Rng) -> list[Case]:
    out: list[Case] = []
    for batch, S, K, E in ((1, 3, 1, 4), (3, *sizes(rng, 1, 4, 6), 2, 8)):
        topk_idx = np.sort(np.argsort(rng.random((batch * S, E)), axis=1)[:, :K], axis=1)
        out.append(((rng.random((batch * S, E)) + 0.1,), dict(topk_idx=topk_idx, batch=batch)))
    return out


def rope_cases(rng: Rng) -> list[Case]:
    B, H, S = sizes(rng, 3, 2, 6)
    out: list[Case] = []
    for heads, d, d_r, interleave in ((1, 4, 4, True), (H, 10, 6, True), (H, 9, 6, True), (H, 10, 6, False)):
        rotation = rotation_table(np.arange(3, 3 + S, dtype=np.int64), d_r, 50.0, None, np.float64)
        out.append(((rng.standard_normal((B, S, heads, d)),), dict(rotation=rotation, interleave=interleave)))
    return out


def _route(rng: Rng) -> tuple[int, int, int, np.ndarray, dict[str, np.ndarray]]:
    K, E, T = sizes(rng, 3, 2, 9)
    topk_idx = np.sort(np.argsort(rng.random((T, E)), axis=1)[:, :K], axis=1)
    slot_of_row = np.argsort(topk_idx.reshape(-1), kind="stable")
    row_of_slot = np.argsort(slot_of_row).reshape(T, K)
    return T, K, E, topk_idx, dict(token_of_row=slot_of_row // K, row_of_slot=row_of_slot)


def _linear(rng: Rng) -> list[Case]:
    B, S, D, F = sizes(rng, 4)
    return [((rng.standard_normal((B, S, D)), rng.standard_normal((F, D))), {})]


def _grouped_linear(rng: Rng) -> list[Case]:
    D, F = sizes(rng, 2)
    rows = rng.permutation(np.array([0, 2, 3, 4], dtype=np.int64))
    return [((rng.standard_normal((9, D)), rng.standard_normal((4, F, D))), dict(rows_per_expert=rows))]


def _embedding(rng: Rng) -> list[Case]:
    S, D, V = sizes(rng, 3)
    return [((rng.standard_normal((V, D)),), dict(tokens=rng.integers(0, V, (3, S))))]


def _attention(rng: Rng) -> list[Case]:
    out: list[Case] = []
    for B, S, H, d, d_r, d_v, size in (
        (1, 2, 1, 3, 1, 2, 1),
        (2, 5, 3, 10, 6, 7, 1),
        (1, 67, 2, 5, 2, 3, 1),
        (2, 5, 3, 6, 6, 7, 40),
    ):
        q, kv = size * rng.standard_normal((B, S, H, d)), rng.standard_normal((B, S, H, d - d_r + d_v))
        out.append(((q, kv, rng.standard_normal((B, S, d_r))), dict(scale=0.4)))
    return out


def _gate_score(rng: Rng) -> list[Case]:
    T, E = sizes(rng, 2)
    return [((rng.standard_normal((T, E)),), dict(scoring_func=name)) for name in ("sigmoid", "softmax")]


def _gate_weight(rng: Rng) -> list[Case]:
    T, _, E, topk_idx, _ = _route(rng)
    scores = rng.random((T, E)) + 0.1
    return [
        ((scores,), dict(topk_idx=topk_idx, normalize=True, scale=2.5)),
        ((scores,), dict(topk_idx=topk_idx, normalize=False, scale=16.0)),
        ((scores,), dict(topk_idx=topk_idx[:, :1], normalize=True, scale=2.5)),
    ]


def _permute(rng: Rng) -> list[Case]:
    T, *_, route = _route(rng)
    return [((rng.standard_normal((T, 11)),), route)]


def _unpermute(rng: Rng) -> list[Case]:
    T, K, *_, route = _route(rng)
    return [((rng.standard_normal((T * K, 11)), rng.random((T, K))), route)]


def _reshape(rng: Rng) -> list[Case]:
    B, S, D = sizes(rng, 3)
    return [((rng.standard_normal((B, S, D)),), dict(shape=(B * S, -1)))]


def _shift(x: np.ndarray) -> np.ndarray:
    return x + x.dtype.type(0.25)  # a rounding that only moves numbers has the straight-through gradient exactly


def _round(rng: Rng) -> list[Case]:
    return [((rng.standard_normal(tuple(sizes(rng, 2))),), dict(rounding=_shift))]


def _split(rng: Rng) -> list[Case]:
    S, *pieces = sizes(rng, 4)
    return [((rng.standard_normal((S, sum(pieces))),), dict(sizes=tuple(pieces)))]


def _concat(rng: Rng) -> list[Case]:
    S, *pieces = sizes(rng, 4)
    return [(tuple(rng.standard_normal((S, n)) for n in pieces), {})]


def _positions(rng: Rng) -> list[Case]:
    B, D, S = sizes(rng, 3, 3)
    return [((rng.standard_normal((B, S, D)),), dict(start=1, stop=S - 1))]


def _add(rng: Rng) -> list[Case]:
    xs = tuple(rng.standard_normal(tuple(sizes(rng, 2))) for _ in range(1))
    more = tuple(rng.standard_normal(xs[0].shape) for _ in range(2))
    return [(xs + more[:1], {}), (xs + more, {}), (xs + more, dict(weights=(1.0, 0.3, -2.0))), (xs, {})]


def _swiglu(rng: Rng) -> list[Case]:
    B, S, F = sizes(rng, 3)
    return [((rng.standard_normal((B, S, 2 * F)),), {})]


def _checkpoint(rng: Rng) -> list[Case]:
    def run(x: Tensor, w: Tensor) -> Tensor:
        return swiglu(rms_norm(x, w, 1e-3))

    return [((rng.standard_normal((5, 6)), rng.standard_normal(6)), dict(run=run))]


CASES: dict[type[Function], Callable[[Rng], list[Case]]] = {
    LinearFunction: _linear, GroupedLinearFunction: _grouped_linear, EmbeddingFunction: _embedding,
    AttentionFunction: _attention, CrossEntropyFunction: cross_entropy_cases,
    SequenceBalanceLossFunction: sequence_loss_cases, RMSNormFunction: rms_norm_cases, RopeFunction: rope_cases,
    GateScoreFunction: _gate_score, GateWeightFunction: _gate_weight, PermuteFunction: _permute,
    UnpermuteFunction: _unpermute, ReshapeFunction: _reshape, RoundFunction: _round, SplitFunction: _split,
    ConcatFunction: _concat, PositionsFunction: _positions, AddFunction: _add, SwiGLUFunction: _swiglu,
    Checkpoint: _checkpoint,
}  # fmt: skip


def exercise_of_op(name: str) -> Exercise:
    """The check of the op class called `name`; ValueError for another name."""
    ops = {op.__name__: op for op in CASES}
    if name not in ops:
        raise ValueError(f"op {name!r} is not one of {', '.join(ops)}")
    op = ops[name]

    def enter(submission: Any, parts: Any) -> None:
        parts.replacements.append((op, submission))

    properties = op_properties(op, CASES[op])
    return Exercise(f"the op {name}, yours", "I", 1, 60, properties, allowed=("minidsv3",), enter=enter)
