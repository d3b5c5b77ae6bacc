"""From one source to all notebooks of an exercise.

``notebooks/exercises/source/exNN_name.py`` is the truth: jupytext's percent format, nbgrader's metadata on the cells,
``### BEGIN SOLUTION`` .. ``### END SOLUTION`` around answers, ``### BEGIN HIDDEN TESTS`` around what only the grader
runs. From it come the student's notebook (answers replaced by a stub, hidden tests cut out) and, for a course, the
teacher's notebook with both, in the layout that nbgrader expects.

A course is drawn from a seed: sizes and random numbers of the hidden tests, the numbers of the account exercises, the
planted error of the find-the-bug exercises. The seed itself is written nowhere; give a long one.

Only as much of the two formats as these sources use: code and markdown cells, metadata as ``name={json}``. jupytext
reads the same cells (a test compares them), and is not needed here.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .checker import catalogue
from .exercise import Exercise, Variant

FOLDER = Path(__file__).parents[2] / "notebooks" / "exercises"
STUB = "# YOUR CODE HERE\nraise NotImplementedError()"  # as nbgrader writes it
_MARKER = re.compile(r"# %%(?P<markdown> \[markdown\])?(?: (?P<name>\w+)=(?P<value>\{.*\}))?$")
_SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION$", re.M | re.S)
_HIDDEN = re.compile(r"^[ \t]*### BEGIN HIDDEN TESTS\n.*?^[ \t]*### END HIDDEN TESTS\n?", re.M | re.S)
_HIDDEN_SEED = re.compile(r"(?<=### BEGIN HIDDEN TESTS\nseed = )\d+")


class Cell(NamedTuple):
    """One cell of a notebook."""

    kind: str  # 'code' or 'markdown'
    source: str
    metadata: dict[str, Any]


def sources(folder: Path = FOLDER / "source") -> dict[str, Path]:
    """Source file of each exercise, by name; ValueError where they are not (they are not in the wheel)."""
    found = {path.stem.partition("_")[2]: path for path in sorted(folder.glob("ex*_*.py"))}
    if not found:
        raise ValueError(f"{folder} has no sources ex*_*.py: build from a copy of the repository")
    return found


def read_percent(text: str) -> list[Cell]:
    """Cells of a percent-format file."""
    cells: list[Cell] = []
    lines: list[str] = []
    for line in text.splitlines():
        if match := _MARKER.match(line):
            _close(cells, lines)
            kind = "markdown" if match["markdown"] else "code"
            cells.append(Cell(kind, "", {match["name"]: json.loads(match["value"])} if match["name"] else {}))
            lines = []
        else:
            lines.append(line)
    _close(cells, lines)
    return cells


def _close(cells: list[Cell], lines: list[str]) -> None:
    """Put the lines that were read into the last cell."""
    if not cells:
        return
    if cells[-1].kind == "markdown":
        lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
    cells[-1] = cells[-1]._replace(source="\n".join(lines).strip("\n"))


def notebook(cells: list[Cell]) -> str:
    """Text of an .ipynb file; the same cells give the same bytes."""
    made = []
    for number, cell in enumerate(cells):
        parts: dict[str, Any] = {"cell_type": cell.kind, "id": f"cell-{number:02d}", "metadata": cell.metadata}
        if cell.kind == "code":
            parts |= {"execution_count": None, "outputs": []}
        made.append(parts | {"source": cell.source.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def for_students(cells: list[Cell]) -> list[Cell]:
    """The cells without answers and hidden tests."""
    return [cell._replace(source=_without_answers(cell.source)) for cell in cells]


def _without_answers(source: str) -> str:
    def stub(match: re.Match[str]) -> str:
        return "\n".join(match[1] + line for line in STUB.splitlines())

    return _HIDDEN.sub("", _SOLUTION.sub(stub, source))


def build(out: Path = FOLDER, source_folder: Path = FOLDER / "source") -> dict[Path, str]:
    """Text of every public student notebook, by path; nothing is written."""
    return {
        out / f"{path.stem}.ipynb": notebook(for_students(read_percent(path.read_text(encoding="utf-8"))))
        for path in sources(source_folder).values()
    }


def build_course(out: Path, seed: int, source_folder: Path = FOLDER / "source") -> dict[Path, str]:
    """Text of a course's files: ``source/exNN_name/exNN_name.ipynb`` for nbgrader, ``student/exNN_name.ipynb``."""
    files = {}
    for name, path in sources(source_folder).items():
        exercise = catalogue()[name]
        cells = course_cells(read_percent(path.read_text(encoding="utf-8")), exercise, seed)
        files[out / "source" / path.stem / f"{path.stem}.ipynb"] = notebook(cells)
        files[out / "student" / f"{path.stem}.ipynb"] = notebook(for_students(cells))
    return files


def course_cells(cells: list[Cell], exercise: Exercise, seed: int) -> list[Cell]:
    """A course's version of a source: its own question where the exercise has variants, its own hidden seeds."""
    drawn: Variant | None = exercise.draw(_generator(seed, exercise.name)) if exercise.draw else None
    hidden = int(_generator(seed, exercise.name, "hidden").integers(2, 10**9))  # not 0 or 1: those are public
    out = []
    for cell in cells:
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        if drawn and grade_id == "given":
            cell = cell._replace(source=given_source(drawn.given, drawn.key))
        elif drawn and grade_id == "solution":
            cell = cell._replace(source=drawn.solution)
        out.append(cell._replace(source=_HIDDEN_SEED.sub(str(hidden), cell.source)))
    return out


def given_source(given: str, key: Any) -> str:
    """The cell that gives a question, and says to `check` which one it is."""
    gap = "\n" if given.startswith("GIVEN") else "\n\n\n"
    return f"{given}{gap}VARIANT = {'GIVEN' if isinstance(key, dict) else json.dumps(key)}"


def _generator(seed: int, *words: str) -> np.random.Generator:
    """Random numbers of a course for one purpose; nothing of the seed can be read from them."""
    digest = hashlib.sha256("/".join([str(seed), *words]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def write(files: dict[Path, str], config: Path | None = None) -> None:
    """Write all files, each to a temporary name first; `config` is copied beside a course's folders."""
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    if config is not None and files:
        root = next(iter(files)).parents[2]
        shutil.copyfile(config, root / config.name)
