"""The three matrix products of a linear layer in low precision.

Each class has the interface that the linear ops ask for (`ops.linear.Gemm` is the exact one):

    kept = gemm.keep(x)               what is stored of the input: it serves fprop now and wgrad later
    weight = gemm.load(w)             the weight as fprop and dgrad multiply with it, stored between the two
    gemm.fprop(x, weight, kept=kept)  y = x w^T        over the input channels
    gemm.dgrad(dy, weight)            dx = dy w        over the output channels
    gemm.wgrad(dy, kept)              dw = dy^T x      over the tokens

and the same for all experts of a layer at once (`forward_groups`, `dgrad_groups`, `wgrad_groups`).

`FP8Gemm` is the report's (section 3.3): E4M3 everywhere; inputs and gradients in 1x128 tiles along the dimension that
is summed over, so what is kept of x as 1x128 is cut anew as 128x1 for the weight gradient; weights in 128x128 blocks,
which serve both directions. Its accumulator is either the emulated Hopper tensor core with promotion every 128
(`exact=True`, some thirty times slower), or BLAS in FP32 over the same 128-blocks. What is missing then is the tensor
core's own loss of bits; and scales are multiplied in before the product instead of after (`product` says why).

Outputs and input gradients are rounded to BF16, weight gradients stay FP32, as the report's Figure 6 has it.
Simplified: sums that BLAS takes within a block are FP32, in BLAS's own order; one process holds the whole batch of a
shard, so the 128 tokens of a tile are neighbours of one shard (for an expert: of the rows that were sent to it).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .blockwise import (
    BLOCK,
    Quantized,
    Rows,
    codes_and_values,
    dequantize,
    quantized,
    there_and_back,
)  # fmt: skip
from .formats import BF16, E4M3, Format, decode
from .product import Operand, Values, part, product, turned
from .rounding import round_bf16_in_place, round_sums_to_bf16

Ranges = list[tuple[int, int, int]]  # (expert, first row, end row), as `ops.linear` cuts them
Forward = tuple[np.ndarray, Sequence, Sequence]  # y, what is kept of x, of the weights
ACCUMULATE = ("fast", "exact")


class ByExpert:
    """The interface of `ops.linear.Gemm`, experts one by one: each expert's operands have their own scales."""

    def keep(self, x: np.ndarray) -> Any:
        raise NotImplementedError

    def load(self, w: np.ndarray) -> Any:
        raise NotImplementedError

    def fprop(self, x: np.ndarray, w: Any, out: np.ndarray | None = None, kept: Any = None) -> np.ndarray:
        raise NotImplementedError

    def dgrad(self, dy: np.ndarray, w: Any, out: np.ndarray | None = None) -> np.ndarray:
        raise NotImplementedError

    def wgrad(self, dy: np.ndarray, kept: Any, out: np.ndarray | None = None) -> np.ndarray:
        raise NotImplementedError

    def wgrad_again(self, dy: np.ndarray, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        return self.wgrad(dy, self.keep(x), out=out)

    def forward(self, x: np.ndarray, w: np.ndarray, keep: bool = True) -> tuple[np.ndarray, Any, Any]:
        kept, weight = self.keep(x), self.load(w)
        return self.fprop(x, weight, kept=kept), kept, weight

    def forward_groups(self, x: np.ndarray, w: np.ndarray, ranges: Ranges, keep: bool = True) -> Forward:
        y, kept = np.empty((len(x), w.shape[1]), dtype=x.dtype), [self.keep(x[a:b]) for _, a, b in ranges]
        weights = [self.load(w[e]) for e, _, _ in ranges]
        for (_, a, b), rows, weight in zip(ranges, kept, weights):
            self.fprop(x[a:b], weight, out=y[a:b], kept=rows)
        return y, kept, weights

    def dgrad_groups(self, dy: np.ndarray, weights: Sequence, ranges: Ranges, out: np.ndarray) -> None:
        for (_, a, b), weight in zip(ranges, weights):
            self.dgrad(dy[a:b], weight, out=out[a:b])

    def wgrad_groups(self, dy: np.ndarray, kept: Sequence | np.ndarray, ranges: Ranges, out: np.ndarray) -> None:
        pieces = [self.keep(kept[a:b]) for _, a, b in ranges] if isinstance(kept, np.ndarray) else kept
        for (e, a, b), rows in zip(ranges, pieces):
            self.wgrad(dy[a:b], rows, out=out[e])


class BF16Gemm(ByExpert):
    """Operands in BF16, sums in FP32; what is kept takes two bytes a number."""

    def keep(self, x: np.ndarray) -> np.ndarray:
        return (_bf16_values(x).view(np.uint32) >> 16).astype(np.uint16).view(BF16)

    def load(self, w: np.ndarray) -> np.ndarray:
        return self.keep(w)

    def fprop(
        self, x: np.ndarray, w: np.ndarray, out: np.ndarray | None = None, kept: np.ndarray | None = None
    ) -> np.ndarray:
        rows = decode(self.keep(x) if kept is None else kept)
        return finished(rows @ decode(loaded(self, w)).T, x.dtype, out)

    def dgrad(self, dy: np.ndarray, w: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        return finished(_bf16_values(dy) @ decode(loaded(self, w)), dy.dtype, out)

    def wgrad(self, dy: np.ndarray, kept: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        return finished(_bf16_values(dy).T @ decode(kept), dy.dtype, out, bf16=False)


class FP8Gemm(ByExpert):
    """Fine-grained FP8 (V3 report, section 3.3).

    Parameters
    ----------
    exact : bool
        The emulated tensor core instead of BLAS.
    x_scale, dy_scale : 'fp32' or 'ue8m0'
        Kind of the scales of inputs and of output gradients.
    kept : Format, optional
        Another format for what is kept of the input, with power-of-two scales (E5M6 behind the attention).
    dy_rows : int
        Rows that share a scale in the output gradient: 1, or 128 for the block-wise quantisation of appendix B.2, which
        serves dgrad and wgrad alike.
    """

    def __init__(
        self,
        *,
        exact: bool = False,
        x_scale: str = "fp32",
        dy_scale: str = "fp32",
        kept: Format | None = None,
        dy_rows: int = 1,
    ) -> None:
        self._exact, self._x_scale, self._dy_scale, self._kept, self._dy_rows = exact, x_scale, dy_scale, kept, dy_rows

    def keep(self, x: np.ndarray) -> Quantized:
        if self._kept is not None:
            return quantized(x, 1, BLOCK, "ue8m0", self._kept)
        return quantized(x, 1, BLOCK, self._x_scale)

    def load(self, w: np.ndarray) -> Quantized:
        return quantized(w, BLOCK, BLOCK, "fp32")

    def fprop(
        self, x: np.ndarray, w: np.ndarray | Quantized, out: np.ndarray | None = None, kept: Quantized | None = None
    ) -> np.ndarray:
        if kept is None or self._kept is not None:
            rows = self._operand(x, 1, BLOCK, self._x_scale)
        else:
            rows = self._stored(kept, 1)
        return _rounded(product(rows, self._stored(loaded(self, w), BLOCK)), x.dtype, out)

    def dgrad(self, dy: np.ndarray, w: np.ndarray | Quantized, out: np.ndarray | None = None) -> np.ndarray:
        weight = self._stored(loaded(self, w), BLOCK)
        return _rounded(product(self._gradient(dy, self._dy_rows), turned(weight)), dy.dtype, out)

    def wgrad(self, dy: np.ndarray, kept: Quantized | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        rows, x = self._along_tokens(dy, kept, BLOCK)
        return finished(product(turned(rows), turned(x), out), dy.dtype, out, bf16=False)

    def wgrad_again(self, dy: np.ndarray, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        return self.wgrad(dy, x, out=out)  # `_along_tokens` rounds as if x had been kept, without its codes

    # The same for all experts at once: what is quantised lies in one piece, the products are taken one by one.

    def forward(self, x: np.ndarray, w: np.ndarray, keep: bool = True) -> tuple[np.ndarray, Any, Any]:
        kept, rows = self._kept_and_used(x, keep)
        weight, columns = self._loaded_and_used(w, BLOCK)
        return _rounded(product(rows, columns), x.dtype), kept, weight

    def forward_groups(self, x: np.ndarray, w: np.ndarray, ranges: Ranges, keep: bool = True) -> Forward:
        E, D_out, D_in = w.shape
        stacked = _stacked(E, D_out)
        cuts = _cuts(stacked)
        kept, rows = self._kept_and_used(x, keep)
        weights, columns = self._loaded_and_used(w.reshape(-1, D_in), cuts)
        y = np.empty((len(x), D_out), dtype=np.float32)
        for e, a, b in ranges:
            product(part(rows, a, b), part(columns, *stacked[e][1:], cuts), y[a:b])
        saved = [part(weights, *stacked[e][1:], cuts) for e, _, _ in ranges]
        return _rounded(y, x.dtype), [part(kept, a, b) for _, a, b in ranges] if kept else [], saved

    def dgrad_groups(self, dy: np.ndarray, weights: Sequence, ranges: Ranges, out: np.ndarray) -> None:
        stacked = _stacked(len(weights), dy.shape[1])
        cuts = _cuts(stacked)
        columns = self._stored(_joined(weights), cuts)
        rows = self._gradient(dy, 1 if self._dy_rows == 1 else _cuts(ranges))
        dx = np.empty(out.shape, dtype=np.float32) if out.dtype != np.float32 else out
        for (_, a, b), (_, c, d) in zip(ranges, stacked):
            product(part(rows, a, b), turned(part(columns, c, d, cuts)), dx[a:b])
        _rounded(dx, out.dtype, out)

    def wgrad_groups(self, dy: np.ndarray, kept: Sequence | np.ndarray, ranges: Ranges, out: np.ndarray) -> None:
        cuts = _cuts(ranges)
        rows, x = self._along_tokens(dy, kept if isinstance(kept, np.ndarray) else _joined(kept), cuts)
        for e, a, b in ranges:
            product(turned(part(rows, a, b, cuts)), turned(part(x, a, b, cuts)), out[e])

    def _operand(self, x: np.ndarray, rows: Rows, columns: int, scale: str) -> Operand:
        """An operand that is used once: BLAS takes its values, the emulated tensor core its codes."""
        if self._exact:
            return quantized(x, rows, columns, scale)
        return Values(there_and_back(x, rows, columns, scale))

    def _stored(self, q: Quantized, rows: Rows) -> Operand:
        return q if self._exact else Values(dequantize(*q, rows, BLOCK))

    def _kept_and_used(self, x: np.ndarray, keep: bool) -> tuple[Quantized | None, Operand]:
        """What is kept of x, and x as fprop multiplies with it."""
        if self._kept is not None or not keep:
            return self.keep(x) if keep else None, self._operand(x, 1, BLOCK, self._x_scale)
        if self._exact:
            kept = self.keep(x)
            return kept, kept
        kept, values = codes_and_values(x, 1, BLOCK, self._x_scale)
        return kept, Values(values)

    def _loaded_and_used(self, w: np.ndarray, rows: Rows) -> tuple[Quantized, Operand]:
        """The stored weight, and as fprop multiplies with it."""
        if self._exact:
            weight = quantized(w, rows, BLOCK, "fp32")
            return weight, weight
        weight, values = codes_and_values(w, rows, BLOCK, "fp32")
        return weight, Values(values)

    def _gradient(self, dy: np.ndarray, rows: Rows) -> Operand:
        q = self._operand(dy, rows, BLOCK, self._dy_scale)
        if isinstance(q, Values) or rows == 1:
            return q
        heights = np.diff(rows) if isinstance(rows, list) else rows
        return Quantized(q.codes, np.repeat(q.scales, heights, axis=0)[: len(dy)])  # blocks: each row has its own

    def _along_tokens(self, dy: np.ndarray, kept: Quantized | np.ndarray, rows: Rows) -> tuple[Operand, Operand]:
        """dy and x of the weight gradient, cut anew along the tokens.

        Power-of-two scales on both sides lose nothing but what falls below E4M3's range.
        """
        x_scale = "ue8m0" if self._kept is not None else self._x_scale
        if isinstance(kept, np.ndarray):  # as if it had been kept
            kept = there_and_back(kept, 1, BLOCK, x_scale, self._kept or E4M3)
        else:
            kept = dequantize(*kept, 1, BLOCK)
        x = self._operand(kept, rows, 1, x_scale)
        q = self._operand(dy, rows, self._dy_rows, self._dy_scale)
        if isinstance(q, Quantized):  # blocks: each column has its own
            q = Quantized(q.codes, np.repeat(q.scales, self._dy_rows, axis=1)[:, : dy.shape[1]])
        return q, x


class FP8Store:
    """Where an op keeps its input for the backward pass in one byte a number: 1x128 tiles of E4M3."""

    def keep(self, x: np.ndarray) -> Quantized:
        return quantized(x.reshape(-1, x.shape[-1]), 1, BLOCK, "fp32")

    def load(self, kept: Quantized) -> np.ndarray:
        """The values, [rows, channels] float32."""
        return dequantize(*kept, 1, BLOCK)


def fake_quantized(x: np.ndarray) -> np.ndarray:
    """Values of 1x128 E4M3 tiles along the last axis, in the dtype and shape of x."""
    rows = x.reshape(-1, x.shape[-1])
    return there_and_back(rows, 1, BLOCK, "fp32").astype(x.dtype, copy=False).reshape(x.shape)


def _cuts(ranges: Ranges) -> list[int]:
    """Where blocks of 128 rows begin when none may reach from one expert into the next, and the end."""
    return [cut for _, a, b in ranges for cut in range(a, b, BLOCK)] + [ranges[-1][2] if ranges else 0]


def _joined(pieces: Sequence[Quantized]) -> Quantized:
    """What stood in one piece before each expert's part of it was saved."""
    if not pieces:
        return Quantized(np.empty((0, 0), dtype=E4M3), np.empty((0, 0), dtype=np.float32))
    return Quantized(*(np.concatenate(arrays) for arrays in zip(*pieces)))


def _stacked(E: int, D_out: int) -> Ranges:
    """The rows of each expert's weight when all stand on one another."""
    return [(e, e * D_out, (e + 1) * D_out) for e in range(E)]


def _bf16_values(x: np.ndarray) -> np.ndarray:
    """A float32 copy rounded to BF16; unlike `round_to` infinity stays, so that a step sees it."""
    return round_bf16_in_place(np.array(x, dtype=np.float32, order="C"))


def loaded(gemm: Any, w: Any) -> Any:
    """`w` as `load` gives it: quantised now if it still is the float matrix."""
    return gemm.load(w) if isinstance(w, np.ndarray) and w.dtype.kind == "f" and w.dtype.itemsize >= 4 else w


def _rounded(y: np.ndarray, dtype: np.dtype, out: np.ndarray | None = None) -> np.ndarray:
    """`finished` for sums of FP8 products.

    No scale is below 1e-4 / 448, so operands are multiples of 2^-55, and sums are zero or at least 2^-110.
    """
    round_sums_to_bf16(y)
    return finished(y, dtype, out, bf16=False)


def finished(y: np.ndarray, dtype: np.dtype, out: np.ndarray | None, bf16: bool = True) -> np.ndarray:
    """The product rounded to BF16 unless it is a weight gradient, in `dtype`, in `out` if given."""
    if bf16:
        round_bf16_in_place(y)
    if out is None or out is y:
        return y.astype(dtype, copy=False)
    out[...] = y
    return out
