"""``minidsv3 data``: what it prints and its exit status."""

import pytest

from minidsv3.commands import data, main
from minidsv3.data import list_corpora


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIDSV3_HOME", str(tmp_path))


def test_data_list_names_every_corpus(capsys):
    assert main(["data", "list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["name", *(entry.name for entry in list_corpora())]


def test_data_list_columns_are_aligned():
    header, *rows = data.corpora_table().splitlines()
    start = header.index("description")
    assert all(row[start - 2 : start] == "  " and row[start] != " " for row in rows)


def test_data_build_builds_each_name_once(monkeypatch):
    built = []
    monkeypatch.setattr(data, "build_corpus", lambda name, report: built.append(name))
    assert main(["data", "build", "kjv", "speeches", "kjv"]) == 0
    assert built == ["kjv", "speeches"]


def test_data_build_prints_what_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(data, "build_corpus", lambda name, report: report(f"fetching {name}"))
    main(["data", "build", "kjv"])
    assert capsys.readouterr().out == "fetching kjv\n"


def test_data_build_of_a_generated_corpus_has_nothing_to_do(capsys):
    assert main(["data", "build", "python"]) == 0
    assert capsys.readouterr().out == "python: made on the spot, nothing to build\n"


def test_data_build_of_an_unknown_name_is_a_user_error(capsys):
    assert main(["data", "build", "shakspeare"]) == 2
    assert "did you mean shakespeare" in capsys.readouterr().err


def test_data_without_an_action_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["data"])
    assert stopped.value.code == 2
    assert "ACTION" in capsys.readouterr().err
