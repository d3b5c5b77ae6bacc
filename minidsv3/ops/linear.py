"""Matrix products with a weight: linear, grouped linear (one weight per expert), and the embedding look-up.

A linear layer is three gemms: ``y = x w^T`` forward (fprop), ``dx = dy w`` (dgrad) and ``dw = dy^T x`` (wgrad). They
are asked of a *gemm* object, so that a precision recipe can put other arithmetic in their place: `keep(x)` says what
is stored for the weight gradient, `load(w)` in which form the weight is used, the others compute. `Gemm` here is the
exact one. An input that its op can make again for less than a gemm (`Function.again`) is not kept.

The weight gradient is returned as a thunk: the engine runs it at once, or later (zero-bubble pipelines).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from ..autograd import Array, Function, InPlaceThunk, Tensor, Thunk, is_replaced
from .shape import require_shape

Ranges = list[tuple[int, int, int]]  # (expert, first row, end row) of every expert that has rows


class Gemm:
    """The three matrix products of a linear layer in the precision of the arrays themselves."""

    def keep(self, x: Array) -> Any:
        """What is stored of the input for `wgrad`."""
        return x

    def load(self, w: Array) -> Any:
        """The weight as `fprop` and `dgrad` use it."""
        return w

    def fprop(self, x: Array, w: Array, out: Array | None = None, kept: Any = None) -> Array:
        """``x w^T``: x [N, D_in], w [D_out, D_in] -> [N, D_out]; `kept` is what `keep(x)` gave, if it was asked."""
        return np.matmul(x, w.T, out=out)

    def dgrad(self, dy: Array, w: Array, out: Array | None = None) -> Array:
        """``dy w``: dy [N, D_out], w [D_out, D_in] -> [N, D_in]."""
        return np.matmul(dy, w, out=out)

    def wgrad(self, dy: Array, kept: Any, out: Array | None = None) -> Array:
        """``dy^T x``: dy [N, D_out], x [N, D_in] -> [D_out, D_in]."""
        return np.matmul(dy.T, kept, out=out)

    def wgrad_again(self, dy: Array, x: Array, out: Array | None = None) -> Array:
        """`wgrad` where x was not kept and has been computed again."""
        return self.wgrad(dy, self.keep(x), out=out)

    def forward(self, x: Array, w: Array, keep: bool = True) -> tuple[Array, Any, Any]:
        """`fprop` with what it needs: y, `keep(x)` (for nobody, unless `keep`) and `load(w)`."""
        kept, weight = self.keep(x), self.load(w)
        return self.fprop(x, weight, kept=kept), kept, weight

    def forward_groups(self, x: Array, w: Array, ranges: Ranges, keep: bool = True) -> tuple[Array, list, list]:
        """`forward` of each expert's rows with its own weight, w [E, D_out, D_in]; `kept` and weights one by one."""
        y, kept = np.empty((x.shape[0], w.shape[1]), dtype=x.dtype), [self.keep(x[a:b]) for _, a, b in ranges]
        weights = [self.load(w[e]) for e, _, _ in ranges]
        for (_, a, b), rows, weight in zip(ranges, kept, weights):
            self.fprop(x[a:b], weight, out=y[a:b], kept=rows)
        return y, kept, weights

    def dgrad_groups(self, dy: Array, weights: Sequence, ranges: Ranges, out: Array) -> None:
        """`dgrad` of each expert's rows into out [N, D_in], with the weights that `forward_groups` gave."""
        for (_, a, b), w in zip(ranges, weights):
            self.dgrad(dy[a:b], w, out=out[a:b])

    def wgrad_groups(self, dy: Array, kept: Sequence | Array, ranges: Ranges, out: Array) -> None:
        """`wgrad` of each expert into out[e]; `kept` as `forward_groups` gave it, or x itself, computed again."""
        if isinstance(kept, np.ndarray):
            for e, a, b in ranges:
                self.wgrad_again(dy[a:b], kept[a:b], out=out[e])
        else:
            for (e, a, b), x in zip(ranges, kept):
                self.wgrad(dy[a:b], x, out=out[e])


EXACT = Gemm()


class LinearFunction(Function):
    """``y = x w^T`` over the last axis; x [..., D_in], w [D_out, D_in] -> [..., D_out].

    With `again`, a function that computes the rows of x once more, nothing of x is kept: the weight gradient calls it.
    """

    def forward(self, x: Array, w: Array, *, gemm: Gemm = EXACT, again: Thunk | None = None) -> Array:
        require_shape("Linear", "weight", w, (None, x.shape[-1]))
        rows = x.reshape(-1, x.shape[-1])  # [N, D_in]
        self._gemm, self._shape, self._again = gemm, x.shape, again
        self.flops = 2 * rows.shape[0] * w.size
        y, kept, weight = gemm.forward(rows, w, keep=not again)
        self.save(*(() if again else (kept,)), weight)
        return y.reshape(*x.shape[:-1], w.shape[0])

    def backward(self, dy: Array) -> tuple[Array | None, InPlaceThunk]:
        *kept, weight = self.saved
        gemm, again, dy = self._gemm, self._again, dy.reshape(-1, dy.shape[-1])
        dx = gemm.dgrad(dy, weight).reshape(self._shape) if self.needs(0) else None
        return dx, InPlaceThunk(
            lambda out: gemm.wgrad_again(dy, again(), out) if again else gemm.wgrad(dy, kept[0], out)
        )


