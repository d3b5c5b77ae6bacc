"""Compare the emulated tensor cores with outputs of real GPUs.

    python tests/hardware/check_real_outputs.py hopper_fp8_realhw.npz [--hypotheses]

The file holds 5,000 dot products a case: ``<case>.a``, ``.b`` [5000, L] and ``.c``, ``.d`` [5000] as bits. It is made
from the published measurements of Khattak and Mikaitis (north-numerical-computing/MATLAB-tensor-core,
model_validation/, BSD 2-Clause), which are another project's data and therefore not in this repository. `--hypotheses`
counts what other rules would get wrong. The exit status is 1 if a bit differs.
"""

import argparse
import dataclasses
import sys

import numpy as np

from minidsv3.quant.formats import BF16, E4M3, E5M2
from minidsv3.quant.tensorcore import UNITS, Unit, tensorcore_matmul

CASES = {  # case -> (unit, dtype of a and b)
    "h100_h200_wgmma_e4m3_k32_c0": ("hopper-fp8", E4M3),
    "h100_wgmma_e5m2_k32_c0": ("hopper-fp8", E5M2),
    "h100_bf16_k16": ("hopper-bf16", BF16),
    "ada_mma_e4m3_k32": ("ada-fp8", E4M3),
}
GROUP = 50  # rows that are multiplied together; only the diagonal is wanted


def mismatches(data, case: str, unit: Unit, dtype: np.dtype) -> int:
    """Rows of `case` whose bits differ under the rules of `unit`."""
    a, b, d = data[f"{case}.a"].view(dtype), data[f"{case}.b"].view(dtype), data[f"{case}.d"]
    c = data[f"{case}.c"].view(np.float32) if f"{case}.c" in data else None
    wrong = 0
    for i in range(0, len(a), GROUP):
        rows = slice(i, i + GROUP)
        square = None if c is None else np.repeat(c[rows, None], len(c[rows]), axis=1)
        got = np.diagonal(tensorcore_matmul(a[rows], b[rows], square, unit=unit)).copy()
        wrong += int(np.count_nonzero(got.view(np.uint32) != d[rows]))
    return wrong


def hypotheses(unit: Unit) -> dict[str, Unit]:
    """Other rules than the table's, one change each."""
    F = unit.fraction_bits
    changes = {
        "floor instead of truncation": {"align": "floor"},
        "nearest even at the alignment": {"align": "nearest"},
        f"{F - 1} fraction bits": {"fraction_bits": F - 1},
        f"{F + 1} fraction bits": {"fraction_bits": F + 1},
        f"steps of {unit.step // 2}": {"step": unit.step // 2},
        f"steps of {unit.step * 2}": {"step": unit.step * 2},
    }
    return {name: dataclasses.replace(unit, **change) for name, change in changes.items()}


def main() -> int:
    """Print a line a case; 1 if anything differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--hypotheses", action="store_true")
    args = parser.parse_args()
    failed = False
    with np.load(args.file) as data:
        for case, (name, dtype) in CASES.items():
            rows, wrong = len(data[f"{case}.d"]), mismatches(data, case, UNITS[name], dtype)
            failed |= wrong > 0
            print(f"{case:30} {name:12} {wrong:5} of {rows} differ")
            for what, unit in hypotheses(UNITS[name]).items() if args.hypotheses else ():
                print(f"{'':6}{what:37} {mismatches(data, case, unit, dtype):5}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
