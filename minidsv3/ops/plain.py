"""The textbook form of each op that has a fast one: the same interface, nothing skipped, nothing in place.

Read these first; the fast forms say what they do differently. `using_plain_ops()` puts all of them under a whole model
(``train --plain`` does), and the tests hold both forms equal, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

from ..autograd import Array, Function, replacing
from .attention import AttentionFunction
from .linear import EmbeddingFunction, GroupedLinearFunction
from .loss import CrossEntropyFunction
from .norm import RMSNormFunction
from .rope import RopeFunction
from .routing import PermuteFunction, UnpermuteFunction
from .swiglu import SwiGLUFunction


class PlainRMSNorm(Function):
    """``y = w x / rms(x)``, written out."""

    def forward(self, x: Array, w: Array, *, eps: float) -> Array:
        rms = np.sqrt((x**2).mean(axis=-1, keepdims=True) + x.dtype.type(eps))
        self.save(x, w, rms)
        return w * (x / rms)

    def backward(self, dy: Array) -> tuple[Array, Array]:
        x, w, rms = self.saved
        unit, g = x / rms, dy * w
        dx = (g - unit * (g * unit).mean(axis=-1, keepdims=True)) / rms
        return dx, (dy * unit).reshape(-1, x.shape[-1]).sum(axis=0)


class PlainSwiGLU(Function):
    """``silu(gate) * up`` with the derivative of silu written out."""

    def forward(self, gate_up: Array) -> Array:
        self.save(gate_up)
        gate, up = np.split(gate_up, 2, axis=-1)
        return gate / (1 + np.exp(-gate)) * up

    def backward(self, dy: Array) -> Array:
        gate, up = np.split(self.saved[0], 2, axis=-1)
        s = 1 / (1 + np.exp(-gate))
        return np.concatenate([dy * up * (s + gate * s * (1 - s)), dy * gate * s], axis=-1)


class PlainRope(Function):
    """Turn each channel pair by its angle: (a, b) -> (a cos - b sin, a sin + b cos)."""

    def forward(self, x: Array, *, rotation: Array, interleave: bool = True) -> Array:
        self._constants = rotation, interleave
        return self._turn(x, rotation.real, rotation.imag, interleave)

    def backward(self, dy: Array) -> Array:
        rotation, interleave = self._constants
        return self._turn(dy, rotation.real, -rotation.imag, interleave)

    @staticmethod
    def _turn(x: Array, cos: Array, sin: Array, interleave: bool) -> Array:
        y, half = x.copy(), cos.shape[-1]
        d_n = x.shape[-1] - 2 * half
        for j in range(half):
            first, second = (d_n + 2 * j, d_n + 2 * j + 1) if interleave else (d_n + j, d_n + j + half)
            a, b, c, s = x[..., first], x[..., second], cos[..., None, j], sin[..., None, j]
            y[..., first], y[..., second] = a * c - b * s, a * s + b * c
        return y


class PlainAttention(Function):
    """Scores for every pair, a causal mask, a softmax over each row, a weighted sum of values."""

    def forward(self, q: Array, kv: Array, k_rope: Array, *, scale: float) -> Array:
        d_n = q.shape[-1] - k_rope.shape[-1]
        H, S = q.shape[2], q.shape[1]
        k = np.concatenate([kv[..., :d_n], np.repeat(k_rope[:, :, None], H, axis=2)], axis=-1)  # [B, S, H, d]
        v = kv[..., d_n:]
        scores = np.einsum("bihd,bjhd->bhij", q, k, optimize=True) * q.dtype.type(scale)
        scores = np.where(np.tri(S, dtype=bool), scores, -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        self._scale, self._d_n = q.dtype.type(scale), d_n
        self.save(q, k, v, p)
        return np.einsum("bhij,bjhd->bihd", p, v, optimize=True)

    def backward(self, do: Array) -> tuple[Array, Array, Array]:
        q, k, v, p = self.saved
        dv = np.einsum("bhij,bihd->bjhd", p, do, optimize=True)
        dp = np.einsum("bihd,bjhd->bhij", do, v, optimize=True)
        ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True)) * self._scale  # softmax, then scale
        dq = np.einsum("bhij,bjhd->bihd", ds, k, optimize=True)
        dk = np.einsum("bhij,bihd->bjhd", ds, q, optimize=True)
        return dq, np.concatenate([dk[..., : self._d_n], dv], axis=-1), dk[..., self._d_n :].sum(axis=2)


class PlainGroupedLinear(Function):
    """Every expert multiplies every row; a mask keeps the rows that are its own."""

    def forward(self, x: Array, w: Array, *, rows_per_expert: Array, gemm: object = None) -> Array:
        expert = np.repeat(np.arange(len(w), dtype=np.int64), rows_per_expert)
        mine = (expert == np.arange(len(w), dtype=np.int64)[:, None]).astype(x.dtype)  # [E, N]
        self.save(x, w, mine)
        return np.einsum("en,nd,efd->nf", mine, x, w, optimize=True)

    def backward(self, dy: Array) -> tuple[Array, Array]:
        x, w, mine = self.saved
        dx = np.einsum("en,nf,efd->nd", mine, dy, w, optimize=True)
        return dx, np.einsum("en,nf,nd->efd", mine, dy, x, optimize=True)


class PlainPermute(Function):
    """Row n is token token_of_row[n]; a token's gradient is the sum over its rows."""

    def forward(self, x: Array, *, token_of_row: Array, row_of_slot: Array) -> Array:
        self.save(token_of_row)
        self._shape = x.shape
        return x[token_of_row]

    def backward(self, drows: Array) -> Array:
        dx = np.zeros(self._shape, dtype=drows.dtype)
        for row, token in enumerate(self.saved[0]):
            dx[token] += drows[row]
        return dx


