"""1x128 tiles in E4M3: a scale for each tile (lesson 08)."""

from typing import Any

import numpy as np

from ..ops.linear import Gemm
from ..quant.formats import round_to
from .calling import Mine, given
from .exercise import Exercise, Property, array, parts, require, same, sizes
from .golden import Case, golden

Rng = np.random.Generator
MAX = 448.0


def _round(x: np.ndarray) -> np.ndarray:
    return round_to(np.asarray(x, dtype=np.float32), "e4m3")


def _got(mine: Mine, x: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    codes, scales = parts("the result", mine(x, block, given(_round)), 2)
    tiles = -(-x.shape[1] // block)
    return array("codes", codes, x.shape, np.float32), array("scales", scales, (len(x), tiles), np.float32)


def _input(rng: Rng, tiles: int, rest: int = 0) -> tuple[np.ndarray, int]:
    block, N = sizes(rng, 2, 3, 9)
    x = rng.standard_normal((N, tiles * block + rest)) * 10.0 ** rng.integers(-3, 4, (N, 1))
    return x.astype(np.float32), block


def _scales(mine: Mine, rng: Rng) -> None:
    x, block = _input(rng, 3)
    amax = np.abs(x.reshape(len(x), 3, block)).max(axis=2)
    same("scales", _got(mine, x, block)[1], amax / np.float32(MAX), rtol=1e-6, atol=0)


def _codes(mine: Mine, rng: Rng) -> None:
    for x, block in (_input(rng, 1), _input(rng, 3)):
        codes, scales = _got(mine, x, block)
        same("codes, rounded once more", codes, _round(codes), rtol=0, atol=0)
        require(np.abs(codes).max() <= MAX, "a code lies beyond 448")
        back = codes * np.repeat(scales, block, axis=1)
        wrong = np.abs(back - x) > np.abs(x) / 15.9 + np.repeat(scales, block, axis=1) * 2.0**-10
        if wrong.any():  # half a step of 3 fraction bits, or half a subnormal step
            index = tuple(int(i) for i in np.argwhere(wrong)[0])
            same(f"code * scale at {index}", back[index], x[index], rtol=1 / 16)


def _edge(mine: Mine, rng: Rng) -> None:
    x, block = _input(rng, 2, rest=2)
    codes, scales = _got(mine, x, block)
    expected = np.abs(x[:, 2 * block :]).max(axis=1) / np.float32(MAX)
    same("the last tile's scale", scales[:, 2], expected, rtol=1e-6, atol=0)
    back = codes[:, 2 * block :] * scales[:, 2:]
    same("code * scale in the last tile", back, x[:, 2 * block :], rtol=1 / 15, atol=float(scales[:, 2].max()) / 512)


def _zeros(mine: Mine, rng: Rng) -> None:
    x, block = _input(rng, 2)
    x[1] = 0
    codes, scales = _got(mine, x, block)
    require(np.isfinite(scales).all() and (scales > 0).all(), "a tile of zeros has the scale 0 or NaN")
    same("the codes of zeros", codes[1], x[1])


class _Recipe:
    """Activations of every linear layer through a student's tiles; the other products stay exact."""

    def __init__(self, quantize: Any) -> None:
        class TileGemm(Gemm):
            def keep(self, x: Any) -> Any:
                codes, scales = quantize(x.astype(np.float32), 128, _round)
                return (codes * np.repeat(scales, 128, axis=1)[:, : x.shape[1]]).astype(x.dtype)

            def fprop(self, x: Any, w: Any, out: Any = None, kept: Any = None) -> Any:
                return np.matmul(self.keep(x) if kept is None else kept, w.T, out=out)

        self._gemm = TileGemm()

    def gemm(self, layer: str) -> Gemm | None:
        return None if layer in ("gate", "lm_head") else self._gemm

    def rounding(self, place: str) -> None:
        return None

    def store(self, op: str) -> None:
        return None


def _golden(mine: Mine, case: Case) -> None:
    codes, scales = _got(mine, case["x"], case["block"])
    same("scales", scales, case["scales"], rtol=1e-6, atol=0)
    same("codes", codes, case["codes"], rtol=0, atol=0)


def _enter(submission: Any, parts: Any) -> None:
    parts.recipe = _Recipe(submission)


EXERCISE = Exercise(
    title="a scale for each tile of 1x128",
    kind="I",
    lesson=8,
    minutes=25,
    properties=(
        Property(
            "scales",
            3,
            "a tile's scale is its largest magnitude / 448",
            _scales,
            "one scale for each row and block of columns: x.reshape(N, tiles, block)",
        ),
        Property(
            "codes",
            2,
            "codes are E4M3 numbers, code * scale is x within half a step",
            _codes,
            "codes = round_e4m3(x / scale): divide by the scale, then round; the scale multiplies on the way back",
        ),
        Property(
            "edge",
            2,
            "a last tile may be shorter",
            _edge,
            "np.add.reduceat, or pad with zeros and cut: the scale of the rest is its own maximum",
        ),
        Property(
            "zeros",
            2,
            "a tile of zeros has a usable scale",
            _zeros,
            "where the largest magnitude is 0, take any positive scale",
        ),
        golden("quantize_tile", _golden, "codes equal, scales rtol 1e-6"),
    ),
    enter=_enter,
)
