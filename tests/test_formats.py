"""Each format against its bit pattern: bfloat16 is the upper half of a float32, E4M3 and UE8M0 in exact fractions."""

from bisect import bisect_left
from fractions import Fraction
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidsv3.quant.formats import (
    BF16,
    E4M3,
    E5M2,
    FORMATS,
    UE8M0,
    ceil_power_of_two,
    decode,
    encode,
    explain,
    format_of,
    from_bf16,
    round_to,
    to_bf16,
    to_e4m3,
)  # fmt: skip


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


# --- every format, against ml_dtypes and against its bits -------------------------------------------------------------

FLOATS = [name for name in FORMATS if name != "ue8m0"]
KNOWN = [name for name in FLOATS if name != "e5m6"]  # those that ml_dtypes has


def positive_values(name):
    """All finite values from zero up, as Fractions by the definition of the bits; their place is their code."""
    fmt = FORMATS[name]
    m, count = fmt.fraction_bits, 1 << (fmt.bits - 1)
    if fmt.has_nan:  # the top exponent is special; in E4M3 only its last code
        count -= 1 if name == "e4m3" else 1 << m
    bias = 2 ** (fmt.exponent_bits - 1) - 1
    fields = ((code >> m, code & (2**m - 1)) for code in range(count))
    return [Fraction(f + (2**m if e else 0), 2**m) * Fraction(2) ** (max(e, 1) - bias) for e, f in fields]


def codes_of(array):
    return array.view(np.uint8 if array.dtype.itemsize == 1 else np.uint16)


@pytest.mark.parametrize("name", [n for n in FLOATS if n != "bf16"])
def test_decode_gives_every_code_the_value_of_its_bits(name):
    fmt, values = FORMATS[name], positive_values(name)
    dtype = np.uint8 if fmt.bits <= 8 else np.uint16
    codes = np.arange(len(values), dtype=dtype)
    assert [Fraction(float(v)) for v in decode(codes, fmt)] == values
    negative = decode(codes | dtype(1 << (fmt.bits - 1)), fmt)
    assert [Fraction(-float(v)) for v in negative] == values and np.signbit(negative).all()
    assert float(values[-1]) == fmt.max and float(values[1]) == fmt.smallest


@pytest.mark.parametrize("name", [n for n in FLOATS if n != "bf16"])
def test_round_to_ties_and_their_neighbours(name):
    """Half-way between all neighbours, and one float32 to either side; the codes agree with the values."""
    values = positive_values(name)
    low, high = np.array(values[:-1], dtype=np.float64), np.array(values[1:], dtype=np.float64)
    tie = ((low + high) / 2).astype(np.float32)
    even = np.where(np.arange(len(low)) % 2 == 0, low, high)
    for x, want in (
        (tie, even),
        (np.nextafter(tie, np.float32(0)), low),
        (np.nextafter(tie, np.float32(np.inf)), high),
        (low.astype(np.float32), low),
    ):
        for sign in (1, -1):
            got = round_to(np.float32(sign) * x, name)
            np.testing.assert_array_equal(got, sign * want)
            assert (np.signbit(got) == (sign < 0)).all()
            np.testing.assert_array_equal(decode(encode(np.float32(sign) * x, name), name), sign * want)


def any_floats(seed, size=200_000):
    x = np.random.default_rng(seed).integers(0, 2**32, size, dtype=np.uint64).astype(np.uint32).view(np.float32)
    return np.concatenate(
        [x[~np.isnan(x)], np.array([0, -0.0, np.inf, -np.inf, 3.4028235e38, 1e-45], dtype=np.float32)]
    )


@pytest.mark.parametrize("name", KNOWN)
def test_round_and_encode_equal_ml_dtypes_after_saturating(name):
    x, fmt = any_floats(1), FORMATS[name]
    want = np.clip(x, -fmt.max, fmt.max).astype(fmt.dtype)
    assert (codes_of(encode(x, name)) == codes_of(want)).all()
    assert (round_to(x, name).view(np.uint32) == want.astype(np.float32).view(np.uint32)).all()


@pytest.mark.parametrize("name", KNOWN)
def test_decode_equals_ml_dtypes(name):
    fmt = FORMATS[name]
    codes = np.arange(1 << fmt.bits, dtype=np.uint8 if fmt.bits <= 8 else np.uint16)
    want = codes.view(fmt.dtype).astype(np.float32)
    np.testing.assert_array_equal(decode(codes.view(fmt.dtype)), want)
    np.testing.assert_array_equal(decode(codes[:-1].view(fmt.dtype)), want[:-1])  # an odd number of them
    np.testing.assert_array_equal(decode(codes[::-2].view(fmt.dtype)), want[::-2])


@settings(max_examples=300, deadline=None)
@given(st.floats(allow_nan=False), st.sampled_from(FLOATS))
def test_round_to_rounds_float64_once(x, name):
    """The nearest by exact fractions; a tie to the even code; beyond the largest: the largest."""
    values = positive_values_of(name)
    magnitude = abs(x)
    if magnitude >= FORMATS[name].max:
        want = FORMATS[name].max
    else:
        above = bisect_left(values, magnitude)
        around = [i for i in (above - 1, above) if 0 <= i < len(values)]
        want = values[min(around, key=lambda i: (abs(Fraction(values[i]) - Fraction(magnitude)), i % 2))]
    assert abs(round_to(np.array([x]), name)[0]) == want


