"""``simulate``: the system without the machines. One file a simulation, ``simulate_NAME.py``; this is their door."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

# name -> one line for --help; the module simulate_NAME has add_arguments(parser) and run(args)
SIMULATIONS = {
    "step": "time of a training step and its parts, beside Table 4, with what-if flags",
    "pipeline": "the four schedules: bubbles, live activations, a Gantt figure",
    "network": "networks by cost and latency; hashing and failures",
    "inference": "the limit of expert parallelism; prefill and decode of one GPU",
    "calibrate": "fit the three communication constants to a table of DeepEP measurements",
    "dispatch": "bytes, nodes and ranks of expert-parallel dispatch; the node limit; load before and after EPLB",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of every simulation."""
    subparsers = parser.add_subparsers(dest="simulation", required=True, metavar="SIMULATION")
    for name, summary in SIMULATIONS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        _module(name).add_arguments(subparser)


def run(args: argparse.Namespace) -> int:
    """Run the one that was asked for."""
    return _module(args.simulation).run(args)


def _module(name: str) -> Any:
    return importlib.import_module(f".simulate_{name}", __package__)
