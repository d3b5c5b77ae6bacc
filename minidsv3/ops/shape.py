"""Ops that only move numbers: reshape, split, concatenate, slice, add; and the shape check that all ops share.

None of them computes anything beyond a sum, but each is a node of the tape, so each states where a gradient goes:
the gradient of a split is a concatenation, of a slice a zero-padded copy, of a sum the same array for every term.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import numpy as np

from ..autograd import Array, Function, Tensor


def require_shape(op: str, argument: str, array: Array, expected: tuple[int | None, ...]) -> None:
    """ValueError naming op, argument, got and expected, unless the shapes agree (None matches any size)."""
    shape = array.shape
    if len(shape) == len(expected):
        for got, wanted in zip(shape, expected):
            if wanted is not None and got != wanted:
                break
        else:
            return
    sizes = ", ".join("any" if e is None else str(e) for e in expected)
    raise ValueError(f"{op}: {argument} has shape {shape}, expected ({sizes})")


class ReshapeFunction(Function):
    """The same numbers under another shape."""

    def forward(self, x: Array, *, shape: tuple[int, ...]) -> Array:
        self._shape = x.shape
        return x.reshape(shape)

    def backward(self, dy: Array) -> Array:
        return dy.reshape(self._shape)


class RoundFunction(Function):
    """Numbers through `rounding` (array -> array of the same shape and dtype); the gradient passes unchanged."""

    def forward(self, x: Array, *, rounding: Callable[[Array], Array]) -> Array:
        return rounding(x)

    def backward(self, dy: Array) -> Array:
        return dy


class SplitFunction(Function):
    """Cut the last axis into pieces of the given sizes."""

    def forward(self, x: Array, *, sizes: tuple[int, ...]) -> tuple[Array, ...]:
        require_shape("Split", "x", x, (*x.shape[:-1], sum(sizes)))
        stops = accumulate(sizes)
        return tuple(x[..., stop - size : stop] for size, stop in zip(sizes, stops))

    def backward(self, *dys: Array) -> Array:
        return np.concatenate(dys, axis=-1)


class ConcatFunction(Function):
    """Join along the last axis."""

    def forward(self, *xs: Array) -> Array:
        for x in xs[1:]:
            require_shape("Concat", "input", x, (*xs[0].shape[:-1], None))
        self._stops = list(accumulate(x.shape[-1] for x in xs))
        return np.concatenate(xs, axis=-1)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return tuple(dy[..., a:b] for a, b in zip([0, *self._stops], self._stops))


class PositionsFunction(Function):
    """Positions ``start:stop`` of axis 1 (the sequence)."""

    def forward(self, x: Array, *, start: int, stop: int) -> Array:
        if not 0 <= start <= stop <= x.shape[1]:
            raise ValueError(f"Positions: {start}:{stop} does not lie in a sequence of {x.shape[1]}")
        self._shape, self._range = x.shape, slice(start, stop)
        return x[:, start:stop]

    def backward(self, dy: Array) -> Array:
        dx = np.zeros(self._shape, dtype=dy.dtype)
        dx[:, self._range] = dy
        return dx


class AddFunction(Function):
    """``sum_i weights[i] * x_i``; weights default to one."""

    def forward(self, *xs: Array, weights: tuple[float, ...] | None = None) -> Array:
        for x in xs[1:]:
            require_shape("Add", "term", x, xs[0].shape)
        self._weights = weights
        if weights is None:
            total = xs[0] + xs[1] if len(xs) > 1 else xs[0].copy()
            for x in xs[2:]:
                total += x
            return total
        return np.asarray(sum(w * x for w, x in zip(weights, xs)), dtype=xs[0].dtype)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        if self._weights is None:
            return (dy,) * len(self._needs)
        return tuple(np.asarray(w * dy, dtype=dy.dtype) for w in self._weights)


def rounded(x: Tensor, rounding: Callable[[Array], Array] | None) -> Tensor:
    """x, or its numbers rounded as a precision recipe says."""
    return x if rounding is None else RoundFunction.apply(x, rounding=rounding)


def reshape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x` under another shape."""
    return ReshapeFunction.apply(x, shape=shape)


def split_last(x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Pieces of the last axis."""
    return SplitFunction.apply(x, sizes=sizes)


def concat_last(*xs: Tensor) -> Tensor:
    """Join along the last axis."""
    return ConcatFunction.apply(*xs)


def positions(x: Tensor, start: int, stop: int) -> Tensor:
    """Positions ``start:stop`` of a [B, S, ...] tensor."""
    return PositionsFunction.apply(x, start=start, stop=stop)


def add(*xs: Tensor, weights: tuple[float, ...] | None = None) -> Tensor:
    """Sum of tensors of one shape, each times its weight."""
    return AddFunction.apply(*xs, weights=weights)
