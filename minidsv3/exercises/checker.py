"""`check`: run the properties of an exercise against a student's work, print a line each, return the score.

Whatever the work does (raise, hang, return nonsense, change its inputs, exit), the checker answers with a failed
property and goes on. Work that is, wraps or imports the package's own implementation scores zero in all of them. After
a time-out the remaining properties are not run, so one endless loop costs one limit. While a class is graded
(``MINIDSV3_GRADING=1``, set by nbgrader_config.py) a submission is run once: the graded cells of a notebook, one for
each property, read their points from the same results, and cells that only practise are passed over.

Numbers are drawn from ``(seed, exercise, property)``: the same seed asks the same questions, and a grader uses another
one than the student. Points are whole properties; there is no credit for nearly.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .calling import Borrowed, Mine, TimeIsUp, borrowed_part, time_limit
from .exercise import Exercise, Failed, Property


class Result(NamedTuple):
    """How one property came out."""

    property: Property
    points: int  # all of the property's or none
    detail: str  # '' where it holds


@cache
def catalogue() -> dict[str, Exercise]:
    """All numbered exercises by name, in order: one for each file ``exNN_name.py`` of this folder."""
    found = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if match := re.fullmatch(r"ex(\d\d)_(\w+)", module.name):
            number, name = int(match[1]), match[2]
            exercise = importlib.import_module(f".{module.name}", __package__).EXERCISE
            found[name] = replace(exercise, name=name, number=number)
    return found


def exercise_of(name: str) -> Exercise:
    """The exercise called `name`; ``op:NAME`` is the check of any op of the package. ValueError for another name."""
    if name.startswith("op:"):
        from .any_op import exercise_of_op

        return replace(exercise_of_op(name[3:]), name=name)
    known = catalogue()
    if name not in known:
        raise ValueError(f"exercise {name!r} is not one of {', '.join(known)}")
    return known[name]


def evaluate(
    name: str, submission: Any, *, seed: int = 0, variant: Any = None, seconds: float | None = None
) -> list[Result]:
    """Run every property; see `check` for the arguments."""
    exercise = exercise_of(name)
    properties = exercise.properties if variant is None else exercise.variants(variant)
    borrowed = borrowed_part(submission, exercise.allowed) if exercise.kind != "M" else None
    results: list[Result] = []
    late = False
    for p in properties:
        if borrowed or late:
            results.append(Result(p, 0, "not run: an earlier property took too long" if late else ""))
            continue
        rng = np.random.default_rng([seed, zlib.crc32(f"{name}/{p.name}".encode())])
        limit, detail = seconds or exercise.seconds, ""
        try:
            with time_limit(limit):
                p.test(Mine(submission, exercise.allowed if exercise.kind != "M" else ("minidsv3",)), rng)
        except Failed as failure:
            detail = str(failure)
        except Borrowed as part:
            borrowed = str(part)
        except Exception as error:  # raised by the property itself, on something that no property expects
            detail = f"what came back cannot be judged: {type(error).__name__}: {' '.join(str(error).split())}"
        except TimeIsUp:
            late, detail = True, f"took longer than {limit:g} s: is there an endless loop?"
        results.append(Result(p, 0 if detail else p.points, detail))
    if borrowed:
        detail = f"uses the package's own {borrowed}"
        results = [Result(p, 0, detail) for p in properties]
    return results


def grading() -> bool:
    """Whether this process grades a class."""
    return os.environ.get("MINIDSV3_GRADING") == "1"


_graded: dict[tuple[Any, ...], tuple[Any, list[Result]]] = {}  # keeps the submissions, or their ids could come again


def _evaluate_once(name: str, submission: Any, **options: Any) -> list[Result]:
    """`evaluate`, or its earlier answer about the same functions: nobody rewrites them between two graded cells."""
    whole = tuple(submission.values()) if isinstance(submission, dict) else submission
    functions = whole if isinstance(whole, tuple) else (whole,)
    key = (name, tuple(map(id, functions)), repr(options))
    if key not in _graded:
        _graded[key] = functions, evaluate(name, submission, **options)
    return _graded[key][1]


def check(
    name: str,
    submission: Any,
    only: str | None = None,
    *,
    seed: int = 0,
    variant: Any = None,
    seconds: float | None = None,
) -> float:
    """Check a solution: print one line for each property, and return the points.

    Parameters
    ----------
    name : str
        An exercise (``python -m minidsv3 exercises list``), or ``op:RMSNormFunction``: any op of the package.
    submission : object
        What the exercise asks for: a function, an op class, a dict of functions or numbers.
    only : str, optional
        Print and count this property alone: a graded cell is one property.
    seed : int
        Of the sizes and numbers that are tried.
    variant : optional
        The key of a course's own version of the question.
    seconds : float, optional
        What one property may take, instead of the exercise's own limit.

    Returns
    -------
    float
        Points: 0 up to the exercise's (or the property's) points.

    Raises
    ------
    ValueError
        Unknown name, property or variant. Never because of what was submitted.
    """
    if grading() and only is None:
        print(f"{name}: not run while a class is graded; the graded cells are below")
        return 0.0
    judge = _evaluate_once if grading() else evaluate
    results = judge(name, submission, seed=seed, variant=variant, seconds=seconds)
    chosen = [r for r in results if only in (None, r.property.name)]
    if not chosen:
        raise ValueError(f"only={only!r} is not one of {', '.join(r.property.name for r in results)}")
    if only is None:
        print(f"{name}: {exercise_of(name).title}")
    print("\n".join(lines(chosen)))
    points = sum(r.points for r in chosen)
    if only is None:
        print(f"  {points} of {sum(r.property.points for r in chosen)} points")
    return float(points)


def measured(measure: Callable[[], Any], seconds: float = 5.0) -> Any:
    """What a measurement returns; TimeoutError if it takes longer than `check` will allow it."""
    try:
        with time_limit(seconds):
            return measure()
    except TimeIsUp:
        raise TimeoutError(f"the measurement took longer than {seconds:g} s: is there an endless loop?") from None


def lines(results: list[Result]) -> list[str]:
    """One line for each property, the failed ones with their smallest case and a hint."""
    width = max(len(r.property.name) for r in results)
    out = []
    for p, points, detail in results:
        start = f"  {'FAILS' if detail else 'holds'} {points:2d}/{p.points:<2d} {p.name:{width}s}  {p.says}"
        hint = "hand in code of your own" if detail.startswith("uses the package's own") else p.hint
        out.append(f"{start}: {detail}. Hint: {hint}" if detail else start)
    return out
