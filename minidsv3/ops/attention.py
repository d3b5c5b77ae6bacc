"""Causal attention with decoupled RoPE: one key part per head from the latent, one rotated part shared by all heads.

For head h, ``score[i, j] = scale (q_nope[i, h] . k_nope[j, h] + q_rope[i, h] . k_rope[j])`` for j <= i (DeepSeek-V2,
Eq. 14-17; V3 report, Eq. 6-10). The op takes what the projections give, so that no caller has to join or transpose:
q = [nope | rope] per head, kv = [k_nope | v] per head, and the single k_rope of each token.

How it is computed: queries go in blocks of 32, and a block looks only at keys up to its own end, so about half of the
square is skipped. Scores stand with a row for each key, so that the triangle to be masked is one piece of memory. Kept
for the backward pass are E = exp(score) and 1/l, l its sum over the keys; with g = dO / l the gradient of the scores is
``E (g v^T - rowsum(g O))``, two passes fewer than through the softmax, and three with a column of ones behind the
values: ``[v | 1] [g | -rowsum]^T``. A softmax needs its maximum only against overflow: no score exceeds max|q| max|k|
(Cauchy-Schwarz), and while that bound is small the maximum is not looked for. The textbook form is
`ops.plain.PlainAttention`.
"""

from __future__ import annotations

import math

import numpy as np

from ..autograd import Array, Function, Tensor
from .shape import require_shape

QUERY_BLOCK = 32
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
        v = np.ascontiguousarray(kv[..., d_n:].swapaxes(1, 2))  # [B, H, S, d_v]
        o = np.empty((B, S, H, v.shape[-1]), dtype=q.dtype)
        reciprocal, exponentials = np.empty((B, H, S, 1), dtype=q.dtype), []
        ones = np.ones((1, S), dtype=q.dtype)
        bounded = _largest_norm(queries) * _largest_norm(keys) < SAFE_SCORE
        for a in range(0, S, QUERY_BLOCK):
            b = min(a + QUERY_BLOCK, S)
            E = keys[:, :, :b] @ queries[:, :, a:b].swapaxes(2, 3)  # [B, H, b, b-a], a row for each key
            if not bounded:
                E[:, :, a:] += np.tril(np.full((b - a, b - a), -np.inf, dtype=q.dtype), k=-1)
                E -= E.max(axis=2, keepdims=True)
            np.exp(E, out=E)
            E[:, :, a:] *= np.triu(np.ones((b - a, b - a), dtype=q.dtype))  # a query sees nothing after itself
            np.reciprocal((ones[:, :b] @ E).swapaxes(2, 3), out=reciprocal[:, :, a:b])
            o[:, a:b] = ((E.swapaxes(2, 3) @ v[:, :, :b]) * reciprocal[:, :, a:b]).swapaxes(1, 2)
            exponentials.append(E)
        self.save(queries, keys, v, o, reciprocal, *exponentials)
        return o

    def backward(self, do: Array) -> tuple[Array, Array, Array]:
        queries, keys, v, o, reciprocal, *exponentials = self.saved
        B, H, S, d_v = v.shape
        d_n, v1 = self._d_n, np.concatenate((v, np.ones((B, H, S, 1), dtype=v.dtype)), axis=-1)  # [v | 1]
        g1 = np.empty_like(v1)  # [g | -rowsum(g O)]
        g = np.multiply(do.swapaxes(1, 2), reciprocal, out=g1[..., :d_v])  # [B, H, S, d_v]
        np.negative(np.vecdot(g, o.swapaxes(1, 2)), out=g1[..., d_v])
        dq, dk, dv = np.empty_like(queries), np.empty_like(keys), np.empty_like(v)
        for a in reversed(range(0, S, QUERY_BLOCK)):  # the last queries see all keys
            E, b = exponentials.pop(), min(a + QUERY_BLOCK, S)
            ds = v1[:, :, :b] @ g1[:, :, a:b].swapaxes(2, 3)  # [B, H, b, b-a]
            ds *= E
            np.matmul(ds.swapaxes(2, 3), keys[:, :, :b], out=dq[:, :, a:b])
            if b == S:
                np.matmul(E, g[:, :, a:b], out=dv)
                np.matmul(ds, queries[:, :, a:b], out=dk)
            else:
                dv[:, :, :b] += E @ g[:, :, a:b]
                dk[:, :, :b] += ds @ queries[:, :, a:b]
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
