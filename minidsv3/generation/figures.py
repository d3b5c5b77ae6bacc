"""Figures of decoding: what a step costs with each way to use the cache, and where they cross."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from ..config import ModelConfig
from ..plots import describe, headline, look
from .costs import PATHS, absorbing_pays_up_to, attention_cost


def bytes_against_context(ax: Axes, cfg: ModelConfig, contexts: np.ndarray) -> Axes:
    """Bytes that one new token's attention reads in one layer (BF16), for each path against the context."""
    for i, path in enumerate(("materialised", "absorbed")):
        values = np.array([attention_cost(cfg, path, int(L)).bytes_read for L in contexts]) / 1e6
        label = "keys and values cached" if path == "materialised" else "latents cached (absorbed, recomputed)"
        ax.loglog(contexts, values, label=label, **look(i, len(contexts)))
    ax.set(xlabel="context (tokens)", ylabel="bytes read a layer (MB, BF16)")
    ax.legend()
    full, latent = (attention_cost(cfg, path, int(contexts[-1])).bytes_read for path in ("materialised", "absorbed"))
    finding = f"At {contexts[-1]:,} tokens a step reads {full / latent:.0f} times fewer bytes from latents"
    describe(ax, f"{finding}: {full / 1e6:,.0f} MB against {latent / 1e6:,.0f} MB a layer.")
    return headline(ax, finding)


def flops_against_new_tokens(ax: Axes, cfg: ModelConfig, context: int, new_tokens: np.ndarray) -> Axes:
    """FLOPs of one layer's attention against the number of new tokens, for each path."""
    for i, path in enumerate(PATHS):
        values = np.array([attention_cost(cfg, path, context, int(S)).flops for S in new_tokens]) / 1e9
        ax.loglog(new_tokens, values, label=path, **look(i, len(new_tokens)))
    crossing = absorbing_pays_up_to(cfg)
    ax.axvline(crossing, color="black", linewidth=1, linestyle=":")
    ax.set(xlabel=f"new tokens at once (context {context:,})", ylabel="GFLOP a layer")
    ax.legend()
    finding = f"Absorbing pays for up to {crossing:.0f} new tokens at once: decode so, prefill the other way"
    describe(ax, f"{finding}. Lines for {', '.join(PATHS)} at {context:,} tokens of context.")
    return headline(ax, finding)
