"""``minidsv3 paper``: a list of rows for others to read, tables for people, inputs that can be changed."""

import json

import pytest

from minidsv3.commands import main
from minidsv3.commands.tables import gigabytes, text_table

KEYS = {"paper", "table", "row", "published", "ours", "unit", "tolerance", "verdict", "computed_by"}


def called(capsys, *words):
    status = main(["paper", *words])
    return status, capsys.readouterr()


def test_json_is_a_list_of_rows(capsys):
    status, printed = called(capsys, "insights-1", "v2-1", "--json")
    rows = json.loads(printed.out)
    assert status == 0 and len(rows) == 9
    assert all(set(row) >= KEYS for row in rows)
    assert {row["table"] for row in rows} == {"insights-1", "v2-1"}


def test_the_beginning_of_a_name_is_enough(capsys):
    _, printed = called(capsys, "v2", "--list")
    assert [line.split()[0] for line in printed.out.splitlines()[2:]] == ["v2-1", "v2-counts"]


def test_tables_say_why_a_value_does_not_follow(capsys):
    _, printed = called(capsys, "insights-1")
    assert "DOES NOT FOLLOW" in printed.out and "516.096 / 70.272 = 7.344" in printed.out
    assert printed.out.rstrip().endswith("4 exact, 1 published value does not follow from its inputs")


def test_an_input_can_be_changed(capsys):
    _, printed = called(capsys, "insights-1", "--json", "--set", "deepseek-v3.kv_lora_rank=256")
    first = json.loads(printed.out)[0]
    assert first["ours"] == 39.04 and first["verdict"] == "published value does not follow from its inputs"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing",), "table 'nothing' is not the beginning of one of insights-1"),
        (("v2", "--set", "ports"), "'ports' is not INPUT=VALUE"),
        (("v2", "--set", "insights-3.planes_=2"), "insights-3 has: ports, planes"),
        (("insights-1", "--set", "deepseek-v3.kv_lora_rank=-1"), "kv_lora_rank=-1 is not a positive number"),
    ],
)
def test_mistake_is_one_line(capsys, words, message):
    status, printed = called(capsys, *words)
    assert status == 2 and message in printed.err and len(printed.err.splitlines()) == 1


def test_text_table_sets_numbers_to_the_right():
    lines = text_table(["name", "n"], [["a", "1"], ["long name", "23"]]).splitlines()
    assert lines == ["name        n", "---------  --", "a           1", "long name  23"]
    assert gigabytes(72_389_000_000) == "72.39 GB"
