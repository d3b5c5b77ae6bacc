"""The matrix products of tensor cores, bit for bit.

A tensor core adds `step` products and the accumulator C in one go. It does not round each sum: it lines all addends up
with the largest exponent among them, cuts each off after `fraction_bits` bits, adds what is left exactly, and cuts the
sum. On Hopper's FP8 units that is 32 products and 13 bits (the "about 14 bits" of the V3 report, section 3.3.2), so
over a long K the accumulator loses everything below 2^-13 of itself, always towards zero. DeepSeek's remedy is to take
the partial sum out every 128 products (four instructions) and add it in FP32: `promote_every`, and with the scales of
tiles and blocks `deepgemm`.

`UNITS` is the specification; `_by_the_table` reads it and is meant to be read; `_fast` computes the units with 13 bits
from the same rules some hundred times faster. One step, for one output:

    1. a product's significand is s_a s_b in (-4, 4), exact and *not* normalised; its exponent is e_a + e_b
       (subnormals keep the format's smallest exponent)
    2. e_max = the largest exponent of the products that are not zero, and of C if it is not zero
    3. each addend becomes trunc(significand * 2^(fraction_bits + e - e_max)): magnitudes are cut, not floored
    4. the sum of these integers is exact; it is normalised and cut once more to the output format; zero is +0

NaN, infinities of both signs, and 0 times infinity give the one NaN 0x7FFFFFFF (0x7FFF in binary16); infinity stays.

Rule and table are checked against outputs of real H100, H200, Ada and B200 GPUs (data of Khattak and Mikaitis) and of
MMA-Sim (arXiv:2511.10909); Hopper FP8 with C != 0 and Blackwell rest on MMA-Sim alone. Simplified: `mma.sync` with FP8
on Hopper is another unit (FP16 arithmetic) and is not here; nor are block-scaled MX instructions.

How `_fast` works. With P_a = 2^(8 e_a - 7), P_b = 2^(8 e_b) and 0 for zeros, the largest of 32 sums e_a + e_b stands
in the exponent of *one* ordinary matrix product P_a P_b: fewer than 2^8 terms cannot carry into the next multiple of
8. Then, for each k, the outer product a_k b_k is exact in float32, and so are its multiple by a power of two, `trunc`
and the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from .blockwise import BLOCK
from .formats import BF16, E4M3, E5M2, FP16, decode, format_of

_FP8, _HALF = (E4M3, E5M2), (BF16, FP16)
_SMALLEST_EXPONENT = -(1 << 20)  # of an addend that is zero: never the largest


@dataclass(frozen=True)
class Unit:
    """What one kind of tensor core does; `align` other than 'truncate' is for hypotheses, no hardware has it."""

    step: int  # products of one fused step
    fraction_bits: int  # kept when the addends are lined up
    output: str  # 'rz13', 'rz23': float32 cut to so many fraction bits; 'rne16': binary16, nearest even
    operands: tuple[np.dtype, ...]
    align: str = "truncate"  # or 'floor', 'nearest'

    @property
    def accumulator(self) -> np.dtype:
        return np.dtype(np.float16 if self.output == "rne16" else np.float32)


UNITS = {
    "hopper-fp8": Unit(32, 13, "rz13", _FP8),  # wgmma m64nNk32; checked on H100 and H200 with C = 0
    "hopper-fp8-f16": Unit(32, 13, "rne16", _FP8),
    "ada-fp8": Unit(16, 13, "rz13", _FP8),  # mma m16n8k32 is two such steps; checked on Ada, with C
    "ada-fp8-f16": Unit(16, 13, "rne16", _FP8),
    "blackwell-fp8": Unit(32, 25, "rz23", _FP8),  # tcgen05 kind::f8f6f4
    "hopper-bf16": Unit(16, 25, "rz23", _HALF),  # checked on H100, with C
    "ampere-bf16": Unit(8, 24, "rz23", _HALF),
}


def tensorcore_matmul(
    a: np.ndarray,
    b: np.ndarray,
    c: np.ndarray | None = None,
    *,
    unit: str | Unit = "hopper-fp8",
    promote_every: int | None = None,
) -> np.ndarray:
    """``a b^T + c`` with the bits of a tensor core.

    Parameters
    ----------
    a, b : [M, K], [N, K]
        float8_e4m3fn, float8_e5m2 (they may differ), or bfloat16 or float16 (they may not), as the unit allows; any
        strides. K is padded with zeros to the unit's step.
    c : [M, N], optional
        Of the accumulator's type: float32, or float16 for units named '-f16'; zero if not given.
    unit : name in `UNITS`, or a Unit
    promote_every : int, optional
        Every so many k, a multiple of the step, the partial sum, started from 0, is added in float32 (nearest even) to
        an accumulator that starts at c. Without it C runs through the tensor core from the first step to the last.

    Returns
    -------
    [M, N] float32, or float16 for units named '-f16'

    Raises
    ------
    ValueError
        Another dtype or shape, an unknown unit, an interval that is no multiple of the step.
    """
    unit = _unit(unit)
    _check_operands(a, b, unit)
    M, N, K = len(a), len(b), a.shape[1]
    if c is not None and (c.shape != (M, N) or c.dtype != unit.accumulator):
        raise ValueError(f"c is {c.dtype} {c.shape}, not {unit.accumulator} {(M, N)}")
    if promote_every is not None and (promote_every <= 0 or promote_every % unit.step):
        raise ValueError(f"promote_every={promote_every} is not a multiple of the unit's step of {unit.step}")
    if promote_every is None:
        return _chain(a, b, c, unit)
    total = np.zeros((M, N), dtype=np.float32) if c is None else c.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for rows, columns in _blocks(M, N):
            for k in (slice(i, i + promote_every) for i in range(0, K, promote_every)):
                total[rows, columns] += _chain(a[rows, k], b[columns, k], None, unit)
        return _one_nan(total.astype(unit.accumulator))


def deepgemm(a: np.ndarray, a_scale: np.ndarray, b: np.ndarray, b_scale: np.ndarray) -> np.ndarray:
    """The product of DeepGEMM's sm90 kernel, FP32 accumulator before its rounding to BF16, bit for bit.

    ``final = fma32(fl32(sa * sb), partial, final)`` over blocks of 128 of K in ascending order, from +0; each partial
    is four chained Hopper steps from 0.

    Parameters
    ----------
    a, b : FP8 [M, K], [N, K]
    a_scale : float32 [M, ceil(K / 128)]
    b_scale : float32 [ceil(N / 128), ceil(K / 128)]

    Returns
    -------
    float32 [M, N]
    """
    if b_scale.ndim != 2 or len(b_scale) != -(-len(b) // BLOCK):
        raise ValueError(f"b_scale {b_scale.shape} does not fit b {b.shape}: one row for each {BLOCK} rows of b")
    return tiled_matmul(a, a_scale, b, np.repeat(b_scale, BLOCK, axis=0)[: len(b)])


def tiled_matmul(a: np.ndarray, a_scale: np.ndarray, b: np.ndarray, b_scale: np.ndarray) -> np.ndarray:
    """`deepgemm` with 1x128 tiles on both sides (the weight gradient): scales [M or N, ceil(K / 128)]."""
    unit = UNITS["hopper-fp8"]
    _check_operands(a, b, unit)
    blocks = -(-a.shape[1] // BLOCK)
    for name, scale, rows in (("a_scale", a_scale, len(a)), ("b_scale", b_scale, len(b))):
        if scale.shape != (rows, blocks) or scale.dtype != np.float32:
            raise ValueError(f"{name} is {scale.dtype} {scale.shape}, not float32 {(rows, blocks)}")
    final = np.zeros((len(a), len(b)), dtype=np.float32)
    with np.errstate(all="ignore"):
        for rows, columns in _blocks(*final.shape):
            for i in range(blocks):
                k = slice(i * BLOCK, (i + 1) * BLOCK)
                partial = _chain(a[rows, k], b[columns, k], None, unit)
                scale = a_scale[rows, i, None] * b_scale[None, columns, i]
                final[rows, columns] = fma32(scale, partial, final[rows, columns])
    return _one_nan(final)


def fma32(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """``x * y + z`` of float32 arrays, rounded once to float32, nearest even.

    The product of two float32 is exact in float64. The sum may not be; where it is not, it goes to the neighbour with
    an odd last bit ("round to odd"), from which the second rounding, to float32, gives what one rounding would have
    given.
    """
    product = np.multiply(x, y, dtype=np.float64)
    total = product + z
    back = total - product
    error = (product - (total - back)) + (z - back)  # Knuth's TwoSum: total + error is the exact sum
    bits = total.view(np.int64)
    inexact = (error != 0) & (error == error) & (bits & 1 == 0)
    bits += np.where(inexact, np.where((error > 0) == (total > 0), 1, -1), 0)
    return total.astype(np.float32)


def _unit(unit: str | Unit) -> Unit:
    if isinstance(unit, Unit):
        return unit
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r} is not one of {', '.join(UNITS)}")
    return UNITS[unit]


def _check_operands(a: np.ndarray, b: np.ndarray, unit: Unit) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a {a.shape} and b {b.shape} are not [M, K] and [N, K]")
    for name, x in (("a", a), ("b", b)):
        if x.dtype not in unit.operands:
            raise ValueError(f"{name} is {x.dtype}, not one of {', '.join(map(str, unit.operands))}")
    if unit.operands == _HALF and a.dtype != b.dtype:
        raise ValueError(f"a is {a.dtype} and b {b.dtype}: this unit takes two of one kind")


def _chain(a: np.ndarray, b: np.ndarray, c: np.ndarray | None, unit: Unit) -> np.ndarray:
    """Steps over ascending k, each taking the result of the one before as its C."""
    if (unit.fraction_bits, unit.output, unit.align) == (13, "rz13", "truncate") and unit.operands == _FP8:
        return _fast(a, b, c, unit.step)
    return _by_the_table(a, b, c, unit)


def _one_nan(x: np.ndarray) -> np.ndarray:
    """Every NaN becomes the hardware's: all ones behind the sign."""
    nan = np.isnan(x)
    if nan.any():
        x.view(np.uint16 if x.dtype == np.float16 else np.uint32)[nan] = 0x7FFF if x.dtype == np.float16 else 0x7FFFFFFF
    return x


