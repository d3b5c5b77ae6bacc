"""Figures of a training run: arrays and an `ax` in, the `ax` out.

Each function draws one thing, states the finding in the title, computed from the data, and keeps one sentence of
alternative text on the axes (``plots.description(ax)`` reads it). `run_figures` draws all of them for a run folder;
a notebook calls the single ones with axes of its own, best inside ``with plots.style():``. Every function raises
ValueError where there is no step to draw.

What a healthy run of a small model shows: the loss falls fast for a hundred steps and slowly after; the MTP loss runs
close to the main loss (it predicts one token farther, but sees one token more); the routing biases open like a fan in
the first hundreds of steps and then run level; MaxVio falls while they do (section 2.1.2 of the report). With
``bias_update_speed`` 0 the biases stay at 0, and one or two experts take most of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from .. import plots
from .runs import Run, max_vio, smoothed

TAIL = 100  # steps at the end over which a finding is averaged
_HEATMAP_COLUMNS = 200  # more are not seen; a column is then the mean of several steps
_HIGHEST_LOAD = 2.0  # times the mean, where the colours end


def loss_curves(
    ax: Axes,
    step: np.ndarray,
    main_loss: np.ndarray,
    mtp_loss: np.ndarray | None = None,
    *,
    smoothing: float = 0.98,
    unit: str = "nats per byte",
) -> Axes:
    """Main and MTP loss against steps: each batch thin, the moving average thick.

    Parameters
    ----------
    step : ndarray [N] of int
    main_loss : ndarray [N]
        In `unit`.
    mtp_loss : ndarray [N], optional
        Left out when None or NaN throughout (a model without MTP modules).
    smoothing : float
        Decay of the moving average (`runs.smoothed`).
    unit : str
    """
    _require_steps(step)
    curves = {"main: the next token": main_loss}
    if mtp_loss is not None and not np.all(np.isnan(mtp_loss)):
        curves["MTP: one token farther"] = mtp_loss
    averages = [smoothed(loss, smoothing) for loss in curves.values()]
    for index, (label, loss) in enumerate(curves.items()):
        ax.plot(step, loss, color=plots.colour(index), linewidth=0.6, alpha=0.35)
        ax.plot(step, averages[index], label=label, **plots.look(index, len(step)))
    ax.set_ylabel(f"loss ({unit})")
    ax.legend()
    finding = _loss_finding(step, main_loss, averages[0], unit)
    last = f"; the smoothed MTP loss ends at {averages[1][-1]:.2f}" if len(curves) == 2 else ""
    return _finish(ax, finding, f"Training curves: {finding}{last}.")


def bits_per_byte(ax: Axes, step: np.ndarray, val: np.ndarray) -> Axes:
    """Validation `val` (bits per byte, [N]) at the steps [N] that evaluated; NaN marks the others."""
    measured = np.isfinite(val)
    _require_steps(step[measured])
    step, val = step[measured], val[measured]
    best = int(np.argmin(val))
    ax.plot(step, val, color=plots.colour(0), marker="o")
    ax.plot(step[best], val[best], "*", color=plots.colour(1), markersize=14, label="lowest", linestyle="none")
    ax.set_xlim(left=0)
    ax.set_ylabel("validation (bits per byte)")
    ax.legend()
    finding = f"Validation reaches {val[best]:.3f} bits per byte at step {step[best]:,}"
    if best < len(val) - 1:
        finding += f" and ends at {val[-1]:.3f}"
    return _finish(ax, finding, f"{finding}; evaluations: {len(val)}, the first gave {val[0]:.3f}.")


def expert_load_heatmap(
    ax: Axes, load: np.ndarray, layer: str, *, step: np.ndarray | None = None, colour_bar: bool = True
) -> Axes:
    """Load of each expert over the steps, relative to the mean of its layer: 1 is the fair share.

    Parameters
    ----------
    load : ndarray [N, E]
        Tokens of each expert in each step.
    layer : str
        Name of the layer, for title and text.
    step : ndarray [N] of int, optional
        1 .. N if not given.
    colour_bar : bool
        False where panels share one.
    """
    step = np.arange(1, len(load) + 1, dtype=np.int64) if step is None else step
    _require_steps(step)
    width = -(-len(load) // _HEATMAP_COLUMNS)
    image = ax.imshow(
        _relative(_binned(load, width)).T, aspect="auto", cmap=plots.DIVERGING, interpolation="nearest",
        norm=TwoSlopeNorm(vmin=0, vcenter=1, vmax=_HIGHEST_LOAD), extent=_extent(step, load.shape[1]),
    )  # fmt: skip
    ax.set_ylabel("expert")
    ax.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    if colour_bar:
        _load_colour_bar([ax], image)
    total = _relative(load[-TAIL:].sum(axis=0))
    low, high = int(np.argmin(total)), int(np.argmax(total))
    finding = f"{layer}: {total[low]:.2f} to {total[high]:.2f} times mean load"
    _finish(ax, finding, (
        f"Expert load of {layer}: over the last {min(TAIL, len(load))} steps the idlest expert, {low}, has "
        f"{total[low]:.2f} times the mean load and the busiest, {high}, has {total[high]:.2f} times."
    ))  # fmt: skip
    ax.grid(False)
    ax.set_xlim(*_extent(step, load.shape[1])[:2])
    return ax


def expert_load_grid(
    axes: Sequence[Axes], load: np.ndarray, layers: Sequence[str], *, step: np.ndarray | None = None
) -> Sequence[Axes]:
    """`expert_load_heatmap` of every layer on `axes`, with one colour bar; axes left over are hidden.

    Parameters
    ----------
    axes : sequence of Axes
        At least one a layer, of one figure.
    load : ndarray [N, Lm, E]
    layers : sequence of str [Lm]
    step : ndarray [N] of int, optional

    Raises
    ------
    ValueError
        No layer, fewer axes than layers, or another number of names.
    """
    Lm = load.shape[1]
    if not 0 < Lm <= len(axes) or Lm != len(layers):
        raise ValueError(f"load has {Lm} layers, there are {len(layers)} names and {len(axes)} axes")
    for index, ax in enumerate(axes[:Lm]):
        expert_load_heatmap(ax, load[:, index], layers[index], step=step, colour_bar=False)
    for ax in axes[Lm:]:
        ax.set_visible(False)
    _load_colour_bar(list(axes), axes[0].images[0])
    return axes


def max_vio_curves(ax: Axes, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, smoothing: float = 0.98) -> Axes:
    """MaxVio of each batch against steps, one curve a label: layers of a run, or runs with and without balancing.

    Parameters
    ----------
    curves : mapping of str to (step, max_vio)
        ndarray [N] of int, ndarray [N]; MaxVio is (max load - mean load) / mean load.
    smoothing : float
        Decay of the moving average that is drawn; of up to two curves the values themselves stand behind it, thin.
    """
    _require_steps(list(curves))
    for index, (label, (step, values)) in enumerate(curves.items()):
        _require_steps(step)
        if len(curves) <= 2:
            ax.plot(step, values, color=plots.colour(index), linewidth=0.6, alpha=0.25)
        ax.plot(step, smoothed(values, smoothing), label=label, **plots.look(index, len(step)))
    ends = {label: float(np.mean(values[-TAIL:])) for label, (_, values) in curves.items()}
    if min(ends.values()) > 0 and max(ends.values()) > 10 * min(ends.values()):
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    ax.set_ylabel("MaxVio (times the mean load)")
    ax.legend(ncols=2 if len(curves) > 3 else 1)
    steps = min(TAIL, max(len(step) for step, _ in curves.values()))
    finding = f"MaxVio of a batch, last {steps} steps: {_ends(ends)}"
    return _finish(ax, finding, f"{finding}.")


def bias_trajectories(ax: Axes, step: np.ndarray, bias: np.ndarray, *, layer: str = "") -> Axes:
    """Routing biases of one layer against steps: every expert grey, the two that end outermost in colour.

    Parameters
    ----------
    step : ndarray [N] of int
    bias : ndarray [N, E]
        e_score_correction_bias; a raised bias draws tokens to an expert that had too few.
    layer : str
        Begins the title, if given.
    """
    _require_steps(step)
    ax.plot(step, bias, color=plots.GREY, linewidth=0.8)
    high, low = int(np.argmax(bias[-1])), int(np.argmin(bias[-1]))
    ax.set_ylabel("routing bias (units of affinity)")
    finding = f"biases from {bias[-1, low]:+.3f} to {bias[-1, high]:+.3f}"
    if not bias.any():
        finding = "all biases stay at 0"
    else:
        for index, expert in enumerate((high, low)):
            ax.plot(step, bias[:, expert], **plots.look(index, len(step)))
            _label_end(ax, step[-1], bias[-1, expert], f"expert {expert}", plots.colour(index))
    finding = f"{layer}: {finding}" if layer else finding.capitalize()
    return _finish(ax, finding, f"Routing, {finding} at step {step[-1]:,} over {bias.shape[1]} experts.")


def load_by_kind(
    ax: Axes, load: np.ndarray, kinds: Sequence[str], *, top_k: int, layer: str = "", colour_bar: bool = True
) -> Axes:
    """Heat map of each kind of text's use of the experts of one layer.

    Parameters
    ----------
    load : ndarray [kinds, E] of int
        Tokens of each kind for each expert; every kind is counted alike.
    kinds : sequence of str
    top_k : int
        Experts per token: the darkest colour is an expert that gets every token of a kind.
    layer : str
        Begins the title, if given.
    """
    share, most = _relative(load), load.shape[1] / top_k
    image = ax.imshow(share, cmap="Blues", vmin=0, vmax=most, aspect="auto")
    for (row, column), n in np.ndenumerate(share):
        ax.text(column, row, f"{n:.1f}", ha="center", va="center", color="white" if n > 0.6 * most else "black", size=8)
    ax.set(xticks=range(load.shape[1]), xlabel="expert", yticks=range(len(kinds)), yticklabels=kinds)
    ax.grid(visible=False)
    if colour_bar:
        ax.figure.colorbar(image, ax=ax, label="load (times the mean)")
    row, column = divmod(int(share.argmax()), share.shape[1])
    finding = f"expert {column} gets {share[row, column]:.1f} times its share of {kinds[row]}"
    finding = f"{layer}: {finding}" if layer else finding.capitalize()
    sentence = f"{finding}; heat map of {len(kinds)} kinds of text by {load.shape[1]} experts."
    return plots.describe(plots.headline(ax, finding), sentence)


def overlay(
    ax: Axes,
    curves: Sequence[tuple[str, np.ndarray, np.ndarray]],
    *,
    quantity: str,
    unit: str,
    x_label: str = "training step",
    points: bool = False,
    legend: Mapping[str, str] | None = None,
) -> Axes:
    """Curves of several runs in one panel; runs of one group share colour, marker and legend entry.

    Parameters
    ----------
    curves : sequence of (group, x, y)
        Name of the group, ndarray [N], ndarray [N]. Curves without points are passed over.
    quantity, unit : str
        What y is, for title and axis.
    x_label : str
    points : bool
        Mark every value (few, measured ones) instead of some eight along the line.
    legend : mapping of group to str, optional
        Longer names of the groups for the legend; the title keeps the short ones.
    """
    curves = [curve for curve in curves if len(curve[1])]
    _require_steps(curves)
    ends: dict[str, list[float]] = {}
    for group, x, y in curves:
        index = [*ends, group].index(group)
        keywords = plots.look(index, len(x)) | ({"markevery": 1} if points else {})
        ax.plot(x, y, label=None if group in ends else (legend or {}).get(group, group), linewidth=1.4, **keywords)
        ends.setdefault(group, []).append(float(y[-1]))
    ax.set_ylabel(f"{quantity} ({unit})")
    ax.legend()
    means = {group: float(np.mean(values)) for group, values in ends.items()}
    finding = f"{quantity[0].upper()}{quantity[1:]} at the end: {_ends(means)}"
    _finish(ax, finding, f"{finding}; runs drawn: {len(curves)}.")
    ax.set_xlabel(x_label)
    return ax


def run_figures(run: Run, *, suffix: str = ".png") -> list[Path]:
    """Draw every figure of a run into its ``figures`` folder, each with its data and its text.

    Parameters
    ----------
    run : Run
    suffix : str
        '.png', '.svg' or '.pdf'.

    Returns
    -------
    list of Path
        The files written. Validation is left out while no step has evaluated, experts if the model has none.
    """
    if len(run.step) == 0:
        raise ValueError(f"{run.path} has no complete step yet: wait for the first, or train again")
    with plots.style():
        files = _save_losses(run, suffix)
        return files + _save_experts(run, suffix) if run.load.shape[1] else files


def _save_losses(run: Run, suffix: str) -> list[Path]:
    step = run.step
    main, mtp, val = (run.metrics[name] for name in ("main_loss", "mtp_loss", "val_bits_per_byte"))
    figure, axes = plots.new_figure()
    loss_curves(axes[0], step, main, mtp, smoothing=_decay(len(step)), unit=run.loss_unit)
    files = _save(run, f"loss{suffix}", figure, {"step": step, "main_loss": main, "mtp_loss": mtp})
    measured = np.isfinite(val)
    if measured.any():
        figure, axes = plots.new_figure()
        bits_per_byte(axes[0], step, val)
        data = {"step": step[measured], "val_bits_per_byte": val[measured]}
        files += _save(run, f"bits_per_byte{suffix}", figure, data)
    return files


def _save_experts(run: Run, suffix: str) -> list[Path]:
    step, layers = run.step, run.layer_names
    columns = min(2, len(layers))
    grid = (-(-len(layers) // columns), columns)
    figure, axes = plots.new_figure(*grid, panel=(5.0, 2.8))
    expert_load_grid(axes, run.load, layers, step=step)
    files = _save(run, f"expert_load{suffix}", figure, {"step": step, **_by_expert(run.load, layers)})
    figure, axes = plots.new_figure()
    violation = dict(zip(layers, max_vio(run.load).T))
    curves = {layer: (step, values) for layer, values in violation.items()}
    max_vio_curves(axes[0], curves, smoothing=_decay(len(step)))
    files += _save(run, f"max_vio{suffix}", figure, {"step": step, **violation})
    figure, axes = plots.new_figure(*grid, panel=(5.0, 3.2))
    for index, layer in enumerate(layers):
        bias_trajectories(axes[index], step, run.bias[:, index], layer=layer)
        if index:
            axes[index].sharey(axes[0])  # layers are compared by eye
    for ax in axes[len(layers) :]:
        ax.set_visible(False)
    return files + _save(run, f"bias{suffix}", figure, {"step": step, **_by_expert(run.bias, layers)})


def _save(run: Run, name: str, figure: Figure, data: Mapping[str, np.ndarray]) -> list[Path]:
    return plots.save(figure, run.path / "figures" / name, data=data, text=plots.description(*figure.axes))


def _decay(steps: int) -> float:
    """0.98, or less where that would average over more than a twentieth of a short run and lag behind it."""
    return min(0.98, max(0.0, 1 - 20 / steps))


def _by_expert(values: np.ndarray, layers: Sequence[str]) -> dict[str, np.ndarray]:
    """values [N, Lm, E] as one column for each expert of each layer."""
    pairs = [(index, expert) for index in range(len(layers)) for expert in range(values.shape[2])]
    return {f"{layers[index]} expert {expert}": values[:, index, expert] for index, expert in pairs}


def _require_steps(step: Sequence | np.ndarray) -> None:
    if len(step) == 0:
        raise ValueError("there is no value to draw: the run has no such step yet")


def _label_end(ax: Axes, x: float, y: float, text: str, colour: str) -> None:
    """Name a line at its right end, where no legend can cover another line."""
    ax.annotate(text, (x, y), (7, 0), textcoords="offset points", va="center", color=colour, annotation_clip=False)


def _finish(ax: Axes, finding: str, sentence: str) -> Axes:
    """The parts that every panel has: step axis, title, alternative text."""
    ax.set_xlabel("training step")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return plots.describe(plots.headline(ax, finding), sentence)


def _loss_finding(step: np.ndarray, loss: np.ndarray, average: np.ndarray, unit: str) -> str:
    broken = np.flatnonzero(~np.isfinite(loss))
    if len(broken):
        return f"Loss is not a finite number from step {step[broken[0]]:,} on"
    verb = "falls" if average[-1] < loss[0] else "does not fall:"
    return f"Loss {verb} from {loss[0]:.2f} to {average[-1]:.2f} {unit} in {step[-1]:,} steps"


def _ends(ends: Mapping[str, float]) -> str:
    """'0.12 (with), 2.3 (without)'; of more than three the outermost only."""
    ordered = sorted(ends, key=lambda label: ends[label])
    if len(ordered) > 3:
        return f"from {ends[ordered[0]]:.3g} ({ordered[0]}) to {ends[ordered[-1]]:.3g} ({ordered[-1]})"
    return ", ".join(f"{ends[label]:.3g} ({label})" for label in ends)


def _binned(load: np.ndarray, width: int) -> np.ndarray:
    """Sums of `width` steps each, the last of what is left: [ceil(N / width), E]."""
    return np.add.reduceat(load, np.arange(0, len(load), width, dtype=np.int64), axis=0)


def _relative(load: np.ndarray) -> np.ndarray:
    return load / load.mean(axis=-1, keepdims=True)


def _extent(step: np.ndarray, E: int) -> tuple[float, float, float, float]:
    return (float(step[0]) - 0.5, float(step[-1]) + 0.5, E - 0.5, -0.5)


def _load_colour_bar(axes: list[Axes], image) -> None:
    bar = axes[0].figure.colorbar(image, ax=axes, extend="max", label="load (times the mean)")
    bar.set_ticks([0, 0.5, 1, 1.5, _HIGHEST_LOAD])
    plots.describe(bar.ax, "")  # its panels are described
