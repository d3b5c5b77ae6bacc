"""The stored tables of the papers: well formed, complete, and nowhere else."""

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest

import minidsv3
from minidsv3.accounting.paper_rows import ROWS
from minidsv3.accounting.published import FILES, published_tables, quantum_of
from minidsv3.config import data_file

TABLES = published_tables()
KEYS = {"row", "published", "unit", "tolerance", "quantum", "rounding", "misprint", "stated", "needs", "note"}


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_well_formed(name):
    table = TABLES[name]
    assert table.paper and table.title and table.rows
    names = [row["row"] for row in table.rows]
    assert len(set(names)) == len(names)
    for row in table.rows:
        assert set(row) <= KEYS and isinstance(row["unit"], str)
        assert isinstance(row["published"], int | Decimal) or (row["published"] is None and row.get("stated"))
        assert row.get("rounding", "truncated") == "truncated"


def test_every_file_is_read():
    files = data_file("published/insights.json").parent.glob("*.json")
    assert {p.stem for p in files if "tables" in json.loads(p.read_text(encoding="utf-8"))} == set(FILES)


def test_every_function_has_its_table():
    assert set(ROWS) <= set(TABLES)


@pytest.mark.parametrize(
    ("text", "quantum"),
    [
        ('{"published": 43.70}', 0.01),
        ('{"published": 7.3e-6}', 1e-7),
        ('{"published": 155}', 1),
        ('{"published": 1200, "quantum": 100}', 100),
    ],
)
def test_quantum_is_the_last_printed_digit(text, quantum):
    assert quantum_of(json.loads(text, parse_float=Decimal)) == pytest.approx(quantum)


def test_no_published_value_stands_in_the_code():
    """Values with five or more digits are not there by chance."""
    numbers = set()
    for table in TABLES.values():
        numbers |= {str(row["published"]) for row in table.rows if row["published"] is not None}
        numbers |= {str(value) for value in table.inputs.values() if isinstance(value, int | float)}
    telling = {
        n.rstrip("0").rstrip(".") if "." in n else n for n in numbers if len(re.sub(r"\D", "", n).strip("0")) >= 4
    }
    assert {"19.926", "272.8", "671026404352"} <= telling
    for path in (Path(minidsv3.__file__).parent / "accounting").rglob("*.py"):
        code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(encoding="utf-8"), flags=re.S)
        written = {n.replace("_", "") for n in re.findall(r"\d[\d_]*(?:\.\d+)?", code)}
        assert not written & telling - {"4096"}, path.name  # 4096 is the default of a sequence's length
