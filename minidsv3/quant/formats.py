"""Number formats narrower than float32.

BF16 is the upper half of a float32: 1 sign, 8 exponent and 7 fraction bits, rounded to nearest even. The arrays are
ml_dtypes' own (`bfloat16`), so an array says what it holds, and ``astype(np.float32)`` gives the value back exactly.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 or float64 to bfloat16, nearest even; overflow gives infinity, NaN stays NaN."""
    return x.astype(BF16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    """The float32 values of a bfloat16 array, exact."""
    return x.astype(np.float32)
