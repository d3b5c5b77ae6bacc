"""Find the bug: a small module that looks right, with one wrong line.

Each planted error is one that others made (the list with sources is in the exercise's file). The student says which
line it is, gives inputs on which it shows, and mends it: three properties. Inputs count together with the line only,
since many inputs show many errors. A course plants another error of the same module on another line, so that the
public answer points at the wrong one there.

The text of the correct module and the lines that replace one of its own stand side by side in the exercise's file; the
module is run from this text, and a test holds the correct one equal to the package.
"""

from __future__ import annotations

import hashlib
import linecache
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .calling import Mine
from .exercise import Exercise, Failed, Property, Variant, same


class Bug(NamedTuple):
    """One line of the module, and what stands there instead."""

    right: str
    wrong: str
    source: str  # who met it, what it does


class Finding(NamedTuple):
    """What is handed in for a find-the-bug exercise."""

    line: Any  # number of the wrong line, `def` is line 1; or a function that returns it
    witness: Any  # function that returns inputs, a dict, on which the module is wrong
    repaired: Any  # the mended function


def find_the_bug(
    title: str,
    lesson: int,
    minutes: int,
    correct: str,
    bugs: tuple[Bug, ...],
    cases: Callable[[np.random.Generator], list[dict[str, Any]]],
    hint: str,
) -> Exercise:
    """An exercise of kind B; `cases` are inputs by name, small to large, on which each of the bugs shows."""
    right = function_of(correct)
    texts = [planted(correct, bug) for bug in bugs]

    def properties(key: Any) -> tuple[Property, ...]:
        known = {key_of(text): (text, bug) for text, bug in zip(texts, bugs)}
        if key not in known:
            raise ValueError(f"variant={key!r} is not a module of this exercise")
        text, bug = known[key]
        wrong = function_of(text)
        number = text.splitlines().index(bug.wrong) + 1

        def line(mine: Mine, rng: np.random.Generator | None = None) -> None:
            part = mine.part("line")
            got = part() if callable(part.submission) else part.submission
            if isinstance(got, bool) or not isinstance(got, int | np.integer):
                raise Failed(f"the line is {type(got).__name__} {got!r}, expected a whole number")
            if got != number:
                raise Failed(f"line {got} is as it should be")

        def witness(mine: Mine, rng: np.random.Generator) -> None:
            line(mine)  # many inputs show many errors: only with the line is it a finding
            inputs = mine.part("witness")()
            names = list(cases(rng)[0])
            if not isinstance(inputs, dict) or set(inputs) != set(names):
                raise Failed(f"the witness is {type(inputs).__name__}, expected a dict of {', '.join(names)}")
            expected = _outcome(right, inputs)
            if isinstance(expected, Exception):
                raise Failed(f"these are no inputs of the module: {type(expected).__name__}: {expected}")
            if _differ(expected, expected):
                raise Failed("these are no inputs of the module: the right result is not finite")
            if not _differ(_outcome(wrong, inputs), expected):
                raise Failed("the module is right on these inputs: the bug does not show")

        def repaired(mine: Mine, rng: np.random.Generator) -> None:
            for inputs in cases(rng):
                compare(mine.part("repaired")(**inputs), right(**inputs))

        return (
            Property("line", 3, "the wrong line is named", line, hint),
            Property(
                "witness",
                3,
                "with the line, inputs on which the module is wrong",
                witness,
                "what must hold for any input?",
            ),
            Property("repaired", 4, "the mended module is right on random inputs", repaired, hint),
        )

    def variant(rng: np.random.Generator) -> Variant:
        lines = [text.splitlines().index(bug.wrong) for text, bug in zip(texts, bugs)]
        i = int(rng.choice([j for j, line in enumerate(lines) if line != lines[0]]))  # never the line of the public one
        return Variant(key_of(texts[i]), texts[i], solution_cell(correct, texts[i], bugs[i], cases))

    return Exercise(title, "B", lesson, minutes, properties(key_of(texts[0])), variants=properties, draw=variant)


def planted(correct: str, bug: Bug) -> str:
    """The module with the bug in it; ValueError unless the line to replace stands there exactly once."""
    lines = correct.splitlines()
    if lines.count(bug.right) != 1 or bug.wrong in lines:
        raise ValueError(f"{bug.right!r} stands {lines.count(bug.right)} times in the module, expected once")
    lines[lines.index(bug.right)] = bug.wrong
    return "\n".join(lines)


def key_of(text: str) -> str:
    """What names a variant: eight digits of the module's hash, which do not say which error it is."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def function_of(text: str) -> Callable[..., Any]:
    """The function that a module's text defines."""
    scope: dict[str, Any] = {"np": np, "__name__": "planted"}
    filename = f"<module {key_of(text)}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    exec(compile(text, filename, "exec"), scope)
    return scope[name_of(text)]


def name_of(text: str) -> str:
    """Name of the function that a module's text defines."""
    found = re.match(r"def (\w+)\(", text)
    assert found
    return found[1]


def compare(got: Any, expected: Any, what: str = "the result") -> None:
    """`same` through tuples."""
    if not isinstance(expected, tuple):
        same(what, got, expected, rtol=1e-9, atol=1e-12)
        return
    if not isinstance(got, tuple) or len(got) != len(expected):
        raise Failed(f"{what} is {type(got).__name__}, expected a tuple of {len(expected)}")
    for i, (a, b) in enumerate(zip(got, expected)):
        compare(a, b, f"{what}, part {i},")


def solution_cell(correct: str, wrong: str, bug: Bug, cases: Callable[[Any], list[dict[str, Any]]]) -> str:
    """The teacher's answer: line, first case on which the bug shows, the correct module."""
    right, broken = function_of(correct), function_of(wrong)
    shown = next(c for c in cases(np.random.default_rng(0)) if _differ(_outcome(broken, c), right(**c)))
    inputs = "\n".join(f"        {name}={_source_of(value)}," for name, value in shown.items())
    body = "\n".join(correct.splitlines()[1:])
    head = correct.splitlines()[0].replace(f"def {name_of(correct)}(", "def repaired(", 1)
    return (
        "def line():\n    ### BEGIN SOLUTION\n"
        f"    return {wrong.splitlines().index(bug.wrong) + 1}\n    ### END SOLUTION\n\n\n"
        "def witness():\n    ### BEGIN SOLUTION\n"
        f"    return dict(\n{inputs}\n    )\n    ### END SOLUTION\n\n\n"
        f"{head}\n    ### BEGIN SOLUTION\n{body}\n    ### END SOLUTION"
    )


def _outcome(function: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    try:
        with np.errstate(all="ignore"):
            return function(**inputs)
    except Exception as error:
        return error


def _differ(got: Any, expected: Any) -> bool:
    try:
        compare(got, expected)
    except Failed:
        return True
    return False


def _source_of(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"np.array({np.round(value, 4).tolist()!r})"
    return repr(value)
