"""SwiGLU: ``silu(gate) * up`` with ``silu(a) = a sigmoid(a)``; gate and up come side by side from one gemm.

The sigmoid is recomputed in the backward pass, so the only thing kept is the input, which the FP8 recipe of section
3.3.3 keeps in one byte (`stored_swiglu`).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ..autograd import Array, Function, Tensor, Thunk


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
    """gate_up [..., 2F] -> [..., F]; `kept` is what `store` keeps of gate_up, without them gate_up itself is kept."""

    def forward(self, gate_up: Array, *, store: Store | None = None, kept: Any = None) -> Array:
        if gate_up.shape[-1] % 2:
            raise ValueError(f"SwiGLU: last axis of {gate_up.shape} is not even: it holds gate and up")
        self._store, self._shape = store, gate_up.shape
        self.save(gate_up if store is None else kept)
        return _silu_product(gate_up)

    def backward(self, dy: Array) -> Array:
        (gate_up,) = self.saved
        if self._store is not None:
            gate_up = self._store.load(gate_up).astype(dy.dtype, copy=False).reshape(self._shape)
        F = gate_up.shape[-1] // 2
        gate, up = gate_up[..., :F], gate_up[..., F:]
        dx = np.empty_like(gate_up)
        s = _fast_sigmoid(gate)
        silu = s * gate
        np.multiply(dy, silu, out=dx[..., F:])
        s -= s * silu  # d silu / d gate = s (1 + gate (1 - s)) = s - s silu + silu
        s += silu
        s *= up
        np.multiply(dy, s, out=dx[..., :F])
        return dx


def _silu_product(gate_up: Array) -> Array:
    F = gate_up.shape[-1] // 2
    y = _fast_sigmoid(gate_up[..., :F])
    y *= gate_up[..., :F]
    y *= gate_up[..., F:]
    return y


def _fast_sigmoid(x: Array) -> Array:
    """`sigmoid` as ``(1 + tanh(x / 2)) / 2``, half the time of exp and a division.

    Right to 6e-8 in float32, not relative to itself: far on the left it is zero where exp(x) is still above it. The
    gate of the experts, where such numbers are compared, uses `sigmoid`.
    """
    y = x * 0.5
    np.tanh(y, out=y)
    y *= 0.5
    y += 0.5
    return y


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of [..., gate | up]."""
    return SwiGLUFunction.apply(gate_up)


def stored_swiglu(gate_up: Tensor, store: Store | None) -> tuple[Tensor, Thunk | None]:
    """`swiglu` that keeps its input in `store`, and a function that computes its rows [N, F] from there again.

    The linear layer behind it then keeps nothing: section 3.3.3 stores SwiGLU's inputs in FP8 and computes its output
    once more in the backward pass. Without a store: plain `swiglu`, and None.
    """
    if store is None:
        return swiglu(gate_up), None
    kept, dtype = store.keep(gate_up.data), gate_up.dtype
    y = SwiGLUFunction.apply(gate_up, store=store, kept=kept)
    return y, lambda: _silu_product(store.load(kept).astype(dtype, copy=False))
