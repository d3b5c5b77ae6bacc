"""Fine-grained scaling: one scale for each 128x128 block of a weight, or 1x128 tile of an activation.

E4M3 has three fraction bits and ends at 448, so a tensor needs a scale, and one scale for a whole tensor would be set
by its worst outlier. DeepSeek-V3 scales blocks of weights and tiles of activations (V3 report, section 3.3.2). What is
stored is ``code = x / scale`` and the *scale itself*, under the misleading name ``weight_scale_inv``: the value is
``code * scale``, the scale multiplies.

Two kinds of scale: FP32, ``amax / 448`` (so the largest value becomes 448), and UE8M0, the next power of two above it
(a scale that costs no rounding of its own). Edge blocks are smaller; sizes need not be multiples of 128.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .formats import E4M3, E4M3_MAX, ceil_power_of_two, to_e4m3

BLOCK = 128


class Quantized(NamedTuple):
    """E4M3 codes and their scales; value = code * scale."""

    codes: np.ndarray  # float8_e4m3fn [M, N]
    scales: np.ndarray  # float32 [ceil(M / rows), ceil(N / columns)]


def quantize_blocks(w: np.ndarray, scale: str = "fp32", block: int = BLOCK) -> Quantized:
    """Quantise a weight in square blocks.

    Parameters
    ----------
    w : float [M, N]
    scale : 'fp32' or 'ue8m0'
        Scales ``amax / 448``, or the next power of two above that.

    Raises
    ------
    ValueError
        `w` is not a finite matrix, or `scale` is unknown.
    """
    return _quantize(w, block, block, scale)


def block_scales(w: np.ndarray, scale: str = "fp32", block: int = BLOCK) -> np.ndarray:
    """The scales of `quantize_blocks` alone: float32 [ceil(M / block), ceil(N / block)]."""
    return _scales(_checked(w, scale), block, block, scale)


def quantize_tiles(x: np.ndarray, scale: str = "fp32", block: int = BLOCK) -> Quantized:
    """Quantise an activation in tiles of one row by `block` columns: x [N, K], scales [N, ceil(K / block)]."""
    return _quantize(x, 1, block, scale)


def dequantize(codes: np.ndarray, scales: np.ndarray, rows: int = BLOCK, columns: int = BLOCK) -> np.ndarray:
    """``code * scale`` as float32 [M, N]; scales float [ceil(M / rows), ceil(N / columns)].

    Raises
    ------
    ValueError
        The scales do not fit: a missing or surplus block is a damaged file, never a different block size.
    """
    if codes.ndim != 2 or scales.shape != scale_shape(codes.shape, rows, columns):
        wanted = scale_shape(codes.shape, rows, columns) if codes.ndim == 2 else "a matrix"
        raise ValueError(f"scales of shape {scales.shape} for {codes.shape} codes in {rows}x{columns}: need {wanted}")
    values = codes.astype(np.float32)
    values *= _spread(scales.astype(np.float32), codes.shape, rows, columns)
    return values


def scale_shape(shape: tuple[int, ...], rows: int = BLOCK, columns: int = BLOCK) -> tuple[int, int]:
    """Shape of the scales of a matrix."""
    return -(-shape[0] // rows), -(-shape[1] // columns)


def _quantize(x: np.ndarray, rows: int, columns: int, kind: str) -> Quantized:
    x = _checked(x, kind)
    scales = _scales(x, rows, columns, kind)
    codes = to_e4m3(x / _spread(scales, x.shape, rows, columns))
    assert codes.dtype == E4M3
    return Quantized(codes, scales)


def _checked(x: np.ndarray, kind: str) -> np.ndarray:
    """`x` as float32; ValueError if nothing can be scaled here."""
    if x.ndim != 2:
        raise ValueError(f"only matrices are quantised in blocks, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"a matrix of shape {x.shape} holds NaN or Inf: no scale fits it")
    if kind not in ("fp32", "ue8m0"):
        raise ValueError(f"scale={kind!r} is not 'fp32' or 'ue8m0'")
    return x.astype(np.float32, copy=False)


def _scales(x: np.ndarray, rows: int, columns: int, kind: str) -> np.ndarray:
    # A block of zeros gets the smallest scale that the published kernels use, not a division by zero.
    scales = np.maximum(_block_amax(x, rows, columns), np.float32(1e-4)) / np.float32(E4M3_MAX)
    # To a power of two before quantising: rounding the scale afterwards would be off by up to two.
    return ceil_power_of_two(scales) if kind == "ue8m0" else scales


def _block_amax(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Largest magnitude of each block, float32; edge blocks may be smaller."""
    magnitude = np.abs(x)
    across = np.maximum.reduceat(magnitude, np.arange(0, x.shape[1], columns, dtype=np.int64), axis=1)
    return np.maximum.reduceat(across, np.arange(0, x.shape[0], rows, dtype=np.int64), axis=0)


def _spread(scales: np.ndarray, shape: tuple[int, ...], rows: int, columns: int) -> np.ndarray:
    """Each element's own scale, [M, N]."""
    return np.repeat(np.repeat(scales, rows, axis=0)[: shape[0]], columns, axis=1)[:, : shape[1]]
