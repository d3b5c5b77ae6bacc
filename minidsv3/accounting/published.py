"""What the papers print: ``data/published/*.json``, one file a paper, and nothing of it anywhere in the code.

    {"paper": ..., "tables": {NAME: {"title": ..., "inputs": {...}, "rows": [
        {"row": ..., "published": 43.73, "unit": "%", ...}]}}}

`inputs` are numbers that a table takes as given (a step time, a port count). A row may carry

    tolerance   how far ours may be away, where it can't be exact, in the row's unit
    quantum     what the printed digits resolve, where it is not their last place ("about 1200": 100)
    rounding    'truncated', where the paper cut digits off
    misprint    why the printed value does not follow from its inputs
    stated      true: nothing computes this, it is listed as stated
    needs       a module of the package that is to compute it and is not there yet
    note        anything else that a reader should know

Printed digits are kept: 272.80 resolves hundredths, so decimals are read as `Decimal`.
"""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any, NamedTuple

from ..config import data_file

FILES = ("insights", "report", "checkpoints", "v2", "balancing", "deepep", "clock", "calculators")


class Table(NamedTuple):
    """One published table."""

    paper: str
    title: str
    inputs: dict[str, Any]
    rows: list[dict[str, Any]]


def published_tables() -> dict[str, Table]:
    """All tables by name, in the order of `FILES`."""
    found = {}
    for name in FILES:
        text = data_file(f"published/{name}.json").read_text(encoding="utf-8")
        content, plain = json.loads(text, parse_float=Decimal), json.loads(text)
        for table, entry in content["tables"].items():
            inputs = plain["tables"][table].get("inputs", {})  # to compute with: floats
            found[table] = Table(content["paper"], entry["title"], inputs, entry["rows"])
    return found


def quantum_of(entry: dict[str, Any]) -> float:
    """What the printed digits of a row resolve."""
    if "quantum" in entry:
        return float(entry["quantum"])
    value = entry["published"]
    return float(Decimal(1).scaleb(int(value.as_tuple().exponent))) if isinstance(value, Decimal) else 1.0
