"""Whose arithmetic is this? The output bits of somebody's FP8 kernel against what different rules would have given.

A `Dump` holds operands, scales and output of one product. `verdict` counts the outputs whose bits differ under each
hypothesis: fraction bits, rounding when addends are lined up, instruction, promotion interval, and, with scales of
1x128 and 128x128, the order of multiplications and whether they are fused. The one with the fewest explains the kernel
best; 0 identifies it as far as these inputs can tell, and inputs with few bits or short K tell little.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from .blockwise import BLOCK
from .formats import BF16
from .tensorcore import UNITS, Unit, fma32, tensorcore_matmul

MOST_PRODUCTS = 1 << 22  # of the part that is recomputed under every hypothesis: a few seconds
INTERVALS = (32, 64, 128, 256, 512)


class Dump(NamedTuple):
    """One product d = a b^T (+ c); with scales, in the layout of `tensorcore.deepgemm`."""

    a: np.ndarray  # FP8 [M, K]
    b: np.ndarray  # FP8 [N, K]
    d: np.ndarray  # float32 or bfloat16 [M, N]
    a_scale: np.ndarray | None = None  # float32 [M, ceil(K / 128)]
    b_scale: np.ndarray | None = None  # float32 [ceil(N / 128), ceil(K / 128)]
    c: np.ndarray | None = None  # float32 [M, N]

    def check(self) -> None:
        """ValueError unless the parts fit."""
        (M, K), N = self.a.shape, len(self.b)
        blocks = -(-K // BLOCK)
        wanted = {"b": (N, K), "d": (M, N), "a_scale": (M, blocks), "b_scale": (-(-N // BLOCK), blocks), "c": (M, N)}
        for name, shape in wanted.items():
            part = getattr(self, name)
            if part is not None and part.shape != shape:
                raise ValueError(f"{name} has shape {part.shape}, expected {shape} beside a {self.a.shape}")
        if (self.a_scale is None) != (self.b_scale is None):
            raise ValueError("a_scale and b_scale come together or not at all")
        if self.a_scale is not None and self.c is not None:
            raise ValueError("a scaled product starts from zero: it has no c")
        if self.d.dtype not in (np.dtype(np.float32), BF16):
            raise ValueError(f"d is {self.d.dtype}, not float32 or bfloat16")

    def part(self, rows: int, columns: int) -> Dump:
        """The product of the first rows of a and b."""

        def cut(x: np.ndarray | None, *sizes: int) -> np.ndarray | None:
            return None if x is None else x[tuple(slice(size) for size in sizes)]

        return Dump(
            self.a[:rows], self.b[:columns], self.d[:rows, :columns], cut(self.a_scale, rows),
            cut(self.b_scale, -(-columns // BLOCK)), cut(self.c, rows, columns),
        )  # fmt: skip


class Score(NamedTuple):
    """How a hypothesis fared."""

    hypothesis: str
    mismatches: int
    of: int
    first: tuple[int, int] | None  # the first output that differs
    got: int  # its bits in the dump, and as the hypothesis has them
    expected: int


def verdict(dump: Dump) -> list[Score]:
    """Scores of all hypotheses on (the first part of) a dump, the best first; ties in the order of plausibility."""
    dump.check()
    M, N, K = len(dump.a), len(dump.b), dump.a.shape[1]
    rows = max(1, min(M, int((MOST_PRODUCTS / max(1, K)) ** 0.5)))
    part = dump.part(rows, max(1, min(N, MOST_PRODUCTS // max(1, K * rows))))
    hypotheses = _plain(part) if part.a_scale is None else _scaled(part)
    return sorted((_score(part, name, compute) for name, compute in hypotheses), key=lambda score: score.mismatches)


def published(dump: Dump) -> Score:
    """The whole dump against the published rules: one chain, or DeepGEMM's product with scales."""
    dump.check()
    name, compute = next(_plain(dump) if dump.a_scale is None else _scaled(dump))
    return _score(dump, name, compute)


def _score(dump: Dump, name: str, compute: Callable[[], np.ndarray]) -> Score:
    with np.errstate(all="ignore"):
        ours = compute().astype(dump.d.dtype)
    width = np.uint16 if dump.d.dtype == BF16 else np.uint32
    got, expected = np.ascontiguousarray(dump.d).view(width), np.ascontiguousarray(ours).view(width)
    differ = got != expected
    if not differ.any():
        return Score(name, 0, differ.size, None, 0, 0)
    i, j = (int(v) for v in np.argwhere(differ)[0])
    return Score(name, int(differ.sum()), differ.size, (i, j), int(got[i, j]), int(expected[i, j]))


def _units() -> Iterator[tuple[str, Unit]]:
    """The published Hopper unit, then one change each."""
    hopper = UNITS["hopper-fp8"]
    yield "Hopper: 13 fraction bits, cut", hopper
    yield "12 fraction bits", dataclasses.replace(hopper, fraction_bits=12)
    yield "14 fraction bits", dataclasses.replace(hopper, fraction_bits=14)
    yield "floor when lined up", dataclasses.replace(hopper, align="floor")
    yield "nearest when lined up", dataclasses.replace(hopper, align="nearest")
    yield "FP32 output", dataclasses.replace(hopper, output="rz23")
    yield "Ada: steps of 16", UNITS["ada-fp8"]
    yield "Blackwell: 25 fraction bits", UNITS["blackwell-fp8"]


def _plain(dump: Dump) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    for name, unit in _units():
        yield f"{name}, one chain", lambda unit=unit: tensorcore_matmul(dump.a, dump.b, dump.c, unit=unit)
    hopper = UNITS["hopper-fp8"]
    for every in INTERVALS:
        yield (
            f"Hopper, promotion every {every}",
            lambda every=every: tensorcore_matmul(dump.a, dump.b, dump.c, unit=hopper, promote_every=every),
        )
    yield "float64, rounded once", lambda: _float64(dump)


def _float64(dump: Dump) -> np.ndarray:
    total = dump.a.astype(np.float64) @ dump.b.astype(np.float64).T
    return (total if dump.c is None else total + dump.c).astype(np.float32)


# how a partial sum p meets its scales and the accumulator
ORDERS: dict[str, Callable[..., np.ndarray]] = {
    "fma(sa sb, p, acc)": lambda p, sa, sb, acc: fma32(sa * sb, p, acc),
    "fma(p sa, sb, acc)": lambda p, sa, sb, acc: fma32(p * sa, np.broadcast_to(sb, p.shape), acc),
    "(sa sb) p + acc": lambda p, sa, sb, acc: (sa * sb) * p + acc,
    "(p sa) sb + acc": lambda p, sa, sb, acc: (p * sa) * sb + acc,
}


def _scaled(dump: Dump) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    orders = list(ORDERS.items())
    for name, unit in _units():
        for order, fold in orders:
            yield f"{name}; {order}", lambda unit=unit, fold=fold: _folded(dump, unit, fold)
        orders = orders[:1]  # other units with the published order only


def _folded(dump: Dump, unit: Unit, fold: Callable[..., np.ndarray]) -> np.ndarray:
    assert dump.a_scale is not None and dump.b_scale is not None
    b_scale = np.repeat(dump.b_scale, BLOCK, axis=0)[: len(dump.b)]
    total = np.zeros(dump.d.shape, dtype=np.float32)
    for i in range(dump.a_scale.shape[1]):
        k = slice(i * BLOCK, (i + 1) * BLOCK)
        partial = tensorcore_matmul(dump.a[:, k], dump.b[:, k], unit=unit)
        total = fold(partial, dump.a_scale[:, i, None], b_scale[None, :, i], total)
    return total
