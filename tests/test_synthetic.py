"""The synthetic language: deterministic, and every determined place is right."""

import operator
import re

import pytest

from minidsv3.data.synthetic import KINDS, answer_of, synthetic


@pytest.fixture(scope="module")
def documents():
    return synthetic(seed=3, size=60_000)


def lines_of(documents, kind):
    return [line for title, text in documents if title.startswith(kind) for line in text.splitlines()]


def test_synthetic_is_deterministic():
    assert synthetic(seed=5, size=9000) == synthetic(seed=5, size=9000)


def test_synthetic_depends_on_the_seed():
    assert synthetic(seed=5, size=900) != synthetic(seed=6, size=900)


def test_synthetic_of_larger_size_begins_the_same():
    assert synthetic(seed=5, size=30_000)[:3] == synthetic(seed=5, size=90_000)[:3]


@pytest.mark.parametrize("size", [1, 700, 8192, 20_011])
def test_synthetic_reaches_its_size_with_its_last_line(size):
    text = "".join(document.text for document in synthetic(size=size))
    without_last_line = text[: text.rstrip("\n").rfind("\n") + 1]
    assert len(without_last_line) < size <= len(text)


def test_synthetic_kinds_come_in_turn(documents):
    assert [document.title for document in documents[:5]] == [*(f"{kind} 0" for kind in KINDS), "arithmetic 1"]


def test_synthetic_is_ascii(documents):
    assert all(document.text.isascii() for document in documents)


def test_arithmetic_is_right(documents):
    calculate = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    for line in lines_of(documents, "arithmetic"):
        a, sign, b, result = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", line).groups()
        assert calculate[sign](int(a), int(b)) == int(result)


def test_brackets_are_balanced(documents):
    for line in lines_of(documents, "brackets"):
        rest = line
        while rest:
            shorter = rest.replace("()", "").replace("[]", "").replace("{}", "")
            assert len(shorter) < len(rest), line
            rest = shorter


def test_recall_answer_is_the_value_given_before(documents):
    for line in lines_of(documents, "recall"):
        given, asked = line.split(" ? ")
        pairs = dict(pair.split("=") for pair in given.split())
        assert len(pairs) == len(given.split())  # no key twice
        key, value = asked.split("=")
        assert pairs[key] == value


def test_story_ends_with_who_was_given_the_thing_last(documents):
    for line in lines_of(documents, "story"):
        owner = line.split()[0]
        for giver, taker in re.findall(r"(\w+) gives the \w+ to (\w+)\.", line):
            assert giver == owner
            owner = taker
        assert line.endswith(f"? {owner}.")


@pytest.mark.parametrize(
    "kind, line, answer",
    [
        ("arithmetic", "47+18=65\n", "65"),
        ("recall", "ka=7 mo=2 ? mo=2", "2"),
        ("story", "Who has the kite? Tom.", "Tom."),
        ("brackets", "([])", None),
    ],
)
def test_answer_of_is_the_determined_end(kind, line, answer):
    assert answer_of(kind, line) == answer


@pytest.mark.parametrize("arguments", [{"size": 0}, {"size": -4}, {"seed": -1}])
def test_synthetic_arguments_out_of_range_are_an_error(arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        synthetic(**arguments)
