"""One file a subcommand: each has ``add_arguments(parser)`` and ``run(args) -> exit status``.

Here, and only here, a run is put together from its parts: communicators, dispatchers and recipes are built and
handed in, figures and traces are written. A command's module is imported only when it is asked for, so that
``--help`` and the small commands start at once.
"""

import argparse
import importlib
import os
import sys

# name -> one line for --help; the module of the same name holds the rest
COMMANDS = {
    "demo": "first figure in seconds, then train `tiny` on Shakespeare and write some",
    "train": "train a model into a run folder",
    "eval": "bits per byte of a run folder on its validation text",
    "generate": "continue a prompt with a trained model",
    "compare": "several run folders beside each other, with the seed spread",
    "convert": "a released-format directory into bf16, fp8 or fp32",
    "report": "the bill of a model: parameters, FLOPs, memory, cache, GPUs, one machine",
    "paper": "every published number that can be computed, beside ours",
    "simulate": "time, schedules and network of the real system, without it",
    "fp8": "a number's bits, a kernel's bits, precision recipes and their experiments",
    "data": "list and build the text corpora",
    "exercises": "list, check and build the exercises; train with your solutions",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 user error, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="minidsv3", description="DeepSeek-V3 on one machine, in NumPy.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in argv if word in COMMANDS), None)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == chosen:
            importlib.import_module(f".{name}", __package__).add_arguments(subparser)
    args = parser.parse_args(argv)
    try:
        return importlib.import_module(f".{args.command}", __package__).run(args)
    except BrokenPipeError:  # the reader of our output has gone: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at its end
        return 0
    except (ValueError, OSError) as error:  # the user's to mend: one line, no traceback
        print(f"minidsv3 {args.command}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nminidsv3: interrupted", file=sys.stderr)
        return 130


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
