"""The properties of an op exercise: values, number types, gradients against central differences.

An op is a `Function` class, so what is checked is always the same: its forward gives what a second implementation
gives, float32 stays float32, every gradient has the shape and type of its input, and every gradient agrees with
(f(x + h) - f(x - h)) / 2h in float64, for f the sum of all outputs times fixed random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..autograd import Function
from .calling import Mine
from .exercise import Failed, Property, array, same

Case = tuple[tuple[np.ndarray, ...], dict[str, Any]]  # float64 inputs, constants
STEP = 1e-6
SAMPLES = 24  # coordinates of each input


def op_properties(
    reference: type[Function],
    cases: Callable[[np.random.Generator], list[Case]],
    points: tuple[int, int, int] = (3, 2, 5),
    hints: tuple[str, str, str] = ("", "", ""),
) -> tuple[Property, ...]:
    """Properties 'values', 'types', 'gradients' of an op that does what `reference` does; cases from small to large."""

    def values(mine: Mine, rng: np.random.Generator) -> None:
        for arrays, constants in cases(rng):
            _, got = mine.forward(*arrays, **constants)
            expected, what = reference().forward(*arrays, **constants), "the output"
            if isinstance(expected, tuple):
                if not isinstance(got, tuple) or len(got) != len(expected):
                    raise Failed(f"forward returned {type(got).__name__}, expected a tuple of {len(expected)}")
                for i, (a, b) in enumerate(zip(got, expected)):
                    same(f"{what} {i}", a, b, rtol=1e-9, atol=1e-12)
            else:
                same(what, got, expected, rtol=1e-9, atol=1e-12)

    def types(mine: Mine, rng: np.random.Generator) -> None:
        for arrays, constants in cases(rng):
            constants = {k: v.astype(np.complex64) if _is_complex(v) else v for k, v in constants.items()}
            arrays = tuple(a.astype(np.float32) for a in arrays)
            op, out = mine.forward(*arrays, **constants)
            outs = out if isinstance(out, tuple) else (out,)
            for y in outs:
                array("the output of float32 inputs", y, np.shape(y), np.float32)
            dxs = mine.backward(op, *(np.ones_like(y) for y in outs))
            _check_kinds(dxs, arrays)

    def gradients(mine: Mine, rng: np.random.Generator) -> None:
        for arrays, constants in cases(rng):
            check_gradients(mine, arrays, constants, rng)

    defaults = (
        "compare with the formula on a case that fits on paper",
        "np.float64 constants and np.zeros without dtype turn float32 into float64",
        "derive dx for one row on paper; every path from x to the loss is a term",
    )
    value_hint, type_hint, gradient_hint = (h or d for h, d in zip(hints, defaults))
    return (
        Property("values", points[0], "forward agrees with a second implementation", values, value_hint),
        Property("types", points[1], "float32 stays float32, gradients have their input's shape", types, type_hint),
        Property("gradients", points[2], "gradients agree with central differences", gradients, gradient_hint),
    )


def check_gradients(mine: Mine, arrays: tuple[np.ndarray, ...], constants: dict[str, Any], rng: Any) -> None:
    """Raise `Failed` at the first coordinate of the first input whose gradient is wrong."""
    op, out = mine.forward(*arrays, **constants)
    weights = tuple(rng.standard_normal(np.shape(y)) for y in (out if isinstance(out, tuple) else (out,)))
    dxs = mine.backward(op, *weights)
    _check_kinds(dxs, arrays)

    def total(number: int, x: np.ndarray) -> float:
        _, out = mine.forward(*arrays[:number], x, *arrays[number + 1 :], **constants)
        return sum(float(np.sum(w * y)) for w, y in zip(weights, out if isinstance(out, tuple) else (out,)))

    for number, (x, dx) in enumerate(zip(arrays, dxs)):
        scale = float(np.abs(dx).max(initial=0.0))
        chosen = np.sort(rng.choice(x.size, min(x.size, SAMPLES), replace=False))
        for index in zip(*(axis.tolist() for axis in np.unravel_index(chosen, x.shape))):
            around = [x.copy(), x.copy()]
            around[0][index] += STEP
            around[1][index] -= STEP
            expected = (total(number, around[0]) - total(number, around[1])) / (2 * STEP)
            if not abs(dx[index] - expected) <= 2e-8 + 2e-6 * max(abs(expected), scale):
                raise Failed(f"gradient of input {number} at {index}: got {dx[index]:.7g}, expected {expected:.7g}")


def _check_kinds(dxs: tuple[Any, ...], arrays: tuple[np.ndarray, ...]) -> None:
    if len(dxs) != len(arrays):
        raise Failed(f"backward returned {len(dxs)} gradients, expected {len(arrays)}: one for each input")
    for number, (dx, x) in enumerate(zip(dxs, arrays)):
        array(f"gradient of input {number}", dx, x.shape, x.dtype)


def _is_complex(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "c"
