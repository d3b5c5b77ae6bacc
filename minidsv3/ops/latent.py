"""Attention over a latent cache, for decoding: two ways that give the same result.

The cache keeps per token ``[c_kv | k_rope]``. Head h has keys ``k = W^UK_h c_kv`` and values ``v = W^UV_h c_kv``.

* *recomputed*: make them for all cached tokens, then attend as in training: S H (d_n + d_v) r_kv multiply-adds a step.
* *absorbed*: ``q . (W^UK c) = (W^UK^T q) . c``, so the up-projection moves into the query, and likewise
  ``sum_j p_j W^UV c_j = W^UV (sum_j p_j c_j)`` moves it behind the sum (DeepSeek-V2, section 2.1.2). Every head attends
  to the same S x r_kv latents; nothing of size S H d_n ever exists. The price: scores are r_kv + d_r wide instead of
  d_n + d_r, so for many new tokens at once (prefill) the recomputed form needs fewer FLOPs.

Plain functions on ndarrays, not ops: decoding has no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..autograd import Array


class Attend(Protocol):
    """Attention of new tokens over a latent cache."""

    def __call__(self, q: Array, pages: Sequence[Array], start: Array, w: Array, scale: float) -> Array:
        """Attend.

        Parameters
        ----------
        q : [B, S, H, d_n + d_r] rotated queries of S new tokens
        pages : arrays [B, P, r_kv + d_r], the cache in order, the new tokens included
        start : int [B], tokens that each sequence had before the new ones
        w : [H (d_n + d_v), r_kv], the weight of kv_b_proj
        scale : factor on scores

        Returns
        -------
        [B, S, H, d_v]
        """
        ...


def absorbed_attention(q: Array, pages: Sequence[Array], start: Array, w: Array, scale: float) -> Array:
    """Attend to the latents themselves (see the module's text and `Attend`)."""
    (B, S, H, d), r_kv = q.shape, w.shape[1]
    d_r = pages[0].shape[2] - r_kv
    w_uk, w_uv = np.split(w.reshape(H, -1, r_kv), [d - d_r], axis=1)  # [H, d_n, r_kv], [H, d_v, r_kv]
    heads_first = q.transpose(2, 0, 1, 3).reshape(H, B * S, d)
    query = np.empty((B, H, S, r_kv + d_r), dtype=q.dtype)
    query[..., :r_kv] = (heads_first[..., : d - d_r] @ w_uk).reshape(H, B, S, r_kv).swapaxes(0, 1)
    query[..., r_kv:] = q[..., d - d_r :].swapaxes(1, 2)
    query *= q.dtype.type(scale)
    query = query.reshape(B, H * S, -1)
    p = np.concatenate([query @ page.swapaxes(1, 2) for page in pages], axis=2)  # [B, H S, L]
    _causal_softmax(p.reshape(B, H, S, -1), start)
    latent, stop = np.zeros((B, H * S, r_kv), dtype=q.dtype), 0
    for page in pages:
        latent += p[:, :, stop : stop + page.shape[1]] @ page[..., :r_kv]
        stop += page.shape[1]
    heads_first = latent.reshape(B, H, S, r_kv).swapaxes(0, 1).reshape(H, B * S, r_kv)
    o = heads_first @ w_uv.swapaxes(1, 2)  # [H, B S, d_v]
    return o.reshape(H, B, S, -1).transpose(1, 2, 0, 3)


def recomputed_attention(q: Array, pages: Sequence[Array], start: Array, w: Array, scale: float) -> Array:
    """Make keys and values of all cached tokens, then attend (see the module's text and `Attend`)."""
    (B, _, H, d), r_kv = q.shape, w.shape[1]
    cached = np.concatenate(pages, axis=1)  # [B, L, r_kv + d_r]
    d_n = d - (cached.shape[2] - r_kv)
    kv = (cached[..., :r_kv] @ w.T).reshape(B, -1, H, len(w) // H).swapaxes(1, 2)  # [B, H, L, d_n | d_v]
    queries = q.swapaxes(1, 2) * q.dtype.type(scale)  # [B, H, S, d]
    p = queries[..., :d_n] @ kv[..., :d_n].swapaxes(2, 3)
    p += queries[..., d_n:] @ cached[:, None, :, r_kv:].swapaxes(2, 3)
    _causal_softmax(p, start)
    return (p @ kv[..., d_n:]).swapaxes(1, 2)


def _causal_softmax(scores: Array, start: Array) -> None:
    """In place over [B, H, S, L]: query s of sequence b sees keys 0 .. start[b] + s."""
    S, L = scores.shape[2:]
    last = start[:, None] + np.arange(S, dtype=np.int64)  # [B, S]
    if int(last.min()) < L - 1:
        hidden = np.arange(L, dtype=np.int64) > last[:, :, None]  # [B, S, L]
        np.copyto(scores, -np.inf, where=hidden[:, None])
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
