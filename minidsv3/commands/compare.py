"""``compare DIR DIR ...``: run folders beside each other, and what the seeds allow to say about them.

A difference between two training runs means little by itself: the seed alone moves the result. So runs whose configs
differ in nothing but `seed` form a group, a group's spread is the distance between its best and its worst seed, and
two groups are called different only when their means lie farther apart than the larger spread of the two. A group
with one seed has an unknown spread, and the verdict says so instead of guessing.

The measures: validation bits per byte, last and smoothed; main and MTP loss, smoothed; MaxVio of the load summed over
the last 100 steps (lasting imbalance) and as a mean over these batches (what a batch sees), both as a mean over the
layers; median tokens a second.

Simplified: the spread is no confidence interval; two or three seeds do not carry one.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..train.runs import Run, max_vio, read_run, smoothed
from .tables import text_table

TAIL = 100  # steps at the end over which MaxVio is taken
MEASURES = {  # key -> heading of the table
    "steps": "steps",
    "val_bits_per_byte": "val bits/byte",
    "val_smoothed": "smoothed",
    "main_loss": "main loss",
    "mtp_loss": "MTP loss",
    "max_vio": f"MaxVio {TAIL} steps",
    "max_vio_batch": "per batch",
    "tokens_per_second": "tokens/s",
}
JUDGED = {"val_bits_per_byte": "validation bits/byte", "main_loss": "main loss", "max_vio": f"MaxVio of {TAIL} steps"}


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed: a letter, what is special about it, members, seeds, measures."""

    name: str
    settings: str
    members: list[int]  # positions in the list of runs
    seeds: list[int]  # ascending, each once
    values: dict[str, list[float]]  # measure -> one value a seed (runs with equal seeds are averaged)

    def mean(self, measure: str) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.values[measure]))

    def spread(self, measure: str) -> float:
        """Worst minus best seed; NaN when there is only one."""
        return float(np.ptp(self.values[measure])) if len(self.seeds) > 1 else math.nan

    def deviation(self, measure: str) -> float:
        """Sample standard deviation over the seeds; NaN when there is only one."""
        return float(np.std(self.values[measure], ddof=1)) if len(self.seeds) > 1 else math.nan


