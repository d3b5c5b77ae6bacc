"""Notebooks from their sources: student copies, a course's own variants, and nothing that should stay hidden."""

import ast
import json
import re
import warnings

import numpy as np
import pytest

from minidsv3.exercises import Finding
from minidsv3.exercises.checker import catalogue, evaluate
from minidsv3.exercises.handed_in import read_solutions
from minidsv3.exercises.sources import (
    FOLDER,
    STUB,
    build,
    build_course,
    course_cells,
    for_students,
    notebook,
    read_percent,
    sources,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # libraries behind these ask for the locale's encoding
    import jupytext
    import nbformat

SOURCES = sources()
NAMES = list(catalogue())
SEEDS = (123456789012, 987654321098)
VARIED = [name for name, e in catalogue().items() if e.kind in "AB"]


def cells_of(name, seed=None):
    cells = read_percent(SOURCES[name].read_text(encoding="utf-8"))
    return cells if seed is None else course_cells(cells, catalogue()[name], seed)


def cell(cells, grade_id):
    return next(c.source for c in cells if c.metadata.get("nbgrader", {}).get("grade_id") == grade_id)


def handed_in(cells, path):
    path.write_text(notebook(cells), encoding="utf-8")
    (found,), troubles = read_solutions(path)
    assert not troubles
    return found


def hidden_seeds(cells):
    """The one that all graded cells share, as often as it is written."""
    return [n for c in cells for n in re.findall(r"BEGIN HIDDEN TESTS\nseed = (\d+)", c.source)]


def test_every_exercise_has_its_source_and_no_other_is_there():
    assert list(SOURCES) == NAMES
    assert [path.stem for path in SOURCES.values()] == [f"ex{e.number:02d}_{name}" for name, e in catalogue().items()]


def test_committed_student_notebooks_are_what_the_sources_give():
    built = build()
    assert set(built) == set(FOLDER.glob("*.ipynb"))
    assert [p.name for p, text in built.items() if p.read_text(encoding="utf-8") != text] == []


@pytest.mark.parametrize("name", NAMES)
def test_jupytext_reads_the_same_cells(name):
    theirs = jupytext.read(SOURCES[name])
    ours = cells_of(name)
    assert [(c.cell_type, c.source) for c in theirs.cells] == [(c.kind, c.source) for c in ours]
    assert [c.metadata.get("nbgrader") for c in theirs.cells] == [c.metadata.get("nbgrader") for c in ours]


@pytest.mark.parametrize("name", NAMES)
def test_student_notebook_is_valid_and_has_no_answer(name):
    text = notebook(for_students(cells_of(name)))
    nbformat.validate(nbformat.reads(text, as_version=4))
    assert "BEGIN SOLUTION" not in text
    assert "HIDDEN" not in text
    assert re.findall(r"seed = (\d+)", text) == ["0"] * len(catalogue()[name].properties)
    assert STUB.splitlines()[0] in text


@pytest.mark.parametrize("name", NAMES)
def test_graded_cells_are_the_properties_with_their_points(name):
    graded = {
        c.metadata["nbgrader"]["grade_id"]: c
        for c in cells_of(name)
        if c.metadata.get("nbgrader", {}).get("grade") and c.kind == "code"
    }
    assert {k: c.metadata["nbgrader"]["points"] for k, c in graded.items()} == {
        p.name: p.points for p in catalogue()[name].properties
    }
    for grade_id, c in graded.items():
        assert c.metadata["nbgrader"]["locked"]
        hidden = "seed = 0\n### BEGIN HIDDEN TESTS\nseed = 1\n### END HIDDEN TESTS\n"
        asked = re.fullmatch(re.escape(f'{hidden}check("{name}", ') + r".*, seed=seed\)", c.source)
        assert asked and asked[0].count(f'"{grade_id}"') == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_names_kind_lesson_and_minutes(name):
    first = cells_of(name)[0].source
    exercise = catalogue()[name]
    assert first.startswith(f"# Exercise {exercise.number:02d} · ")
    assert f"lesson {exercise.lesson:02d}" in first
    assert f"about {exercise.minutes} minutes" in first


@pytest.mark.parametrize("name", [n for n in NAMES if catalogue()[n].kind == "M"])
def test_measurements_end_in_a_text_for_the_rubric(name):
    cells = cells_of(name)
    i = next(i for i, c in enumerate(cells) if c.metadata.get("nbgrader", {}).get("grade_id") == "explain")
    assert cells[i].kind == cells[i - 1].kind == "markdown"
    assert cells[i].source == "YOUR ANSWER HERE"  # nbgrader takes away what stands in a cell for an answer
    assert "Rubric" in cells[i - 1].source
    assert not cells[i - 1].metadata


@pytest.mark.parametrize("name", VARIED)
def test_two_course_seeds_give_different_questions_and_answers(name):
    one, two = (cells_of(name, seed) for seed in SEEDS)
    if catalogue()[name].kind == "A":
        assert cell(one, "given") != cell(two, "given")
        assert cell(one, "solution") != cell(two, "solution")
    drawn = {cell(cells_of(name, seed), "given") for seed in range(40)}
    assert len(drawn) >= 3
    assert cell(cells_of(name), "given") not in drawn  # never the public question


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", VARIED)
def test_public_key_scores_below_half_on_a_course_variant(name, seed, tmp_path):
    public, course = cells_of(name), cells_of(name, seed)
    stolen = [
        c._replace(source=cell(public, "solution"))
        if c.metadata.get("nbgrader", {}).get("grade_id") == "solution"
        else c
        for c in course
    ]
    found = handed_in(stolen, tmp_path / "stolen.ipynb")
    results = evaluate(name, found.submission, variant=found.variant)
    assert sum(r.points for r in results) < 5
    honest = handed_in(course, tmp_path / "honest.ipynb")
    assert [r.detail for r in evaluate(name, honest.submission, variant=honest.variant, seed=3)] == [""] * len(results)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_seeds_of_a_course_are_its_own(name):
    one, two, public = (hidden_seeds(c) for c in (cells_of(name, SEEDS[0]), cells_of(name, SEEDS[1]), cells_of(name)))
    assert len(one) == len(catalogue()[name].properties)
    assert len({*one, *two}) == 2  # one for all cells of a notebook: a submission is then run once
    assert set(public) == {"1"}


def test_course_is_reproducible_and_never_shows_its_seed(tmp_path):
    seed = SEEDS[0]
    files = build_course(tmp_path, seed)
    assert files == build_course(tmp_path, seed)
    assert not [path for path, text in files.items() if str(seed) in text]
    student = {path: text for path, text in files.items() if path.parent.name == "student"}
    assert len(student) == len(NAMES)
    hidden = {n for name in NAMES for n in hidden_seeds(cells_of(name, seed))}
    assert len(hidden) == len(NAMES)
    assert not [path for path, text in student.items() if any(n in text for n in hidden)]


def test_planted_errors_of_a_module_are_at_least_three_and_all_show():
    for name in (n for n in NAMES if catalogue()[n].kind == "B"):
        keys = {ast.literal_eval(cell(cells_of(name, s), "given").rpartition("= ")[2]) for s in range(60)}
        assert len(keys) >= 3
        for key in keys:
            untouched = Finding(None, dict, lambda **inputs: None)
            assert sum(r.points for r in evaluate(name, untouched, variant=key)) == 0


def test_percent_reader_keeps_blank_lines_and_metadata():
    text = '# %% [markdown] nbgrader={"grade_id": "a"}\n# one\n#\n# two\n\n# %%\nx = 1\n\n\ny = 2\n'
    first, second = read_percent(text)
    assert first == ("markdown", "one\n\ntwo", {"nbgrader": {"grade_id": "a"}})
    assert second == ("code", "x = 1\n\n\ny = 2", {})


def test_sources_elsewhere_are_asked_for(tmp_path):
    with pytest.raises(ValueError, match="build from a copy of the repository"):
        sources(tmp_path)


def test_notebook_text_is_json_with_a_kernel():
    loaded = json.loads(notebook(cells_of("rms_norm")))
    assert loaded["metadata"]["kernelspec"]["name"] == "python3"
    assert len({c["id"] for c in loaded["cells"]}) == len(loaded["cells"])
    assert np.all([c["outputs"] == [] for c in loaded["cells"] if c["cell_type"] == "code"])
