"""Promoted accumulation: a narrow accumulator, emptied into float32 every 128 numbers (lesson 09)."""

from typing import Any

import numpy as np

from .calling import Mine, given
from .exercise import Exercise, Property, array, require, same, sizes
from .golden import Case, golden

Rng = np.random.Generator
BITS = 14


def narrow(x: Any) -> np.float32:
    """The nearest number to zero with 14 significant bits: what the accumulator of the tensor core keeps."""
    fraction, exponent = np.frexp(np.float32(x))
    return np.float32(np.ldexp(np.trunc(fraction * 2**BITS) / 2**BITS, exponent))


def _products(rng: Rng, n: int) -> np.ndarray:
    return rng.uniform(0.5, 1.5, n).astype(np.float32)


def _expected(products: np.ndarray, interval: int) -> np.float32:
    total = np.float32(0)
    for a in range(0, len(products), interval):
        part = np.float32(0)
        for product in products[a : a + interval]:
            part = narrow(part + product)
        total = np.float32(total + part)
    return total


def _sum(mine: Mine, products: np.ndarray, interval: int) -> np.float32:
    got = mine(products, interval, given(narrow))
    if isinstance(got, np.ndarray):
        array("the sum", got, ())
    require(
        isinstance(got, int | float | np.number | np.ndarray), f"the sum is {type(got).__name__}, expected a number"
    )
    return got


def _short(mine: Mine, rng: Rng) -> None:
    for n in (1, 2, *sizes(rng, 1, 3, 8)):
        products = _products(rng, n)
        same(f"the sum of {n}", _sum(mine, products, 16), _expected(products, 16), rtol=0, atol=0)


def _whole(mine: Mine, rng: Rng) -> None:
    interval, blocks = sizes(rng, 2, 3, 9)
    products = _products(rng, interval * blocks)
    same("the sum", _sum(mine, products, interval), _expected(products, interval), rtol=0, atol=0)


def _rest(mine: Mine, rng: Rng) -> None:
    interval, blocks = sizes(rng, 2, 4, 9)
    products = _products(rng, interval * blocks + 3)
    same("the sum", _sum(mine, products, interval), _expected(products, interval), rtol=0, atol=0)


def _error(mine: Mine, rng: Rng) -> None:
    products = _products(rng, 4096)
    exact = float(products.sum(dtype=np.float64))
    error = abs(float(_sum(mine, products, 128)) - exact) / exact
    require(error < 3e-3, f"relative error {error:.2e} with promotion every 128, expected below 3e-3")
    alone = abs(float(_sum(mine, products, 4096)) - exact) / exact
    require(alone > 4 * error, f"without promotion the error is {alone:.2e}, with it {error:.2e}: expected far more")


def _golden(mine: Mine, case: Case) -> None:
    for interval, expected in zip(case["intervals"].tolist(), case["sums"]):
        same(f"the sum of 300 with interval {interval}", _sum(mine, case["products"], interval), expected, 0, 0)


EXERCISE = Exercise(
    title="promoted accumulation",
    kind="I",
    lesson=9,
    minutes=20,
    properties=(
        Property(
            "short",
            2,
            "inside one interval every sum is narrowed",
            _short,
            "part = narrow(part + product), number after number",
        ),
        Property(
            "whole",
            2,
            "after each interval the part goes to a float32 sum",
            _whole,
            "start the next part at zero; total is float32 and is not narrowed",
        ),
        Property("rest", 2, "numbers behind the last whole interval count", _rest, "the last interval may be shorter"),
        Property(
            "error",
            3,
            "promotion every 128 keeps the error small",
            _error,
            "without promotion a large part swallows the low bits of each new product",
        ),
        golden("promoted_sum", _golden, "equal"),
    ),
)
