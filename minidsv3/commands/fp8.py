"""``fp8``: look at a number in a low-precision format, check a kernel's bits, run the experiments behind the figures.

python -m minidsv3 fp8 explain 0.3 --format e4m3
python -m minidsv3 fp8 check DUMP.safetensors     tensors a, b (FP8), d (output), and a_scale, b_scale or c
python -m minidsv3 fp8 recipe fp8                 which row of the model uses which arithmetic
python -m minidsv3 fp8 experiment accumulation --out DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ..config import PRECISIONS
from ..pretrained.reader import read_tensors
from ..quant.formats import FORMATS, explain
from ..quant.kernelcheck import Dump, Score, published, verdict
from ..quant.recipe import RECIPES, recipe_for
from .fp8_experiments import EXPERIMENTS, VARIANTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``fp8`` and its actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    explained = actions.add_parser("explain", help="bits, value and neighbours of a number")
    explained.add_argument("number", type=float)
    explained.add_argument("--format", default="e4m3", choices=FORMATS)
    checked = actions.add_parser("check", help="bits of a kernel's output against the emulated tensor core")
    checked.add_argument("dump", metavar="DUMP.safetensors")
    shown = actions.add_parser("recipe", help="the table of a precision recipe")
    shown.add_argument("name", help=f"{', '.join(PRECISIONS)}, or one with changed rows: fp8:lm_head=fp8")
    tried = actions.add_parser("experiment", help="one of the experiments, with its figure")
    tried.add_argument("name", choices=EXPERIMENTS)
    tried.add_argument("--out", required=True, metavar="DIR")
    tried.add_argument("--steps", type=int, help="of training experiments")
    tried.add_argument("--variants", nargs="+", default=VARIANTS, metavar="NAME", help="of `twins`, against bf16")
    tried.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    tried.add_argument("--lr", type=float, metavar="RATE", help="of `twins` (1e-3)")
    tried.add_argument(
        "--batch", type=int, nargs=2, metavar=("B", "S"), help="of `twins`: sequences a step and their length (4 64)"
    )


def run(args: argparse.Namespace) -> int:
    """Do the action; `check` returns 1 if a bit differs from the published rules."""
    if args.action == "explain":
        print(explain(args.number, args.format))
    elif args.action == "check":
        return check(Path(args.dump))
    elif args.action == "recipe":
        recipe = recipe_for(args.name)
        rows = recipe.rows if recipe else RECIPES["fp32"]
        print("\n".join(f"{row:20} {arithmetic}" for row, arithmetic in rows.items()))
    else:
        EXPERIMENTS[args.name](Path(args.out), args)
    return 0


def check(path: Path) -> int:
    """Print what differs, and the hypothesis that explains the bits best."""
    dump = read_dump(path)
    whole = published(dump)
    print(f"{whole.mismatches:,} of {whole.of:,} outputs differ from: {whole.hypothesis}")
    if not whole.mismatches:
        return 0
    print(f"first: {_first(whole)}")
    scores = verdict(dump)
    print(f"hypotheses on {scores[0].of:,} outputs, the best first:")
    for score in scores[:6]:
        print(f"  {score.mismatches:>9,} differ   {score.hypothesis}")
    best = scores[0]
    print(
        f"explained by: {best.hypothesis}"
        if not best.mismatches
        else f"best, not exact: {best.hypothesis}; {_first(best)}"
    )
    return 1


def _first(score: Score) -> str:
    return f"output {score.first} has bits {score.got:#x}, expected {score.expected:#x}"


def read_dump(path: Path) -> Dump:
    """The tensors of a dump.

    Raises ValueError for a missing or a strange tensor.
    """
    tensors = dict(read_tensors(path))
    missing, strange = {"a", "b", "d"} - set(tensors), set(tensors) - set(Dump._fields)
    if missing or strange:
        what = f"lacks {', '.join(sorted(missing))}" if missing else f"has unknown tensors {', '.join(sorted(strange))}"
        raise ValueError(f"{path} {what}: a dump has a, b, d and may have a_scale, b_scale, c")
    if any(tensors[name].ndim != 2 for name in tensors):
        raise ValueError(f"{path}: every tensor of a dump is a matrix")
    return Dump(**{name: np.array(array) for name, array in tensors.items()})
