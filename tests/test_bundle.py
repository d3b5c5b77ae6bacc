"""The bundle for a classroom: what it holds, and that damage is noticed. `make bundle` builds and tries a real one."""

import hashlib
import importlib.util
import os
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture(scope="module")
def bundle():
    spec = importlib.util.spec_from_file_location("make_bundle", NOTEBOOKS / "make_bundle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sums_are_those_of_sha256sum_and_cover_every_file(bundle, tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "x.txt").write_bytes(b"one")
    (tmp_path / "y.txt").write_bytes(b"two")
    bundle.write_sums(tmp_path)
    expected = [
        f"{hashlib.sha256(text).hexdigest()}  {name}" for name, text in (("a b/x.txt", b"one"), ("y.txt", b"two"))
    ]
    assert (tmp_path / "SHA256SUMS").read_text(encoding="utf-8").splitlines() == expected
    assert bundle.verify_sums(tmp_path) == []


def test_changed_missing_and_new_files_are_named(bundle, tmp_path):
    for name in ("changed", "gone", "same"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    bundle.write_sums(tmp_path)
    (tmp_path / "changed").write_text("Changed", encoding="utf-8")
    (tmp_path / "gone").unlink()
    (tmp_path / "new").write_text("new", encoding="utf-8")
    assert bundle.verify_sums(tmp_path) == ["changed: changed", "missing: gone", "not listed: new"]
    with pytest.raises(SystemExit, match="missing: gone"):
        bundle.check(tmp_path, "00_tour", 1.0)


def test_notebooks_travel_without_solutions(bundle, tmp_path):
    bundle.copy_notebooks(tmp_path / "notebooks")
    taken = {path.relative_to(tmp_path / "notebooks").as_posix() for path in (tmp_path / "notebooks").rglob("*")}
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} <= taken
    assert not [name for name in taken if "source" in name or name.endswith("make_bundle.py")]


def test_a_folder_that_is_no_bundle_is_left_alone(bundle, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(SystemExit, match="no bundle"):
        bundle.build(tmp_path, [])
    assert (tmp_path / "thesis.tex").read_text(encoding="utf-8") == "mine"


def test_offline_environment_has_no_way_out(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://example.org/simple")
    monkeypatch.setenv("https_proxy", "http://example.org:3128")
    env = bundle.offline(tmp_path, tmp_path / "out")
    assert "PIP_INDEX_URL" not in env and env["PIP_CONFIG_FILE"] == os.devnull
    assert env["https_proxy"] == env["HTTPS_PROXY"] == "http://127.0.0.1:9" and env["HOME"] == str(tmp_path)
