"""``train``: a model into a run folder, or further into it with ``--resume``."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from typing import Any

from ..config import PRECISIONS, PRESETS, ModelConfig, TrainConfig, replace_settings
from ..ops.plain import using_plain_ops
from ..quant.recipe import recipe_for
from ..train.figures import run_figures
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
    parser.add_argument(
        "--precision", metavar="NAME", help=f"{', '.join(PRECISIONS)}; rows change as in fp8:lm_head=fp8,moments=fp32"
    )
    parser.add_argument("--accumulate", choices=("fast", "exact"), help="FP8 sums: BLAS, or the emulated tensor core")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in DIR")
    parser.add_argument("--plain", action="store_true", help="run the textbook form of every op (slow)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--set", dest="settings", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="any field of ModelConfig or TrainConfig; values as in JSON",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Train; 0 when done, 130 after Ctrl-C."""
    settings = parse_settings(args.settings)
    flags = ("data", "steps", "seed", "workers", "init_from", "precision", "accumulate")
    settings |= {k: v for k in flags if (v := getattr(args, k)) is not None}
    recipe = recipe_for(str(settings.get("precision", "fp32")), str(settings.get("accumulate", "fast")))
    if recipe:
        settings = {"moments_dtype": recipe.moments_dtype} | settings
        if args.plain:
            raise ValueError(f"--plain has the textbook ops, which know no precision={recipe.name!r}: leave one out")
    model, train = replace_settings(ModelConfig.preset(args.preset), TrainConfig.preset(args.preset), settings)
    trainer = Trainer(
        model, train, args.out, recipe=recipe, preset=args.preset, resume=args.resume,
        progress=not args.quiet and sys.stderr.isatty(), on_evaluation=_say,
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


def _say(trainer: Trainer, step: int, bits: float) -> None:
    trainer.message(f"step {step:>6}: validation {bits:.3f} bits per byte")
