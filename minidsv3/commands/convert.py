"""``convert``: a released-format directory into another dtype, on a CPU, one tensor at a time."""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from ..pretrained.convert import convert
from ..pretrained.writer import STORED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``convert``."""
    parser.add_argument("source", metavar="IN", help="directory with config.json and *.safetensors")
    parser.add_argument("target", metavar="OUT", help="directory to make")
    parser.add_argument("--to", required=True, choices=STORED, help="dtype of the weights")
    parser.add_argument("--max-shard-bytes", type=int, default=5_000_000_000)


def run(args: argparse.Namespace) -> int:
    """Convert with a progress bar."""
    with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        convert(args.source, args.target, args.to, max_shard_bytes=args.max_shard_bytes, report=report)
    print(f"{args.target} holds the model in {args.to}")
    return 0
