"""``train``: a model into a run folder, or further into it with ``--resume``."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..config import PRESETS, ModelConfig, TrainConfig, replace_settings
from ..hardware.trace import Span, write_trace
from ..ops.plain import using_plain_ops
from ..plots import description, new_figure, save, style
from ..train.figures import run_figures
from ..train.machine import sgemm_gflops, workers_for
from ..train.profile import Profile
from ..train.profile_figures import time_per_op
from ..train.runs import read_run
from ..train.trainer import Trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``train``."""
    parser.add_argument("--preset", default="tiny", choices=PRESETS, help="model and training settings to start from")
    parser.add_argument("--out", required=True, metavar="DIR", help="the run folder")
    parser.add_argument("--data", help="corpus (see `data list`), several joined by +, or a UTF-8 file")
    parser.add_argument("--steps", type=int, help="total number of steps, also with --resume")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--workers", type=int, help="threads; never changes the result (default: cores, shards)")
    parser.add_argument("--init-from", metavar="DIR", help="start with the weights of a run or a model directory")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in DIR")
    parser.add_argument("--plain", action="store_true", help="run the textbook form of every op (slow)")
    parser.add_argument("--profile", action="store_true", help="time every op of ten steps; table, figure and trace")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--set", dest="settings", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="any field of ModelConfig or TrainConfig; values as in JSON",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Train; 0 when done, 130 after Ctrl-C."""
    settings = parse_settings(args.settings)
    settings |= {k: v for k in ("data", "steps", "seed", "workers", "init_from") if (v := getattr(args, k)) is not None}
    model, train = replace_settings(ModelConfig.preset(args.preset), TrainConfig.preset(args.preset), settings)
    trainer = Trainer(
        model, train, args.out, preset=args.preset, resume=args.resume,
        progress=not args.quiet and sys.stderr.isatty(), on_evaluation=_say,
        on_step=profile_into(Path(args.out), train) if args.profile else None,
    )  # fmt: skip
    with using_plain_ops() if args.plain else nullcontext():
        done = trainer.run()
    if not done:
        return 130
    run_figures(read_run(args.out))
    print(f"done: {args.out}/final holds the model; try: python -m minidsv3 generate {args.out} --prompt 'ROMEO:'")
    return 0


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """``key=value`` strings as a dict; a value is JSON, or else a string."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair!r} is not KEY=VALUE")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


def profile_into(out: Path, train: TrainConfig) -> Profile:
    """A profile of ten steps that prints its table and leaves ``figures/profile.png`` and ``trace.json`` in `out`."""
    workers = workers_for(train.workers, train.shards)
    peak = sgemm_gflops(workers)

    def report(profile: Profile) -> None:
        print(profile.table())
        figure, (ax,) = new_figure(panel=(8.0, 5.2))
        with style():
            time_per_op(ax, profile.rows(), peak / workers, profile.share_of_peak)
        rows = profile.rows()
        data = {name: [getattr(row, name) for row in rows] for name in rows[0]._fields}
        save(figure, out / "figures" / "profile.png", data=data, text=description(ax))
        spans = (
            Span(s.name, s.start, s.seconds, "training", f"worker {s.thread}", s.phase, {"module": s.scope})
            for s in profile.samples
        )
        write_trace(out / "trace.json", spans)
        print(f"{out / 'figures' / 'profile.png'}; {out / 'trace.json'} opens in Perfetto (ui.perfetto.dev)")

    return Profile(workers, peak, report)


def _say(trainer: Trainer, step: int, bits: float) -> None:
    trainer.message(f"step {step:>6}: validation {bits:.3f} bits per byte")
