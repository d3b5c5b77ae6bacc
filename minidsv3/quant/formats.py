"""Number formats narrower than float32: rounding into them, their bit patterns, and back.

A float is (-1)^s * 1.f * 2^(E - bias); E = 0 means 0.f * 2^(1 - bias), the subnormals. A `Format` is the three sizes
that make one, and what it does with its highest codes:

    bf16   1+8+7   the upper half of a float32         e5m6   1+5+6   the 12 bits of section 3.3.3 of the V3 report
    fp16   1+5+10  IEEE binary16                       e4m3   1+4+3   'fn': no infinity, one NaN, ends at 448
    e5m2   1+5+2   IEEE style                          e3m2, e2m3, e2m1   the elements of MX: neither infinity nor NaN
    ue8m0  an exponent alone: byte b means 2^(b - 127), 255 is NaN, there is no zero; it holds scales

Rounding is to nearest even and *saturates*: what lies beyond the largest number, infinity too, becomes the largest.
NaN stays NaN, and is refused where there is none. (ml_dtypes turns a float beyond 464 into an E4M3 NaN; hardware
saturates.)

Codes are arrays of ml_dtypes' own types (uint16 for E5M6, which has none), so an array says what it holds and
``astype(np.float32)`` is exact. The top exponent of E5M6 is unpublished; here it is kept for infinity and NaN, as IEEE
has it, so the largest number is 65024.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import ml_dtypes
import numpy as np

from .rounding import CACHED, push_out, round_bf16_in_place

BF16 = np.dtype(ml_dtypes.bfloat16)
FP16 = np.dtype(np.float16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)
E3M2 = np.dtype(ml_dtypes.float6_e3m2fn)
E2M3 = np.dtype(ml_dtypes.float6_e2m3fn)
E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
UE8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
E4M3_MAX = 448.0

_SIGN, _MAGNITUDE, _EXPONENT = 0x80000000, 0x7FFFFFFF, 0x7F800000  # fields of a float32


@dataclass(frozen=True)
class Format:
    """A float format.

    Attributes
    ----------
    name : str
    exponent_bits, fraction_bits : int
    max : float
        Largest finite number.
    has_nan : bool
    dtype : numpy dtype of its codes
    """

    name: str
    exponent_bits: int
    fraction_bits: int
    max: float
    has_nan: bool
    dtype: np.dtype

    @cached_property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1 if self.name != "ue8m0" else 127

    @cached_property
    def bits(self) -> int:
        """Width of a code with its sign."""
        return 1 + self.exponent_bits + self.fraction_bits if self.name != "ue8m0" else 8

    @cached_property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number, and of all subnormals."""
        return 1 - self.bias

    @cached_property
    def max_exponent(self) -> int:
        """floor(log2(max)): the `emax` of the MX specification."""
        return int(np.frexp(self.max)[1]) - 1

    @cached_property
    def smallest(self) -> float:
        """The smallest positive number."""
        return 2.0 ** (self.min_exponent - self.fraction_bits) if self.name != "ue8m0" else 2.0**-127


FORMATS = {
    f.name: f
    for f in (
        Format("bf16", 8, 7, float.fromhex("0x1.fep127"), True, BF16),
        Format("fp16", 5, 10, 65504.0, True, FP16),
        Format("e5m6", 5, 6, 65024.0, True, np.dtype(np.uint16)),
        Format("e4m3", 4, 3, E4M3_MAX, True, E4M3),
        Format("e5m2", 5, 2, 57344.0, True, E5M2),
        Format("e3m2", 3, 2, 28.0, False, E3M2),
        Format("e2m3", 2, 3, 7.5, False, E2M3),
        Format("e2m1", 2, 1, 6.0, False, E2M1),
        Format("ue8m0", 8, 0, 2.0**127, True, UE8M0),
    )
}
E5M6 = FORMATS["e5m6"]


_BY_DTYPE = {f.dtype: f for f in FORMATS.values()}