class GroupedLinearFunction(Function):
    """One weight per expert over rows sorted by expert: x [N, D_in], w [E, D_out, D_in] -> [N, D_out].

    `rows_per_expert` [E] int cuts the rows; an expert without rows costs nothing and gets a zero gradient.
    """

    def forward(
        self, x: Array, w: Array, *, rows_per_expert: Array, gemm: Gemm = EXACT, again: Thunk | None = None
    ) -> Array:
        require_shape("GroupedLinear", "weight", w, (len(rows_per_expert), None, x.shape[-1]))
        require_shape("GroupedLinear", "x", x, (int(rows_per_expert.sum()), None))
        self._gemm, self._ranges, self._again, self._w_shape = gemm, _ranges(rows_per_expert), again, w.shape
        self.flops = 2 * x.shape[0] * w.shape[1] * w.shape[2]
        y, kept, weights = gemm.forward_groups(x, w, self._ranges, keep=not again)
        self.save(*weights, *(() if again else kept))
        return y

    def backward(self, dy: Array) -> tuple[Array, InPlaceThunk]:
        gemm, ranges, again, shape = self._gemm, self._ranges, self._again, self._w_shape
        weights, kept = self.saved[: len(ranges)], self.saved[len(ranges) :]
        dx = np.empty((dy.shape[0], shape[2]), dtype=dy.dtype)
        gemm.dgrad_groups(dy, weights, ranges, dx)

        def weight_gradient(out: Array | None) -> Array:
            dw = np.empty(shape, dtype=dy.dtype) if out is None else out
            if len(ranges) < len(dw):
                dw[...] = 0
            gemm.wgrad_groups(dy, again() if again else kept, ranges, dw)
            return dw

        return dx, InPlaceThunk(weight_gradient)


class EmbeddingFunction(Function):
    """Rows of a table: w [V, D], tokens int [...] -> [..., D]."""

    def forward(self, w: Array, *, tokens: Array) -> Array:
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(w):
            raise ValueError(
                f"Embedding: tokens {int(tokens.min())}..{int(tokens.max())} exceed a vocabulary of {len(w)}"
            )
        self._shape = w.shape
        self.save(tokens)
        return np.take(w, tokens, axis=0)

    def backward(self, dy: Array) -> Thunk:
        (tokens,) = self.saved

        def weight_gradient() -> Array:
            dw = np.zeros(self._shape, dtype=dy.dtype)
            if tokens.size:
                order = np.argsort(tokens, axis=None, kind="stable")  # equal tokens side by side, in text order
                ids = tokens.reshape(-1)[order]
                starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
                dw[ids[starts]] = np.add.reduceat(dy.reshape(-1, self._shape[1])[order], starts, axis=0)
            return dw

        return weight_gradient


def _ranges(rows_per_expert: Array) -> Ranges:
    stops = list(accumulate(rows_per_expert.tolist()))
    return [(e, a, b) for e, (a, b) in enumerate(zip([0, *stops], stops)) if b > a]


def _again(x: Tensor | Array, op: type[Function]) -> dict[str, Thunk]:
    """How `op` can have its input made again, as its constant; a replacement is not asked to know it, and keeps x."""
    maker = x.made_by if isinstance(x, Tensor) else None
    again = maker.again() if maker and not is_replaced(op) else None
    return {"again": partial(_rows, again)} if again else {}


def _rows(again: Thunk) -> Array:
    x = again()
    return x.reshape(-1, x.shape[-1])


def linear(x: Tensor, w: Tensor, gemm: Gemm = EXACT) -> Tensor:
    """``x w^T``: [..., D_in], [D_out, D_in] -> [..., D_out]."""
    return LinearFunction.apply(x, w, gemm=gemm, **_again(x, LinearFunction))


def grouped_linear(x: Tensor, w: Tensor, rows_per_expert: Array, gemm: Gemm = EXACT) -> Tensor:
    """Rows [N, D_in] sorted by expert, weights [E, D_out, D_in] -> [N, D_out]."""
    again = _again(x, GroupedLinearFunction)
    return GroupedLinearFunction.apply(x, w, rows_per_expert=rows_per_expert, gemm=gemm, **again)


def embedding(w: Tensor, tokens: Array) -> Tensor:
    """Table [V, D], tokens int [...] -> [..., D]."""
    return EmbeddingFunction.apply(w, tokens=tokens)
