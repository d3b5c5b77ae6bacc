"""Figures of the bill: where the parameters are, memory along the pipeline, caches and FLOPs against the context.

Drawing functions take numbers and an `ax`; the ``save_`` functions compute, draw one figure and write it with its data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ..config import ModelConfig
from ..plots import GREY, HATCHES, colour, describe, description, headline, look, new_figure, save, style
from .flops import flops_of_contexts
from .memory import STATES


def parameters_by_part(ax: Axes, by_part: Mapping[str, int], active: Mapping[str, float]) -> Axes:
    """Billions of parameters of each part, all of them and those that a token meets, on a logarithmic axis."""
    names = sorted((n for n, size in by_part.items() if size), key=lambda n: by_part[n])
    where = np.arange(len(names), dtype=np.float64)
    ax.barh(where + 0.2, [by_part[n] / 1e9 for n in names], 0.4, color=colour(0), label="stored")
    ax.barh(where - 0.2, [active[n] / 1e9 for n in names], 0.4, color=colour(4), hatch="//", label="a token meets")
    for y, n in zip(where, names):
        ax.annotate(f" {by_part[n] / 1e9:,.3g}", (by_part[n] / 1e9, y + 0.2), va="center", fontsize=9)
    ax.set_yticks(where, [n.replace("_", " ") for n in names])
    ax.set(xscale="log", xlabel="parameters (10⁹)")
    ax.legend(loc="lower right")
    total, largest, met = sum(by_part.values()), names[-1], sum(active.values())
    finding = f"{by_part[largest] / total:.1%} of the parameters are {largest.replace('_', ' ')}"
    describe(
        ax,
        f"{finding}: bars for {', '.join(n.replace('_', ' ') for n in reversed(names))}; {total / 1e9:,.4g} billion "
        f"in all, of which a token meets {met / 1e9:,.4g} billion.",
    )
    return headline(ax, finding)


def memory_along_stages(ax: Axes, per_stage: Sequence[Mapping[str, Any]], capacity: float | None = None) -> Axes:
    """Bytes of the GPUs of every pipeline rank, stacked by state; a line at the GPU's memory."""
    x = [stage["stage"] for stage in per_stage]
    base = np.zeros(len(x), dtype=np.float64)
    for n, state in enumerate(STATES):
        height = np.array([stage[state] for stage in per_stage], dtype=np.float64) / 1e9
        ax.bar(x, height, 0.8, base, color=colour(n), hatch=HATCHES[n], edgecolor="white", linewidth=0.5, label=state)
        base += height
    if capacity is not None:
        ax.axhline(capacity / 1e9, color="black", linewidth=1.2, linestyle="--")
        ax.annotate(
            "memory of the GPU", (x[-1] + 0.4, capacity / 1e9), xytext=(0, 3), textcoords="offset points", ha="right"
        )
    ax.set(xlabel="pipeline rank", ylabel="memory (GB)", xticks=x if len(x) <= 16 else x[:: len(x) // 8])
    ax.legend(ncols=1, loc="upper left", bbox_to_anchor=(1, 1))
    ax.grid(axis="x", visible=False)
    fullest = int(base.argmax())
    activations = per_stage[fullest]["activations"] / 1e9
    finding = f"The fullest GPU holds {base.max():.1f} GB, {activations:.1f} GB of them activations"
    describe(
        ax,
        f"{finding}; the emptiest {base.min():.1f} GB. Stacked bars of {len(x)} pipeline ranks: {', '.join(STATES)}.",
    )
    return headline(ax, finding)


def memory_of_layouts(ax: Axes, fullest: Mapping[str, Mapping[str, Any]], capacity: float) -> Axes:
    """Bytes of the fullest GPU of layouts, stacked by state (stages of `memory_report`), and a line at `capacity`."""
    left = np.zeros(len(fullest), dtype=np.float64)
    for n, state in enumerate(STATES):
        width = np.array([stage[state] for stage in fullest.values()], dtype=np.float64) / 1e9
        ax.barh(list(fullest), width, 0.72, left, color=colour(n), hatch=HATCHES[n], edgecolor="white", label=state)
        left += width
    ax.axvline(capacity / 1e9, color="black", linewidth=1.2, linestyle="--")
    ax.invert_yaxis()
    ax.set(xlabel=f"memory of the fullest GPU (GB); dashed: its {capacity / 1e9:.0f} GB")
    ax.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1, 0.5))
    fits, of = int((left <= capacity / 1e9).sum()), len(fullest)
    finding = f"{fits} of {of} layouts fit; the largest takes {left.max():,.0f} GB"
    if of == 1:
        finding = f"{left[0]:,.0f} GB: this layout {'fits' if fits else 'does not fit'}"
    told = ", ".join(f"{name} {total:.1f} GB" for name, total in zip(fullest, left))
    describe(ax, f"{finding}. {told}; states: {', '.join(STATES)}.")
    return headline(ax, finding)


