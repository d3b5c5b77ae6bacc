"""The three matrix products of a linear layer in low precision.

Each class has the interface that the linear ops ask for (`ops.linear.Gemm` is the exact one):

    kept = gemm.keep(x)               what is stored of the input: it serves fprop now and wgrad later
    weight = gemm.load(w)             the weight as fprop and dgrad multiply with it, stored between the two
    gemm.fprop(x, weight, kept=kept)  y = x w^T        over the input channels
    gemm.dgrad(dy, weight)            dx = dy w        over the output channels
    gemm.wgrad(dy, kept)              dw = dy^T x      over the tokens

`FP8Gemm` is the report's (section 3.3): E4M3 everywhere; inputs and gradients in 1x128 tiles along the dimension that
is summed over, so what is kept of x as 1x128 is cut anew as 128x1 for the weight gradient; weights in 128x128 blocks,
which serve both directions. Its accumulator is either the emulated Hopper tensor core with promotion every 128
(`exact=True`, some thirty times slower), or BLAS in FP32 over the same 128-blocks with the same scaling in between:
all that is missing then is the tensor core's own loss of bits.

Outputs and input gradients are rounded to BF16, weight gradients stay FP32, as the report's Figure 6 has it.
Simplified: sums that BLAS takes within a block are FP32, in BLAS's own order; one process holds the whole batch of a
shard, so the 128 tokens of a tile are neighbours of one shard (for an expert: of the rows that were sent to it).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .blockwise import BLOCK, MX_BLOCK, Quantized, dequantize, quantize_mx, quantized
from .formats import BF16, E4M3, E5M2, Format, decode, round_bf16_in_place
from .tensorcore import deepgemm, tensorcore_matmul, tiled_matmul

Ranges = list[tuple[int, int, int]]  # (expert, first row, end row), as `ops.linear` cuts them
ACCUMULATE = ("fast", "exact")


class _Gemm:
    """Experts one by one: where scales are shared between rows, each expert's rows have their own."""

    def keep(self, x: np.ndarray) -> Any:
        raise NotImplementedError

    def load(self, w: np.ndarray) -> Any:
        raise NotImplementedError

    def keep_groups(self, x: np.ndarray, ranges: Ranges) -> list[Any]:
        return [self.keep(x[a:b]) for _, a, b in ranges]

    def load_groups(self, w: np.ndarray, ranges: Ranges) -> list[Any]:
        return [self.load(w[e]) for e, _, _ in ranges]

    def gradient_groups(self, dy: np.ndarray, ranges: Ranges) -> list[Any]:
        return [dy[a:b] for _, a, b in ranges]