@cache
def positive_values_of(name):
    return [float(v) for v in positive_values(name)]


@pytest.mark.parametrize("name", FLOATS)
def test_round_to_is_idempotent_monotone_and_odd(name):
    x = np.sort(any_floats(2, 20_000))
    once = round_to(x, name)
    assert (round_to(once, name).view(np.uint32) == once.view(np.uint32)).all()
    assert (np.diff(once) >= 0).all()
    assert (round_to(-x, name).view(np.uint32) == (-once).view(np.uint32)).all()


@pytest.mark.parametrize("name", FLOATS)
def test_round_to_saturates_infinity(name):
    x = np.array([np.inf, -np.inf], dtype=np.float32)
    assert round_to(x, name).tolist() == [FORMATS[name].max, -FORMATS[name].max]


@pytest.mark.parametrize("name", FLOATS)
def test_nan_stays_or_is_refused(name):
    x = np.array([1, np.nan], dtype=np.float32)
    if FORMATS[name].has_nan:
        assert np.isnan(round_to(x, name)).tolist() == np.isnan(decode(encode(x, name), name)).tolist() == [False, True]
    else:
        for function in (round_to, encode):
            with pytest.raises(ValueError, match=f"{name} has no NaN"):
                function(x, name)


def test_round_to_writes_in_place():
    x = np.random.default_rng(3).standard_normal((7, 300)).astype(np.float32)
    want = round_to(x, "e4m3")
    assert round_to(x, "e4m3", out=x) is x and (x == want).all()
    with pytest.raises(ValueError, match="must be C-contiguous float32"):
        round_to(x, "e4m3", out=np.empty((300, 7), dtype=np.float32).T)


def test_round_to_takes_any_strides_and_sizes():
    x = np.random.default_rng(4).standard_normal((300, 301)).astype(np.float32)  # more than one block of the loop
    np.testing.assert_array_equal(round_to(x.T[::3], "e5m2"), x.T[::3].astype(E5M2).astype(np.float32))
    assert (
        round_to(np.zeros((0, 3), dtype=np.float32), "e4m3").shape == encode(np.zeros((0, 3)), "e4m3").shape == (0, 3)
    )


def test_ue8m0_rounds_as_ml_dtypes_and_saturates():
    x = np.abs(any_floats(5, 50_000))
    x = x[np.isfinite(x) & (x > 0)]
    inside = x[x <= 2.0**127]
    assert (encode(inside, "ue8m0").view(np.uint8) == inside.astype(UE8M0).view(np.uint8)).all()
    assert (round_to(x[x > 2.0**127], "ue8m0") == 2.0**127).all()


@pytest.mark.parametrize("x", [0.0, -1.0, np.nan])
def test_ue8m0_of_what_is_not_positive_is_nan(x):
    assert encode(np.array([x], dtype=np.float32), "ue8m0").view(np.uint8).tolist() == [255]


@pytest.mark.parametrize("x, name, value, bits, between", [
    (0.3, "e4m3", 0.3125, "0 0101 010", (0.28125, 0.34375)),
    (-0.001, "e4m3", -(2.0**-9), "1 0000 001", (-(2.0**-8), 0.0)),
    (500.0, "e4m3", 448.0, "0 1111 110", (416.0, 448.0)),
    (1.0, "e5m2", 1.0, "0 01111 00", (0.875, 1.25)),
    (-1.0, "e2m1", -1.0, "1 01 0", (-1.5, -0.5)),
    (1.0, "e5m6", 1.0, "0 01111 000000", (1 - 2.0**-7, 1 + 2.0**-6)),
    (3.0, "ue8m0", 4.0, "10000001", (2.0, 8.0)),
    (0.0, "e3m2", 0.0, "0 000 00", (-0.0625, 0.0625)),
])  # fmt: skip
def test_explain_shows_bits_and_neighbours(x, name, value, bits, between):
    e = explain(x, name)
    assert (e.value, e.bits, (e.below, e.above)) == (value, bits, between)
    assert bits in str(e) and repr(value) in str(e)


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "e5m6"])
def test_explain_of_every_value_has_its_neighbours(name):
    values = positive_values_of(name)
    for low, middle, high in zip(values, values[1:], values[2:]):
        for sign in (1, -1):
            e = explain(sign * middle, name)
            assert e.value == sign * middle and sorted([sign * low, sign * high]) == [e.below, e.above]
            assert (
                e.value
                == (-1) ** e.sign
                * ((e.fraction / 2**e.format.fraction_bits) + (abs(e.value) >= 2.0**e.format.min_exponent))
                * 2.0**e.exponent
            )


def test_explain_shows_a_nan_and_infinity():
    assert np.isnan(explain(float("nan"), "e4m3").value) and explain(float("inf"), "e5m2").value == 57344
    assert "0x7f" in str(explain(float("nan"), "e4m3"))


def test_format_of_takes_names_dtypes_and_formats():
    assert format_of("E4M3") is format_of(E4M3) is format_of(FORMATS["e4m3"]) is FORMATS["e4m3"]
    with pytest.raises(ValueError, match="format 'e9m9' is not one of bf16, fp16"):
        format_of("e9m9")
