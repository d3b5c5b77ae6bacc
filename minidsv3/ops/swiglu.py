"""SwiGLU: ``silu(gate) * up`` with ``silu(a) = a sigmoid(a)``; gate and up come side by side from one gemm.

The sigmoid is recomputed in the backward pass, so the only thing kept is the input (which the FP8 recipe of section
3.3.3 keeps in one byte).
"""

from __future__ import annotations

import numpy as np

from ..autograd import Array, Function, Tensor


def sigmoid(x: Array) -> Array:
    """``1 / (1 + exp(-x))`` in the dtype of x; exact limits 0 and 1, no warning for large \\|x\\|."""
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
        y = np.exp(-x)
    y += 1
    return np.reciprocal(y, out=y)


class SwiGLUFunction(Function):
    """gate_up [..., 2F] -> [..., F]."""

    def forward(self, gate_up: Array) -> Array:
        if gate_up.shape[-1] % 2:
            raise ValueError(f"SwiGLU: last axis of {gate_up.shape} is not even: it holds gate and up")
        self.save(gate_up)
        F = gate_up.shape[-1] // 2
        gate, up = gate_up[..., :F], gate_up[..., F:]
        y = np.negative(gate)
        with np.errstate(over="ignore"):  # exp(-gate) = inf gives the right limit, gate / inf = 0
            np.exp(y, out=y)
        y += 1
        np.divide(gate, y, out=y)
        y *= up
        return y

    def backward(self, dy: Array) -> Array:
        (gate_up,) = self.saved
        F = gate_up.shape[-1] // 2
        gate, up = gate_up[..., :F], gate_up[..., F:]
        dx = np.empty_like(gate_up)
        s = sigmoid(gate)
        silu = s * gate
        np.multiply(dy, silu, out=dx[..., F:])
        s -= s * silu  # d silu / d gate = s (1 + gate (1 - s)) = s - s silu + silu
        s += silu
        s *= up
        np.multiply(dy, s, out=dx[..., :F])
        return dx


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of [..., gate | up]."""
    return SwiGLUFunction.apply(gate_up)
