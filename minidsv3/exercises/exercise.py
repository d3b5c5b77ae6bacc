"""What an exercise is: named properties with points, and how a property says that it does not hold.

A property is a function ``test(mine, rng)`` that calls the student's work (`calling.Mine`) on sizes and numbers drawn
from `rng`, small cases first, and raises `Failed` at the first that is wrong: argument, index, got, expected. It is
one idea (a shape, an invariant, two ways that must agree, a gradient against central differences, a sum that is
conserved), so a wrong solution loses the points of the idea it missed and no others.

Simplified against a test framework: no fixtures, no discovery, no report but one line a property.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

KINDS = {"I": "implement", "A": "account", "B": "find the bug", "M": "measure and explain"}


class Failed(Exception):
    """A property does not hold; the text says where."""


class Property(NamedTuple):
    """One thing that must hold."""

    name: str
    points: int
    says: str  # what holds
    test: Callable[[Any, np.random.Generator], None]
    hint: str


def _no_variant(variant: Any) -> tuple[Property, ...]:
    raise ValueError(f"this exercise has no variants, got variant={variant!r}")


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes
    ----------
    title : str
    kind : 'I', 'A', 'B' or 'M' (`KINDS`)
    lesson : number of the lesson it belongs to
    minutes : what a student should plan for it
    properties : the checks of the public exercise
    seconds : what one property may take
    allowed : beginnings of names of the package that a solution may use besides the engine
    enter : what puts a solution into the model, a function of (submission, `training.Parts`); None: nothing to enter
    variants : properties of a course's own variant of a question; only of kinds A and B
    draw : a course's variant from a generator: what the student's notebook names, and what stands in its cells
    """

    title: str
    kind: str
    lesson: int
    minutes: int
    properties: tuple[Property, ...]
    seconds: float = 5.0
    allowed: tuple[str, ...] = ()
    enter: Callable[[Any, Any], None] | None = None
    variants: Callable[[Any], tuple[Property, ...]] = _no_variant
    draw: Callable[[np.random.Generator], Variant] | None = None
    name: str = field(default="", compare=False)
    number: int = field(default=0, compare=False)

    @property
    def points(self) -> int:
        """Full score."""
        return sum(p.points for p in self.properties)


class Variant(NamedTuple):
    """A course's own version of an exercise."""

    key: Any  # what `check(..., variant=key)` takes; a literal of Python
    given: str  # source of the cell that gives the question
    solution: str  # source of the solution cell, for the teacher's copy


def sizes(rng: np.random.Generator, count: int, low: int = 2, high: int = 9) -> list[int]:
    """`count` sizes from low..high, pairwise different and ascending: a swapped axis cannot pass."""
    return sorted(int(n) for n in rng.choice(np.arange(low, high + 1, dtype=np.int64), count, replace=False))


def same(what: str, got: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Raise `Failed` unless `got` has the shape and, within the tolerance, the numbers of `expected`.

    Integers and booleans must be equal. The first index that differs is named.
    """
    expected = np.asarray(expected)
    if not isinstance(got, np.ndarray | np.generic | numbers.Number) or np.asarray(got).dtype == object:
        raise Failed(f"{what} is {_kind(got)}, expected an array of shape {expected.shape}")
    got = np.asarray(got)
    if got.shape != expected.shape:
        raise Failed(f"{what} has shape {got.shape}, expected {expected.shape}")
    exact = expected.dtype.kind in "biu"
    if exact and got.dtype.kind not in "biu":
        raise Failed(f"{what} has dtype {got.dtype}, expected integers")
    with np.errstate(all="ignore"):
        good = got == expected if exact else np.isclose(got, expected, rtol=rtol, atol=atol, equal_nan=False)
    if not np.all(good):
        index = tuple(int(i) for i in np.argwhere(~np.atleast_1d(good))[0]) if got.ndim else ()
        where = f"{what} at {index}" if got.ndim else what
        raise Failed(f"{where}: got {_number(got[index])}, expected {_number(expected[index])}")


def array(what: str, got: Any, shape: tuple[int, ...], dtype: Any = None) -> np.ndarray:
    """`got`, if it is an ndarray of this shape (and dtype); `Failed` else."""
    if not isinstance(got, np.ndarray):
        raise Failed(f"{what} is {_kind(got)}, expected an ndarray of shape {shape}")
    if got.shape != shape:
        raise Failed(f"{what} has shape {got.shape}, expected {shape}")
    if got.dtype.kind not in "biufc":
        raise Failed(f"{what} has dtype {got.dtype}, expected numbers")
    if dtype is not None and got.dtype != np.dtype(dtype):
        raise Failed(f"{what} has dtype {got.dtype}, expected {np.dtype(dtype)}")
    return got


def parts(what: str, got: Any, count: int) -> tuple[Any, ...]:
    """`got`, if it is a tuple (or list) of `count` things; `Failed` else."""
    if not isinstance(got, tuple | list) or len(got) != count:
        length = f" of {len(got)}" if isinstance(got, tuple | list) else ""
        raise Failed(f"{what} is {_kind(got)}{length}, expected a tuple of {count}")
    return tuple(got)


def require(holds: Any, message: str) -> None:
    """Raise `Failed` with `message` unless `holds`."""
    if not holds:
        raise Failed(message)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _number(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, float | np.floating) else str(value)
