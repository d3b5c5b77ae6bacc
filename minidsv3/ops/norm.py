"""RMSNorm: divide a vector by its root mean square, then scale each channel.

``y = w * x / sqrt(mean(x^2) + eps)``. With r = 1/rms and g = w * dy, the gradient is ``dx = r (g - x r^2 mean(g x))``:
the part of g along x is taken out, because the length of x does not matter to y.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ..autograd import Array, Function, Tensor, Thunk
from .shape import require_shape


class RMSNormFunction(Function):
    """x [..., D], weight [D] -> [..., D]."""

    def forward(self, x: Array, w: Array, *, eps: float) -> Array:
        require_shape("RMSNorm", "weight", w, (x.shape[-1],))
        D = x.shape[-1]
        r = np.vecdot(x, x)[..., None]  # [..., 1] sum of squares
        r += D * eps
        np.divide(D, r, out=r)
        np.sqrt(r, out=r)
        self.save(x, w, r)
        return _scaled(x, w, r)

    def again(self) -> Thunk:
        return partial(_scaled, *self.saved)

    def backward(self, dy: Array) -> tuple[Array, Thunk]:
        x, w, r = self.saved
        D = x.shape[-1]
        products = dy * x
        along = (products @ w)[..., None]  # sum of g x
        along *= r
        along *= r * (1 / D)
        dx = dy * w  # g
        dx -= x * along
        dx *= r
        return dx, lambda: r.reshape(-1) @ products.reshape(-1, D)


def _scaled(x: Array, w: Array, r: Array) -> Array:
    y = x * r
    y *= w
    return y


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis."""
    return RMSNormFunction.apply(x, w, eps=eps)
