"""LogFMT: numbers stored as the rounded logarithm of their magnitude (ISCA'25 paper, section 3.2).

In a tile of 1x128 the logarithms of the magnitudes run from min to max. A number is its sign and a code K of n - 1
bits:

    K = 0        zero                         step = (max - min) / (2^(n-1) - 2)
    K >= 1       exp(min + step (K - 1))      so that K = 1 is the smallest and K = 2^(n-1) - 1 the largest of the tile

min is not let further below max than log(2^32). Rounding is to the nearest in *linear* space: half-way between two
codes the numbers' mean decides, not their logarithms' (the paper found this to matter). What is nearer to zero than to
the smallest number becomes zero.

`logfmt10` is the form that DeepEP's low-latency kernel has: ten bits, base 2, the threshold of the linear mean folded
into one `floor`, tiles left in BF16 unless all their magnitudes are below 1 and not all equal, and the ends of the
range sent as BF16 numbers. A zero in a tile counts as 2^-32 of its largest there.

LogFMT was an experiment, for the combine step: it was not deployed, because logarithms and exponentials cost more than
the bytes saved (same section). On a GPU they are approximations, so these bits are not those of a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .blockwise import dequantize, quantize_tiles
from .formats import BF16, E5M2, round_to

TILE = 128
_RANGE = 32 * np.log(2.0)  # of the logarithms in a tile


class LogTiles(NamedTuple):
    """Codes [N, K] uint16, the sign above n - 1 bits of magnitude; smallest logarithm and step [N, ceil(K / 128)]."""

    codes: np.ndarray
    low: np.ndarray
    step: np.ndarray
    bits: int


def logfmt_encode(x: np.ndarray, bits: int = 8) -> LogTiles:
    """Codes of finite x [N, K] in tiles of 1x128.

    Raises ValueError for anything but a finite matrix and 3 to 16 bits.
    """
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(
            f"LogFMT takes a finite matrix, got shape {x.shape}" + ("" if x.ndim != 2 else " with NaN or Inf")
        )
    if not 3 <= bits <= 16:
        raise ValueError(f"bits={bits} is not between 3 and 16")
    magnitude = np.abs(x).astype(np.float64)
    with np.errstate(divide="ignore"):
        logs = np.log(magnitude)
    low, high = _per_tile(np.minimum, np.where(magnitude > 0, logs, np.inf)), _per_tile(np.maximum, logs)
    low = np.where(np.isfinite(high), np.maximum(low, high - _RANGE), 0.0)  # a tile of zeros: any number will do
    step = (np.where(np.isfinite(high), high, 0.0) - low) / (2 ** (bits - 1) - 2)
    wide_low, wide_step = _spread(low, x.shape[1]), _spread(step, x.shape[1])
    below = np.where(wide_step > 0, np.floor((logs - wide_low) / np.where(wide_step > 0, wide_step, 1)), 0)
    below = np.clip(np.nan_to_num(below, neginf=0), 0, 2 ** (bits - 1) - 2)
    lower, upper = np.exp(wide_low + wide_step * below), np.exp(wide_low + wide_step * (below + 1))
    code = below + 1 + ((magnitude > (lower + upper) / 2) & (below < 2 ** (bits - 1) - 2))
    code = np.where(magnitude < np.exp(wide_low) / 2, 0, code)  # nearer to zero
    codes = code.astype(np.uint16) | np.where(np.signbit(x), 1 << (bits - 1), 0).astype(np.uint16)
    return LogTiles(codes, low, step, bits)


def logfmt_decode(tiles: LogTiles) -> np.ndarray:
    """float32 values."""
    magnitude = tiles.codes & np.uint16((1 << (tiles.bits - 1)) - 1)
    low, step = (_spread(part, tiles.codes.shape[1]) for part in (tiles.low, tiles.step))
    values = np.where(magnitude == 0, 0.0, np.exp(low + step * (magnitude.astype(np.float64) - 1)))
    return np.where(tiles.codes >> (tiles.bits - 1), -values, values).astype(np.float32)


def logfmt_round(x: np.ndarray, bits: int = 8) -> np.ndarray:
    """What LogFMT-n makes of x: float32 [N, K]."""
    return logfmt_decode(logfmt_encode(x, bits))


def logfmt10(x: np.ndarray, *, always: bool = False) -> np.ndarray:
    """What the ten bits of DeepEP's kernel make of x [N, K]: float32.

    Tiles that it does not cast are BF16; `always` casts those with magnitudes of 1 and more too, for comparisons.
    """
    x = round_to(x, BF16)
    magnitude = np.abs(x)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        logs = np.log2(magnitude)
        # the ends of the range travel as BF16, which they are
        high = _per_tile(np.maximum, logs)
        low = np.maximum(_per_tile(np.minimum, logs), high - np.float32(32))
        step = (high - low) / np.float32(510)
        threshold = 2 - np.log2((1 + np.exp2(step)) / 2) / step
        cast = (low < high) & ((high < 0) | always)
        low, step, threshold, cast = (_spread(part, x.shape[1]) for part in (low, step, threshold, cast))
        code = np.floor(np.maximum(logs / step + threshold - low / step, 0))
        values = np.where(code == 0, np.float32(0), np.exp2(low + (code - 1) * step))
    return np.where(cast, np.copysign(values, x), x).astype(np.float32)


def compared(x: np.ndarray) -> dict[str, float]:
    """Relative root-mean-square error of each way to send x [N, K], all in tiles of 1x128."""
    made = {
        "E5M2": dequantize(*quantize_tiles(x, fmt=E5M2), 1, TILE),
        "E4M3": dequantize(*quantize_tiles(x), 1, TILE),
        "LogFMT-8": logfmt_round(x, 8),
        "LogFMT-10": logfmt10(x, always=True),
        "BF16": round_to(x, BF16),
    }
    size = np.sqrt(np.mean(np.square(x, dtype=np.float64)))
    return {name: float(np.sqrt(np.mean(np.square(y - x, dtype=np.float64))) / size) for name, y in made.items()}


def _per_tile(op: np.ufunc, x: np.ndarray) -> np.ndarray:
    return op.reduceat(x, np.arange(0, x.shape[1], TILE, dtype=np.int64), axis=1)


def _spread(per_tile: np.ndarray, K: int) -> np.ndarray:
    return np.repeat(per_tile, TILE, axis=1)[:, :K]
