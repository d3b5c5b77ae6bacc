"""bfloat16 against its bit pattern: the upper half of a float32."""

import numpy as np
import pytest

from minidsv3.quant.formats import BF16, from_bf16, to_bf16


def by_bits(x):
    """Nearest even on the lower 16 bits of float32, in integers; finite numbers only."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def test_to_bf16_rounds_to_nearest_even():
    x = np.random.default_rng(0).normal(size=2000).astype(np.float32) * np.float32(10) ** np.arange(-20, 20).repeat(50)
    x[:4] = 1.00390625, 1.01171875, -1.00390625, 0.0  # ties, both ways
    assert to_bf16(x).view(np.uint16).tolist() == by_bits(x).tolist()


def test_to_bf16_overflow_is_infinity():
    with np.errstate(over="ignore"):
        assert np.isposinf(from_bf16(to_bf16(np.array([3.4e38], dtype=np.float32))))[0]


def test_to_bf16_keeps_nan():
    assert np.isnan(from_bf16(to_bf16(np.array([np.nan], dtype=np.float32))))[0]


def test_from_bf16_is_exact_for_every_finite_number():
    every = np.arange(2**16, dtype=np.uint16)
    every = every[(every & 0x7F80) != 0x7F80]
    values = from_bf16(every.view(BF16))
    assert values.dtype == np.float32
    assert values.view(np.uint32).tolist() == (every.astype(np.uint32) << 16).tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_to_bf16_takes_both_widths(dtype):
    assert to_bf16(np.array([1.5], dtype=dtype)).dtype == BF16
