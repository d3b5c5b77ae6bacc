"""The glossary knows every config field and every term that a lesson prints in bold, and where it appears first."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import minidsv3
from minidsv3 import ModelConfig, TrainConfig

FOLDER = Path(__file__).parent.parent / "notebooks"
LESSONS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
FIELDS = [f.name for cls in (ModelConfig, TrainConfig) for f in dataclasses.fields(cls) if f.name != "extra"]
COLUMNS = ["symbol", "code name", "meaning", "unit", "shape", "lesson"]


def rows():
    """One dict a row; a bar inside code or mathematics would be a seventh cell."""
    lines = [line for line in (FOLDER / "GLOSSARY.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == COLUMNS and set("".join(cells[1])) <= {":", "-"}
    assert {len(row) for row in cells} == {len(COLUMNS)}
    return [dict(zip(COLUMNS, row)) for row in cells[2:]]


def plain(term):
    """'Experts.' and 'expert' are one term, 'micro-batches' and 'micro-batch' another."""
    term = " ".join(term.split()).strip(" .:,;").lower()
    if term.endswith("ches"):
        return term[:-2]
    return term[:-1] if term.endswith("s") and not term.endswith(("ss", "us", "is", "as")) else term


def bold(text):
    """What stands between double asterisks, outside of drawings and code."""
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    return {plain(term) for term in re.findall(r"\*\*([^*]+?)\*\*", text)}


def terms():
    """Term -> lesson of its row."""
    return {term: row["lesson"] for row in rows() for term in bold(row["meaning"])}


def bold_terms_of(path):
    """Of all text cells but the first, whose bold words are the headings of a table and the verbs of objectives."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"][1:]
    return set().union(*(bold("".join(cell["source"])) for cell in cells if cell["cell_type"] == "markdown"))


@pytest.mark.parametrize("field", FIELDS)
def test_glossary_has_config_field(field):
    assert any(f"`{field}`" in row["code name"] for row in rows())


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_glossary_has_bold_terms_of_lesson(path):
    assert bold_terms_of(path) - set(terms()) == set()


def test_glossary_names_the_lesson_of_first_use():
    first = {}
    for path in LESSONS:
        for term in bold_terms_of(path):
            first.setdefault(term, path.stem[:2])
    known = terms()
    assert {term: known.get(term) for term in first} == first


def test_glossary_rows_have_meaning_and_lesson():
    for row in rows():
        assert row["meaning"] and re.fullmatch(r"0\d|1[0-2]", row["lesson"]), row
    listed = [term for row in rows() for term in bold(row["meaning"])]
    assert len(listed) == len(set(listed))


def test_glossary_code_names_are_in_the_package():
    package = Path(minidsv3.__file__).parent
    source = "\n".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    names = {name for row in rows() for name in re.findall(r"`([^`]+)`", row["code name"])}
    parts = {part for name in names for part in name.split(".")}
    assert {part for part in parts if not re.search(rf"\b{re.escape(part)}\b", source)} == set()


def test_plain_and_bold_find_terms():
    text = "**Experts.** have **top-k** and `**no**`\n```text\n**none**\n```\n**loss**, **bias**: **two\nbatches**"
    assert bold(text) == {"expert", "top-k", "loss", "bias", "two batch"}