def format_of(fmt: str | Format | np.dtype) -> Format:
    """The format of a name ('e4m3', in either case) or of its codes' dtype; a Format is returned as it is."""
    if isinstance(fmt, Format):
        return fmt
    found = FORMATS.get(fmt.lower()) if isinstance(fmt, str) else _BY_DTYPE.get(np.dtype(fmt))
    if found is None:
        raise ValueError(f"format {fmt!r} is not one of {', '.join(FORMATS)}")
    return found


def round_to(x: np.ndarray, fmt: str | Format | np.dtype, out: np.ndarray | None = None) -> np.ndarray:
    """The nearest numbers of a format, as float32: ties to even, saturating, signs of zeros kept.

    Parameters
    ----------
    x : float32 or float64 of any shape
    fmt : name, Format or dtype
        For 'ue8m0': the nearest power of two, as ml_dtypes rounds it; what is not positive becomes NaN.
    out : float32 of the shape of x, C-contiguous, optional
        Where to write; may be x.

    Raises
    ------
    ValueError
        A NaN for a format without one.
    """
    fmt = format_of(fmt)
    x = _single(x)
    out = np.empty(x.shape, dtype=np.float32) if out is None else out
    if not out.flags.c_contiguous or out.dtype != np.float32 or out.shape != x.shape:
        raise ValueError(f"round_to: out must be C-contiguous float32 {x.shape}, got {out.dtype} {out.shape}")
    if fmt.name == "ue8m0":
        out[...] = encode(x, fmt).astype(np.float32)
        return out
    round_block = _round_bf16 if fmt.name == "bf16" else _round_by_adding
    source, target = np.ascontiguousarray(x).reshape(-1), out.reshape(-1)
    scratch = np.empty((2, min(CACHED, source.size)), dtype=np.uint32)
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        for a in range(0, source.size, CACHED):
            n = min(CACHED, source.size - a)
            round_block(source[a : a + n], fmt, target[a : a + n], *scratch[:, :n])
    if not fmt.has_nan and np.isnan(out).any():
        raise ValueError(f"{fmt.name} has no NaN: the input holds one")
    return out


def _round_by_adding(x: np.ndarray, fmt: Format, out: np.ndarray, magic: np.ndarray, sign: np.ndarray) -> None:
    """One block of `round_to`; `magic` and `sign` are scratch."""
    np.bitwise_and(x.view(np.uint32), _SIGN, out=sign)
    np.clip(x, -fmt.max, fmt.max, out=out)
    push_out(out, fmt, magic)
    np.bitwise_or(out.view(np.uint32), sign, out=out.view(np.uint32))  # -0.001 becomes -0, not +0


def _round_bf16(x: np.ndarray, fmt: Format, out: np.ndarray, *scratch: np.ndarray) -> None:
    """In integers, on the upper 16 bits: BF16 reaches as far as float32, where no larger c exists."""
    round_bf16_in_place(np.clip(x, -fmt.max, fmt.max, out=out))


def encode(x: np.ndarray, fmt: str | Format | np.dtype) -> np.ndarray:
    """Codes of `round_to(x, fmt)`, in the format's dtype; a NaN gets a NaN's code."""
    fmt = format_of(fmt)
    if fmt.name == "ue8m0":
        return np.minimum(_single(x), np.float32(fmt.max)).astype(UE8M0)
    if fmt.bits > 8:
        return _codes(round_to(x, fmt), fmt)
    if not fmt.has_nan and np.isnan(x).any():
        raise ValueError(f"{fmt.name} has no NaN: the input holds one")
    source, table = np.ascontiguousarray(_single(x)), _code_table(fmt)
    codes, bits = np.empty(source.size, dtype=np.uint8), source.reshape(-1).view(np.uint32)
    scratch = np.empty(min(CACHED, bits.size), dtype=np.uint32)
    for a in range(0, bits.size, CACHED):
        block = bits[a : a + CACHED]
        index = scratch[: block.size]
        # The upper half of a float32, with its last bit set if anything is in the lower half, decides every rounding to
        # five fraction bits or fewer: adding 0xFFFF carries into bit 16 unless the lower half is zero.
        np.bitwise_and(block, 0xFFFF, out=index)
        index += 0xFFFF
        index |= block
        index >>= 16
        np.take(table, index, out=codes[a : a + CACHED], mode="wrap")
    return codes.reshape(source.shape).view(fmt.dtype)


