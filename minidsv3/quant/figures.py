"""Figures of number formats and FP8 experiments: arrays and an `ax` in, the `ax` out; titles state the finding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ..plots import GREY, HATCHES, colour, describe, headline, look
from .experiments import Price
from .formats import FORMATS, Explanation, round_to

FIELDS = ("sign", "exponent", "fraction")


def number_bits(ax: Axes, explanation: Explanation) -> Axes:
    """One box a bit, a colour for each field (`formats.explain`)."""
    fmt, fields = explanation.format, explanation.bits.split()
    names = FIELDS[: len(fields)] if fmt.name != "ue8m0" else ("exponent",)
    x = 0.0
    for i, (name, field) in enumerate(zip(names, fields)):
        for bit in field:
            ax.add_patch(
                Rectangle((x, 0), 0.92, 1, facecolor=colour(i), alpha=0.25 + 0.5 * (bit == "1"), edgecolor="k")
            )
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


def accumulation_curves(ax: Axes, K: np.ndarray, errors: Mapping[str, np.ndarray], promoted: str) -> Axes:
    """Error against K: one series a label; series whose label ends in `promoted` are dashed."""
    for i, (label, error) in enumerate(errors.items()):
        ax.plot(
            K,
            100 * np.asarray(error),
            label=label,
            **look(i, len(K)) | {"linestyle": "--" if label.endswith(promoted) else "-"},
        )
    ax.set(xscale="log", yscale="log", xlabel="K, products in a sum", ylabel="largest error / mean magnitude (%)")
    ax.set_xticks(K, [f"{k:,}" for k in K], minor=False)
    ax.minorticks_off()
    ax.legend(fontsize=8.5, loc="upper left", bbox_to_anchor=(1, 1))
    plain = [float(e[-1]) for label, e in errors.items() if not label.endswith(promoted)]
    with_promotion = [float(e[-1]) for label, e in errors.items() if label.endswith(promoted)]
    finding = f"Sums of {K[-1]:,}: up to {max(plain):.1%} wrong in one chain, {max(with_promotion):.2%} with promotion"
    describe(ax, f"{finding}: lines of {len(errors)} series over K from {K[0]:,} to {K[-1]:,}.")
    return headline(ax, finding)


def price_of_precision(ax: Axes, prices: Sequence[Price]) -> Axes:
    """Errors against the interval, and beside them what the interval costs."""
    at = np.arange(len(prices), dtype=np.int64)
    series = {
        "error of the sum (%)": [100 * p.accumulation_error for p in prices],
        "error of quantising (%)": [100 * p.quantisation_error for p in prices],
        "promotions per 100 products": [p.promotions / 10 for p in prices],
        "bytes of scales per 100 bytes": [p.scale_bytes / 10 for p in prices],
    }
    for i, (label, values) in enumerate(series.items()):
        ax.plot(at, values, label=label, **look(i, len(at)) | {"markevery": 1, "linestyle": "-" if i < 2 else "--"})
    ax.axvspan(*_around(prices, 128), color=GREY, alpha=0.18)
    ax.set_xticks(at, [f"{p.interval:,}" for p in prices])
    ax.set(yscale="log", xlabel="interval N_C: products under one scale and one partial sum", ylabel="per cent")
    ax.legend(fontsize=8.5)
    chosen = next(p for p in prices if p.interval == 128)
    last = prices[-1]
    finding = (
        f"At 128 sums are {chosen.accumulation_error:.2%} wrong for {chosen.promotions:.0f} promotions in 1,000 "
        f"products; at {last.interval:,} {last.accumulation_error:.1%}"
    )
    describe(ax, f"{finding}: lines of two errors and two costs over {len(prices)} intervals.")
    return headline(ax, finding)


def _around(prices: Sequence[Price], interval: int) -> tuple[float, float]:
    at = [p.interval for p in prices].index(interval)
    return at - 0.3, at + 0.3


def gradient_blocks(ax: Axes, layers: Sequence[str], tile: np.ndarray, block: np.ndarray) -> Axes:
    """Quantisation error of each layer's output gradient in tiles and in blocks."""
    at = np.arange(len(layers), dtype=np.int64)
    for i, (label, values) in enumerate({"1x128 tiles": tile, "128x128 blocks": block}.items()):
        ax.barh(at + (i - 0.5) * 0.4, 100 * values, 0.4, label=label, color=colour(i), hatch=HATCHES[i])
    ax.set_yticks(at, layers, fontsize=8.5)
    ax.invert_yaxis()
    ax.set_xlabel("relative rms error of the output gradient (%)")
    ax.legend(loc="lower left", frameon=True)
    worst = int((block / tile).argmax())
    ratio = block / tile
    finding = f"Blocks lose {ratio.mean():.2f} times what tiles do, {ratio[worst]:.2f} in {layers[worst]}"
    describe(ax, f"{finding}: bars for {len(layers)} kinds of layer.")
    return headline(ax, finding)


