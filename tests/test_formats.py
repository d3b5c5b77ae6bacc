"""Each format against its bit pattern: bfloat16 is the upper half of a float32, E4M3 and UE8M0 in exact fractions."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from minidsv3.quant.formats import BF16, E4M3, UE8M0, ceil_power_of_two, from_bf16, to_bf16, to_e4m3


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


def e4m3_value(code):
    """1 sign, 4 exponent (bias 7), 3 fraction bits; no infinity, and all ones is NaN. As a fraction, or None."""
    sign, exponent, fraction = -1 if code & 0x80 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return None
    if exponent == 0:
        return sign * Fraction(fraction, 8) * Fraction(2) ** -6
    return sign * (1 + Fraction(fraction, 8)) * Fraction(2) ** (exponent - 7)


E4M3_VALUES = {code: value for code in range(256) if (value := e4m3_value(code)) is not None}
POSITIVE = sorted((value, code) for code, value in E4M3_VALUES.items() if code < 0x80)


def nearest_e4m3(x):
    """Code of the nearest positive value, a tie to the even code, by comparing fractions."""
    return min(POSITIVE, key=lambda pair: (abs(pair[0] - x), pair[1] % 2))[1]


def test_e4m3_all_256_codes_have_the_values_of_their_bits():
    values = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    for code, value in enumerate(values):
        assert np.isnan(value) if code not in E4M3_VALUES else Fraction(float(value)) == E4M3_VALUES[code]


def test_to_e4m3_gives_back_every_code():
    codes = np.array(sorted(E4M3_VALUES), dtype=np.uint8)
    assert to_e4m3(codes.view(E4M3).astype(np.float32)).view(np.uint8).tolist() == codes.tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_to_e4m3_rounds_ties_to_even(dtype):
    """Every number half-way between two neighbours, and one step of the dtype to either side."""
    for (a, low), (b, high) in pairwise(POSITIVE):
        tie = dtype(float((a + b) / 2))
        below, above = np.nextafter(tie, dtype(0)), np.nextafter(tie, dtype(1000))
        got = to_e4m3(np.array([below, tie, above, -tie], dtype=dtype)).view(np.uint8).tolist()
        even = low if low % 2 == 0 else high
        assert got == [low, even, high, even | 0x80]


def test_to_e4m3_rounds_to_nearest():
    x = (np.random.default_rng(1).uniform(-10, 9, 500).astype(np.float32)).astype(np.float64)
    x = np.exp2(x).astype(np.float32)
    x = x[x < 448]
    assert to_e4m3(x).view(np.uint8).tolist() == [nearest_e4m3(Fraction(float(v))) for v in x]


def test_to_bf16_rounds_float64_once():
    """1 + 2^-8 is a tie; a little above it, which float32 would not see, goes up."""
    x = np.array([1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-40, 1 + 3 * 2.0**-8 - 2.0**-40, -1 - 2.0**-8 - 2.0**-40, np.nan])
    assert from_bf16(to_bf16(x))[:4].tolist() == [1, 1 + 2.0**-7, 1 + 2.0**-7, -1 - 2.0**-7]
    assert np.isnan(from_bf16(to_bf16(x))[4])


@pytest.mark.parametrize("x", [448, 449, 464, 465, 1e6, 3e38, np.inf])
def test_to_e4m3_saturates_at_448(x):
    assert to_e4m3(np.array([x, -x], dtype=np.float32)).astype(np.float32).tolist() == [448, -448]


def test_to_e4m3_keeps_nan():
    assert np.isnan(to_e4m3(np.array([np.nan], dtype=np.float32)).astype(np.float32))[0]


def test_ue8m0_all_codes_are_powers_of_two():
    values = np.arange(255, dtype=np.uint8).view(UE8M0).astype(np.float64)
    assert [Fraction(v) for v in values] == [Fraction(2) ** (b - 127) for b in range(255)]


def test_ue8m0_code_255_is_nan():
    assert np.isnan(np.array([255], dtype=np.uint8).view(UE8M0).astype(np.float32))[0]


def test_ceil_power_of_two_is_the_smallest_not_below():
    """By exact fractions: random numbers, powers of two, and their neighbours."""
    rng = np.random.default_rng(2)
    powers = np.exp2(np.arange(-120, 127, dtype=np.float32))
    x = np.concatenate([
        np.exp2(rng.uniform(-120, 126, 500)).astype(np.float32), powers, np.nextafter(powers, np.float32(0)),
        np.nextafter(powers[:-1], np.float32(np.inf)),
    ])  # fmt: skip
    for value, power in zip(x, ceil_power_of_two(x)):
        value, power = Fraction(float(value)), Fraction(float(power))
        assert power / 2 < value <= power and (power.numerator == 1 or power.denominator == 1)
        assert (power.numerator & (power.numerator - 1)) == 0 == (power.denominator & (power.denominator - 1))


def test_ceil_power_of_two_is_float32_that_ue8m0_holds():
    x = np.array([1e-30, 0.3, 1.0, 5.0, 1e30], dtype=np.float32)
    powers = ceil_power_of_two(x)
    assert powers.dtype == np.float32
    np.testing.assert_array_equal(powers.astype(UE8M0).astype(np.float32), powers)


@pytest.mark.parametrize("x", [1.5e38, 1.8e38, 3.4e38])
def test_ceil_power_of_two_ends_at_the_largest_of_ue8m0(x):
    assert ceil_power_of_two(np.array([x], dtype=np.float32)).tolist() == [2.0**127]
