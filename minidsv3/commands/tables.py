"""Text tables of the command line: columns of equal width, the first to the left, numbers to the right."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The table as text; the first `left` columns are set to the left."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows)]
    lines = [[cell.ljust(w) if n < left else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths))]
             for row in (header, ["-" * w for w in widths], *rows)]  # fmt: skip
    return "\n".join("  ".join(line).rstrip() for line in lines)


def gigabytes(nbytes: float) -> str:
    """'72.39 GB'; GB = 1e9 bytes."""
    return f"{nbytes / 1e9:,.2f} GB"
