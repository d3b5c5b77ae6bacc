"""Inference: what a cache takes, and how many GPUs a model needs for a batch and a context.

The cache of one token (DeepSeek-V2, Table 1), in numbers a layer:

    MHA   2 H d        keys and values of every head
    GQA   2 G d        of G groups of heads
    MQA   2 d          of one head that all share
    MLA   r_kv + d_r   the latent and the rotated key

GPUs: routed experts are dealt out over all of them, a whole number to each (the slots that are over hold redundant
experts); everything else is repeated, or split in groups of TP GPUs; sequences are spread over these groups. The latent
cache can't be split by TP: every head reads the whole of it. MTP modules are left out.

Simplified: activations of a decoding step, CUDA context and fragmentation are one reserved share of the memory.
"""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig
from .dense import MODELS, AnyConfig, DenseConfig, check_context, load_config
from .memory import Layout, share_of
from .params import shapes

BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
CACHES = ("mla", "mha", "gqa", "mqa")


def cache_numbers_per_token(cfg: AnyConfig, kind: str | None = None, groups: int | None = None) -> int:
    """Numbers that all layers of the model keep of one token (MTP modules left out).

    Parameters
    ----------
    kind : 'mla', 'mha', 'gqa', 'mqa' or None
        None: as the model is built. Others ask what its heads would need under another kind.
    groups : int, optional
        Key-value heads for 'gqa'; a dense model's own by default.

    Raises
    ------
    ValueError
        An unknown kind, 'mla' of a dense model, or groups that do not divide the heads.
    """
    dense = isinstance(cfg, DenseConfig)
    kind = kind or ("gqa" if dense else "mla")
    if kind not in CACHES:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(map(repr, CACHES))}")
    H, L = cfg.num_attention_heads, cfg.num_hidden_layers
    if kind == "mla":
        if isinstance(cfg, DenseConfig):
            raise ValueError("a dense model has no latent: choose mha, gqa or mqa")
        # what the projection makes for the cache, of the real class
        main = (w for w in shapes(cfg).weights if w.layer is not None and w.layer < L)
        return sum(w.shape[0] for w in main if w.name == "kv_a_proj_with_mqa")
    d = cfg.head if isinstance(cfg, DenseConfig) else cfg.v_head_dim
    if kind == "gqa" and groups is None:
        groups = cfg.num_key_value_heads if isinstance(cfg, DenseConfig) else None
        if groups is None:
            raise ValueError("gqa of this model needs a number of groups")
    heads = {"mha": H, "mqa": 1}.get(kind, groups) or 0
    if heads < 1 or H % heads:
        raise ValueError(f"groups={groups} does not divide num_attention_heads={H}")
    return 2 * heads * d * L


def cache_bytes_per_token(
    cfg: AnyConfig, precision: str = "bf16", kind: str | None = None, groups: int | None = None
) -> int:
    """Bytes of `cache_numbers_per_token`."""
    if precision not in BYTES:
        raise ValueError(f"precision={precision!r} is not one of {', '.join(map(repr, BYTES))}")
    return BYTES[precision] * cache_numbers_per_token(cfg, kind, groups)


def cache_report(cfg: AnyConfig, context: int, batch: int = 1, precision: str = "bf16") -> dict[str, Any]:
    """``bytes_per_token``, ``bytes_total`` of `batch` sequences, and the bytes of one token ``by_model``."""
    check_context(cfg, context)
    if batch < 1:
        raise ValueError(f"batch={batch} is not positive")
    per_token = cache_bytes_per_token(cfg, precision)
    return {
        "bytes_per_token": per_token,
        "bytes_total": per_token * context * batch,
        "context": context,
        "batch": batch,
        "precision": precision,
        "bytes_per_token_as_mha": cache_bytes_per_token(cfg, precision, "mha"),
        "by_model": {name: cache_bytes_per_token(load_config(name, None), precision) for name in MODELS},
    }