@cache
def _code_table(fmt: Format) -> np.ndarray:
    """uint8 [65536]: the code of every number of 16 bits."""
    every = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    if not fmt.has_nan:
        every = np.nan_to_num(every, nan=0.0)
    return _codes(round_to(every, fmt), fmt).view(np.uint8)


def _codes(rounded: np.ndarray, fmt: Format) -> np.ndarray:
    """Codes of numbers that the format has: shift the exponent's bias, then cut the fraction.

    Times 2^(bias - 127) the format's subnormals become float32's own, and their bits stand where the code has them.
    """
    bits = rounded.view(np.uint32)
    aligned = ((bits & _MAGNITUDE).view(np.float32) * np.float32(2.0 ** (fmt.bias - 127))).view(np.uint32)
    codes = aligned >> (23 - fmt.fraction_bits)
    if fmt.has_nan:
        codes[np.isnan(rounded)] = _nan_code(fmt)
    codes |= (bits >> 31) << (fmt.bits - 1)
    return codes.astype(np.uint8 if fmt.bits <= 8 else np.uint16).view(fmt.dtype)


def _nan_code(fmt: Format) -> int:
    """The quiet NaN: all ones in E4M3, the highest fraction bit alone in formats with an infinity."""
    top = ((1 << fmt.exponent_bits) - 1) << fmt.fraction_bits
    return top | 7 if fmt.name == "e4m3" else top | 1 << (fmt.fraction_bits - 1)