class BF16Gemm(_Gemm):
    """Operands in BF16, sums in FP32; what is kept takes two bytes a number."""

    def keep(self, x: np.ndarray) -> np.ndarray:
        return (_bf16_values(x).view(np.uint32) >> 16).astype(np.uint16).view(BF16)

    load = keep

    def fprop(
        self, x: np.ndarray, w: np.ndarray, out: np.ndarray | None = None, kept: np.ndarray | None = None
    ) -> np.ndarray:
        rows = decode(self.keep(x) if kept is None else kept)
        return _finished(rows @ decode(_loaded(self, w)).T, x.dtype, out)

    def dgrad(self, dy: np.ndarray, w: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        return _finished(_bf16_values(dy) @ decode(_loaded(self, w)), dy.dtype, out)

    def wgrad(self, dy: np.ndarray, kept: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        return _finished(_bf16_values(dy).T @ decode(kept), dy.dtype, out, bf16=False)


class FP8Gemm(_Gemm):
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
            kept = self._operand(x, 1, BLOCK, self._x_scale)
        return _finished(scaled_product(kept, _loaded(self, w), exact=self._exact), x.dtype, out)

    def dgrad(self, dy: np.ndarray | Quantized, w: np.ndarray | Quantized, out: np.ndarray | None = None) -> np.ndarray:
        weight = _loaded(self, w)
        q = self._gradient(dy) if isinstance(dy, np.ndarray) else dy
        product = scaled_product(q, Quantized(weight.codes.T, weight.scales.T), exact=self._exact)
        return _finished(product, product.dtype if dy is q else dy.dtype, out)

    def wgrad(self, dy: np.ndarray, kept: Quantized, out: np.ndarray | None = None) -> np.ndarray:
        # Cut anew along the tokens; power-of-two scales on both sides lose nothing but what falls below E4M3's range.
        x = self._operand(dequantize(*kept, 1, BLOCK), BLOCK, 1, "ue8m0" if self._kept is not None else self._x_scale)
        q = self._operand(dy, BLOCK, 1 if self._dy_rows == 1 else BLOCK, self._dy_scale)
        dy_scales = q.scales if self._dy_rows == 1 else np.repeat(q.scales, BLOCK, axis=1)[:, : dy.shape[1]]
        product = scaled_product(Quantized(q.codes.T, dy_scales.T), Quantized(x.codes.T, x.scales.T), exact=self._exact)
        return _finished(product, dy.dtype, out, bf16=False)

    def keep_groups(self, x: np.ndarray, ranges: Ranges) -> list[Quantized]:
        return _rows(self.keep(x), ranges)  # a tile has one row: no scale is shared between experts

    def load_groups(self, w: np.ndarray, ranges: Ranges) -> list[Quantized]:
        E, D_out, D_in = w.shape
        if D_out % BLOCK or len(ranges) < E:
            return super().load_groups(w, ranges)
        return _rows(self.load(w.reshape(-1, D_in)), [(e, e * D_out, (e + 1) * D_out) for e in range(E)], BLOCK)

    def gradient_groups(self, dy: np.ndarray, ranges: Ranges) -> list[Any]:
        return _rows(self._gradient(dy), ranges) if self._dy_rows == 1 else super().gradient_groups(dy, ranges)

    def _operand(self, x: np.ndarray, rows: int, columns: int, scale: str) -> Quantized:
        """An operand that is used once: BLAS takes its values, the emulated tensor core its codes."""
        return quantized(x, rows, columns, scale, as_values=not self._exact)

    def _gradient(self, dy: np.ndarray) -> Quantized:
        q = self._operand(dy, self._dy_rows, BLOCK, self._dy_scale)
        if self._dy_rows == 1:
            return q
        return Quantized(q.codes, np.repeat(q.scales, self._dy_rows, axis=0)[: len(dy)])


class TensorwiseGemm(_Gemm):
    """One scale a tensor, E4M3 forwards and E5M2 for gradients: the older recipe that the report compares with.

    Scales are taken from the tensor at hand. With `exact`, partial sums are promoted every 128, and scaled at the end.
    """

    def __init__(self, *, exact: bool = False) -> None:
        self._exact = exact

    def keep(self, x: np.ndarray) -> Quantized:
        return quantized(x, max(1, x.shape[0]), max(1, x.shape[1]), "fp32", E4M3)

    load = keep

    def fprop(
        self, x: np.ndarray, w: np.ndarray | Quantized, out: np.ndarray | None = None, kept: Quantized | None = None
    ) -> np.ndarray:
        return _finished(self._product(self.keep(x) if kept is None else kept, _loaded(self, w)), x.dtype, out)

    def dgrad(self, dy: np.ndarray, w: np.ndarray | Quantized, out: np.ndarray | None = None) -> np.ndarray:
        weight = _loaded(self, w)
        product = self._product(self._gradient(dy), Quantized(weight.codes.T, weight.scales))
        return _finished(product, dy.dtype, out)

    def wgrad(self, dy: np.ndarray, kept: Quantized, out: np.ndarray | None = None) -> np.ndarray:
        q = self._gradient(dy)
        product = self._product(Quantized(q.codes.T, q.scales), Quantized(kept.codes.T, kept.scales))
        return _finished(product, dy.dtype, out, bf16=False)

    def _gradient(self, dy: np.ndarray) -> Quantized:
        return quantized(dy, max(1, dy.shape[0]), max(1, dy.shape[1]), "fp32", E5M2)

    def _product(self, a: Quantized, b: Quantized) -> np.ndarray:
        if self._exact:
            product = tensorcore_matmul(a.codes, b.codes, promote_every=BLOCK)
        else:
            product = _values(a.codes) @ _values(b.codes).T
        if a.scales.size and b.scales.size:  # a tensor without numbers has no scale
            product *= a.scales[0, 0] * b.scales[0, 0]
        return product


class MXKept(NamedTuple):
    """A matrix quantised along its rows and along its columns: MX blocks lie along what is summed over."""

    rows: Quantized | None
    columns: Quantized  # of the transpose

    @property
    def nbytes(self) -> int:
        return self.columns.nbytes + (self.rows.nbytes if self.rows is not None else 0)


class MXGemm(_Gemm):
    """MXFP8: E4M3 in blocks of 32 with power-of-two scales that do not clip, sums in FP32."""

    def keep(self, x: np.ndarray) -> MXKept:
        return MXKept(None, _mx(x.T))

    def load(self, w: np.ndarray) -> MXKept:
        return MXKept(_mx(w), _mx(w.T))

    def fprop(
        self, x: np.ndarray, w: np.ndarray | MXKept, out: np.ndarray | None = None, kept: MXKept | None = None
    ) -> np.ndarray:
        weight = _loaded(self, w).rows
        return _finished(_mx_values(_mx(x)) @ _mx_values(weight).T, x.dtype, out)

    def dgrad(self, dy: np.ndarray, w: np.ndarray | MXKept, out: np.ndarray | None = None) -> np.ndarray:
        return _finished(_mx_values(_mx(dy)) @ _mx_values(_loaded(self, w).columns).T, dy.dtype, out)

    def wgrad(self, dy: np.ndarray, kept: MXKept, out: np.ndarray | None = None) -> np.ndarray:
        return _finished(_mx_values(_mx(dy.T)) @ _mx_values(kept.columns).T, dy.dtype, out, bf16=False)


class FP8Store:
    """Where an op keeps its input for the backward pass in one byte a number: 1x128 tiles of E4M3."""

    def keep(self, x: np.ndarray) -> Quantized:
        return quantized(x.reshape(-1, x.shape[-1]), 1, BLOCK, "fp32")

    def load(self, kept: Quantized) -> np.ndarray:
        """The values, [rows, channels] float32."""
        return dequantize(*kept, 1, BLOCK)


def scaled_product(a: Quantized, b: Quantized, *, exact: bool = False) -> np.ndarray:
    """``a b^T`` with scales every 128 of K, summed block by block in FP32.

    Parameters
    ----------
    a : FP8 codes (or without `exact` their float32 values) [M, K], scales [M, ceil(K / 128)]
    b : FP8 codes [N, K], scales [N, ceil(K / 128)] of tiles or [ceil(N / 128), ceil(K / 128)] of blocks
    exact : bool
        Each block of K on the emulated Hopper tensor core, with one FMA to scale and add it.

    Returns
    -------
    float32 [M, N]
    """
    N, K = b.codes.shape
    tiles = b.scales.shape[0] == N
    if exact:
        return (tiled_matmul if tiles else deepgemm)(a.codes, a.scales, b.codes, b.scales)
    x, y = _values(a.codes), _values(b.codes)
    total = np.zeros((len(x), N), dtype=np.float32) if K == 0 else None
    for i, k in enumerate(range(0, K, BLOCK)):
        partial = x[:, k : k + BLOCK] @ y[:, k : k + BLOCK].T
        if tiles:
            partial *= a.scales[:, i, None] * b.scales[None, :, i]
        else:
            for j, n in enumerate(range(0, N, BLOCK)):
                partial[:, n : n + BLOCK] *= (a.scales[:, i] * b.scales[j, i])[:, None]
        total = partial if total is None else np.add(total, partial, out=total)
    assert total is not None
    return total


def fake_quantized(x: np.ndarray) -> np.ndarray:
    """Values of 1x128 E4M3 tiles along the last axis, in the dtype and shape of x."""
    rows = x.reshape(-1, x.shape[-1])
    return dequantize(*quantized(rows, 1, BLOCK, "fp32"), 1, BLOCK).astype(x.dtype, copy=False).reshape(x.shape)


def _rows(q: Quantized, ranges: Ranges, block: int = 1) -> list[Quantized]:
    """Pieces of `q`, whose scales serve `block` rows each."""
    return [Quantized(q.codes[a:b], q.scales[a // block : b // block]) for _, a, b in ranges]


def _values(codes: np.ndarray) -> np.ndarray:
    """float32 values in the memory order of the codes, so that a transpose costs nothing; values are given back."""
    if codes.dtype == np.float32:
        return codes
    return decode(codes) if codes.flags.c_contiguous else decode(codes.T).T


def _bf16_values(x: np.ndarray) -> np.ndarray:
    """A float32 copy rounded to BF16; unlike `round_to` infinity stays, so that a step sees it."""
    return round_bf16_in_place(np.array(x, dtype=np.float32, order="C"))


def _mx(x: np.ndarray) -> Quantized:
    return quantize_mx(x, E4M3, "rceil")


def _mx_values(q: Quantized) -> np.ndarray:
    return dequantize(*q, 1, MX_BLOCK)


def _loaded(gemm: Any, w: Any) -> Any:
    """`w` as `load` gives it: quantised now if it still is the float matrix."""
    return gemm.load(w) if isinstance(w, np.ndarray) and w.dtype.kind == "f" and w.dtype.itemsize >= 4 else w


def _finished(product: np.ndarray, dtype: np.dtype, out: np.ndarray | None, bf16: bool = True) -> np.ndarray:
    """The product rounded to BF16 unless it is a weight gradient, in `dtype`, in `out` if given."""
    if bf16:
        round_bf16_in_place(product)
    if out is None:
        return product.astype(dtype, copy=False)
    out[...] = product
    return out
