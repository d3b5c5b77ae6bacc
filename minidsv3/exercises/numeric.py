"""Questions whose answer is a number with a unit, on a model or machine that is given as a few numbers.

The public question asks about published sizes; a course draws its own (`draw`), so an answer copied from the public
key is wrong there. A wrong answer to the public question is told whether it is too large or too small (a course's is
not: nobody should find it by halving), and where a factor is missing that everybody trips over: 1024 against 1000,
bits against bytes, a 2.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .calling import Mine
from .exercise import Exercise, Failed, Property, Variant

Given = dict[str, Any]
FACTORS = {
    1.024: "1 kB = 1000 B, 1 KiB = 1024 B", 1.024**2: "1 MB = 10^6 B, 1 MiB = 2^20 B",
    1.024**3: "1 GB = 10^9 B, 1 GiB = 2^30 B", 8.0: "8 bits are a byte",
    2.0: "a multiply-add is two FLOPs, a BF16 number two bytes", 1000.0: "look at the unit again",
}  # fmt: skip


class Question(NamedTuple):
    """One number that is asked for; its name is that of the function which returns it."""

    name: str
    points: int
    unit: str
    text: str
    answer: Callable[[Given], float]
    hint: str
    rtol: float = 1e-6


def numeric_exercise(
    title: str,
    lesson: int,
    minutes: int,
    questions: tuple[Question, ...],
    given: Given,
    draw: Callable[[np.random.Generator], Given],
) -> Exercise:
    """An exercise of kind A: the submission is a dict of name -> number, or of functions that return one."""

    def properties(numbers_given: Given) -> tuple[Property, ...]:
        if not isinstance(numbers_given, dict) or set(numbers_given) != set(given):
            raise ValueError(f"variant={numbers_given!r} does not give exactly {', '.join(given)}")
        return tuple(
            Property(q.name, q.points, f"{q.text} ({q.unit})", _test(q, numbers_given, numbers_given == given), q.hint)
            for q in questions
        )

    def variant(rng: np.random.Generator) -> Variant:
        drawn = draw(rng)
        functions = [_function(q, f"return {_literal(q.answer(drawn))}") for q in questions]
        return Variant(drawn, given_cell(drawn), "\n\n\n".join(functions))

    return Exercise(title, "A", lesson, minutes, properties(given), variants=properties, draw=variant)


def given_cell(given: Given) -> str:
    """The cell that gives the numbers of a question."""
    return "\n".join(["GIVEN = {", *(f"    {name!r}: {value!r}," for name, value in given.items()), "}"])


def _function(q: Question, body: str) -> str:
    return f'def {q.name}():\n    """{q.text} ({q.unit})."""\n    ### BEGIN SOLUTION\n    {body}\n    ### END SOLUTION'


def _literal(value: float) -> str:
    return repr(int(value)) if float(value).is_integer() else repr(float(value))


def _test(q: Question, given: Given, public: bool) -> Callable[[Mine, np.random.Generator], None]:
    def test(mine: Mine, rng: np.random.Generator) -> None:
        part = mine.part(q.name)
        got = part() if callable(part.submission) else part.submission
        if isinstance(got, bool | np.bool_ | complex) or not isinstance(got, numbers.Real | np.number):
            raise Failed(f"the answer is {type(got).__name__} {got!r}, expected a number")
        expected, number = float(q.answer(given)), float(got)
        if math.isfinite(number) and abs(number - expected) <= q.rtol * abs(expected):
            return
        if math.isnan(number):
            raise Failed("the answer is not a number")
        wrong = ("too large" if number > expected else "too small") if public else "wrong"
        raise Failed(f"got {number:,.10g} {q.unit}, which is {wrong}{_remark(number, expected)}")

    return test


def _remark(got: float, expected: float) -> str:
    ratio = got / expected if expected and got > 0 else 1.0
    for factor, remark in FACTORS.items():
        if math.isfinite(ratio) and abs(max(ratio, 1 / ratio) / factor - 1) < 1e-6:
            return f" by a factor of {factor:.4g} ({remark})"
    return ""
