"""RoPE in both channel layouts, and the permutation that makes them one (lesson 02)."""

from typing import Any

import numpy as np

from ..autograd import Function
from ..ops.rope import RopeFunction
from .calling import Mine
from .exercise import Exercise, Property, array, same, sizes
from .golden import ATOL, RTOL, Case, golden

Rng = np.random.Generator


def _angles(rng: Rng, S: int, half: int) -> np.ndarray:
    return rng.uniform(-3, 3, (S, half))


def _pairs(half: int, interleave: bool) -> list[tuple[int, int]]:
    return [(2 * j, 2 * j + 1) if interleave else (j, j + half) for j in range(half)]


def _layout(interleave: bool) -> Any:
    def test(mine: Mine, rng: Rng) -> None:
        for S, half in ((1, 1), *((S, half) for half, S in [sizes(rng, 2, 2, 6)])):
            x, angles = rng.standard_normal((S, 2 * half)), _angles(rng, S, half)
            expected = x.copy()
            for j, (a, b) in enumerate(_pairs(half, interleave)):  # each pair is a complex number that turns
                turned = (x[:, a] + 1j * x[:, b]) * np.exp(1j * angles[:, j])
                expected[:, a], expected[:, b] = turned.real, turned.imag
            same("the result", mine.part("rotate")(x, angles, interleave), expected)

    return test


def _relative(mine: Mine, rng: Rng) -> None:
    half = sizes(rng, 1, 2, 5)[0]
    q, k = rng.standard_normal((2, 1, 2 * half))
    frequencies = rng.uniform(0.1, 1, (1, half))
    for interleave in (True, False):
        scores = []
        for shift in (0, 7):
            a = mine.part("rotate")(q, (5 + shift) * frequencies, interleave)
            b = mine.part("rotate")(k, (2 + shift) * frequencies, interleave)
            array("the result", a, q.shape), array("the result", b, k.shape)
            scores.append(float(a[0] @ b[0]))
        same("q . k with both positions moved by 7", scores[1], scores[0])
        same("the length after turning", np.linalg.norm(a), np.linalg.norm(q))


def _permutation(mine: Mine, rng: Rng) -> None:
    for half in (1, *sizes(rng, 2, 2, 6)):
        order = array("the permutation", mine.part("permutation")(2 * half), (2 * half,))
        x, angles = rng.standard_normal((3, 2 * half)), _angles(rng, 3, half)
        same("sorted, the permutation", np.sort(order), np.arange(2 * half, dtype=np.int64))
        turned = x.copy()
        for a, b in _pairs(half, True):
            z = (x[:, a] + 1j * x[:, b]) * np.exp(1j * angles[:, a // 2])
            turned[:, a], turned[:, b] = z.real, z.imag
        halves = x[:, order]
        z = (halves[:, :half] + 1j * halves[:, half:]) * np.exp(1j * angles)
        same("halves turned in x[:, order]", np.concatenate([z.real, z.imag], axis=1), turned[:, order])


def _types(mine: Mine, rng: Rng) -> None:
    x, angles = rng.standard_normal((3, 4)).astype(np.float32), _angles(rng, 3, 2).astype(np.float32)
    for interleave in (True, False):
        array("the result", mine.part("rotate")(x, angles, interleave), x.shape, np.float32)


def _golden(mine: Mine, case: Case) -> None:
    for layout in ("neighbours", "halves"):
        got = mine.part("rotate")(case["x"], case["angles"], layout == "neighbours")
        same(f"{layout} turned", got, case[layout], RTOL, ATOL)
    same("the permutation", mine.part("permutation")(case["x"].shape[1]), case["permutation"])


def _enter(submission: Any, parts: Any) -> None:
    rotate = Mine(submission).part("rotate").submission

    class Rope(Function):
        def forward(self, x: Any, *, rotation: Any, interleave: bool = True) -> Any:
            self._angles, self._interleave = np.angle(rotation).astype(x.dtype), interleave
            return self._turned(x, self._angles)

        def backward(self, dy: Any) -> Any:
            return self._turned(dy, -self._angles)

        def _turned(self, x: Any, angles: Any) -> Any:
            d_r, y = 2 * angles.shape[-1], x.copy()
            for b, h in np.ndindex(x.shape[0], x.shape[2]):
                y[b, :, h, -d_r:] = rotate(x[b, :, h, -d_r:], angles, self._interleave)
            return y

    parts.replacements.append((RopeFunction, Rope))


EXERCISE = Exercise(
    title="RoPE in both layouts, and the permutation between them",
    kind="I",
    lesson=2,
    minutes=30,
    properties=(
        Property(
            "neighbours",
            2,
            "channels (2j, 2j+1) turn together",
            _layout(True),
            "(a, b) -> (a cos - b sin, a sin + b cos)",
        ),
        Property(
            "halves",
            2,
            "channels (j, j + d/2) turn together",
            _layout(False),
            "the first half holds all a, the second all b",
        ),
        Property(
            "relative",
            2,
            "scores depend on the difference of positions, lengths stay",
            _relative,
            "a turn by m of q and by n of k leaves m - n",
        ),
        Property(
            "permutation",
            2,
            "one permutation of channels turns one layout into the other",
            _permutation,
            "where does the half-split layout take its channel j from? even channels first",
        ),
        Property("types", 1, "float32 stays float32", _types, "np.empty and np.zeros without dtype are float64"),
        golden("rope", _golden),
    ),
    enter=_enter,
)
