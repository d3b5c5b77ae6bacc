"""Multi-head Latent Attention (V3 report, section 2.1.1, Eq. 1-11).

Keys and values of all heads are made from one small latent per token, ``c_kv = W^DKV x`` (kv_lora_rank numbers), and
position enters through a separate key part, ``k_rope = RoPE(W^KR x)``, made from x itself and shared by all heads.
These two are all that a cache has to keep: 512 + 64 numbers a token and layer in DeepSeek-V3, where plain multi-head
attention of that size keeps 32,768 (2 x 128 x 128) and these keys and values, materialised, are 40,960 (128 x (192 +
128)). Queries take the same detour through a latent (q_lora_rank), which saves activation memory;
where q_lora_rank is None (V2-Lite) they are projected straight from x.

Released names: q_a_proj and q_b_proj are W^DQ and [W^UQ; W^QR], kv_a_proj_with_mqa is [W^DKV; W^KR], kv_b_proj is
[W^UK; W^UV] head by head, o_proj is W^O. Both latents pass an RMSNorm that the equations do not show.

Simplified against the real system: no tensor parallelism, one sequence length per batch, no attention kernel that
works on the latent during training (keys and values are materialised).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from ..autograd import Array, Tensor, no_grad
from ..config import ModelConfig
from ..ops.attention import attention
from ..ops.rope import rope, softmax_scale
from ..ops.shape import reshape, rounded, split_last
from .layers import Linear, Recipe, RMSNorm, gemm_of
from .module import Module, as_tensor

LATENT_EPS = 1e-6  # the released code leaves the latents' norms at this, whatever rms_norm_eps says


class AttentionScores(NamedTuple):
    """What `MLA.explain` returns; scores are already scaled, and masked entries are -inf in `total`."""

    content: Array  # [B, H, S, S] q_nope . k_nope
    position: Array  # [B, H, S, S] q_rope . k_rope
    total: Array  # [B, H, S, S] their sum, causal
    weights: Array  # [B, H, S, S] softmax of total
    latent: Array  # [B, S, kv_lora_rank] c_kv after its norm: what a cache keeps, with
    k_rope: Array  # [B, S, d_r] the rotated shared key


class LayerCache(Protocol):
    """What one layer sees of a latent cache (`generation.cache`)."""

    def append(self, c_kv: Array, k_rope: Array) -> None:
        """Store new tokens: [B, S, r_kv] and [B, S, d_r]."""
        ...

    def attend(self, q: Array, w: Array, scale: float) -> Array:
        """Attention of queries [B, S, H, d_n | d_r] over all that is stored; w is kv_b_proj's weight."""
        ...


class MLA(Module):
    """Attention over a latent cache; x [B, S, D] -> [B, S, D]."""

    def __init__(self, cfg: ModelConfig, recipe: Recipe | None = None) -> None:
        D, H, r_q, r_kv = cfg.hidden_size, cfg.num_attention_heads, cfg.q_lora_rank, cfg.kv_lora_rank

        def project(name: str, in_features: int, out_features: int) -> Linear:
            return Linear(in_features, out_features, gemm_of(recipe, name))

        if r_q is None:
            self.q_proj = project("q_proj", D, H * cfg.qk_head_dim)
        else:
            self.q_a_proj = project("q_a_proj", D, r_q)
            self.q_a_layernorm = RMSNorm(r_q, LATENT_EPS)
            self.q_b_proj = project("q_b_proj", r_q, H * cfg.qk_head_dim)
        self.kv_a_proj_with_mqa = project("kv_a_proj_with_mqa", D, r_kv + cfg.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(r_kv, LATENT_EPS)
        self.kv_b_proj = project("kv_b_proj", r_kv, H * (cfg.qk_nope_head_dim + cfg.v_head_dim))
        self.o_proj = project("o_proj", H * cfg.v_head_dim, D)
        self._cfg = cfg
        self._rounding = recipe.rounding("attention") if recipe else None
        self._scale = softmax_scale(cfg.qk_head_dim, cfg.rope_scaling)

    def forward(self, x: Tensor, rotation: Array, cache: LayerCache | None = None) -> Tensor:
        """Attend within each sequence; `rotation` complex [S, d_r/2] turns position s (`ops.rope`).

        With a cache (decoding, no gradients) x holds the new tokens only: they are stored, and attend to all that is
        stored before them. Without one, keys and values of the whole sequence are materialised.
        """
        (B, S, _), H = x.shape, self._cfg.num_attention_heads
        q, c_kv, k_rope = self.queries_and_latent(x, rotation)
        if cache is not None:
            cache.append(c_kv.data, k_rope.data)
            o = Tensor(cache.attend(q.data, self.kv_b_proj.weight.data, self._scale))  # [B, S, H, d_v]
            return self.o_proj(reshape(o, (B, S, -1)))
        kv = reshape(self.kv_b_proj(c_kv), (B, S, H, -1))  # [B, S, H, d_n | d_v]
        q, kv, k_rope = (rounded(t, self._rounding) for t in (q, kv, k_rope))
        o = attention(q, kv, k_rope, self._scale)  # [B, S, H, d_v]
        return self.o_proj(reshape(o, (B, S, -1)))

    def queries_and_latent(self, x: Tensor, rotation: Array) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, S, H, d_n | d_r], normed latent c_kv [B, S, r_kv], rotated shared key [B, S, d_r]."""
        cfg, (B, S, _) = self._cfg, x.shape
        H, d_r, interleave = cfg.num_attention_heads, cfg.qk_rope_head_dim, cfg.rope_interleave
        c_q = x if cfg.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(x))  # [B, S, r_q]
        q = self.q_proj(x) if cfg.q_lora_rank is None else self.q_b_proj(c_q)  # [B, S, H * (d_n + d_r)]
        q = rope(reshape(q, (B, S, H, -1)), rotation, interleave)
        c_kv, k_rope = split_last(self.kv_a_proj_with_mqa(x), (cfg.kv_lora_rank, d_r))  # Eq. 1 and 3
        c_kv = self.kv_a_layernorm(c_kv)
        k_rope = reshape(rope(reshape(k_rope, (B, S, 1, d_r)), rotation, interleave), (B, S, d_r))
        return q, c_kv, k_rope

    def explain(self, x: Array | Tensor, rotation: Array) -> AttentionScores:
        """Scores taken apart: what content says, what position says, and the softmax of their sum."""
        cfg = self._cfg
        with no_grad():
            q, c_kv, k_rope = (t.data for t in self.queries_and_latent(as_tensor(x), rotation))
            (B, S, H, _), d_n = q.shape, cfg.qk_nope_head_dim
            kv = self.kv_b_proj(Tensor(c_kv)).data.reshape(B, S, H, -1)
        content = np.einsum("bihd,bjhd->bhij", q[..., :d_n], kv[..., :d_n], optimize=True) * self._scale
        position = np.einsum("bihd,bjd->bhij", q[..., d_n:], k_rope, optimize=True) * self._scale
        total = np.where(np.tri(S, dtype=bool), content + position, -np.inf).astype(q.dtype)
        weights = np.exp(total - total.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return AttentionScores(content, position, total, weights, c_kv, k_rope)
