"""``minidsv3 exercises``, and training with a student's code."""

import json

import numpy as np
import pytest

from minidsv3.commands import main
from minidsv3.exercises import use
from minidsv3.exercises.checker import catalogue
from minidsv3.exercises.handed_in import read_folder, read_solutions
from minidsv3.exercises.sources import FOLDER, for_students, read_percent, sources
from minidsv3.exercises.training import Parts, compare_losses, parts_of, train
from minidsv3.ops.norm import RMSNormFunction
from minidsv3.ops.plain import PlainRMSNorm

SOURCES = sources()
ENTERING = [name for name, e in catalogue().items() if e.enter]


@pytest.fixture(scope="module")
def references():
    return {name: read_solutions(SOURCES[name])[0][0].submission for name in ENTERING}


@pytest.fixture(scope="module")
def package_losses():
    return train(Parts(), steps=4)


def student_file(folder, name, *changes):
    text = SOURCES[name].read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    folder.mkdir(exist_ok=True)
    path = folder / SOURCES[name].name
    path.write_text(text, encoding="utf-8")
    return path


def test_list_names_every_exercise(capsys):
    assert main(["exercises", "list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in catalogue())
    assert all(kind in out for kind in ("implement", "account", "find the bug", "measure and explain"))


def test_check_of_a_right_file_succeeds_and_of_a_wrong_one_does_not(tmp_path, capsys):
    assert main(["exercises", "check", str(student_file(tmp_path, "bias_update"))]) == 0
    assert "10 of 10 points" in capsys.readouterr().out
    wrong = student_file(tmp_path, "bias_update", ("load.mean() - load", "load - load.mean()"))
    assert main(["exercises", "check", str(wrong), "--seed", "8"]) == 1
    assert "4 of 10 points" in capsys.readouterr().out


def test_check_of_an_untouched_student_notebook_scores_zero(capsys):
    assert main(["exercises", "check", str(FOLDER / f"{SOURCES['router'].stem}.ipynb")]) == 1
    assert "0 of 10 points" in capsys.readouterr().out


def test_check_reports_cells_that_raise_and_goes_on(tmp_path, capsys):
    path = student_file(tmp_path, "bias_update", ("# %%\nimport numpy", "# %%\n1 / 0\n\n# %%\nimport numpy"))
    assert main(["exercises", "check", str(path)]) == 0
    error = capsys.readouterr().err
    assert "cell 1" in error
    assert "ZeroDivisionError" in error


@pytest.mark.parametrize("name, text", [
    ("a.txt", "x = 1"), ("a.ipynb", "{"), ("a.ipynb", json.dumps({"cells": 3})), ("a.py", "x = 1"), ("a.py", "x ="),
])  # fmt: skip
def test_file_without_a_solution_is_a_user_error(tmp_path, name, text, capsys):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert main(["exercises", "check", str(tmp_path / name)]) == 2
    assert "error" in capsys.readouterr().err


def test_notebook_commands_and_shown_names_are_passed_over(tmp_path):
    path = tmp_path / "mine.py"
    lines = ["%matplotlib inline", "!ls", "f = lambda *a: None", "f", 'check("bias_update", f)', "score"]
    path.write_text("# %%\n" + "\n".join(lines) + "\n", encoding="utf-8")
    (found,), troubles = read_solutions(path)
    assert (found.name, troubles) == ("bias_update", [])


def test_build_writes_what_is_committed_and_check_says_what_is_not(tmp_path, capsys):
    assert main(["exercises", "build", "--check"]) == 0
    assert main(["exercises", "build", "--out", str(tmp_path)]) == 0
    names = {p.name: p.read_bytes() for p in FOLDER.glob("*.ipynb")}
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == names
    (tmp_path / "ex02_rms_norm.ipynb").write_text("{}", encoding="utf-8")
    (tmp_path / "ex99_stranger.ipynb").write_text("{}", encoding="utf-8")
    assert main(["exercises", "build", "--check", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "ex02_rms_norm.ipynb is not" in error
    assert "ex99_stranger.ipynb is not" in error
    assert error.count("is not what") == 2


def test_build_of_a_course_writes_teacher_student_and_settings(tmp_path, capsys):
    assert main(["exercises", "build", "--course-seed", "55667788", "--out", str(tmp_path / "c")]) == 0
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"source", "student", "nbgrader_config.py"}
    assert len(list((tmp_path / "c").rglob("*.ipynb"))) == 2 * len(catalogue())
    assert main(["exercises", "build", "--course-seed", "5"]) == 2
    assert main(["exercises", "autograde", "ex12_router", "--course", str(tmp_path)]) == 2  # no course
    course = ["exercises", "autograde", "ex12_router", "--course", str(tmp_path / "c")]
    assert main(course) == 2  # nobody handed in
    (tmp_path / "c" / "submitted" / "ada" / "ex12_router").mkdir(parents=True)
    assert main([*course, "--workers", "0"]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ENTERING)
def test_right_solution_trains_like_the_package(name, references, package_losses):
    parts = parts_of([(name, references[name])])
    expected = train(parts.package(), steps=4) if parts.rope_scaling else package_losses
    tolerance = 0.02 if name == "quantize_tile" else 1e-4  # FP8 rounds; the others differ by float32 rounding
    np.testing.assert_allclose(train(parts, steps=4), expected, atol=tolerance)


def test_restored_run_goes_on_to_the_same_bits_and_one_without_moments_does_not(references, package_losses):
    save, restore = references["resume"]["save"], references["resume"]["restore"]
    assert np.array_equal(train(Parts(save_and_restore=(save, restore)), steps=4), package_losses)

    def forgetful(run, saved):
        restore(run, ({"weights": saved[0]["weights"]}, *saved[1:]))

    losses = train(Parts(save_and_restore=(save, forgetful)), steps=4)
    assert np.array_equal(losses[:3], package_losses[:3])  # the third step's loss is taken before its update
    assert abs(losses[3] - package_losses[3]) > 1e-3


def test_frequencies_of_a_student_turn_the_model(references):
    parts = parts_of([("yarn_ramp", references["yarn_ramp"])])
    expected = train(parts.package(), steps=2)
    parts.frequencies = lambda cfg: np.full(cfg.qk_rope_head_dim // 2, 0.5)
    assert abs(train(parts, steps=2) - expected).max() > 1e-4
    assert abs(train(Parts(), steps=2) - expected).max() > 1e-6  # YaRN is on in both


@pytest.mark.parametrize("name", ENTERING)
def test_stub_inside_the_model_is_really_called(name):
    cells = for_students(read_percent(SOURCES[name].read_text(encoding="utf-8")))
    scope = {}
    for cell in cells:
        if cell.kind == "code" and "check(" not in cell.source and "use(" not in cell.source:
            exec(cell.source, scope)
    call = next(c.source for c in cells if c.source.startswith(f'check("{name}", '))
    submission = eval(call.removeprefix(f'check("{name}", ')[:-1], scope)
    with pytest.raises(NotImplementedError):
        train(parts_of([(name, submission)]), steps=1)


def test_solution_really_runs_inside_the_model(package_losses):
    calls = []

    class Counting(PlainRMSNorm):
        def forward(self, x, w, *, eps):
            calls.append(x.shape)
            return super().forward(x, w, eps=eps)

    train(Parts(replacements=[(RMSNormFunction, Counting)]), steps=1)
    assert len(calls) > 20


def test_wrong_bias_rule_shows_in_the_load(references):
    seen = []

    def spy(bias, load, speed):
        seen.append(bias.copy())
        return references["bias_update"](bias, load, speed)

    train(Parts(update_bias=spy), steps=3)
    assert np.abs(seen[-1]).max() == np.float32(0.002)  # twice the speed, after two steps


def test_run_mine_takes_what_passes_and_names_what_does_not(tmp_path, capsys):
    folder = tmp_path / "mine"
    student_file(folder, "rms_norm")
    student_file(folder, "bill_cache")
    student_file(folder, "router", ("-np.inf", "0"))
    figure = tmp_path / "mine.png"
    assert main(["exercises", "run-mine", str(folder), "--steps", "3", "--figure", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "rms_norm             inside" in out
    assert "left out: fails negative" in out
    assert "no place in a training step" in out
    assert "3 steps of nano with 1 of your solutions" in out
    text = figure.with_suffix(".txt").read_text(encoding="utf-8")
    assert "with rms_norm" in text
    assert len(figure.with_suffix(".csv").read_text(encoding="utf-8").splitlines()) == 4


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: student_file(p, "bill_cache")])
def test_run_mine_without_anything_to_run_is_a_user_error(tmp_path, make, capsys):
    make(tmp_path / "mine")
    assert main(["exercises", "run-mine", str(tmp_path / "mine")]) == 2
    assert "error" in capsys.readouterr().err


def test_use_shows_the_curve_only_after_the_check(references, capsys, monkeypatch):
    monkeypatch.setenv("MINIDSV3_FAST", "1")
    picture = use("rms_norm", references["rms_norm"])
    assert "Loss of nano over 2 steps" in picture.text
    assert use("rms_norm", None) is None
    assert "does not pass yet" in capsys.readouterr().out
    assert use("bill_cache", read_solutions(SOURCES["bill_cache"])[0][0].submission) is None
    assert "no place in a training step" in capsys.readouterr().out


def test_all_solutions_together_stay_close_to_the_package(references):
    picture = compare_losses(references, steps=3)
    assert f"with {len(references)} of your solutions; the package's curve" in picture.text


def test_folder_is_read_in_order_of_names(tmp_path):
    folder = tmp_path / "mine"
    for name in ("router", "rms_norm"):
        student_file(folder, name)
    assert [s.name for s in read_folder(folder)[0]] == ["rms_norm", "router"]
