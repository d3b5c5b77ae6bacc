"""Number formats narrower than float32: rounding into them and back.

BF16 is the upper half of a float32: 1 sign, 8 exponent and 7 fraction bits. E4M3 has 1 sign, 4 exponent and 3 fraction
bits; its 'fn' variant gives up infinity for one more exponent, so it ends at 448 and has one NaN. UE8M0 is an exponent
alone: the byte b means 2^(b - 127), 255 is NaN, and there is no zero; it holds scales. All rounding is to nearest even.

The arrays are ml_dtypes' own types, so an array says what it holds, and ``astype(np.float32)`` gives the value back
exactly. One trap: ml_dtypes turns a float beyond 464 into an E4M3 NaN; hardware and `to_e4m3` saturate at 448.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
UE8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
E4M3_MAX = 448.0


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 or float64 to bfloat16, nearest even; overflow gives infinity, NaN stays NaN."""
    return _rounded_once(x).astype(BF16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    """The float32 values of a bfloat16 array, exact."""
    return x.astype(np.float32)


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """Round to float8_e4m3fn, nearest even, saturating at 448 (infinity too); NaN stays NaN."""
    return _rounded_once(np.clip(x, -E4M3_MAX, E4M3_MAX)).astype(E4M3)


def ceil_power_of_two(x: np.ndarray) -> np.ndarray:
    """The smallest power of two not below x, for positive float32 x: exact, by exponent, within UE8M0's range."""
    mantissa, exponent = np.frexp(x)  # x = mantissa * 2^exponent, mantissa in [0.5, 1)
    exponent = np.where(mantissa == 0.5, exponent - 1, exponent)
    return np.ldexp(np.float32(1), np.clip(exponent, -127, 127)).astype(np.float32)


def _rounded_once(x: np.ndarray) -> np.ndarray:
    """`x`, or for float64 a float32 array that rounds further as `x` would: inexact numbers go to the odd neighbour.

    ml_dtypes rounds a float64 to float32 first, and what lands on a tie there was none before.
    """
    if x.dtype != np.float64:
        return x
    single = x.astype(np.float32)
    odd = (single == x) | np.isnan(x) | (single.view(np.uint32) & 1 == 1)
    return np.where(odd, single, np.nextafter(single, np.where(x > single, np.inf, -np.inf).astype(np.float32)))
