"""Rounding float32 arrays in few passes, where they stand.

NumPy runs over an array once for each operation, so a rounding costs what its passes cost, some 0.06 ns a number each
while the arrays stay in the cache; a look-up in a table costs five of them.

`push_out`: adding c = 1.5 * 2^(e + 23 - m) to a number with exponent e pushes all but m fraction bits out of a float32,
rounded to nearest even by the adder itself; subtracting c brings the number back. Subnormals need no code of their own:
e is not let below the smallest exponent.

`write_codes`: times 2^(bias - 127) the format's subnormals become float32's own, and the bits of exponent and
fraction stand as the code has them, only further left.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .formats import Format

CACHED = 1 << 16  # elements: the arrays of a pass over so many stay in the L2 cache
_EXPONENT = 0x7F800000  # field of a float32


def push_out(x: np.ndarray, fmt: Format, magic: np.ndarray) -> None:
    """Round flat float32 x within the format's range; a zero may lose its sign. `magic`: uint32 scratch, to CACHED."""
    np.bitwise_and(x.view(np.uint32), _EXPONENT, out=magic)
    np.maximum(magic, _smallest_exponent(fmt.min_exponent)[: magic.size], out=magic)
    magic += np.uint32(((23 - fmt.fraction_bits) << 23) | 0x400000)  # times 1.5 * 2^(23 - m)
    x += magic.view(np.float32)
    x -= magic.view(np.float32)


@cache
def _smallest_exponent(exponent: int) -> np.ndarray:
    """uint32 [CACHED], one number again and again: against a scalar NumPy's maximum takes five times as long."""
    return np.full(CACHED, (exponent + 127) << 23, dtype=np.uint32)


def round_scaled_in_place(x: np.ndarray, fmt: Format) -> None:
    """`round_to` for C-contiguous float32 that a scale has brought into the range; a zero may lose its sign."""
    flat = x.reshape(-1)
    magic = np.empty(min(CACHED, flat.size), dtype=np.uint32)
    for a in range(0, flat.size, CACHED):
        block = flat[a : a + CACHED]
        push_out(block, fmt, magic[: block.size])


def write_codes(x: np.ndarray, fmt: Format, codes: np.ndarray) -> None:
    """Round as `round_scaled_in_place` does, and write the codes too: uint8 or uint16 of the shape of x, C-contiguous.

    No NaN, and no format that reaches as far as float32.
    """
    flat, out = x.reshape(-1), codes.view(f"u{codes.itemsize}").reshape(-1)
    magic = np.empty(min(CACHED, flat.size), dtype=np.uint32)
    for a in range(0, flat.size, CACHED):
        block, code = flat[a : a + CACHED], out[a : a + CACHED]
        scratch = magic[: block.size]
        sign = np.signbit(block).view(np.uint8)
        push_out(block, fmt, scratch)
        np.multiply(block, np.float32(2.0 ** (fmt.bias - 127)), out=scratch.view(np.float32))
        scratch >>= np.uint32(23 - fmt.fraction_bits)
        if fmt.bits > 8:
            scratch &= np.uint32((1 << (fmt.bits - 1)) - 1)
        np.copyto(code, scratch, casting="unsafe")  # a byte has no room for the sign, which stands further left
        code |= np.multiply(sign, 1 << (fmt.bits - 1), dtype=code.dtype)


def round_sums_to_bf16(x: np.ndarray) -> None:
    """`round_bf16_in_place` in half the passes, for numbers that are zero or not below 2^-126, float32's subnormals.

    With c = 2^16 x, exact, x - c keeps eight bits of x, and its rounding error is that of x to the nearest even: at a
    tie, x is a multiple of 2^16 steps of float32, so c cannot make the sum odd. (This is Dekker's splitting.)
    """
    flat = x.reshape(-1)
    for a in range(0, flat.size, CACHED):
        block = flat[a : a + CACHED]
        with np.errstate(over="ignore"):
            squares = np.dot(block, block)  # the cheapest look at them all
        if squares < np.inf:  # so all are below 2^64, and c is finite
            c = block * np.float32(1 << 16)
            block -= c
            block += c
        else:
            round_bf16_in_place(block)


def round_bf16_in_place(x: np.ndarray) -> np.ndarray:
    """float32 x to BF16 values, nearest even, where it stands; beyond the range: infinity. C-contiguous only.

    In integers, on the upper 16 bits: BF16 reaches as far as float32, where no larger c exists.
    """
    bits = x.view(np.uint32)
    nan = np.isnan(x)
    odd = bits >> 16
    odd &= 1
    bits += np.uint32(0x7FFF)
    bits += odd
    bits &= np.uint32(0xFFFF0000)
    if nan.any():
        x[nan] = np.nan
    return x