class PlainUnpermute(Function):
    """``y[t] = sum_k weights[t, k] rows[row_of_slot[t, k]]``."""

    def forward(self, rows: Array, weights: Array, *, token_of_row: Array, row_of_slot: Array) -> Array:
        self.save(rows, weights, row_of_slot)
        return np.einsum("tk,tkd->td", weights, rows[row_of_slot], optimize=True)

    def backward(self, dy: Array) -> tuple[Array, Array]:
        rows, weights, row_of_slot = self.saved
        drows = np.zeros_like(rows)
        drows[row_of_slot] = weights[:, :, None] * dy[:, None, :]
        return drows, np.einsum("td,tkd->tk", dy, rows[row_of_slot], optimize=True)


class PlainEmbedding(Function):
    """A one-hot matrix times the table."""

    def forward(self, w: Array, *, tokens: Array) -> Array:
        one_hot = (tokens[..., None] == np.arange(len(w), dtype=np.int64)).astype(w.dtype)  # [..., V]
        self.save(one_hot)
        return one_hot @ w

    def backward(self, dy: Array) -> Array:
        (one_hot,) = self.saved
        return one_hot.reshape(-1, one_hot.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])


class PlainCrossEntropy(Function):
    """Log-softmax, pick the target, average over the targets that count."""

    def forward(self, logits: Array, *, targets: Array) -> Array:
        flat, targets = logits.reshape(targets.size, -1), targets.reshape(-1)
        shifted = flat - flat.max(axis=-1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        rows = np.flatnonzero(targets >= 0)
        self._shape, self._rows, self._targets = logits.shape, rows, targets[rows]
        self.save(log_p)
        total = -log_p[rows, targets[rows]].sum(dtype=np.float64)
        return np.asarray(total / max(len(rows), 1), dtype=logits.dtype)

    def backward(self, dy: Array) -> Array:
        (log_p,) = self.saved
        dlogits, rows = np.zeros_like(log_p), self._rows
        dlogits[rows] = np.exp(log_p[rows])
        dlogits[rows, self._targets] -= 1
        return (dlogits * (dy / max(len(rows), 1))).astype(log_p.dtype).reshape(self._shape)


PLAIN_FORMS: dict[type[Function], type[Function]] = {
    RMSNormFunction: PlainRMSNorm,
    SwiGLUFunction: PlainSwiGLU,
    RopeFunction: PlainRope,
    AttentionFunction: PlainAttention,
    GroupedLinearFunction: PlainGroupedLinear,
    PermuteFunction: PlainPermute,
    UnpermuteFunction: PlainUnpermute,
    EmbeddingFunction: PlainEmbedding,
    CrossEntropyFunction: PlainCrossEntropy,
}


@contextmanager
def using_plain_ops() -> Iterator[None]:
    """Run the block with every fast op replaced by its textbook form."""
    with ExitStack() as stack:
        for fast, plain in PLAIN_FORMS.items():
            stack.enter_context(replacing(fast, plain))
        yield