def format_errors(ax: Axes, errors: Mapping[str, Mapping[str, float]]) -> Axes:
    """Relative error of each format on each kind of activation."""
    formats = list(next(iter(errors.values())))
    at, width = np.arange(len(formats), dtype=np.int64), 0.8 / len(errors)
    for i, (where, by_format) in enumerate(errors.items()):
        values = [100 * by_format[name] for name in formats]
        ax.bar(at + (i - (len(errors) - 1) / 2) * width, values, width, label=where, color=colour(i), hatch=HATCHES[i])
    ax.set_xticks(at, formats)
    ax.set(yscale="log", ylabel="relative rms error (%)")
    ax.legend()
    mean = {name: float(np.mean([e[name] for e in errors.values()])) for name in formats}
    eight, ten = mean["LogFMT-8"] / mean["E4M3"], mean["LogFMT-10"] / mean["BF16"]
    finding = f"LogFMT-8 loses {eight:.2f} times what E4M3 loses, LogFMT-10 {ten:.1f} times what BF16 loses"
    describe(ax, f"{finding}: bars for {len(formats)} formats on {len(errors)} kinds of activation.")
    return headline(ax, finding)


def saved_memory(ax: Axes, saved: Mapping[str, Mapping[str, float]]) -> Axes:
    """Stacked bars: bytes a token that the ops keep for the backward pass, by kind of op, for each precision."""
    kinds = list(next(iter(saved.values())))
    at, bottom = np.arange(len(saved), dtype=np.int64), np.zeros(len(saved), dtype=np.float64)
    for i, kind in enumerate(kinds):
        values = np.array([by_kind[kind] / 1000 for by_kind in saved.values()])
        ax.bar(at, values, 0.6, bottom=bottom, label=kind, color=colour(i), hatch=HATCHES[i])
        bottom += values
    ax.set_xticks(at, list(saved))
    ax.set_ylabel("kept for the backward pass (KB a token)")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    totals = dict(zip(saved, bottom))
    first, last = next(iter(saved)), list(saved)[-1]
    finding = f"{last} keeps {totals[last] / totals[first]:.0%} of what {first} keeps"
    describe(ax, f"{finding}: stacked bars of {len(kinds)} kinds of op for {len(saved)} precisions.")
    return headline(ax, finding)


