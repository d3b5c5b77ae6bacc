"""nbgrader's whole round trip on generated submissions: release, autograde, feedback, export.

Optional: needs the extra `classroom`. A class of 9 by default, or as many as MINIDSV3_CLASS says; three notebooks: one
that trains, one with planted errors, and the one that takes longest.
"""

import csv
import json
import os
import re
import subprocess
import sys
import sysconfig
import time

import pytest

from minidsv3.exercises import ex14_bug_gate_bias as bug
from minidsv3.exercises.checker import catalogue
from minidsv3.exercises.handed_in import code_cells
from minidsv3.exercises.planted import key_of, planted, solution_cell
from minidsv3.exercises.sources import FOLDER, build_course, read_percent, sources, write

pytest.importorskip("nbgrader")
pytestmark = pytest.mark.slow

COURSE_SEED = 918273645546372819
STUDENTS = int(os.environ.get("MINIDSV3_CLASS", "9"))
SECONDS = 300  # one notebook of the whole class
EXERCISES = ("rms_norm", "bug_gate_bias", "measure_balance")


def run(folder, *arguments):
    """What `python -m ...` does in a folder, as from an activated environment."""
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, capture_output=True, text=True, encoding="utf-8",
        env=os.environ | {"PATH": path}, check=False,
    )  # fmt: skip


def nbgrader(folder, *arguments):
    return run(folder, "nbgrader", *arguments)


def reference(name):
    cells = read_percent(sources()[name].read_text(encoding="utf-8"))
    return next(c.source for c in cells if c.metadata.get("nbgrader", {}).get("grade_id") == "solution")


