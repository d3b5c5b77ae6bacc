"""``a b^T`` of FP8 operands: scales every 128 of K, sums in FP32 block by block.

The report's product (section 3.3.2) takes 128 of K on the tensor core, multiplies the partial sum of output (m, n) with
``s_a[m] s_b[n]``, and adds it in FP32 outside. `scaled_product` does so to the bit on the emulated tensor core
(`exact`), or approximately with BLAS.

With BLAS the scales are multiplied in *before* the product: within a block of K each is constant along the sum, so
``sum_k (s_a a_k)(s_b b_k) = s_a s_b sum_k a_k b_k`` but for FP32 rounding, 2^-24 for each operand. An operand has M x K
numbers, all partial sums M x N x K / 128: nearly the same count for the small matrices of a small model, but an operand
is in the cache anyway when it is quantised (`blockwise.there_and_back`). What is missing against the real thing is the
tensor core's own loss of bits, and the place of those roundings.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .blockwise import BLOCK, Quantized, dequantize
from .tensorcore import deepgemm, tiled_matmul


class Values(NamedTuple):
    """An operand for BLAS: the numbers that FP8 codes and scales stand for."""

    values: np.ndarray  # float32 [M, K]


Operand = Quantized | Values


def turned(operand: Operand) -> Operand:
    """The transpose."""
    return type(operand)(*(part.T for part in operand))


def part(operand: Operand, a: int, b: int, cuts: list[int] | None = None) -> Operand:
    """Rows a to b; `cuts` are the first rows of the blocks that share a scale, if they are higher than one."""
    if isinstance(operand, Values):
        return Values(operand.values[a:b])
    first, last = (a, b) if cuts is None else (cuts.index(a), cuts.index(b))
    return Quantized(operand.codes[a:b], operand.scales[first:last])


def product(a: Operand, b: Operand, out: np.ndarray | None = None) -> np.ndarray:
    """``a b^T``, float32 [M, N]: of `Values` with BLAS, of `Quantized` on the emulated Hopper tensor core.

    Parameters
    ----------
    a : Values [M, K], or Quantized: FP8 codes [M, K] with scales [M, ceil(K / 128)]
    b : Values [N, K], or Quantized: FP8 codes [N, K] with scales [N, ceil(K / 128)] of tiles or
        [ceil(N / 128), ceil(K / 128)] of blocks
    out : float [M, N], optional
        Where to write; fastest if C-contiguous float32.
    """
    in_place = out if out is not None and out.dtype == np.float32 and out.flags.c_contiguous else None
    if isinstance(a, Values) and isinstance(b, Values):
        result = _sum_of_blocks(a.values, b.values, in_place)
    elif isinstance(a, Quantized) and isinstance(b, Quantized):
        tiles = len(b.scales) == len(b.codes)
        result = (tiled_matmul if tiles else deepgemm)(a.codes, a.scales, b.codes, b.scales)
    else:
        raise TypeError("one operand has codes, the other values")
    if out is None or result is out:
        return result
    out[...] = result
    return out


def scaled_product(a: Quantized, b: Quantized, *, exact: bool = False) -> np.ndarray:
    """``a b^T`` of codes and scales as `product` takes them, on the tensor core (`exact`) or with BLAS."""
    if exact:
        return product(a, b)
    rows = 1 if len(b.scales) == len(b.codes) else BLOCK
    return _sum_of_blocks(dequantize(*a, 1, BLOCK), dequantize(*b, rows, BLOCK))


def _sum_of_blocks(x: np.ndarray, y: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """``x y^T``, each 128 of K by BLAS and added up in FP32."""
    K = x.shape[1]
    total = np.matmul(x[:, :BLOCK], y[:, :BLOCK].T, out=out)  # without K: zeros
    partial = np.empty_like(total) if K > BLOCK else None
    for k in range(BLOCK, K, BLOCK):
        total += np.matmul(x[:, k : k + BLOCK], y[:, k : k + BLOCK].T, out=partial)
    return total