def repeated_and_expert_bytes(cfg: ModelConfig, tp: int = 1, precision: str = "fp8") -> tuple[int, int]:
    """Bytes that every GPU holds whatever their number, split by `tp`, and those of one routed expert in all layers."""
    layout, repeated, experts = Layout(tp=tp), 0, 0
    for w in shapes(cfg).weights:
        if w.part == "mtp_join" or (w.layer is not None and w.layer >= cfg.num_hidden_layers):
            continue
        share = share_of(w, layout)
        size = share.nbytes(precision)
        if share.routed:
            experts += size // cfg.n_routed_experts
        else:
            repeated += size
    return repeated, experts


def gpus_needed(
    cfg: ModelConfig,
    memory: float,
    *,
    batch: int,
    context: int,
    precision: str = "fp8",
    cache: str = "bf16",
    tp: int | None = None,
    reserve: float = 0.1,
) -> dict[str, Any]:
    """The fewest GPUs of `memory` bytes that hold the weights and the cache of `batch` sequences of `context` tokens.

    Parameters
    ----------
    precision, cache : 'fp8', 'bf16' or 'fp32'
        Of weights and of the cache.
    tp : int, optional
        GPUs over which everything but the routed experts is split; 1, 2, 4 and 8 are tried by default, and the
        smallest that needs the fewest GPUs is taken.
    reserve : float
        Share of the memory that is left for everything else.

    Returns
    -------
    dict
        ``gpus``, ``bytes_per_gpu`` of the fullest one, and what it is made of.

    Raises
    ------
    ValueError
        An impossible size, or a model that no number of these GPUs can hold: what is repeated on each is too large.
    """
    check_context(cfg, context)
    for name, kind in (("precision", precision), ("cache", cache)):
        if kind not in BYTES:
            raise ValueError(f"{name}={kind!r} is not one of {', '.join(map(repr, BYTES))}")
    if not (batch > 0 and memory > 0 and 0 <= reserve < 1):
        raise ValueError(f"batch={batch}, memory={memory} must be positive, and reserve={reserve} in [0, 1)")
    splits = [t for t in ((1, 2, 4, 8) if tp is None else (tp,)) if t > 0 and cfg.num_attention_heads % t == 0]
    if not splits:
        raise ValueError(f"tp={tp} does not divide num_attention_heads={cfg.num_attention_heads}")
    per_token, usable = cache_bytes_per_token(cfg, cache), memory * (1 - reserve)
    found = [plan for t in splits if (plan := _fewest(cfg, t, usable, batch, context * per_token, precision))]
    if not found:
        raise ValueError(
            f"no number of GPUs of {memory / 1e9:,.0f} GB is enough: attention weights and one sequence of {context:,} "
            f"tokens ({context * per_token / 1e9:,.1f} GB) on each exceed {usable / 1e9:,.1f} GB"
        )
    best = min(found, key=lambda plan: plan["gpus"])  # ties: the smallest tp
    return {**best, "batch": batch, "context": context, "precision": precision, "cache": cache, "gpu_memory": memory}


def _fewest(
    cfg: ModelConfig, tp: int, usable: float, batch: int, bytes_of_sequence: int, precision: str
) -> dict[str, Any] | None:
    """The smallest multiple of `tp` GPUs that is enough; more than one a expert and sequence never helps."""
    repeated, expert = repeated_and_expert_bytes(cfg, tp, precision)
    for groups in range(1, max(batch, -(-cfg.n_routed_experts // tp)) + 1):
        gpus, sequences = groups * tp, -(-batch // groups)
        slots = -(-cfg.n_routed_experts // gpus)
        held, cached = repeated + slots * expert, sequences * bytes_of_sequence
        if held + cached <= usable:
            return {"gpus": gpus, "bytes_per_gpu": held + cached, "weight_bytes": held, "cache_bytes": cached, "tp": tp,
                    "experts_per_gpu": slots, "redundant_experts": slots * gpus - cfg.n_routed_experts,
                    "sequences_per_group": sequences}  # fmt: skip
    return None
