"""``simulate calibrate FILE``: fit the three communication constants to a table of DeepEP measurements.

The file is JSON, like data/published/deepep_kernels.json:

    {"measurements": [{"kernel": "normal", "operation": "dispatch", "ranks": 32, "value": "58 GB/s"},
                      {"kernel": "low-latency", "operation": "combine", "ranks": 64, "value": "314 us"}]}

Normal kernels give logical GB/s (4,096 tokens a rank, top-8 of 256 experts), low-latency ones the time of 128 tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from ..config import data_file
from ..hardware.messages import Links, fit, read_measurements
from ..hardware.specs import quantity
from .tables import text_table

SIMPLIFIED = (
    "one rate a link class whatever the size of a message, one latency, no congestion; top-8 of 256 experts, 7168 wide"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``simulate calibrate``."""
    parser.add_argument("file", metavar="FILE", nargs="?", help="measurements (default: DeepEP's published ones)")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Fit, print the constants and every residual."""
    path = Path(args.file) if args.file else data_file("published/deepep_kernels.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("measurements"), list):
        raise ValueError(f"{path} has no list 'measurements'")
    measured = read_measurements(content["measurements"], quantity)
    links = fit(measured, Links())
    residuals = np.array([m.predicted(links) / m.value - 1 for m in measured])
    constants = {
        "infiniband_bytes_per_second": links.infiniband_bytes_per_second,
        "nvlink_bytes_per_second": links.nvlink_bytes_per_second,
        "low_latency_seconds": links.low_latency_seconds,
    }
    if args.json:
        rows = [
            {**m._asdict(), "predicted": m.predicted(links), "residual": float(r)} for m, r in zip(measured, residuals)
        ]
        print(json.dumps({"constants": constants, "measurements": rows, "simplified": [SIMPLIFIED]}, indent=1))
        return 0
    rates = links.infiniband_bytes_per_second / 1e9, links.nvlink_bytes_per_second / 1e9
    microseconds = 1e6 * links.low_latency_seconds
    print(f"InfiniBand {rates[0]:.2f} GB/s, NVLink {rates[1]:.1f} GB/s, latency {microseconds:.1f} us\n")
    rows_ = []
    for m, r in zip(measured, residuals):
        scale, unit = (1e-6, "us") if m.kernel == "low-latency" else (1e9, "GB/s")
        rows_.append(
            [
                f"{m.kernel} EP {m.ranks} {m.operation}",
                f"{m.value / scale:.1f}",
                f"{m.predicted(links) / scale:.1f}",
                unit,
                f"{100 * r:+.1f} %",
            ]
        )
    print(text_table(["measurement", "measured", "predicted", "unit", "residual"], rows_))
    print(
        f"\nlargest residual {100 * np.abs(residuals).max():.1f} %, median {100 * np.median(np.abs(residuals)):.1f} %"
    )
    print(f"Simplified: {SIMPLIFIED}.")
    return 0
