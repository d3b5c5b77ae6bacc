"""Fine-grained scaling: one scale for each 128x128 block of a weight, or 1x128 tile of an activation.

E4M3 has three fraction bits and ends at 448, so a tensor needs a scale, and one scale for a whole tensor would be set
by its worst outlier. DeepSeek-V3 scales blocks of weights and tiles of activations (V3 report, section 3.3.2): tiles of
1x128 along the channels where a token is a row of the product, of 128x1 along the tokens where the tokens are summed
over (the weight gradient). What is stored is ``code = x / scale`` and the *scale itself*, under the misleading name
``weight_scale_inv``: the value is ``code * scale``, the scale multiplies.

Kinds of scale; amax is the largest magnitude of the block, not below 1e-4, so zeros are divided by no zero:

    fp32             amax / 448, and code = x / scale             (DeepSeek-V3's inference/kernel.py)
    fp32-reciprocal  amax / 448, and code = x * (1 / scale)       (DeepGEMM): one code in a few thousand differs
    ue8m0            the next power of two above amax / 448: exact to multiply with, and never clips

`quantize_mx` is the other school (OCP MX v1.0): blocks of 32 along a row, power-of-two scales only.

Edge blocks are smaller; sizes need not be multiples of 128. NaN and infinity: no scale fits them, so these functions
refuse them by name; MX marks such a block with the scale NaN; `quantized`, which training uses, lets them through as
NaN. (FLT_MAX itself, with power-of-two scales, rounds up to 256 * 2^120, which float32 can only give back as
infinity.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .formats import E4M3, UE8M0, Format, ceil_power_of_two, decode, encode, format_of
from .rounding import round_scaled_in_place, write_codes

BLOCK = 128
MX_BLOCK = 32
SCALES = ("fp32", "fp32-reciprocal", "ue8m0")
SMALLEST_AMAX = 1e-4  # of the published kernels
_PANEL = 1 << 16  # elements that are quantised at a time
Into = np.ndarray | None  # where to write, if wanted
Rows = int | list[int]  # height of the blocks, or where they begin, and the end


class Quantized(NamedTuple):
    """Codes and their scales; value = code * scale."""

    codes: np.ndarray  # float8_e4m3fn (or another format's dtype) [M, N]
    scales: np.ndarray  # float32 [ceil(M / rows), ceil(N / columns)]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return self.codes.nbytes + self.scales.nbytes


def quantize_blocks(
    w: np.ndarray, scale: str = "fp32", block: int = BLOCK, fmt: str | Format | np.dtype = E4M3
) -> Quantized:
    """Quantise a weight in square blocks.

    Parameters
    ----------
    w : float [M, N]
    scale : 'fp32', 'fp32-reciprocal' or 'ue8m0'
    block : int
    fmt : name, Format or dtype

    Raises
    ------
    ValueError
        `w` is not a finite matrix, or `scale` is unknown.
    """
    return _finite(quantized(w, block, block, scale, fmt), w)


def block_scales(w: np.ndarray, scale: str = "fp32", block: int = BLOCK) -> np.ndarray:
    """The scales of `quantize_blocks` alone: float32 [ceil(M / block), ceil(N / block)]."""
    scales = _quantize(_matrix(w, scale), block, block, scale, format_of(E4M3))
    return _finite(Quantized(scales, scales), w).scales


def quantize_tiles(
    x: np.ndarray, scale: str = "fp32", block: int = BLOCK, *, axis: int = 1, fmt: str | Format | np.dtype = E4M3
) -> Quantized:
    """Quantise an activation in tiles of `block` numbers.

    Parameters
    ----------
    x : float [N, K]
    axis : int
        1: tiles of 1 x block along the channels, scales [N, ceil(K / block)].
        0: tiles of block x 1 along the tokens, scales [ceil(N / block), K].
    scale, block, fmt, errors
        As for `quantize_blocks`.
    """
    if axis not in (0, 1):
        raise ValueError(f"axis={axis} is not 0 (along the tokens) or 1 (along the channels)")
    rows, columns = (1, block) if axis == 1 else (block, 1)
    return _finite(quantized(x, rows, columns, scale, fmt), x)


def quantize_mx(x: np.ndarray, fmt: str | Format | np.dtype = E4M3, mode: str = "floor") -> Quantized:
    """Quantise in blocks of 32 along a row, as MX (OCP v1.0) does.

    Parameters
    ----------
    x : float [M, N]
    fmt : 'e4m3' (MXFP8), 'e5m2', 'e3m2', 'e2m3' or 'e2m1' (MXFP4)
    mode : 'floor' or 'rceil'
        Scale ``2 ** (floor(log2 amax) - floor(log2 max))`` of the specification, which may clip the largest numbers, or
        ``2 ** ceil(log2(amax * fl(1 / max)))``, which may not.

    Returns
    -------
    Quantized
        Scales are UE8M0 [M, ceil(N / 32)]. A block with NaN or infinity has the scale NaN and zero codes.
    """
    fmt = format_of(fmt)
    if fmt.name not in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1"):
        raise ValueError(f"fmt={fmt.name!r} is no element of MX")
    if mode not in ("floor", "rceil"):
        raise ValueError(f"mode={mode!r} is not 'floor' or 'rceil'")
    x = _matrix(x, "ue8m0")
    cuts = range(len(x) + 1)
    amax = _block_amax(x, cuts, MX_BLOCK, np.empty(x.shape, dtype=np.int32))
    bad = ~np.isfinite(amax)
    amax[bad] = 0
    if mode == "floor":
        powers = np.ldexp(np.float32(1), np.clip(np.frexp(amax)[1] - 1 - fmt.max_exponent, -127, 127))
    else:
        powers = ceil_power_of_two(amax * np.float32(1 / np.float32(fmt.max)))
    powers = np.where(amax > 0, powers, np.float32(2.0**-127)).astype(np.float32)
    values = np.where(_spread(bad, cuts, MX_BLOCK, x.shape[1]), np.float32(0), x)
    values /= _spread(powers, cuts, MX_BLOCK, x.shape[1])
    scales = powers.astype(UE8M0)
    scales[bad] = np.nan
    return Quantized(encode(values, fmt), scales)


def dequantize(codes: np.ndarray, scales: np.ndarray, rows: Rows = BLOCK, columns: int = BLOCK) -> np.ndarray:
    """``code * scale`` as float32 [M, N]; scales float [ceil(M / rows), ceil(N / columns)], `rows` as for `quantized`.

    Raises
    ------
    ValueError
        The scales do not fit: a missing or surplus block is a damaged file, never a different block size.
    """
    if codes.ndim != 2 or scales.shape != scale_shape(codes.shape, rows, columns):
        wanted = scale_shape(codes.shape, rows, columns) if codes.ndim == 2 else "a matrix"
        raise ValueError(f"scales of shape {scales.shape} for {codes.shape} codes in {rows}x{columns}: need {wanted}")
    values, scales = np.empty(codes.shape, dtype=np.float32), scales.astype(np.float32, copy=False)
    N = codes.shape[1]
    for a, b, block, cuts in _panels(rows, *codes.shape):
        np.multiply(decode(codes[a:b]), _spread(scales[block], cuts, columns, N), out=values[a:b])
    return values


def scale_shape(shape: tuple[int, ...], rows: Rows = BLOCK, columns: int = BLOCK) -> tuple[int, int]:
    """Shape of the scales of a matrix."""
    return -(-shape[0] // rows) if isinstance(rows, int) else len(rows) - 1, -(-shape[1] // columns)


def quantized(x: np.ndarray, rows: Rows, columns: int, scale: str, fmt: str | Format | np.dtype = E4M3) -> Quantized:
    """Quantise in blocks of any shape; a block with NaN or infinity dequantises to NaN, and nothing is raised.

    `rows` is the height of a block, or a list of the first row of each, and the end.
    """
    x, fmt = _matrix(x, scale), format_of(fmt)
    codes = np.empty(x.shape, dtype=fmt.dtype)
    return Quantized(codes, _quantize(x, rows, columns, scale, fmt, codes))


def there_and_back(
    x: np.ndarray, rows: Rows, columns: int, scale: str, fmt: str | Format | np.dtype = E4M3
) -> np.ndarray:
    """``dequantize(*quantized(x, ...))`` without the codes, float32 [M, N]: for an operand that is used at once."""
    x = _matrix(x, scale)
    values = np.empty(x.shape, dtype=np.float32)
    _quantize(x, rows, columns, scale, format_of(fmt), values=values)
    return values


def codes_and_values(
    x: np.ndarray, rows: Rows, columns: int, scale: str, fmt: str | Format | np.dtype = E4M3
) -> tuple[Quantized, np.ndarray]:
    """`quantized` and `there_and_back` in one: for an operand that is used at once and kept."""
    x, fmt = _matrix(x, scale), format_of(fmt)
    codes, values = np.empty(x.shape, dtype=fmt.dtype), np.empty(x.shape, dtype=np.float32)
    return Quantized(codes, _quantize(x, rows, columns, scale, fmt, codes, values)), values


def _quantize(
    x: np.ndarray, rows: Rows, columns: int, scale: str, fmt: Format, codes: Into = None, values: Into = None
) -> np.ndarray:
    """Write codes, or the values they stand for, or both; returns the scales."""
    M, N = x.shape
    scales = np.empty(scale_shape(x.shape, rows, columns), dtype=np.float32)
    with np.errstate(invalid="ignore"):  # infinity / infinity
        for a, b, block, cuts in _panels(rows, M, N):
            part, s = np.ascontiguousarray(x[a:b]), scales[block]
            ratio = np.empty(part.shape, dtype=np.float32) if values is None else values[a:b]
            _scales(_block_amax(part, cuts, columns, ratio.view(np.int32)), scale, fmt, out=s)
            if codes is None and values is None:
                continue
            spread = _spread(s, cuts, columns, N)
            if scale == "fp32-reciprocal":
                np.multiply(part, 1 / spread, out=ratio)
            else:
                np.divide(part, spread, out=ratio)
            if codes is None:
                round_scaled_in_place(ratio, fmt)
            elif fmt.exponent_bits == 8 or not np.isfinite(s).all():
                codes[a:b] = encode(ratio, fmt)
                ratio[...] = decode(codes[a:b], fmt)
            else:
                write_codes(ratio, fmt, codes[a:b])
            if values is not None:
                ratio *= spread
    return scales


def _scales(amax: np.ndarray, scale: str, fmt: Format, out: np.ndarray) -> None:
    """The scale of each block from its largest magnitude."""
    np.maximum(amax, np.float32(SMALLEST_AMAX), out=out)
    out /= np.float32(fmt.max)
    if scale == "ue8m0":  # before quantising: rounding the scale afterwards would be off by up to two
        out[...] = ceil_power_of_two(out)


def _panels(rows: Rows, M: int, N: int) -> Iterator[tuple[int, int, slice, Sequence[int]]]:
    """Whole blocks that together stay in the cache from one pass to the next.

    Of each panel: its first row and its end, the numbers of its blocks, and their first rows and the end from its own.
    """
    cuts = rows if not isinstance(rows, int) else range(M + 1) if rows == 1 else [*range(0, M, rows), M]
    first, blocks = 0, len(cuts) - 1 if N else 0
    while first < blocks:
        a = cuts[first]
        last = max(first + 1, bisect_right(cuts, a + _PANEL // N) - 1)
        b = cuts[last]
        yield a, b, slice(first, last), range(b - a + 1) if rows == 1 else [cut - a for cut in cuts[first : last + 1]]
        first = last


def _matrix(x: np.ndarray, kind: str) -> np.ndarray:
    """`x` as float32; ValueError if it is no matrix or the kind of scale is unknown."""
    if x.ndim != 2:
        raise ValueError(f"only matrices are quantised in blocks, got shape {x.shape}")
    if kind not in SCALES:
        raise ValueError(f"scale={kind!r} is not one of {', '.join(map(repr, SCALES))}")
    return x.astype(np.float32, copy=False)


def _finite(result: Quantized, x: np.ndarray) -> Quantized:
    """`result`, unless a NaN or infinity of `x` reached a scale."""
    if not np.isfinite(result.scales).all():
        raise ValueError(f"a matrix of shape {x.shape} holds NaN or Inf: no scale fits it")
    return result


def _block_amax(x: np.ndarray, cuts: Sequence[int], columns: int, scratch: np.ndarray) -> np.ndarray:
    """Largest magnitude of each block, float32; NaN counts as the largest of all. Edge blocks may be smaller."""
    if x.size == 0:
        return np.zeros((len(cuts) - 1, -(-x.shape[1] // columns)), dtype=np.float32)
    # As integers, magnitudes order as their bits do, NaN on top, and NumPy finds their maximum several times faster.
    magnitude = np.bitwise_and(np.ascontiguousarray(x).view(np.int32), 0x7FFFFFFF, out=scratch)
    if len(cuts) <= len(x):
        height, N = cuts[1], x.shape[1]
        if height % 16 == 0 and cuts == [*range(0, len(x) + 1, height)]:
            # 16 rows as one first: NumPy's loop is as long as a row
            magnitude = magnitude.reshape(-1, height // 16, 16 * N).max(axis=1).reshape(-1, 16, N).max(axis=1)
        else:
            magnitude = np.stack([magnitude[a:b].max(axis=0) for a, b in pairwise(cuts)])
    if columns > 1:
        magnitude = np.maximum.reduceat(magnitude, np.arange(0, x.shape[1], columns, dtype=np.int64), axis=1)
    return magnitude.view(np.float32)


def _spread(scales: np.ndarray, cuts: Sequence[int], columns: int, N: int) -> np.ndarray:
    """Each element's own scale [M, N]: written out, NumPy's loops over short broadcast rows take twice as long."""
    if columns > 1:
        scales = scales.repeat(columns if columns < N else N, axis=1)[:, :N]
    return scales if len(cuts) - 1 == cuts[-1] else scales.repeat([b - a for a, b in pairwise(cuts)], axis=0)
