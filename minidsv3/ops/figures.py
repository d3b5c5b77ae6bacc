"""Figures of the ops: how far each RoPE pair turns in a context, and which pairs YaRN stretches."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ..plots import colour, describe, headline
from .rope import correction_range, rope_frequencies


def turns_of_pairs(ax: Axes, d_r: int, theta: float, scaling: dict[str, Any]) -> Axes:
    """Turns that each channel pair makes over the original context, as trained and under YaRN.

    Parameters
    ----------
    d_r : int
        RoPE channels of a head.
    theta : float
        Base of the frequencies.
    scaling : dict
        `rope_scaling` of a config: factor, original_max_position_embeddings, beta_fast, beta_slow.
    """
    context, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    pair = np.arange(d_r // 2, dtype=np.int64)
    for i, (label, frequencies) in enumerate(
        (("as trained", rope_frequencies(d_r, theta)), ("with YaRN", rope_frequencies(d_r, theta, scaling)))
    ):
        look = {"color": colour(i), "marker": "os"[i], "linestyle": "-"}
        ax.semilogy(pair, frequencies * context / (2 * np.pi), label=label, **look)
    low, high = correction_range(d_r, theta, scaling)
    ax.axvspan(low, high, color=colour(6), alpha=0.25, linewidth=0)
    for beta in (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)):
        ax.axhline(beta, color="black", linewidth=1, linestyle=":")
        ax.annotate(
            f"{beta} turns" if beta != 1 else "1 turn", (pair[-1], beta), (0, 3), textcoords="offset points", ha="right"
        )
    ax.set(xlabel="channel pair", ylabel=f"turns over {context:,} positions")
    ax.legend(loc="lower left")
    finding = f"YaRN leaves pairs up to {low} alone and slows those from {high} on by {factor}"
    describe(ax, f"{finding}; between them it blends. Turns fall from {context / (2 * np.pi):.0f} to below 1.")
    return headline(ax, finding)