def hand_in(folder, student, stem, solution):
    """Put the released notebook, with this text in its solution cell, where `collect` would."""
    notebook = json.loads((folder / "release" / stem / f"{stem}.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if solution and cell["metadata"].get("nbgrader", {}).get("grade_id") == "solution":
            cell["source"] = solution
    place = folder / "submitted" / student / stem
    place.mkdir(parents=True)
    (place / f"{stem}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")


def course_bug(course):
    """Index of the error that this course planted."""
    text = (course / "source" / "ex14_bug_gate_bias" / "ex14_bug_gate_bias.ipynb").read_text(encoding="utf-8")
    return next(i for i, b in enumerate(bug.BUGS) if key_of(planted(bug.CORRECT, b)) in text)


def op_answers():
    """Kinds of answers to rms_norm: name -> (text of the solution cell, points of each property)."""
    good = reference("rms_norm")
    body = "        ### BEGIN SOLUTION\n        r = 1 / np.sqrt("
    own = "from minidsv3.ops.norm import RMSNormFunction\n\n\nclass RMSNorm(RMSNormFunction):\n    pass"
    nothing = dict(values=0, types=0, gradients=0, golden=0)
    return {
        "perfect": (good, dict(values=2, types=2, gradients=5, golden=1)),
        "untouched": (None, nothing),
        "partly right": (good.replace("g - x * r * r * (g * x).mean(axis=-1, keepdims=True)", "g"),
                         dict(values=2, types=2, gradients=0, golden=0)),
        "in double precision": (good.replace("x.dtype.type(eps)", "np.float64(eps)"),
                                dict(values=2, types=0, gradients=5, golden=1)),
        "raises": (good.replace(body, "        raise ValueError('no')\n" + body), nothing),
        "hangs": (good.replace(body, "        while True:\n            pass\n" + body), nothing),
        "borrowed": (own, nothing),
        "hangs in the cell": ("while True:\n    pass", nothing),
        "no Python": ("class RMSNorm(", nothing),
    }  # fmt: skip


def bug_answers(planted_bug):
    """Kinds of answers to bug_gate_bias; `planted_bug` is the course's own error."""
    answers = {}
    for i, error in enumerate(bug.BUGS):
        text = solution_cell(bug.CORRECT, planted(bug.CORRECT, error), error, bug.cases)
        right = i == planted_bug
        answers[f"finding {i}"] = (text, dict(line=3 * right, witness=3 * right, repaired=4))
    nothing = dict(line=0, witness=0, repaired=0)
    text = answers[f"finding {planted_bug}"][0]
    return answers | {
        "untouched": (None, nothing),
        "raises": ("raise RuntimeError('no')", nothing),
        "hangs": (text.replace("    ### BEGIN", "    while True:\n        pass\n    ### BEGIN"), nothing),
        "not mended": (text.replace("(scores, topk_idx", "(choice, topk_idx").replace("-logits)", "-logits - bias)"),
                       dict(line=3, witness=3, repaired=0)),
    }  # fmt: skip


def measure_answers():
    """Kinds of answers to measure_balance."""
    good = reference("measure_balance")
    full, nothing = dict(loads=2, sweep=2, max_vio=3, best=3), dict(loads=0, sweep=0, max_vio=0, best=0)
    return {
        "perfect": (good, full),
        "untouched": (None, nothing),
        "partly right": (good.replace("load[-50:]", "load[:50]"), full | dict(max_vio=0)),
        "a short sweep": (good.replace("0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3", "0.001, 0.003, 0.01"),
                          full | dict(sweep=0)),
        "raises": (good.replace("    speeds = ", "    raise RuntimeError('no')\n    speeds = "), nothing),
        "hangs": (good.replace("    speeds = ", "    while True:\n        pass\n    speeds = "), nothing),
    }  # fmt: skip


ANSWERS = {
    "rms_norm": lambda course: op_answers(),
    "bug_gate_bias": lambda course: bug_answers(course_bug(course)),
    "measure_balance": lambda course: measure_answers(),
}


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course, graded: (folder, expected points by student and exercise, what the commands said, seconds)."""
    folder = tmp_path_factory.mktemp("course")
    write(build_course(folder, COURSE_SEED), FOLDER / "nbgrader_config.py")
    expected, said, seconds = {}, {}, {}
    for name in EXERCISES:
        stem = sources()[name].stem
        said[name, "release"] = nbgrader(folder, "generate_assignment", stem)
        answers = ANSWERS[name](folder)
        for number in range(STUDENTS):
            kind = list(answers)[number % len(answers)]
            solution, points = answers[kind]
            student = f"s{number:02d}"
            hand_in(folder, student, stem, solution)
            expected[student, stem] = kind, points
        start = time.monotonic()
        said[name, "autograde"] = run(folder, "minidsv3", "exercises", "autograde", stem)
        seconds[name] = time.monotonic() - start
        said[name, "feedback"] = nbgrader(folder, "generate_feedback", stem)
    said["export"] = nbgrader(folder, "export", "--to=grades.csv")
    print({name: f"{s:.0f} s for {STUDENTS} students" for name, s in seconds.items()})
    return folder, expected, said, seconds


def test_every_command_succeeds(course):
    assert {step: r.stderr[-800:] for step, r in course[2].items() if r.returncode} == {}


def test_points_of_every_property_are_as_expected(course):
    folder, expected, _, _ = course
    with (folder / "grades.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    got = {(r["student"], r["exercise"], r["property"]): r["points"] for r in rows}
    wrong = []
    for (student, stem), (kind, points) in expected.items():
        for name, value in points.items():
            if float(got[student, stem, name]) != value:
                wrong.append((kind, name, got[student, stem, name], value))
    assert wrong == []
    assert {r["max_points"] for r in rows if r["property"] == "gradients"} == {"5"}
    texts = sum(catalogue()[name].kind == "M" for name in EXERCISES)  # one a measurement, for the rubric
    assert len(rows) == STUDENTS * (texts + sum(len(catalogue()[name].properties) for name in EXERCISES))


def test_answers_of_other_variants_score_below_half(course):
    folder, expected, _, _ = course
    with (folder / "grades.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    others = [key for key, (kind, points) in expected.items() if kind.startswith("finding") and points["line"] == 0]
    assert others
    for student, stem in others:
        assert sum(float(r["points"]) for r in rows if (r["student"], r["exercise"]) == (student, stem)) < 10


def test_a_notebook_of_the_whole_class_takes_less_than_five_minutes(course):
    _, _, _, seconds = course
    assert max(seconds.values()) < SECONDS


def test_released_and_student_notebooks_are_the_same(course):
    folder = course[0]
    for name in EXERCISES:
        stem = sources()[name].stem
        released = json.loads((folder / "release" / stem / f"{stem}.ipynb").read_text(encoding="utf-8"))
        ours = json.loads((folder / "student" / f"{stem}.ipynb").read_text(encoding="utf-8"))
        assert ["".join(c["source"]) for c in released["cells"]] == ["".join(c["source"]) for c in ours["cells"]]


def test_feedback_reveals_no_hidden_test(course):
    folder = course[0]
    pages = list((folder / "feedback").rglob("*.html"))
    assert len(pages) == STUDENTS * len(EXERCISES)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "HIDDEN TESTS" not in text
        assert "points" in text
        cells = "\n".join(code_cells(folder / "source" / page.stem / f"{page.stem}.ipynb"))
        hidden = re.findall(r"BEGIN HIDDEN TESTS\nseed = (\d+)", cells)
        assert len(hidden) >= 3
        assert not [seed for seed in hidden if seed in text]


def test_seed_of_a_course_is_in_none_of_its_files(course):
    for path in course[0].rglob("*"):
        if path.is_file() and path.suffix in (".ipynb", ".html", ".py"):
            assert str(COURSE_SEED) not in path.read_text(encoding="utf-8")


def test_who_ends_the_kernel_is_named_and_all_others_are_graded(tmp_path):
    write(build_course(tmp_path, COURSE_SEED), FOLDER / "nbgrader_config.py")
    stem = sources()["bias_update"].stem
    nbgrader(tmp_path, "generate_assignment", stem)
    for student, solution in (("ada", reference("bias_update")), ("ben", "import os\nos._exit(3)")):
        hand_in(tmp_path, student, stem, solution)
    done = run(tmp_path, "minidsv3", "exercises", "autograde", stem, "--workers", "2")
    assert done.returncode == 1
    assert "for student 'ben'" in done.stderr and "ada" not in done.stderr
    nbgrader(tmp_path, "export", "--to=grades.csv")
    with (tmp_path / "grades.csv").open(encoding="utf-8", newline="") as stream:
        points = [(r["student"], float(r["points"] or 0)) for r in csv.DictReader(stream)]
    assert sum(n for student, n in points if student == "ada") == 10
    assert sum(n for student, n in points if student == "ben") == 0
