"""SwiGLU: ``silu(gate) * up`` with ``silu(a) = a sigmoid(a)``; gate and up come side by side from one gemm.

Only the input is kept for the backward pass. The output, which the linear layer behind would keep for its weight
gradient, is made again from it there (V3 report, section 3.2.3), and the FP8 recipe keeps the input itself in one byte
(section 3.3.3).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import numpy as np

from ..autograd import Array, Function, Tensor, Thunk, is_replaced


def sigmoid(x: Array) -> Array:
    """``1 / (1 + exp(-x))`` in the dtype of x; exact limits 0 and 1, no warning for large \\|x\\|."""
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
        y = np.exp(-x)
    y += 1
    return np.reciprocal(y, out=y)


class Store(Protocol):
    """Another form in which an input is kept for the backward pass."""

    def keep(self, x: Array) -> Any:
        """What is stored of x [..., C]."""
        ...

    def load(self, kept: Any) -> Array:
        """The rows again, [N, C]."""
        ...


class SwiGLUFunction(Function):
    """gate_up [..., 2F] -> [..., F]; gate_up is kept in `store`, as it is without."""

    _parts: tuple[Array, Array, Array] | None = None

    def forward(self, gate_up: Array, *, store: Store | None = None) -> Array:
        if gate_up.shape[-1] % 2:
            raise ValueError(f"SwiGLU: last axis of {gate_up.shape} is not even: it holds gate and up")
        self._store, self._shape, self._dtype = store, gate_up.shape, gate_up.dtype
        self.save(store.keep(gate_up) if store is not None and self.needs(0) else gate_up)
        F = gate_up.shape[-1] // 2
        _, y = _twice_sigmoid_and_silu(gate_up[..., :F])
        y *= gate_up[..., F:]
        return y

    def again(self) -> Thunk:
        return partial(self._output, *self.saved)

    def backward(self, dy: Array) -> Array:
        gate_up, s, silu = self._parts or self._from(self.saved[0])
        self._parts = None
        F = silu.shape[-1]
        dx = np.empty_like(gate_up)
        np.multiply(dy, silu, out=dx[..., F:])
        s *= 0.5
        s -= s * silu  # d silu / d gate = s (1 + gate (1 - s)) = s - s silu + silu
        s += silu
        s *= gate_up[..., F:]
        np.multiply(dy, s, out=dx[..., :F])
        return dx

    def _output(self, kept: Any) -> Array:
        """The output once more; what it shares with the backward pass is left for that."""
        gate_up, _, silu = self._parts = self._from(kept)
        return silu * gate_up[..., silu.shape[-1] :]

    def _from(self, kept: Any) -> tuple[Array, Array, Array]:
        """gate_up, and twice the sigmoid and the silu of its gate."""
        gate_up = kept
        if self._store is not None:
            gate_up = self._store.load(kept).astype(self._dtype, copy=False).reshape(self._shape)
        return gate_up, *_twice_sigmoid_and_silu(gate_up[..., : gate_up.shape[-1] // 2])


def _twice_sigmoid_and_silu(x: Array) -> tuple[Array, Array]:
    """``2 sigmoid(x) = 1 + tanh(x / 2)`` and ``x sigmoid(x)``: tanh takes half the time of exp and a division.

    Right to 6e-8 in float32, not relative to itself: far on the left it is zero where exp(x) is still above it. The
    experts' gate, where such numbers are compared, uses `sigmoid`.
    """
    silu = x * 0.5
    twice = np.tanh(silu)
    twice += 1
    silu *= twice
    return twice, silu


def swiglu(gate_up: Tensor, store: Store | None = None) -> Tensor:
    """``silu(gate) * up`` of [..., gate | up], which is kept in `store`; a replacement is not asked to know it."""
    constants = {"store": store} if store is not None and not is_replaced(SwiGLUFunction) else {}
    return SwiGLUFunction.apply(gate_up, **constants)