def caches_against_context(ax: Axes, bytes_per_token: Mapping[str, int], contexts: np.ndarray) -> Axes:
    """Cache of one sequence for each model, both axes logarithmic."""
    for n, (name, size) in enumerate(bytes_per_token.items()):
        ax.loglog(
            contexts, size * contexts / 1e9, label=f"{name}, {size / 1e3:,.0f} KB a token", **look(n, len(contexts))
        )
    ax.set(xlabel="context (tokens)", ylabel="cache of one sequence (GB, BF16)")
    ax.legend()
    sizes = {name: size * int(contexts[-1]) / 1e9 for name, size in bytes_per_token.items()}
    first, largest = next(iter(sizes)), max(sizes, key=lambda name: sizes[name])
    finding = f"At {int(contexts[-1]):,} tokens {first} keeps {sizes[first]:.1f} GB, {largest} {sizes[largest]:.1f} GB"
    describe(ax, f"{finding}. Lines for {', '.join(sizes)}.")
    return headline(ax, finding)


def flops_against_context(
    ax: Axes, contexts: np.ndarray, gemms: np.ndarray, attention: np.ndarray, decode: np.ndarray
) -> Axes:
    """Forward GFLOP of a token, matrices below and causal attention above, and of a decoded token behind its cache."""
    ax.fill_between(
        contexts, 0, gemms / 1e9, color=colour(0), alpha=0.35, hatch="//", edgecolor="white", label="matrices"
    )
    ax.fill_between(
        contexts, gemms / 1e9, (gemms + attention) / 1e9, color=colour(1), alpha=0.45, label="causal attention"
    )
    ax.plot(contexts, decode / 1e9, label="decoding (absorbed)", **look(2, len(contexts)))
    at = float(contexts[0] * gemms[0] / attention[0])  # attention grows in proportion to the context
    ax.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="GFLOP a token (forward)")
    ax.set_ylim(bottom=gemms.min() / 3e9)
    ax.legend(loc="upper left")
    if at <= contexts[-1]:
        ax.axvline(at, color=GREY, linestyle=":", linewidth=1.2)
        finding = f"Attention costs as much as all matrices from {at:,.0f} tokens on"
    else:
        finding = f"Up to {int(contexts[-1]):,} tokens the matrices cost more than attention"
    describe(
        ax,
        f"{finding}: {gemms[0] / 1e9:.1f} GFLOP of matrices at any context, {attention[-1] / 1e9:,.0f} of attention at "
        "the last.",
    )
    return headline(ax, finding)


def save_parameters(path: str | Path, report: Mapping[str, Any]) -> None:
    """`parameters_by_part` of a ``report params``."""
    by_part = report["by_part"]
    idle = report["parameters"] - report["active_with_head_and_embedding"]
    active = {n: size - (idle if n == "routed_experts" else 0) for n, size in by_part.items()}
    with style():
        figure, (ax,) = new_figure(panel=(7.2, 4.2))
        parameters_by_part(ax, by_part, active)
        rows = {"part": list(by_part), "parameters": list(by_part.values()), "a_token_meets": list(active.values())}
        save(figure, path, data=rows, text=description(ax))


def save_memory(path: str | Path, report: Mapping[str, Any], capacity: float | None = None) -> None:
    """`memory_along_stages` of a ``report memory``."""
    stages = report["per_stage"]
    with style():
        figure, (ax,) = new_figure(panel=(8.0, 4.2))
        memory_along_stages(ax, stages, capacity)
        save(figure, path, data={k: [s[k] for s in stages] for k in ("stage", *STATES, "total")}, text=description(ax))


def save_caches(path: str | Path, bytes_per_token: Mapping[str, int]) -> None:
    """`caches_against_context` from 1,024 to 131,072 tokens."""
    contexts = 2.0 ** np.arange(10, 17.25, 0.25, dtype=np.float64)
    with style():
        figure, (ax,) = new_figure(panel=(7.2, 4.2))
        caches_against_context(ax, bytes_per_token, contexts)
        columns = {name: size * contexts for name, size in bytes_per_token.items()}
        save(figure, path, data={"context": contexts, **columns}, text=description(ax))


def save_flops(path: str | Path, cfg: ModelConfig) -> None:
    """`flops_against_context` over the contexts that the config allows."""
    lowest = cfg.num_nextn_predict_layers + 1
    contexts = np.unique(np.geomspace(max(lowest, 256), max(lowest, cfg.max_position_embeddings), 40).astype(np.int64))
    curves = flops_of_contexts(cfg, contexts.tolist())
    rows = {"context": contexts, **{name: np.array(values, dtype=np.float64) for name, values in curves.items()}}
    with style():
        figure, (ax,) = new_figure(panel=(7.2, 4.2))
        flops_against_context(ax, *rows.values())
        save(figure, path, data=rows, text=description(ax))
