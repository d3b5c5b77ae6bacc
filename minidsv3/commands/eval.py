"""``eval``: bits per byte of run folders' models on the validation part of their corpus, or of another."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..autograd import Array
from ..data import ByteTokenizer, load_corpus, split_documents, validation_windows
from ..generation.load import LoadedRun, load_run
from ..ops.loss import IGNORED
from ..quant.recipe import recipe_for
from ..train.evaluate import bits_by_position, bits_per_byte
from ..train.machine import worker_pool, workers_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``eval``."""
    parser.add_argument("run", metavar="DIR", nargs="+", help="run folders, finished or not")
    parser.add_argument("--data", help="another corpus; its validation part is used")
    parser.add_argument("--seq-len", type=int, help="length of the windows (default: that of the training)")
    parser.add_argument("--windows", type=int, metavar="N", help="only N windows, evenly spaced (default: all)")
    parser.add_argument("--json", action="store_true", help="an object, or a list of them for several folders")
    parser.add_argument(
        "--figure", metavar="FILE", help="also draw bits against the position in the window (.png, .svg or .pdf)"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    for name in ("seq_len", "windows"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} is not positive")
    results, curves = [], {}
    for folder in args.run:
        loaded = load_run(Path(folder), lambda train: recipe_for(train.precision, train.accumulate))
        result, windows, batch_size = _evaluate(loaded, args.data, args.seq_len, args.windows)
        results.append(result)
        if args.figure:
            with worker_pool(workers_for(None, len(windows[0]))) as run_map:
                curves[folder] = bits_by_position(loaded.model, *windows[:2], batch_size=batch_size, run=run_map)
        if not args.json:
            where = f"{result['bytes']:,} bytes of {result['data']}, windows of {result['seq_len']}"
            print(f"{folder} after step {loaded.step}: {result['val_bits_per_byte']:.4f} bits per byte on {where}")
    if args.json:
        print(json.dumps(results if len(results) > 1 else results[0]))
    if args.figure:
        _draw(args.figure, curves)
    return 0


def _evaluate(
    loaded: LoadedRun, data: str | None, seq_len: int | None, count: int | None
) -> tuple[dict[str, Any], Any, int]:
    """What is printed of one run, the windows that it was evaluated on, and how many of them at once."""
    data, seq_len = data or loaded.train.data, seq_len or loaded.train.seq_len
    _, validation = split_documents(load_corpus(data).documents)
    windows = validation_windows(validation, ByteTokenizer(), seq_len)
    if count is not None and count < len(windows[0]):
        chosen = np.linspace(0, len(windows[0]) - 1, count, dtype=np.int64)
        targets = windows[1][chosen]
        windows = windows[0][chosen], targets, int(np.count_nonzero(targets != IGNORED))  # a token is a byte
    batch_size = max(1, loaded.train.batch_size * loaded.train.seq_len // seq_len)
    with worker_pool(workers_for(None, len(windows[0]))) as run_map:
        bits = bits_per_byte(loaded.model, *windows, batch_size=batch_size, run=run_map)
    result = {"data": data, "seq_len": seq_len, "step": loaded.step, "bytes": windows[2], "val_bits_per_byte": bits}
    return result, windows, batch_size


def _draw(path: str, curves: dict[str, Array]) -> None:
    """The figure of bits against position, its data and its text."""
    from .. import plots  # matplotlib takes a second to import, and only the figure needs it
    from ..generation.figures import bits_against_position

    with plots.style():
        figure, (ax,) = plots.new_figure()
        bits_against_position(ax, curves)
    S = max(map(len, curves.values()))
    data = {"position": np.arange(1, S + 1, dtype=np.int64), **curves}
    plots.save(figure, path, data=data, text=plots.description(ax))
