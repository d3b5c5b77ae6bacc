"""Figure of a profile: time per op beside how fast its gemms ran."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..plots import GREY, HATCHES, colour, describe, headline
from .profile import Row


def time_per_op(ax: Axes, rows: Sequence[Row], peak_gflops: float, share_of_peak: float, most: int = 12) -> Axes:
    """Bars of milliseconds per step and op; ops with gemms carry their share of the peak of one worker.

    Parameters
    ----------
    rows : sequence of Row
        As `Profile.rows` gives them, the most expensive first.
    peak_gflops : float
        sgemm speed of one worker, GFLOP/s.
    share_of_peak : float
        What whole steps reach, 0 to 1.
    most : int
        Bars to draw; the rest is drawn as one.
    """
    shown, rest = rows[:most], rows[most:]
    names = [f"{r.name} {r.phase}" for r in shown] + (["all others"] if rest else [])
    ms = [1e3 * r.seconds for r in shown] + ([1e3 * sum(r.seconds for r in rest)] if rest else [])
    where = np.arange(len(names), dtype=np.int64)
    gemm = [r.gflops > 0 for r in shown] + ([False] if rest else [])
    colours, hatches = [colour(0) if g else GREY for g in gemm], [HATCHES[0 if g else 1] for g in gemm]
    bars = ax.barh(where, ms, color=colours, hatch=hatches)
    labels = [f"{r.gflops / peak_gflops:.0%} of peak" if r.gflops else "" for r in shown] + ([""] if rest else [])
    ax.bar_label(bars, labels, padding=3, fontsize=9)
    ax.set_yticks(where, names)
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.set_xlabel("time (ms per step, summed over workers)")
    inside = sum(m for m, g in zip(ms, gemm) if g) / sum(ms)
    finding = f"Gemm ops take {inside:.0%} of the ops' time; a whole step reaches {share_of_peak:.0%} of the sgemm peak"
    if isinstance(ax.figure, Figure):
        ax.figure.draw_without_rendering()  # the long names take room from the title
    describe(ax, f"{finding}: bars of {len(names)} ops, the longest {names[int(np.argmax(ms))]} with {max(ms):.1f} ms.")
    return headline(ax, finding)
