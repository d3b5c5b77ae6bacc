"""Gradients against central differences, in float64.

One function serves every op and the whole model: `check_gradients(f, inputs)` compares what `backward` gives with
(f(x + h) - f(x - h)) / 2h, coordinate by coordinate, and says which argument, which index, what came and what was
expected. A non-scalar output is reduced with fixed random weights, so every output element takes part.

Central differences err by O(h^2) plus rounding / h; h = 1e-6 in float64 leaves about 1e-9 for values near one. They
say nothing where a function jumps or has a kink: top-k selections must be held fixed, and FP8 is checked against code
tables instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .autograd import Parameter, Tensor, _propagate


class GradientError(AssertionError):
    """A gradient differs from its central difference."""


def check_gradients(
    f: Callable[..., Any],
    inputs: Sequence[Tensor],
    *,
    step: float = 1e-6,
    rtol: float = 1e-6,
    atol: float = 1e-8,
    samples: int | None = None,
    seed: int = 0,
) -> None:
    """Raise `GradientError` unless the gradients of ``f(*inputs)`` agree with central differences.

    Parameters
    ----------
    f : function of Tensors, returning one Tensor or a tuple of them
    inputs : float64 Tensors with requires_grad (Parameters too, which `f` may also close over)
    step, rtol, atol : float
        Half width of the difference; allowed error ``atol + rtol * max(|expected|, largest |gradient| of the input)``.
    samples : int, optional
        Check this many random coordinates of each input instead of all.
    seed : int
        Of the output weights and of the sampled coordinates.
    """
    rng = np.random.default_rng(seed)
    for number, tensor in enumerate(inputs):
        if tensor.dtype != np.float64:
            raise ValueError(f"argument {number} is {tensor.dtype}: central differences need float64")
        tensor.grad = np.zeros_like(tensor.data) if isinstance(tensor, Parameter) else None
    outputs = _as_tuple(f(*inputs))
    weights = [rng.standard_normal(t.shape) for t in outputs]
    _propagate(outputs, tuple(w if t._op else None for t, w in zip(outputs, weights)))
    analytic = [np.zeros_like(t.data) if t.grad is None else t.grad for t in inputs]

    def total() -> float:
        return sum(float(np.sum(w * t.data)) for w, t in zip(weights, _as_tuple(f(*inputs))))

    for number, (tensor, gradient) in enumerate(zip(inputs, analytic)):
        scale = float(np.abs(gradient).max(initial=0.0))
        for index in _coordinates(tensor.shape, samples, rng):
            expected = _central_difference(total, tensor.data, index, step)
            error = abs(gradient[index] - expected)
            if not error <= atol + rtol * max(abs(expected), scale):
                raise GradientError(
                    f"argument {number} (shape {tensor.shape}) at index {tuple(int(i) for i in index)}: "
                    f"got {gradient[index]:.12g}, expected {expected:.12g}"
                )


def _as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _central_difference(total: Callable[[], float], data: np.ndarray, index: tuple[int, ...], step: float) -> float:
    before = data[index]
    data[index] = before + step
    above = total()
    data[index] = before - step
    below = total()
    data[index] = before
    return (above - below) / (2 * step)


def _coordinates(shape: tuple[int, ...], samples: int | None, rng: np.random.Generator) -> list[tuple[int, ...]]:
    size = int(np.prod(shape))
    flat = np.arange(size, dtype=np.int64)
    if samples is not None and samples < size:
        flat = np.sort(rng.choice(size, samples, replace=False))
    return list(zip(*(axis.tolist() for axis in np.unravel_index(flat, shape)))) if shape else [()] * size