@dataclass(frozen=True)
class Comparison:
    """All that is printed and written; lists are in the order of the runs."""

    runs: list[Run]
    names: list[str]
    measures: list[dict[str, float]]
    differences: dict[str, list[Any]]  # setting -> value of each run
    groups: list[Group]
    verdicts: list[str]

    @property
    def letters(self) -> list[str]:
        """Name of the group of each run."""
        return [next(group.name for group in self.groups if n in group.members) for n in range(len(self.runs))]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``compare``."""
    parser.add_argument("runs", nargs="+", metavar="DIR", help="run folders; seeds of one configuration form a group")
    parser.add_argument("--figure", metavar="FILE", help="overlay validation and loss (.png, .svg or .pdf)")
    parser.add_argument("--csv", metavar="FILE", help="write one row a run")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--smoothing", type=float, default=0.98, metavar="DECAY", help="of the moving averages, in [0, 1) (0.98)"
    )


def run(args: argparse.Namespace) -> int:
    """Print differences, measures and verdicts; write the figure and the table that were asked for."""
    if args.figure and args.csv and Path(args.figure).with_suffix(".csv") == Path(args.csv):
        raise ValueError(f"--csv {args.csv} is where --figure keeps its data: give one of them another name")
    comparison = compare(_read_runs(args.runs), args.smoothing)
    if args.csv:
        _write_csv(Path(args.csv), comparison)
    if args.figure:
        _write_figure(args.figure, comparison, args.smoothing)
    print(json.dumps(_as_json(comparison), indent=2) if args.json else _report(comparison))
    return 0


def compare(runs: list[Run], smoothing: float = 0.98) -> Comparison:
    """Measure the runs, group them by config, and judge the groups.

    Parameters
    ----------
    runs : list of Run
        Each with at least one step.
    smoothing : float
        Decay of the moving averages, in [0, 1).
    """
    measures = [measure(one, smoothing) for one in runs]
    groups = group_runs(runs, measures)
    return Comparison(runs, _names(runs), measures, differences(runs), groups, [*_notes(runs), *judge(groups)])


def measure(run: Run, smoothing: float) -> dict[str, float]:
    """The measures of one run (keys as in `MEASURES`); NaN where the run has no such value."""
    step, val = run.step, run.metrics["val_bits_per_byte"]
    evaluated = np.flatnonzero(~np.isnan(val))
    load = run.load[-TAIL:]
    experts = load.size > 0
    speeds = run.metrics["tokens_per_second"]
    return {
        "steps": int(step[-1]),
        "val_bits_per_byte": _last(val[evaluated]),
        "val_smoothed": _last(smoothed(val[evaluated], smoothing, step[evaluated])),
        "main_loss": _last(smoothed(run.metrics["main_loss"], smoothing)),
        "mtp_loss": _last(smoothed(run.metrics["mtp_loss"], smoothing)),
        "max_vio": float(max_vio(load.sum(axis=0)).mean()) if experts else math.nan,
        "max_vio_batch": float(max_vio(load).mean()) if experts else math.nan,
        "tokens_per_second": math.nan if np.isnan(speeds).all() else float(np.nanmedian(speeds)),
    }


def differences(runs: list[Run]) -> dict[str, list[Any]]:
    """Settings of model and training in which the runs are not all equal: name -> value of each run."""
    settings = [_settings(run) for run in runs]
    columns = {name: [one[name] for one in settings] for name in settings[0]}
    return {name: values for name, values in columns.items() if any(value != values[0] for value in values)}


def group_runs(runs: list[Run], measures: list[dict[str, float]]) -> list[Group]:
    """Runs that differ in nothing but `seed`, together; groups in the order in which they first appear."""
    settings = [_settings(run) for run in runs]  # how a preset is called decides no number
    keys = [{name: value for name, value in one.items() if name not in ("seed", "preset")} for one in settings]
    first = [keys.index(key) for key in keys]  # the run that founds the group
    differing = [name for name in differences(runs) if name != "seed"]
    groups = []
    for index, founder in enumerate(dict.fromkeys(first)):
        members = [n for n, one in enumerate(first) if one == founder]
        seeds = sorted({runs[n].train.seed for n in members})
        of_seed = [[n for n in members if runs[n].train.seed == seed] for seed in seeds]
        values = {key: [float(np.mean([measures[n][key] for n in same])) for same in of_seed] for key in MEASURES}
        special = [f"{name}={settings[founder][name]}" for name in differing]
        short = ", ".join([*special[:3], *(["..."] if len(special) > 3 else [])])
        groups.append(Group(_letter(index), short, members, seeds, values))
    return groups


def judge(groups: list[Group]) -> list[str]:
    """One sentence for each pair of groups and each judged measure that one of them has."""
    return [
        f"{a.name} and {b.name}, {words}: {_verdict(a, b, key)}"
        for a, b in itertools.combinations(groups, 2)
        for key, words in JUDGED.items()
        if not (math.isnan(a.mean(key)) and math.isnan(b.mean(key)))
    ]


def _verdict(a: Group, b: Group, key: str) -> str:
    missing = [group.name for group in (a, b) if not math.isfinite(group.mean(key))]
    if missing:
        return f"no verdict, {' and '.join(missing)} has no finite value"
    gap = a.mean(key) - b.mean(key)
    known = [spread for spread in (a.spread(key), b.spread(key)) if not math.isnan(spread)]
    single = " and ".join(group.name for group in (a, b) if len(group.seeds) == 1)
    if known and abs(gap) <= max(known):
        return f"no difference beyond the seed spread of {max(known):.3g}"
    lower = f"{a.name if gap < 0 else b.name} is lower by {abs(gap):.3g}" if gap else "equal"
    if single:
        return f"{lower}, but the seed spread of {single} is unknown: run more seeds before calling it a difference"
    return f"{lower}, beyond the seed spread of {max(known):.3g} ({len(a.seeds)} and {len(b.seeds)} seeds)"


def _notes(runs: list[Run]) -> list[str]:
    """What makes the numbers of the table not comparable."""
    notes = []
    if len({run.train.data for run in runs}) > 1:
        notes.append("the runs read different data: their losses and bits per byte are of different texts")
    if len({run.loss_unit for run in runs}) > 1:
        notes.append("the losses are per token of different vocabularies: compare the bits per byte only")
    if len({int(run.step[-1]) for run in runs}) > 1:
        notes.append("the runs have completed different numbers of steps: a longer run is lower for that reason alone")
    return [f"note: {note}" for note in notes]


def _read_runs(paths: list[str]) -> list[Run]:
    runs = [read_run(path) for path in paths]
    resolved = [run.path.resolve() for run in runs]
    for n, run in enumerate(runs):
        if resolved.index(resolved[n]) != n:
            raise ValueError(f"{run.path} is given twice: a run is no second seed of itself")
        if len(run.step) == 0:
            raise ValueError(f"{run.path} has no complete step yet: wait for the first, or leave it out")
    return runs


def _names(runs: list[Run]) -> list[str]:
    """Folder names where they tell the runs apart, else the paths as given."""
    short = [run.path.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.path) for run in runs]


def _settings(run: Run) -> dict[str, Any]:
    model = dataclasses.asdict(run.config)
    del model["extra"]  # keys of the released file that we do not use
    return {"preset": run.preset, **model, **dataclasses.asdict(run.train)}


def _letter(index: int) -> str:
    return chr(ord("A") + index % 26) + (str(index // 26) if index >= 26 else "")


def _last(values: np.ndarray) -> float:
    return float(values[-1]) if len(values) else math.nan


def _report(c: Comparison) -> str:
    parts = ["The configs are equal." if len(c.runs) > 1 else "One run, nothing to compare it with."]
    if c.differences:
        rows = [[name, *map(str, values)] for name, values in c.differences.items()]
        parts = ["Settings that differ\n" + text_table(["setting", *c.names], rows)]
    rows = [
        [name, letter, *(_cell(one[key]) for key in MEASURES)]
        for name, letter, one in zip(c.names, c.letters, c.measures)
    ]
    parts.append(text_table(["run", "group", *MEASURES.values()], rows))
    rows = [_group_row(group, key, words) for group in c.groups for key, words in JUDGED.items()]
    parts.append(text_table(["group", "seeds", "measure", "mean", "max - min", "standard deviation"], rows))
    legend = [f"{group.name}: {group.settings}" for group in c.groups if group.settings]
    return "\n\n".join(part for part in (*parts, "\n".join(legend), "\n".join(c.verdicts)) if part)


def _group_row(group: Group, key: str, words: str) -> list[str]:
    spread = [_cell(group.spread(key)), _cell(group.deviation(key))] if len(group.seeds) > 1 else ["unknown"] * 2
    return [group.name, str(len(group.seeds)), words, _cell(group.mean(key)), *spread]


def _cell(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if value >= 100 or isinstance(value, int) else f"{value:.4f}"


def _as_json(c: Comparison) -> dict[str, Any]:
    runs = [
        {"run": name, "path": str(run.path), "group": letter, "seed": run.train.seed, **_nulls(one)}
        for name, run, letter, one in zip(c.names, c.runs, c.letters, c.measures)
    ]
    groups = [
        {
            "group": group.name,
            "settings": group.settings,
            "seeds": group.seeds,
            "mean": _nulls({key: group.mean(key) for key in JUDGED}),
            "spread": _nulls({key: group.spread(key) for key in JUDGED}),
            "standard_deviation": _nulls({key: group.deviation(key) for key in JUDGED}),
        }
        for group in c.groups
    ]
    return {"differences": c.differences, "runs": runs, "groups": groups, "verdicts": c.verdicts}


def _nulls(values: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN and no infinity."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def _write_csv(path: Path, c: Comparison) -> None:
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(["run", "group", "seed", *MEASURES])
    for name, letter, run, one in zip(c.names, c.letters, c.runs, c.measures):
        writer.writerow([name, letter, run.train.seed, *(one[key] for key in MEASURES)])
    path.write_text(content.getvalue(), encoding="utf-8", newline="\n")


def _write_figure(path: str, c: Comparison, smoothing: float) -> None:
    """Validation, smoothed main loss and MaxVio of all runs; against tokens where a step differs between them."""
    from .. import plots  # matplotlib takes a second to import, and only the figure needs it
    from ..train.figures import overlay

    by_tokens = len({run.train.batch_size * run.train.seq_len for run in c.runs}) > 1
    key, label = ("tokens", "training tokens") if by_tokens else ("step", "training step")
    legend = {group.name: f"{group.name}: {group.settings}".rstrip(": ") for group in c.groups}
    validation, losses, balance, data = [], [], [], {}
    for name, letter, run in zip(c.names, c.letters, c.runs):
        x, val = run.metrics[key], run.metrics["val_bits_per_byte"]
        done, loss = ~np.isnan(val), smoothed(run.metrics["main_loss"], smoothing)
        validation.append((letter, x[done], val[done]))
        losses.append((letter, x, loss))
        balance.append((letter, x, smoothed(run.metrics["max_vio"], smoothing)))
        columns = {f"validation {key}": x[done], "val_bits_per_byte": val[done], key: x, "main_loss_smoothed": loss}
        columns["max_vio_smoothed"] = balance[-1][2]
        data.update({f"{name} {column}": values for column, values in columns.items()})
    panels = [
        (losses, "smoothed main loss", c.runs[0].loss_unit, False),
        (balance, "smoothed MaxVio", "per batch", False),
    ]
    if any(len(x) > 1 for _, x, _ in validation):  # a single value is in the table
        panels.insert(0, (validation, "validation", "bits per byte", True))
    with plots.style():
        figure, axes = plots.new_figure(1, len(panels), panel=(6.0, 4.2))
        for ax, (curves, quantity, unit, points) in zip(axes, panels):
            overlay(ax, curves, quantity=quantity, unit=unit, x_label=label, points=points, legend=legend)
        plots.save(figure, path, data=data, text=plots.description(*axes))
