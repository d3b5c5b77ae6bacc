"""Causal attention with decoupled RoPE: one key part per head from the latent, one rotated part shared by all heads.

For head h, ``score[i, j] = scale (q_nope[i, h] . k_nope[j, h] + q_rope[i, h] . k_rope[j])`` for j <= i (DeepSeek-V2,
Eq. 14-17; V3 report, Eq. 6-10). The op takes what the projections give, so that no caller has to join or transpose:
q = [nope | rope] per head, kv = [k_nope | v] per head, and the single k_rope of each token.

How it is computed: queries go in blocks of 64, and a block looks only at keys up to its own end, so about half of the
square is skipped. Kept for the backward pass are E = exp(score) and 1/l, l its row sum; with g = dO / l the gradient of
the scores is ``E (g v^T - rowsum(g O))``, two passes fewer than through the softmax. A softmax needs its row maximum
only against overflow: no score exceeds max|q| max|k| (Cauchy-Schwarz), and while that bound is small the maximum is
not looked for. The textbook form is `ops.plain.PlainAttention`.
"""

from __future__ import annotations

import math

import numpy as np

from ..autograd import Array, Function, Tensor
from .shape import require_shape

QUERY_BLOCK = 64
SAFE_SCORE = 60.0  # exp(60) summed over 10^12 keys still fits a float32, exp(-60) is not zero


class AttentionFunction(Function):
    """q [B, S, H, d_n+d_r], kv [B, S, H, d_n+d_v], k_rope [B, S, d_r] -> [B, S, H, d_v]."""

    def forward(self, q: Array, kv: Array, k_rope: Array, *, scale: float) -> Array:
        B, S, H, d = q.shape
        d_n = d - k_rope.shape[-1]
        require_shape("Attention", "kv", kv, (B, S, H, None))
        require_shape("Attention", "k_rope", k_rope, (B, S, None))
        if not 0 <= d_n < kv.shape[-1]:
            raise ValueError(f"Attention: k_rope has {k_rope.shape[-1]} of {d} query channels, kv has {kv.shape[-1]}")
        self._scale, self._d_n = q.dtype.type(scale), d_n
        self.flops = B * H * S * (S + 1) * (d + kv.shape[-1] - d_n)  # only j <= i counts
        queries = np.empty((B, H, S, d), dtype=q.dtype)
        np.multiply(q.swapaxes(1, 2), self._scale, out=queries)
        keys = np.empty_like(queries)
        keys[..., :d_n] = kv[..., :d_n].swapaxes(1, 2)
        keys[..., d_n:] = k_rope[:, None]
        v = kv[..., d_n:].swapaxes(1, 2)  # [B, H, S, d_v]
        o = np.empty((B, S, H, kv.shape[-1] - d_n), dtype=q.dtype)
        reciprocal = np.empty((B, H, S, 1), dtype=q.dtype)
        exponentials, ones = [], np.ones((S, 1), dtype=q.dtype)
        bounded = _largest_norm(queries) * _largest_norm(keys) < SAFE_SCORE
        for a in range(0, S, QUERY_BLOCK):
            b = min(a + QUERY_BLOCK, S)
            E = queries[:, :, a:b] @ keys[:, :, :b].swapaxes(2, 3)  # [B, H, b-a, b]
            if not bounded:
                E[..., a:] += np.triu(np.full((b - a, b - a), -np.inf, dtype=q.dtype), k=1)
                E -= E.max(axis=-1, keepdims=True)
            np.exp(E, out=E)
            E[..., a:] *= np.tri(b - a, dtype=q.dtype)  # a query sees nothing after itself
            np.reciprocal(E @ ones[:b], out=reciprocal[:, :, a:b])
            o[:, a:b] = ((E @ v[:, :, :b]) * reciprocal[:, :, a:b]).swapaxes(1, 2)
            exponentials.append(E)
        self.save(queries, keys, v, o, reciprocal, *exponentials)
        return o

    def backward(self, do: Array) -> tuple[Array, Array, Array]:
        queries, keys, v, o, reciprocal, *exponentials = self.saved
        B, H, S, _ = queries.shape
        d_n, d_v = self._d_n, v.shape[-1]
        g = do.swapaxes(1, 2) * reciprocal  # [B, H, S, d_v]
        along = np.vecdot(g, o.swapaxes(1, 2))[..., None]  # [B, H, S, 1]
        dq, dk, dv = np.empty_like(queries), np.zeros_like(keys), np.zeros((B, H, S, d_v), dtype=do.dtype)
        for a, E in zip(range(0, S, QUERY_BLOCK), exponentials):
            b = min(a + QUERY_BLOCK, S)
            dv[:, :, :b] += E.swapaxes(2, 3) @ g[:, :, a:b]
            ds = g[:, :, a:b] @ v[:, :, :b].swapaxes(2, 3)  # [B, H, b-a, b]
            ds -= along[:, :, a:b]
            ds *= E
            np.matmul(ds, keys[:, :, :b], out=dq[:, :, a:b])
            dk[:, :, :b] += ds.swapaxes(2, 3) @ queries[:, :, a:b]
        dq *= self._scale
        dkv = np.empty((B, S, H, d_n + d_v), dtype=do.dtype)
        dkv[..., :d_n] = dk[..., :d_n].swapaxes(1, 2)
        dkv[..., d_n:] = dv.swapaxes(1, 2)
        return dq.swapaxes(1, 2), dkv, dk[..., d_n:].sum(axis=1)


def _largest_norm(rows: Array) -> float:
    """The largest Euclidean norm among the rows [..., d] (NaN if there is one, 0 for no rows)."""
    squares = np.square(rows) @ np.ones((rows.shape[-1], 1), dtype=rows.dtype)  # a gemm sums short rows fastest
    return math.sqrt(squares.max(initial=0))


def attention(q: Tensor, kv: Tensor, k_rope: Tensor, scale: float) -> Tensor:
    """Causal attention of [nope | rope] queries over [k_nope | v] and the shared k_rope."""
    return AttentionFunction.apply(q, kv, k_rope, scale=scale)
