"""``simulate pipeline``: a schedule timed, or all four beside each other: makespan, idle, live chunks, formula."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..parallel.schedules import SCHEDULES, Schedule, bubble, build, validate
from ..parallel.timeline import Timeline, timeline
from .tables import text_table

SIMPLIFIED = (
    "durations are the same on every rank (simulate step has uneven stages), a message takes --hop and no bandwidth"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``simulate pipeline``."""
    parser.add_argument("--schedule", choices=SCHEDULES, help="one of them (default: all that the sizes allow)")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument(
        "--chunks", type=int, default=20, help="micro-batches; for dualpipe both directions together (20)"
    )
    for name, value, text in (
        ("F", 1.0, "forward"),
        ("B", 2.0, "full backward"),
        ("Bi", 1.0, "backward for the input"),
        ("W", 1.0, "weight part"),
        ("FB", 3.0, "overlapped pair"),
    ):
        parser.add_argument(f"--{name}", type=float, default=value, metavar="T", help=f"{text} ({value:g})")
    parser.add_argument("--hop", type=float, default=0.0, metavar="T", help="a message between two ranks (0)")
    parser.add_argument("--instructions", action="store_true", help="also the instructions of every rank")
    parser.add_argument("--trace", metavar="FILE", help="Chrome trace; one unit of time is a millisecond")
    parser.add_argument("--figure", metavar="FILE", help="Gantt figure (.png, .svg, .pdf)")
    parser.add_argument("--bubbles", metavar="FILE", help="figure of the idle time against the number of ranks")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Build, validate, time, print."""
    found: dict[str, tuple[Schedule, Timeline]] = {}
    durations = {kind: getattr(args, kind) for kind in ("F", "B", "Bi", "W", "FB")}
    refused = {}
    for name in [args.schedule] if args.schedule else SCHEDULES:
        try:
            plan = build(name, args.ranks, args.chunks)
        except ValueError as error:
            if args.schedule:
                raise
            refused[name] = str(error)
            continue
        validate(plan)
        found[name] = plan, timeline(plan, durations, hop=args.hop)
    rows = [_row(name, plan, times, durations) for name, (plan, times) in found.items()]
    if args.trace:
        from ..hardware.trace import spans_of_schedule, write_trace

        spans = []
        for name, (_, times) in found.items():
            spans += [
                s._replace(start=s.start / 1e3, seconds=s.seconds / 1e3, process=f"{name}, {s.process}")
                for s in spans_of_schedule(times)
            ]
        write_trace(args.trace, spans)
    if args.figure:
        _write_figure(args.figure, {name: plan for name, (plan, _) in found.items()}, durations, args.hop)
    if args.bubbles:
        _write_bubbles(args.bubbles, args.chunks, durations)
    if args.json:
        for row, (plan, times) in zip(rows, found.values()):
            if args.instructions:
                row |= {"instructions": plan, "start": times.start, "end": times.end}
        print(json.dumps({"schedules": rows, "refused": refused, "simplified": [SIMPLIFIED]}, indent=1))
        return 0
    header = ["schedule", "makespan", "idle, least", "idle, most", "formula", "live chunks", "stages a rank"]
    print(
        text_table(
            header,
            [
                [
                    r["schedule"],
                    f"{r['makespan']:g}",
                    f"{min(r['idle']):g}",
                    f"{max(r['idle']):g}",
                    f"{r['formula_bubble']:g}",
                    str(max(r["peak_live"])),
                    str(r["stages_per_rank"]),
                ]
                for r in rows
            ],
        )
    )
    for name, reason in refused.items():
        print(f"{name}: not at this size: {reason}")
    if args.instructions:
        for name, (plan, _) in found.items():
            for rank, row in enumerate(plan):
                print(f"{name} rank {rank}: " + " ".join(op[0] + ".".join(map(str, op[1:])) for op in row))
    print(
        "\nThe formula is the papers' (Table 2); where it is exact stands in parallel.schedules.bubble.\n"
        f"Simplified: {SIMPLIFIED}."
    )
    return 0


def _row(name: str, plan: Schedule, times: Timeline, d: dict[str, float]) -> dict[str, Any]:
    return {
        "schedule": name,
        "ranks": plan.ranks,
        "chunks": plan.chunks,
        "makespan": times.makespan,
        "idle": times.idle,
        "busy": times.busy,
        "peak_live": times.peak_live,
        "stages_per_rank": len(plan.directions),
        "formula_bubble": bubble(name, plan.ranks, d["F"], d["B"], d["W"], d["FB"]),
    }


def _same_model(plan: Schedule, durations: dict[str, float]) -> dict[str, float]:
    """Durations of `plan` for the model that the others cut into a stage a rank: DualPipeV's stages are half of it."""
    return {kind: t * plan.ranks / plan.stages for kind, t in durations.items()}


def _write_figure(path: str, found: dict[str, Schedule], durations: dict[str, float], hop: float) -> None:
    from .. import plots
    from ..hardware.figures import gantt

    with plots.style():
        figure, axes = plots.new_figure(len(found), 1, panel=(9.0, 2.6))
        data: dict[str, Any] = {}
        for ax, (name, plan) in zip(axes, found.items()):
            times = timeline(plan, _same_model(plan, durations), hop=hop)
            gantt(ax, times, name + (" (stages half as long)" if plan.stages > plan.ranks else ""), ax is axes[-1])
            flat = [
                (r, op[0], s, e)
                for r, row in enumerate(times.schedule)
                for op, s, e in zip(row, times.start[r], times.end[r])
            ]
            data |= dict(zip((f"{name} rank", f"{name} kind", f"{name} start", f"{name} end"), map(list, zip(*flat))))
    plots.save(figure, Path(path), data=data, text=plots.description(*axes))


def _write_bubbles(path: str, chunks: int, durations: dict[str, float]) -> None:
    from .. import plots
    from ..hardware.figures import bubble_against_ranks

    ranks = [n for n in range(2, 17, 2) if 2 * n <= chunks]
    if len(ranks) < 2 or chunks % 2:
        raise ValueError(f"--chunks {chunks}: the figure needs an even number, at least 8 (dualpipe: twice the ranks)")
    idle: dict[str, list[float]] = {}
    for name in SCHEDULES:
        plans = [build(name, n, chunks) for n in ranks]
        idle[name] = [max(timeline(plan, _same_model(plan, durations)).idle) for plan in plans]
    with plots.style():
        figure, (ax,) = plots.new_figure(panel=(6.6, 4.0))
        bubble_against_ranks(ax, ranks, idle, "forward chunks")
    plots.save(figure, Path(path), data={"ranks": ranks, **idle}, text=plots.description(ax))
