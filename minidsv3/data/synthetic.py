"""A small language of our own, written by a seeded generator: no download, and every answer can be graded.

Four kinds of documents, in turn; each is a list of short items, one a line:

    arithmetic   47+18=65              a sum, a difference or a product; what follows ``=`` is determined
    brackets     ([]{()})              a balanced string; which bracket closes is determined, when is not
    recall       ka=7 mo=2 ti=9 ? mo=2 one pair is asked again; what follows the last ``=`` is determined
    story        Ann has a red kite. ... Who has the kite? Tom.       the last word is determined

The determined places are what a model can learn to get right, the others are noise of a known size: so routing, load
balance, multi-token prediction and decoding can be watched learning within seconds. `answer_of` finds the determined
end of a line, for grading.

What is simplified against text: four kinds instead of a language, no item is longer than a line.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from .extract import Document

KINDS = ("arithmetic", "brackets", "recall", "story")
_DOCUMENT_BYTES = 8192
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
_NAMES = ["Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gil", "Hana", "Ivo", "June", "Kim", "Leo", "Mia", "Noor", "Tom"]
_COLOURS = ["red", "blue", "green", "small", "old", "new", "round", "heavy"]
_THINGS = ["kite", "ball", "book", "lamp", "cup", "hat", "drum", "coin", "shell", "map"]
_PLACES = ["garden", "school", "market", "river", "station", "kitchen"]


def synthetic(seed: int = 0, size: int = 1_000_000) -> list[Document]:
    """Documents of the synthetic language, the four kinds in turn.

    Parameters
    ----------
    seed : int
        The same seed and size give the same documents; a larger size begins with the same documents.
    size : int
        Bytes to reach; the last document ends with the line that reaches it.

    Returns
    -------
    list of Document
        ASCII text, titled ``arithmetic 0``, ``brackets 0``, ... ``arithmetic 1``, ...; about 8 kB each.

    Raises
    ------
    ValueError
        `size` is not positive or `seed` is negative.
    """
    if size <= 0:
        raise ValueError(f"size={size} is not positive")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative")
    documents: list[Document] = []
    while size > 0:
        number = len(documents)
        kind = KINDS[number % len(KINDS)]
        text = _document(_WRITERS[kind], np.random.default_rng([seed, number]), min(size, _DOCUMENT_BYTES))
        documents.append(Document(f"{kind} {number // len(KINDS)}", text))
        size -= len(text)
    return documents


def answer_of(kind: str, line: str) -> str | None:
    """The end of a line that its beginning determines, without the newline; None where nothing is determined."""
    if kind in ("arithmetic", "recall"):
        return line.rstrip("\n").rpartition("=")[2]
    if kind == "story":
        return line.rstrip("\n").rpartition(" ")[2]
    return None


def _document(write_item: Callable[[np.random.Generator], str], rng: np.random.Generator, size: int) -> str:
    lines: list[str] = []
    length = 0
    while length < size:
        lines.append(write_item(rng) + "\n")
        length += len(lines[-1])
    return "".join(lines)


def _arithmetic(rng: np.random.Generator) -> str:
    rest, b = divmod(int(rng.integers(3 * 100 * 100)), 100)
    operation, a = divmod(rest, 100)
    if operation == 0:
        return f"{a}+{b}={a + b}"
    if operation == 1:
        return f"{max(a, b)}-{min(a, b)}={abs(a - b)}"
    a, b = a % 10, b % 10
    return f"{a}*{b}={a * b}"


def _brackets(rng: np.random.Generator) -> str:
    """Open or close by the toss of a coin, close all at the end."""
    written, open_brackets = "", ""
    for opens, which in rng.integers([2, 3], size=(int(rng.integers(4, 17)), 2)).tolist():
        if opens or not open_brackets:
            bracket = "([{"[which]
            open_brackets += bracket
        else:
            bracket, open_brackets = _PAIRS[open_brackets[-1]], open_brackets[:-1]
        written += bracket
    return written + "".join(_PAIRS[bracket] for bracket in reversed(open_brackets))


def _recall(rng: np.random.Generator) -> str:
    count = int(rng.integers(3, 9))
    keys = rng.permutation(len(_SYLLABLES))[:count].tolist()
    pairs = [f"{_SYLLABLES[key]}={value}" for key, value in zip(keys, rng.integers(10, size=count).tolist())]
    return " ".join([*pairs, "?", pairs[int(rng.integers(count))]])


def _story(rng: np.random.Generator) -> str:
    """A thing changes hands up to three times."""
    people = [_NAMES[i] for i in rng.permutation(len(_NAMES))[: int(rng.integers(2, 5))].tolist()]
    colour, thing, place = (words[int(rng.integers(len(words)))] for words in (_COLOURS, _THINGS, _PLACES))
    moves = [f"{giver} gives the {thing} to {taker}." for giver, taker in pairwise(people)]
    return " ".join(
        [
            f"{people[0]} has a {colour} {thing}.".replace("a old", "an old"),
            f"{people[0]} goes to the {place}.",
            *moves,
            f"Who has the {thing}? {people[-1]}.",
        ]
    )


_WRITERS = dict(zip(KINDS, (_arithmetic, _brackets, _recall, _story)))
