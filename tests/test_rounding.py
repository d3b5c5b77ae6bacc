"""Rounding in few passes against ml_dtypes' casts."""

import numpy as np
import pytest

from minidsv3.quant.formats import BF16, E5M6, FORMATS, decode
from minidsv3.quant.rounding import CACHED, round_bf16_in_place, round_scaled_in_place, round_sums_to_bf16, write_codes

NORMAL = 2.0**-126


def any_bits(seed, size):
    return np.random.default_rng(seed).integers(0, 2**32, size, dtype=np.uint64).astype(np.uint32)


@pytest.mark.parametrize("largest", [2.0**50, np.inf])
def test_round_sums_to_bf16_is_the_cast(largest):
    """All ties, their neighbours and random numbers; with a large or infinite one among them the slower way."""
    ties = (np.arange(1 << 16, dtype=np.uint32) << 16) | 0x8000
    x = np.concatenate([ties, ties - 1, ties + 1, ties & 0xFFFF0000, any_bits(0, 100_000)]).view(np.float32)
    x = x[(np.abs(x) >= NORMAL) & (np.abs(x) < largest) | (x == 0)]
    got = x.copy()
    round_sums_to_bf16(got)
    np.testing.assert_array_equal(got, x.astype(BF16).astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3.4e38])
@pytest.mark.parametrize("function", [round_sums_to_bf16, round_bf16_in_place])
def test_what_bf16_cannot_hold(function, bad):
    x = np.array([1 + 2.0**-9, bad, -1.5], dtype=np.float32)
    function(x)
    assert x[0] == 1 and x[2] == -1.5 and (np.isnan(x[1]) if np.isnan(bad) else x[1] == np.sign(bad) * np.inf)


@pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if f.exponent_bits < 8 and f is not E5M6])
def test_write_codes_is_the_cast(name):
    """All numbers within the range, zeros of both signs too, in more than one block of the loop."""
    fmt = FORMATS[name]
    x = any_bits(1, CACHED * 3).view(np.float32)
    x = np.concatenate([x, np.geomspace(fmt.smallest / 4, fmt.max, CACHED // 2).astype(np.float32)])
    x = np.concatenate([x[np.abs(x) <= fmt.max], np.array([0, -0.0, fmt.max, -fmt.max], dtype=np.float32)])
    want, codes, rounded = x.astype(fmt.dtype), np.empty(x.shape, dtype=fmt.dtype), x.copy()
    write_codes(rounded, fmt, codes)
    assert codes.tobytes() == want.tobytes()
    np.testing.assert_array_equal(rounded, want.astype(np.float32))
    round_scaled_in_place(x, fmt)
    np.testing.assert_array_equal(x, rounded)


def test_write_codes_of_e5m6():
    codes = np.arange(1 << 12, dtype=np.uint16)
    codes = codes[(codes & 0x7C0) != 0x7C0]  # infinity and NaN
    got = np.empty_like(codes)
    write_codes(decode(codes, E5M6), E5M6, got)
    np.testing.assert_array_equal(got, codes)
