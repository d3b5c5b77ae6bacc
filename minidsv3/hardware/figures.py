"""Figures of schedules, the clock and the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from ..plots import COLOURS, GREY, HATCHES, describe, headline, look

# Kind of instruction -> (colour, hatch); the second stream of DualPipe is hatched.
KINDS = {"F": COLOURS[0], "B": COLOURS[1], "Bi": COLOURS[4], "W": COLOURS[2], "FB": COLOURS[3]}
MEANING = {
    "F": "forward",
    "B": "full backward",
    "Bi": "backward, input",
    "W": "backward, weights",
    "FB": "overlapped pair",
}


def gantt(ax: Axes, timeline: Any, name: str, legend: bool = True) -> Axes:
    """When each rank computes what; white is waiting. `timeline` as `parallel.timeline.timeline` gives it."""
    for rank, row in enumerate(timeline.schedule):
        for op, start, end in zip(row, timeline.start[rank], timeline.end[rank]):
            ax.barh(
                rank,
                end - start,
                left=start,
                height=0.84,
                color=KINDS[op[0]],
                edgecolor="white",
                linewidth=0.3,
                hatch="////" if op[1] else None,
            )
    ranks, idle = len(timeline.schedule), 100 * float(np.mean(timeline.idle)) / timeline.makespan
    ax.set(xlabel="time (forward chunks)", ylabel="rank", xlim=(0, timeline.makespan), yticks=range(ranks))
    ax.invert_yaxis()
    ax.grid(False)
    kinds = [k for k in KINDS if any(op[0] == k for row in timeline.schedule for op in row)]
    if legend:
        handles = [Patch(color=KINDS[k], label=MEANING[k]) for k in kinds]
        ax.legend(handles=handles, ncols=len(kinds), loc="upper center", bbox_to_anchor=(0.5, -0.28), fontsize=9)
    finding = f"{name}: ends at {timeline.makespan:g}, ranks wait {idle:.0f} % of the time"
    describe(ax, f"{finding}; {ranks} ranks, at most {max(timeline.peak_live)} chunks alive on one of them.")
    return headline(ax, finding)


def overlapped_pair(ax: Axes, placed: Sequence[Any]) -> Axes:
    """Two streams of a GPU while a forward runs over a backward (`clock.Clock.pair`, or a part of it)."""
    start = min(op.start for op in placed)
    end = max(op.end for op in placed)
    busy = dict.fromkeys(("compute", "communication"), 0.0)
    for (name, stream, seconds, _), begin, stop in placed:
        kind = next(letter for letter in reversed(name) if letter in "FBW")
        busy[stream] += seconds
        left, width = 1e3 * (begin - start), 1e3 * (stop - begin)
        row = list(busy).index(stream)
        hatch = {"F": "", "B": "//", "W": ".."}[kind]
        ax.barh(row, width, 0.8, left, color=KINDS[kind], alpha=0.75, hatch=hatch, edgecolor="white", linewidth=0.6)
        if width > 0.03 * 1e3 * (end - start):
            label = name.rstrip("0123456789").rsplit(" ", 1)[0].replace("attention", "attn")
            box = {"facecolor": "white", "alpha": 0.85, "pad": 1.0, "linewidth": 0}
            ax.text(left + width / 2, row, label, ha="center", va="center", fontsize=8, rotation=90, bbox=box)
    ax.set(yticks=(0, 1), yticklabels=list(busy), xlabel="time (ms)", xlim=(0, 1e3 * (end - start)))
    ax.invert_yaxis()
    ax.grid(False)
    handles = [
        Patch(facecolor=KINDS[kind], label=MEANING[kind].replace("full backward", "backward, input")) for kind in "FBW"
    ]
    ax.legend(handles=handles, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.3), fontsize=9)
    hidden = busy["compute"] + busy["communication"] - (end - start)
    share = hidden / busy["communication"]
    finding = f"{share:.0%} of the communication is hidden behind computation"
    told = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in busy.items())
    describe(ax, f"{finding}: {told}, together in {1e3 * (end - start):.1f} ms.")
    return headline(ax, finding)


def bubble_against_ranks(ax: Axes, ranks: Sequence[int], idle: Mapping[str, Sequence[float]], chunk: str) -> Axes:
    """Waiting of a rank against the number of ranks, for each schedule; `chunk` says what one unit of time is."""
    for i, (name, values) in enumerate(idle.items()):
        ax.plot(ranks, values, label=name, **look(i, len(ranks)))
    ax.set(xlabel="pipeline ranks", ylabel=f"idle of a rank ({chunk})", xticks=list(ranks))
    ax.legend()
    worst, best = (f(idle, key=lambda name: idle[name][-1]) for f in (max, min))
    ratio = idle[worst][-1] / idle[best][-1]
    finding = f"At {ranks[-1]} ranks {best} waits {ratio:.1f} times less than {worst}"
    describe(ax, f"{finding}: {idle[best][-1]:.1f} against {idle[worst][-1]:.1f} {chunk}.")
    return headline(ax, finding)


def where_the_seconds_go(ax: Axes, steps: Mapping[str, Mapping[str, float]]) -> Axes:
    """Parts of a step as stacked bars, one bar a step: the first is what is shown, the second stands beside it."""
    names = list(steps)
    for i, part in enumerate(steps[names[0]]):
        values = [steps[name][part] for name in names]
        left = [sum(v for p, v in steps[name].items() if p in list(steps[name])[:i]) for name in names]
        bars = ax.barh(names, values, left=left, color=COLOURS[i], hatch=HATCHES[i], edgecolor="white", label=part)
        shown = [f"{v:.2f}" if v > 0.9 else "" for v in values]
        for label in ax.bar_label(bars, shown, label_type="center", fontsize=9):
            label.set_bbox({"facecolor": "white", "alpha": 0.85, "pad": 1.2, "linewidth": 0})
    ax.set(xlabel="seconds of a step, mean over the pipeline ranks")
    ax.invert_yaxis()
    ax.legend(ncols=6, loc="upper center", bbox_to_anchor=(0.42, -0.25), fontsize=9)
    totals = [sum(steps[name].values()) for name in names]
    finding = f"Where {totals[1]:.1f} s go: {names[0]} {totals[0]:.1f} s, {100 * (totals[0] / totals[1] - 1):+.0f} %"
    told = [f"{name}: " + ", ".join(f"{part} {v:.2f}" for part, v in steps[name].items()) for name in names]
    describe(ax, f"{finding}. {'; '.join(told)} s.")
    return headline(ax, finding)


def step_by_what_if(ax: Axes, seconds: Mapping[str, float]) -> Axes:
    """Step time of each change beside the unchanged machine, which comes first."""
    names, values = list(seconds), np.array(list(seconds.values()))
    colours = [GREY, *(COLOURS[1] if v > values[0] else COLOURS[0] for v in values[1:])]
    hatches = ["", *("//" if v > values[0] else "" for v in values[1:])]
    bars = ax.barh(names, values, color=colours, hatch=hatches, edgecolor="white")
    ax.bar_label(bars, [f"{v:.1f} s" for v in values], padding=3, fontsize=9)
    ax.axvline(values[0], color="black", linewidth=1, linestyle=":")
    ax.set(xlabel="seconds of a step", xlim=(0, 1.15 * values.max()))
    ax.invert_yaxis()
    worst = names[int(values.argmax())]
    finding = f"The dearest change: {worst}, {100 * (values.max() / values[0] - 1):+.0f} %"
    describe(ax, f"{finding}. " + ", ".join(f"{n} {v:.1f} s" for n, v in seconds.items()) + ".")
    return headline(ax, finding)


def cost_per_endpoint(ax: Axes, sizes: Mapping[str, Sequence[int]], costs: Mapping[str, Sequence[float]]) -> Axes:
    """Dollars an endpoint against endpoints, for families of networks; prices are calibrated."""
    for i, name in enumerate(sizes):
        ax.semilogx(sizes[name], np.array(costs[name]) / 1e3, label=name, **look(i, len(sizes[name])))
    ax.set(xlabel="endpoints", ylabel="cost of an endpoint (k$, calibrated prices)")
    ax.set_ylim(bottom=0)
    ax.legend()
    size, two = sizes["MPFT"][-1], costs["MPFT"][-1] / 1e3
    three = costs["FT3"][int(np.argmin(np.abs(np.array(sizes["FT3"]) - size)))] / 1e3
    finding = f"Near {size:,} endpoints planes cost {two:.1f} k$ an endpoint, three layers {three:.1f} k$"
    describe(ax, f"{finding}. Families: {', '.join(sizes)}.")
    return headline(ax, finding)


def all_to_all_under_failures(ax: Axes, shares: Sequence[float], times: Mapping[str, Sequence[float]]) -> Axes:
    """Slow-down of an all-to-all against the share of dead cables, and lines for whole planes."""
    for i, (name, values) in enumerate(times.items()):
        ax.plot(100 * np.array(shares), values, label=name, **look(i, len(shares)))
    ax.set(xlabel="cables between leaf and spine that are dead (%)", ylabel="time of an all-to-all (unbroken = 1)")
    ax.legend()
    first, values = next(iter(times.items()))
    finding = f"{100 * shares[-1]:.0f} % of the cables dead: an all-to-all takes {values[-1]:.2f} times as long"
    describe(ax, f"{finding} ({first}); " + ", ".join(f"{n} {v[-1]:.2f}" for n, v in times.items()) + ".")
    return headline(ax, finding)
