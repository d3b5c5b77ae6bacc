"""Gemms of recipes that the report's is compared with: one scale a tensor, and MX (the interface: see `gemm`)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .blockwise import BLOCK, MX_BLOCK, Quantized, dequantize, quantize_mx, quantized
from .formats import E4M3, E5M2, decode
from .gemm import ByExpert, finished, loaded
from .tensorcore import tensorcore_matmul


class TensorwiseGemm(ByExpert):
    """One scale a tensor, E4M3 forwards and E5M2 for gradients: the older recipe that the report compares with.

    Scales are taken from the tensor at hand. With `exact`, partial sums are promoted every 128, and scaled at the end.
    """

    def __init__(self, *, exact: bool = False) -> None:
        self._exact = exact

    def keep(self, x: np.ndarray) -> Quantized:
        return quantized(x, max(1, x.shape[0]), max(1, x.shape[1]), "fp32", E4M3)

    def load(self, w: np.ndarray) -> Quantized:
        return self.keep(w)

    def fprop(
        self, x: np.ndarray, w: np.ndarray | Quantized, out: np.ndarray | None = None, kept: Quantized | None = None
    ) -> np.ndarray:
        return finished(self._product(self.keep(x) if kept is None else kept, loaded(self, w)), x.dtype, out)

    def dgrad(self, dy: np.ndarray, w: np.ndarray | Quantized, out: np.ndarray | None = None) -> np.ndarray:
        weight = loaded(self, w)
        dx = self._product(self._gradient(dy), Quantized(weight.codes.T, weight.scales))
        return finished(dx, dy.dtype, out)

    def wgrad(self, dy: np.ndarray, kept: Quantized, out: np.ndarray | None = None) -> np.ndarray:
        q = self._gradient(dy)
        dw = self._product(Quantized(q.codes.T, q.scales), Quantized(kept.codes.T, kept.scales))
        return finished(dw, dy.dtype, out, bf16=False)

    def _gradient(self, dy: np.ndarray) -> Quantized:
        return quantized(dy, max(1, dy.shape[0]), max(1, dy.shape[1]), "fp32", E5M2)

    def _product(self, a: Quantized, b: Quantized) -> np.ndarray:
        if self._exact:
            total = tensorcore_matmul(a.codes, b.codes, promote_every=BLOCK)
        else:
            total = _values(a.codes) @ _values(b.codes).T
        if a.scales.size and b.scales.size:  # a tensor without numbers has no scale
            total *= a.scales[0, 0] * b.scales[0, 0]
        return total


class MXKept(NamedTuple):
    """A matrix quantised along its rows and along its columns: MX blocks lie along what is summed over."""

    rows: Quantized | None
    columns: Quantized  # of the transpose

    @property
    def nbytes(self) -> int:
        return self.columns.nbytes + (self.rows.nbytes if self.rows is not None else 0)


class MXGemm(ByExpert):
    """MXFP8: E4M3 in blocks of 32 with power-of-two scales that do not clip, sums in FP32."""

    def keep(self, x: np.ndarray) -> MXKept:
        return MXKept(None, _mx(x.T))

    def load(self, w: np.ndarray) -> MXKept:
        return MXKept(_mx(w), _mx(w.T))

    def fprop(
        self, x: np.ndarray, w: np.ndarray | MXKept, out: np.ndarray | None = None, kept: MXKept | None = None
    ) -> np.ndarray:
        weight = loaded(self, w).rows
        return finished(_mx_values(_mx(x)) @ _mx_values(weight).T, x.dtype, out)

    def dgrad(self, dy: np.ndarray, w: np.ndarray | MXKept, out: np.ndarray | None = None) -> np.ndarray:
        return finished(_mx_values(_mx(dy)) @ _mx_values(loaded(self, w).columns).T, dy.dtype, out)

    def wgrad(self, dy: np.ndarray, kept: MXKept, out: np.ndarray | None = None) -> np.ndarray:
        return finished(_mx_values(_mx(dy.T)) @ _mx_values(kept.columns).T, dy.dtype, out, bf16=False)


def _values(codes: np.ndarray) -> np.ndarray:
    """float32 values in the memory order of the codes, so that a transpose costs nothing."""
    return decode(codes) if codes.flags.c_contiguous else decode(codes.T).T


def _mx(x: np.ndarray) -> Quantized:
    return quantize_mx(x, E4M3, "rceil")


def _mx_values(q: Quantized) -> np.ndarray:
    return dequantize(*q, 1, MX_BLOCK)