def _split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Significand (float64) and exponent (int64) of each number; infinity and NaN count as zero."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        value = x.astype(np.float64)
    value[~np.isfinite(value)] = 0
    smallest = -126 if x.dtype == np.float32 else format_of(x.dtype).min_exponent
    exponent = np.maximum(np.frexp(value)[1].astype(np.int64) - 1, smallest)
    return np.ldexp(value, -exponent), np.where(value == 0, _SMALLEST_EXPONENT, exponent)


# --- the slow way: the rules as they stand above ----------------------------------------------------------------------


def _by_the_table(a: np.ndarray, b: np.ndarray, c: np.ndarray | None, unit: Unit) -> np.ndarray:
    """Any unit, all outputs at once, in float64 (every number below is exact in it)."""
    L, F = unit.step, unit.fraction_bits
    cut = {"truncate": np.trunc, "floor": np.floor, "nearest": np.rint}[unit.align]
    d = np.zeros((len(a), len(b)), dtype=unit.accumulator) if c is None else c.copy()
    (a_sig, a_exp), (b_sig, b_exp) = _split(a), _split(b)
    rows = max(1, (1 << 18) // (L * max(1, len(b))))
    for r in (slice(i, i + rows) for i in range(0, len(a), rows)):
        for k in (slice(i, i + L) for i in range(0, a.shape[1], L)):
            c_sig, c_exp = _split(d[r])
            product = a_sig[r, None, k] * b_sig[None, :, k]  # [rows, N, L]
            exponent = np.maximum(a_exp[r, None, k] + b_exp[None, :, k], _SMALLEST_EXPONENT)
            largest = np.maximum(exponent.max(axis=2), c_exp)
            shift = np.maximum(exponent - largest[:, :, None], -2000)
            total = cut(np.ldexp(product, F + shift)).sum(axis=2)
            total += cut(np.ldexp(c_sig, F + np.maximum(c_exp - largest, -2000)))
            result = _output(np.ldexp(total, np.maximum(largest, -2000) - F), unit.output)
            d[r] = _with_specials(result, a[r, k], b[:, k], d[r])
    return _one_nan(d)


def _output(x: np.ndarray, kind: str) -> np.ndarray:
    """Exact sums (float64) in the unit's output format; overflow is infinity, zero is +0."""
    bits, smallest, cut = {"rz13": (13, -126, np.trunc), "rz23": (23, -126, np.trunc), "rne16": (10, -14, np.rint)}[
        kind
    ]
    exponent = np.maximum(np.frexp(x)[1] - 1, smallest)
    with np.errstate(over="ignore"):
        rounded = np.ldexp(cut(np.ldexp(x, bits - exponent)) + 0.0, exponent - bits)
        return rounded.astype(np.float16 if kind == "rne16" else np.float32)


def _with_specials(d: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray | None) -> np.ndarray:
    """`d`, but what IEEE arithmetic says where an infinity or a NaN takes part."""
    with np.errstate(invalid="ignore"):
        if np.isfinite(decode(a)).all() and np.isfinite(decode(b)).all() and (c is None or np.isfinite(c).all()):
            return d
        ieee = a.astype(np.float64) @ b.astype(np.float64).T
        ieee = ieee if c is None else ieee + c
        return np.where(np.isfinite(ieee), d, ieee.astype(d.dtype))


# --- the fast way: 13 fraction bits, FP8 operands, float32 accumulator ------------------------------------------------


class _Operand(NamedTuple):
    """An FP8 matrix [M, K] made ready: its values, and powers of two that stand for their exponents."""

    columns: np.ndarray  # float32 [K, M]: one k is contiguous
    powers: np.ndarray  # [M, K]: 2^(8 e + offset), 0 for zero


def _fast(a: np.ndarray, b: np.ndarray, c: np.ndarray | None, step: int) -> np.ndarray:
    # 8 (e_a + e_b) spans 224 for two E4M3, which float32 holds, and up to 464 with E5M2, which needs float64.
    wide = E5M2 in (a.dtype, b.dtype)
    x, y = _operand(a, -7, wide), _operand(b, 0, wide)
    d = np.zeros((len(a), len(b)), dtype=np.float32)
    if c is not None:
        d[np.isfinite(c)] = c[np.isfinite(c)]
    # An output without any product is its C, cut; e_max, which is not let below -29, would lose a C as small as this.
    tiny = c is not None and bool(((np.abs(d) < 2.0**-14) & (d != 0)).any())
    for rows, columns in _blocks(*d.shape):
        d[rows, columns] = _fast_block(x, y, d[rows, columns], rows, columns, step, tiny)
    return _one_nan(_with_specials(d, a, b, c))


def _operand(x: np.ndarray, offset: int, wide: bool) -> _Operand:
    codes = np.ascontiguousarray(x).view(np.uint8)
    values, powers = _tables(x.dtype, offset, wide)
    return _Operand(np.ascontiguousarray(np.take(values, codes).T), np.take(powers, codes))


@cache
def _tables(dtype: np.dtype, offset: int, wide: bool) -> tuple[np.ndarray, np.ndarray]:
    """Value and power of two of each of the 256 codes; what is not finite counts as zero."""
    values = decode(np.arange(256, dtype=np.uint8).view(dtype))
    significand, exponent = _split(values.astype(dtype))
    powers = np.where(significand == 0, 0, np.exp2((8 * exponent + offset).astype(np.float64)))
    return np.where(np.isfinite(values), values, 0), powers if wide else powers.astype(np.float32)


def _blocks(M: int, N: int, size: int = 1 << 16) -> Iterator[tuple[slice, slice]]:
    """Blocks of at most `size` outputs, whose three scratch arrays stay in the L2 cache."""
    width = min(N, 256)
    height = size // max(1, width)
    for i in range(0, M, height):
        for j in range(0, N, max(1, width)):
            yield slice(i, min(i + height, M)), slice(j, min(j + width, N))


def _fast_block(
    a: _Operand, b: _Operand, d: np.ndarray, rows: slice, columns: slice, step: int, tiny: bool
) -> np.ndarray:
    """All steps of one block of outputs; `d` [m, n] is its C."""
    d = np.ascontiguousarray(d)
    a_columns, b_columns = a.columns[:, rows], b.columns[:, columns]
    product, total = np.empty_like(d), np.empty_like(d)
    bits = d.view(np.uint32)
    for k in range(0, len(a.columns), step):
        ks = slice(k, k + step)
        peak = a.powers[rows, ks] @ b.powers[columns, ks].T
        largest = _largest_exponent(peak)
        np.maximum(largest, (bits >> 23 & 0xFF).astype(np.int32) - 127, out=largest)
        scale = ((140 - largest) << 23).view(np.float32)  # 2^(13 - e_max)
        np.multiply(d, scale, out=total)
        np.trunc(total, out=total)
        total += np.float32(0)  # -0 becomes +0
        for a_k, b_k in zip(a_columns[ks], b_columns[ks]):
            np.dot(a_k[:, None], b_k[None, :], out=product)
            product *= scale
            np.trunc(product, out=product)
            total += product
        total *= ((largest + 114) << 23).view(np.float32)  # 2^(e_max - 13)
        if tiny:
            np.copyto(total, d, where=peak == 0)
            total[total == 0] = 0
        np.bitwise_and(total.view(np.uint32), 0xFFFFFC00, out=bits)
        if tiny:
            d[d == 0] = 0
    return d


def _largest_exponent(peak: np.ndarray) -> np.ndarray:
    """e_max from the exponent field of the sum of powers, int32; not below -29, which is below all products."""
    if peak.dtype == np.float32:
        return (peak.view(np.int32) >> 26) - 15  # 127 - 7 = 15 * 8
    return np.maximum((peak.view(np.int64) >> 55) - 127, -29).astype(np.int32)  # 1023 - 7 = 127 * 8
