"""The last property of an exercise: a stored case, inputs and outputs, in golden/NAME.npz.

The outputs were computed by slow textbook loops (tests/golden/make_exercise_golden.py), never by this package: should
a check and the package err together, this one does not. One file, one point: who hands in the stored arrays themselves
has that point and no other, since all other properties draw their numbers from a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .calling import Mine
from .exercise import Failed, Property, same

FOLDER = Path(__file__).parent / "golden"
RTOL, ATOL = 1e-5, 1e-6  # float32, unless an exercise says otherwise
Case = dict[str, Any]


@cache
def stored(name: str) -> Case:
    """The case of an exercise: arrays by name, single numbers as Python's."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        case = {key: file[key] for key in file.files}
    return {key: a.item() if a.ndim == 0 and a.dtype != np.float32 else a for key, a in case.items()}


def golden(
    name: str, compare: Callable[[Mine, Case], None], within: str = f"rtol {RTOL:g}, atol {ATOL:g}", points: int = 1
) -> Property:
    """Property 'golden': `compare` calls the work on the stored inputs and raises `Failed` at what differs."""

    def test(mine: Mine, rng: np.random.Generator) -> None:
        compare(mine, stored(name))

    hint = f"both sides stand in minidsv3/exercises/golden/{name}.npz: np.load it, and go through the smallest case"
    return Property("golden", points, f"a stored case, computed by slow loops, comes out ({within})", test, hint)


def golden_op(name: str, inputs: str, constants: str, output: str, gradients: str) -> Property:
    """Property 'golden' of an op: its output, and the gradients of its inputs for the stored `dy`; names in a case."""

    def compare(mine: Mine, case: Case) -> None:
        op, got = mine.forward(*(case[n] for n in inputs.split()), **{n: case[n] for n in constants.split()})
        same("the output", got, case[output], RTOL, ATOL)
        dxs, names = mine.backward(op, case["dy"]), gradients.split()
        if len(dxs) != len(names):
            raise Failed(f"backward returned {len(dxs)} gradients, expected {len(names)}: one for each input")
        for n, dx in zip(names, dxs):
            same(n, dx, case[n], RTOL, ATOL)

    return golden(name, compare)
