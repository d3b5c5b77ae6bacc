"""Figures of decoding: what a step costs with each way to use the cache, and what a long context costs and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from ..autograd import Array
from ..config import ModelConfig
from ..plots import HATCHES, colour, describe, headline, look
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


def seconds_against_context(
    ax: Axes, name: str, contexts: Sequence[int], step: Sequence[float], attention: Sequence[float]
) -> Axes:
    """Measured seconds of one decode step of model `name` over each context, and of its attention alone."""
    us = [1e6 * np.array(values, dtype=np.float64) for values in (step, attention)]
    series = {"one token": us[0], "its attention over the cache": us[1], "the rest": us[0] - us[1]}
    for i, (label, values) in enumerate(series.items()):
        ax.plot(contexts, values, label=label, **look(i, len(contexts)))
    ax.set_xscale("log", base=2)
    ax.set(xlabel="context (tokens)", ylabel="time (microseconds)", ylim=(0, None))
    ax.legend()
    span = {label: f"{values[0]:,.0f} to {values[-1]:,.0f} us" for label, values in series.items()}
    finding = f"{name}: attention goes from {span['its attention over the cache']}, the rest from {span['the rest']}"
    describe(ax, f"{finding}, one token from {span['one token']}, for contexts of {contexts[0]:,} to {contexts[-1]:,}.")
    return headline(ax, finding)


def bits_against_position(ax: Axes, curves: Mapping[str, Array], bins: int = 32) -> Axes:
    """Mean bits of a token against its position in the window [S], for each model; positions in `bins` groups."""
    ends = {}
    for i, (label, bits) in enumerate(curves.items()):
        groups = [np.nanmean(part) for part in np.array_split(bits, min(bins, len(bits)))]
        places = [
            float(part.mean()) for part in np.array_split(np.arange(1, len(bits) + 1, dtype=np.int64), len(groups))
        ]
        ax.plot(places, groups, label=label, **look(i, len(groups)))
        ends[label] = groups[-1]
    ax.set(xlabel="position in the window (tokens)", ylabel="bits per token")
    ax.legend()
    best = min(ends, key=lambda name: ends[name])
    finding = f"At the end of a window {best} needs {ends[best]:.2f} bits"
    if len(ends) > 1:
        worst = max(ends, key=lambda name: ends[name])
        finding += f", {worst} {ends[worst]:.2f}"
    describe(ax, f"{finding}. Lines of bits per token against position for {', '.join(curves)}.")
    return headline(ax, finding)


def acceptance_of_texts(ax: Axes, accepted: Mapping[str, int], drafted: Mapping[str, int]) -> Axes:
    """Share of the drafts that the main model accepted, for each kind of text; both mappings have the same keys."""
    rates = {kind: accepted[kind] / drafted[kind] for kind in drafted}
    for i, (kind, rate) in enumerate(rates.items()):
        bar = ax.barh(kind, rate, 0.65, color=colour(i), hatch=HATCHES[i])
        ax.bar_label(bar, [f"{rate:.0%}: {1 + rate:.2f} tokens a pass"], padding=4)
    ax.invert_yaxis()
    ax.set(xlabel="drafts that the main model accepts (share)", xlim=(0, 1.55), xticks=np.linspace(0, 1, 6))
    low, high = min(rates, key=lambda k: rates[k]), max(rates, key=lambda k: rates[k])
    finding = f"The draft is right {rates[low]:.0%} ({low}) to {rates[high]:.0%} ({high}) of the time"
    describe(ax, f"{finding}. Bars for {len(rates)} kinds of text.")
    return headline(ax, finding)