def decode(codes: np.ndarray, fmt: str | Format | np.dtype | None = None) -> np.ndarray:
    """The float32 values of codes, exact.

    Parameters
    ----------
    codes : array of the format's dtype, or of unsigned integers
    fmt : name, Format or dtype, optional
        Not needed where the dtype says it.
    """
    fmt = format_of(codes.dtype if fmt is None else fmt)
    codes = np.ascontiguousarray(codes)
    if codes.dtype.itemsize == 2:
        return codes.view(fmt.dtype).astype(np.float32) if fmt is not E5M6 else np.take(_value_table(fmt), codes)
    byte = codes.view(np.uint8)
    if byte.ndim == 0 or byte.shape[-1] % 2:
        return np.take(_value_table(fmt), byte)
    pairs = np.empty((*byte.shape[:-1], byte.shape[-1] // 2), dtype=np.uint64)  # two at a time: twice as fast
    return np.take(_pair_table(fmt), byte.view(np.uint16), out=pairs, mode="wrap").view(np.float32)


@cache
def _value_table(fmt: Format) -> np.ndarray:
    """float32 value of each code; from the bits for E5M6, from ml_dtypes where it has the format."""
    if fmt is not E5M6:
        width = min(fmt.bits, 8)
        return np.tile(np.arange(1 << width, dtype=np.uint8).view(fmt.dtype).astype(np.float32), 256 >> width)
    code = np.arange(1 << 12, dtype=np.uint32)
    values = ((code & 0x7FF) << 17).view(np.float32) * np.float32(2.0 ** (127 - fmt.bias))
    special = (code & 0x7C0) == 0x7C0
    values[special] = np.where(code[special] & 0x3F, np.nan, np.inf).astype(np.float32)
    return np.where(code >> 11, -values, values)


@cache
def _pair_table(fmt: Format) -> np.ndarray:
    """uint64 [65536]: the values of two neighbouring codes; which comes first depends on the machine's byte order."""
    pairs = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    return np.take(_value_table(fmt), pairs).view(np.uint64)


class Explanation(NamedTuple):
    """What `explain` shows; `print` it for one line a fact."""

    format: Format
    x: float
    value: float  # what the format makes of x
    code: int
    sign: int  # 0 or 1
    exponent: int  # of the value: 2^exponent, the subnormals' own for subnormals
    fraction: int  # the fraction bits as an integer
    below: float  # the next numbers of the format on either side of the value; the value itself at the ends
    above: float

    @property
    def bits(self) -> str:
        """Sign, exponent and fraction bits with blanks between them."""
        fmt, text = self.format, f"{self.code:0{self.format.bits}b}"
        parts = (
            (text,)
            if fmt.name == "ue8m0"
            else (text[0], text[1 : 1 + fmt.exponent_bits], text[1 + fmt.exponent_bits :])
        )
        return " ".join(part for part in parts if part)

    def __str__(self) -> str:
        fmt, step = self.format, 1 << self.format.fraction_bits
        error = f"{(self.value - self.x) / self.x:+.3%}" if self.x and np.isfinite(self.x) else "none"
        lines = [
            f"{self.x!r} in {fmt.name}: {self.value!r}   relative error {error}",
            f"bits   {self.bits}   (0x{self.code:0{-(-fmt.bits // 4)}x})",
        ]
        if np.isfinite(self.value):
            subnormal = fmt.name != "ue8m0" and abs(self.value) < 2.0**fmt.min_exponent
            note = "   (subnormal)" if subnormal else ""
            significand = f"({0 if subnormal else 1} + {self.fraction}/{step})" if fmt.fraction_bits else "1"
            lines.append(f"value  {'-' if self.sign else '+'}{significand} * 2^{self.exponent}{note}")
            lines.append(f"between {self.below!r} and {self.above!r}")
        return "\n".join(lines)


def explain(x: float, fmt: str | Format | np.dtype) -> Explanation:
    """Sign, exponent, fraction and neighbours of what a format makes of one number (float64: rounded once)."""
    fmt = format_of(fmt)
    code_array = encode(np.array([x], dtype=np.float64), fmt)
    code = int(code_array.view(np.uint8 if code_array.dtype.itemsize == 1 else np.uint16)[0])
    value = float(decode(code_array, fmt)[0])
    if fmt.name == "ue8m0":
        neighbours = value / 2 if value > fmt.smallest else value, value * 2 if value < fmt.max else value
        return Explanation(fmt, float(x), value, code, 0, code - 127, 0, *neighbours)
    m = fmt.fraction_bits
    field = code >> m & ((1 << fmt.exponent_bits) - 1)
    exponent = max(field, 1) - fmt.bias
    step = 2.0 ** (exponent - m)
    inward = step / 2 if value and code & ((1 << m) - 1) == 0 and field > 1 else step  # below a power of two: half
    steps = (inward, step) if value > 0 else (step, inward)
    below, above = max(value - steps[0], -fmt.max), min(value + steps[1], fmt.max)
    return Explanation(
        fmt, float(x), value, code, code >> (fmt.bits - 1), exponent, code & ((1 << m) - 1), below, above
    )


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 or float64 to bfloat16, nearest even; overflow gives infinity, NaN stays NaN."""
    return _single(x).astype(BF16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    """The float32 values of a bfloat16 array, exact."""
    return x.astype(np.float32)


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """Round to float8_e4m3fn, nearest even, saturating at 448 (infinity too); NaN stays NaN."""
    return encode(x, "e4m3")


def ceil_power_of_two(x: np.ndarray) -> np.ndarray:
    """The smallest power of two not below x, for positive float32 x: exact, by its bits, within UE8M0's range.

    Infinity and NaN are given back; zero becomes the smallest, 2^-127.
    """
    x = np.asarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    up = np.minimum((bits + np.uint32(0x7FFFFF)) & _EXPONENT, 0x7F000000)  # carries unless the fraction is zero
    up = np.where(bits <= 0x400000, 0x400000, up)  # 2^-127, a subnormal float32
    return np.where(bits >= _EXPONENT, bits, up).astype(np.uint32).view(np.float32)


def _single(x: np.ndarray) -> np.ndarray:
    """`x`, or for float64 a float32 array that rounds further as `x` would: inexact numbers go to the odd neighbour.

    Rounding a float64 to float32 first would put numbers on a tie that were none before.
    """
    x = np.asarray(x)
    if x.dtype != np.float64:
        return x.astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        single = x.astype(np.float32)
    odd = (single == x) | np.isnan(x) | (single.view(np.uint32) & 1 == 1)
    return np.where(odd, single, np.nextafter(single, np.where(x > single, np.inf, -np.inf).astype(np.float32)))
