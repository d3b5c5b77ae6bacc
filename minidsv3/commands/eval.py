"""``eval``: bits per byte of a run folder's model on the validation part of its corpus, or of another."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..data import ByteTokenizer, load_corpus, split_documents, validation_windows
from ..generation.load import load_run
from ..quant.recipe import recipe_for
from ..train.evaluate import bits_per_byte
from ..train.machine import worker_pool, workers_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``eval``."""
    parser.add_argument("run", metavar="DIR", help="a run folder, finished or not")
    parser.add_argument("--data", help="another corpus; its validation part is used")
    parser.add_argument("--seq-len", type=int, help="length of the windows (default: that of the training)")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    loaded = load_run(Path(args.run), lambda train: recipe_for(train.precision, train.accumulate))
    data, seq_len = args.data or loaded.train.data, args.seq_len or loaded.train.seq_len
    _, validation = split_documents(load_corpus(data).documents)
    windows = validation_windows(validation, ByteTokenizer(), seq_len)
    batch_size = max(1, loaded.train.batch_size * loaded.train.seq_len // seq_len)
    with worker_pool(workers_for(None, len(windows[0]))) as run_map:
        bits = bits_per_byte(loaded.model, *windows, batch_size=batch_size, run=run_map)
    if args.json:
        print(
            json.dumps(
                {"data": data, "seq_len": seq_len, "step": loaded.step, "bytes": windows[2], "val_bits_per_byte": bits}
            )
        )
    else:
        where = f"{windows[2]:,} bytes of {data}, windows of {seq_len}"
        print(f"{args.run} after step {loaded.step}: {bits:.4f} bits per byte on {where}")
    return 0