def loss_differences(ax: Axes, step: np.ndarray, differences: Mapping[str, np.ndarray], limit: float = 0.0025) -> Axes:
    """Smoothed relative loss differences [seeds, steps] against BF16: a line a seed, one colour a variant."""
    means = {}
    for i, (label, rows) in enumerate(differences.items()):
        for j, row in enumerate(rows):
            ax.plot(
                step,
                100 * row,
                color=colour(i),
                linewidth=1.1,
                alpha=0.9,
                label=label if j == 0 else None,
                linestyle=("-", "--", ":")[j % 3],
            )
        means[label] = float(np.mean([row[-max(1, len(row) // 5) :].mean() for row in rows]))
    ax.axhspan(-100 * limit, 100 * limit, color=GREY, alpha=0.15)
    reach = max(1.2, *(105 * float(np.abs(rows).max()) for rows in differences.values()))
    ax.set(xlabel="step", ylabel="loss against BF16, relative (%)", ylim=(-reach, reach))
    ax.legend(fontsize=8.5)
    finding = "Over the last fifth: " + ", ".join(f"{label} {value:+.2%}" for label, value in means.items())
    describe(ax, f"{finding}: lines of {len(means)} variants over {int(step[-1]):,} steps; grey band: 0.25 %.")
    return headline(ax, finding)


def rounding_costs(ax: Axes, step: np.ndarray, costs: Mapping[str, np.ndarray]) -> Axes:
    """What rounding costs weights that never met it [steps], a line a learning rate, the lowest first."""
    for i, (rate, values) in enumerate(costs.items()):
        ax.plot(step, 100 * values, label=f"learning rate {rate}", **look(i, len(step)))
    ax.axhspan(-0.25, 0.25, color=GREY, alpha=0.15)
    ax.set(xlabel="step of training in BF16", ylabel="loss in FP8 against BF16, same weights (%)")
    ax.legend(fontsize=8.5)
    low, *_, high = costs
    finding = f"FP8 rounding costs {costs[low][-1]:+.2%} at rate {low}, {costs[high][-1]:+.2%} at {high}"
    describe(ax, f"{finding}: lines of {len(costs)} learning rates over {int(step[-1]):,} steps; grey band: 0.25 %.")
    return headline(ax, finding)


def tail_means(ax: Axes, tails: Mapping[str, np.ndarray], limit: float = 0.0025) -> Axes:
    """Where each variant ends, relative to BF16: a dot a seed [seeds]."""
    _dots(ax, tails)
    ax.axvspan(-100 * limit, 100 * limit, color=GREY, alpha=0.15)
    ax.set_xlabel("last 200 steps against BF16 (%); dots: seeds, bar: mean")
    seeds = len(next(iter(tails.values())))
    spread = {n: f" (spread {np.std(v, ddof=1):.2%})" if seeds > 1 else "" for n, v in tails.items()}
    means = [f"{n} {np.mean(v):+.2%}{spread[n]}" for n, v in tails.items()]
    describe(ax, f"Mean of {seeds} seeds: {', '.join(means)}; grey band: 0.25 %.")
    beyond = [n for n, v in tails.items() if np.any(np.asarray(v) > limit)]
    return headline(ax, f"Seeds above 0.25 %: {', '.join(beyond)}" if beyond else "No seed ends above 0.25 %")


def _dots(ax: Axes, groups: Mapping[str, np.ndarray]) -> None:
    """A row a group: a dot for each of its values, in per cent, and a bar at their mean."""
    for i, values in enumerate(groups.values()):
        rows = np.full(len(values), i, dtype=np.int64)
        ax.plot(100 * np.asarray(values), rows, linestyle="none", marker="o", color=colour(0))
        ax.plot([100 * float(np.mean(values))], [i], marker="|", markersize=16, color=colour(1))
    ax.set_yticks(np.arange(len(groups), dtype=np.int64), list(groups))
    ax.set_ylim(len(groups) - 0.5, -0.5)


def sensitivity(ax: Axes, differences: Mapping[str, np.ndarray], floor: np.ndarray) -> Axes:
    """What changing one row of the recipe does to the loss: a dot a seed [seeds], the floor as a band."""
    widest = 100 * float(np.abs(floor).max())
    _dots(ax, differences)
    ax.axvspan(-widest, widest, color=GREY, alpha=0.2)
    ax.set_xlabel("loss against plain fp8 (%); dots: seeds, bar: mean")
    beyond = [
        label for label, v in differences.items()
        if abs(np.mean(v)) > np.abs(floor).max() and abs(np.mean(v)) > 2 * np.std(v, ddof=1) / np.sqrt(len(v))
    ]  # fmt: skip
    finding = f"Beyond the floor: {', '.join(beyond)}" if beyond else "No row has a visible effect at this size"
    describe(ax, f"{finding}: dots for {len(differences)} changed rows; grey band: one ulp in the initial weights.")
    return headline(ax, finding)
