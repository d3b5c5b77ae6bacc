"""Figures of number formats: the bits of a number, how far a rounded number is off, what an accumulator drops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ..plots import GREY, colour, describe, headline, look
from .formats import FORMATS, Explanation, round_to

FIELDS = ("sign", "exponent", "fraction")


def number_bits(ax: Axes, explanation: Explanation) -> Axes:
    """One box a bit, a colour for each field (`formats.explain`)."""
    fmt, fields = explanation.format, explanation.bits.split()
    names = FIELDS[: len(fields)] if fmt.name != "ue8m0" else ("exponent",)
    x = 0.0
    for i, (name, field) in enumerate(zip(names, fields)):
        for bit in field:
            ax.add_patch(Rectangle((x, 0), 0.92, 1, facecolor=colour(i), alpha=0.25 + 0.5 * (bit == "1"), edgecolor="k"))
            ax.text(x + 0.46, 0.5, bit, ha="center", va="center", fontsize=12, family="monospace")
            x += 1
        ax.text(x - len(field) / 2 - 0.04, -0.15, name, ha="center", va="top", fontsize=9)
        x += 0.25
    ax.set(xlim=(-0.1, max(x, 17.5)), ylim=(-0.75, 1.1))
    ax.axis("off")
    error = (explanation.value - explanation.x) / explanation.x if explanation.x else 0.0
    finding = f"{explanation.x:g} in {fmt.name} is {explanation.value:.6g}"
    finding += f", {error:+.2%}" if np.isfinite(error) else ""
    describe(ax, f"{finding}; bits {explanation.bits}.")
    return headline(ax, finding)


def error_against_magnitude(ax: Axes, names: Sequence[str], low: int = -18, high: int = 18) -> Axes:
    """Largest relative error of a number against its size, from 2^low to 2^high, one line a format."""
    edges = 2.0 ** np.arange(low, high + 1, dtype=np.float64)
    bounds = {}
    for i, name in enumerate(names):
        within = edges[:-1, None] * np.linspace(1, 2, 257)[:-1]  # [powers, numbers between two powers]
        worst = np.max(np.abs(round_to(within, name) - within) / within, axis=1)
        bounds[name] = float(worst[edges[:-1] >= 2.0 ** max(low, FORMATS[name].min_exponent)].min())
        ax.loglog(edges[:-1], np.maximum(worst, 1e-4), label=name, **look(i, len(worst)))
    ax.axhline(1, color=GREY, linewidth=1, linestyle=":")
    ax.set_xscale("log", base=2)
    ax.set(xlabel="magnitude of the number", ylabel="largest relative error", ylim=(1e-3, 2))
    ax.legend()
    finding = f"{names[0]} is off by {bounds[names[0]]:.1%} at most, inside its range"
    told = ", ".join(f"{name} {bound:.2%}" for name, bound in bounds.items())
    describe(ax, f"{finding}. Inside their ranges: {told}; outside, small numbers become zero and large ones are cut.")
    return headline(ax, finding)


def error_against_length(ax: Axes, lengths: Sequence[int], errors: Mapping[str, Sequence[float]]) -> Axes:
    """Relative error of an accumulated product against the number of products, one line for each way to add."""
    for i, (name, values) in enumerate(errors.items()):
        ax.loglog(lengths, np.asarray(values, dtype=np.float64), label=name, **look(i, len(lengths)))
    ax.set_xscale("log", base=2)
    ax.set(xlabel="products in a sum (K)", ylabel="relative error of the matrix")
    ax.legend()
    last = {name: float(values[-1]) for name, values in errors.items()}
    worst, best = max(last, key=last.__getitem__), min(last, key=last.__getitem__)
    finding = f"At K = {lengths[-1]:,} {worst} is {last[worst] / last[best]:,.0f} times as wrong as {best}"
    told = ", ".join(f"{name} {value:.2g}" for name, value in last.items())
    describe(ax, f"{finding}. Errors there: {told}.")
    return headline(ax, finding)
