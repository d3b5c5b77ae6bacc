"""``paper``: every published number that can be computed, beside ours, with a verdict and the function behind it."""

from __future__ import annotations

import argparse
import json
from itertools import groupby

from ..accounting.paper import DOES_NOT_FOLLOW, EXACT, STATED, Inputs, PaperRow, evaluate, summary
from ..accounting.published import published_tables
from .tables import text_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``paper``."""
    parser.add_argument(
        "tables", nargs="*", metavar="TABLE", help="a table or the beginning of its name (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="only the tables' names and titles")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="INPUT=VALUE", dest="changes",
        help="change inputs: deepseek-v3.kv_lora_rank=256, insights-4.step_seconds_mpft=20.5",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Compute and print."""
    known = published_tables()
    chosen = [name for name in known if not args.tables or any(name.startswith(word) for word in args.tables)]
    for word in args.tables:
        if not any(name.startswith(word) for name in known):
            raise ValueError(f"table {word!r} is not the beginning of one of {', '.join(known)}")
    if args.list:
        print(text_table(["table", "title"], [[name, known[name].title] for name in chosen], left=2))
        return 0
    inputs = Inputs.published()
    for change in args.changes:
        name, separator, value = change.partition("=")
        if not separator:
            raise ValueError(f"--set {change!r} is not INPUT=VALUE")
        inputs.change(name, _value(value))
    rows = evaluate(chosen, inputs)
    if args.json:
        print(json.dumps([row._asdict() for row in rows], indent=1, ensure_ascii=False))
        return 0
    for name, group in groupby(rows, key=lambda row: row.table):
        print(f"{name}: {known[name].title}\n  {known[name].paper}\n")
        print(_table(list(group)), end="\n\n")
    print(", ".join(f"{count} {verdict}" for verdict, count in summary(rows).items() if count))
    return 0


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _table(rows: list[PaperRow]) -> str:
    """Published beside ours; reasons and notes stand under the rows that have one."""
    short = {DOES_NOT_FOLLOW: "DOES NOT FOLLOW", STATED: "stated"}
    lines = [
        [
            row.row,
            _number(row.published),
            _number(row.ours),
            row.unit,
            short.get(row.verdict, row.verdict),
            row.computed_by or "",
        ]
        for row in rows
    ]
    text = text_table(["row", "published", "ours", "unit", "verdict", "computed by"], lines)
    notes = [f"  {row.row}: {row.reason}" for row in rows if row.reason and row.verdict != EXACT]
    return "\n".join([text, *notes])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) or value == int(value) else f"{value:,.7g}"
