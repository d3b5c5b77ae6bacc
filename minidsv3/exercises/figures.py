"""The figure of the exercises: a student's loss curve beside the package's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .. import plots


def losses_beside(ax: Axes, own: np.ndarray, ours: np.ndarray, names: Sequence[str]) -> Axes:
    """Loss of each step with a student's code (`own`) and without (`ours`), both float [steps] in nats."""
    step, gap = np.arange(1, len(own) + 1, dtype=np.int64), float(np.abs(own - ours).max())
    ax.plot(step, ours, color=plots.COLOURS[0], linewidth=3, alpha=0.6, label="the package")
    ax.plot(step, own, color=plots.COLOURS[1], linestyle="--", marker="o", markersize=3, label="yours")
    verdict = "the package's curve" if gap < 0.01 else f"up to {gap:.2f} nats away from the package's"
    what = ", ".join(names) if len(names) < 4 else f"{len(names)} of your solutions"
    ax.set(xlabel="step", ylabel="training loss (nats)", title=f"With {what}: {verdict}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    sentence = f"Loss of nano over {len(own)} steps, {own[0]:.2f} to {own[-1]:.2f} with {what}; {verdict}."
    return plots.describe(ax, sentence)


def show_losses(own: np.ndarray, ours: np.ndarray, names: Sequence[str]) -> plots.Picture:
    """`losses_beside` as a picture for a notebook."""
    figure, (ax,) = plots.new_figure(1, 1)
    losses_beside(ax, own, ours, names)
    return plots.Picture(figure)


def save_losses(path: Path, own: np.ndarray, ours: np.ndarray, names: Sequence[str]) -> list[Path]:
    """`losses_beside` as a file, with its data and its text."""
    figure, (ax,) = plots.new_figure(1, 1)
    text = plots.description(losses_beside(ax, own, ours, names))
    return plots.save(figure, path, data={"yours": own, "package": ours}, text=text)
