"""What one decoding step costs in attention: FLOPs and bytes of the three ways to use a cache (DeepSeek-V2, 2.1.2).

    materialised   keys and values of every head are cached:      most bytes, fewest FLOPs
    recomputed     latents are cached, keys and values are made   few bytes, FLOPs grow with context times r_kv
    absorbed       latents are cached, queries come to them       few bytes, scores r_kv + d_r wide

Counted per layer and sequence, for S new tokens over a context of L (the new ones included); FLOPs are two for each
multiply-add, softmax and projections common to all three are left out, causality inside the new tokens is ignored.
"""

from __future__ import annotations

from typing import NamedTuple

from ..config import ModelConfig

PATHS = ("materialised", "recomputed", "absorbed")


class Cost(NamedTuple):
    """Attention over a cache in one layer."""

    flops: float
    bytes_read: float  # of the cache and of kv_b_proj


def attention_cost(cfg: ModelConfig, path: str, context: int, new_tokens: int = 1, bytes_per_number: float = 2) -> Cost:
    """FLOPs and bytes of one layer's attention for `new_tokens` behind `context - new_tokens` cached ones.

    Raises ValueError for an unknown path or a context shorter than the new tokens.
    """
    if path not in PATHS:
        raise ValueError(f"path={path!r} is not one of {', '.join(PATHS)}")
    if not 1 <= new_tokens <= context:
        raise ValueError(f"new_tokens={new_tokens} must lie between 1 and context={context}")
    H, r_kv, d_r = cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_rope_head_dim
    up, L, S = cfg.qk_nope_head_dim + cfg.v_head_dim, context, new_tokens
    attend = 2 * S * L * H * (up + d_r)
    weight = H * up * r_kv
    if path == "materialised":
        return Cost(attend + 2 * S * weight, bytes_per_number * (L * H * (up + d_r) + weight))
    cached = bytes_per_number * (L * (r_kv + d_r) + weight)
    if path == "recomputed":
        return Cost(attend + 2 * L * weight, cached)
    return Cost(2 * S * weight + 2 * S * L * H * (2 * r_kv + d_r), cached)


def absorbing_pays_up_to(cfg: ModelConfig) -> float:
    """New tokens at which recomputing keys and values starts to need fewer FLOPs, for a long context.

    ``r_kv u / (2 r_kv - u)`` with u = d_n + d_v; infinite where absorbed scores are no wider than plain ones.
    """
    up = cfg.qk_nope_head_dim + cfg.v_head_dim
    wider = 2 * cfg.kv_lora_rank - up
    return cfg.kv_lora_rank * up / wider if wider > 0 else float("inf")
