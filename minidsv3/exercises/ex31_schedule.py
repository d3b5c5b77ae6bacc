"""One forward, one backward: a schedule for the validator (lesson 11)."""

from collections import Counter
from typing import Any

import numpy as np

from ..parallel.schedules import Schedule, bubble, validate
from ..parallel.timeline import timeline
from .calling import Mine
from .exercise import Exercise, Failed, Property, parts, require, same, sizes
from .golden import Case, golden

Rng = np.random.Generator


def _plan(mine: Mine, ranks: int, chunks: int) -> list[list[tuple[Any, ...]]]:
    rows = parts("the schedule", mine(ranks, chunks), ranks)
    for r, row in enumerate(rows):
        for op in parts(f"the list of rank {r}", row, 2 * chunks):
            if not (isinstance(op, tuple) and len(op) == 3 and op[0] in ("F", "B") and op[1] == 0):
                raise Failed(f"rank {r} has {op!r}, expected ('F', 0, chunk) or ('B', 0, chunk)")
    return [list(row) for row in rows]


def _complete(mine: Mine, rng: Rng) -> None:
    for ranks, chunks in ((1, 1), (2, 3), sizes(rng, 2, 3, 9)):
        for r, row in enumerate(_plan(mine, ranks, chunks)):
            wanted = Counter((kind, 0, c) for kind in "FB" for c in range(chunks))
            require(Counter(row) == wanted, f"rank {r} does not do each F and each B of {chunks} chunks once")


def _runs(mine: Mine, rng: Rng) -> None:
    for ranks, chunks in ((1, 2), (2, 3), sizes(rng, 2, 3, 9)):
        try:
            validate(Schedule("1f1b", _plan(mine, ranks, chunks)))
        except ValueError as error:
            raise Failed(f"{ranks} ranks, {chunks} chunks: {error}") from None


def _memory(mine: Mine, rng: Rng) -> None:
    for ranks, chunks in ((2, 5), sizes(rng, 2, 3, 9)):
        for r, row in enumerate(_plan(mine, ranks, chunks)):
            live = most = 0
            for kind, _, _ in row:
                live += 1 if kind == "F" else -1
                most = max(most, live)
            limit = min(ranks - r, chunks)
            require(most <= limit, f"rank {r} of {ranks} holds {most} chunks at once, expected at most {limit}")


def _bubble(mine: Mine, rng: Rng) -> None:
    ranks, chunks = sizes(rng, 2, 3, 9)
    F, B = 1.0, 2.0
    line = timeline(Schedule("1f1b", _plan(mine, ranks, chunks)), {"F": F, "B": B})
    expected = bubble("1f1b", ranks, F, B, 0.0, 0.0)
    same(
        f"idle time of each of {ranks} ranks with {chunks} chunks",
        np.array(line.idle),
        np.full(ranks, expected, np.float64),
    )


def _golden(mine: Mine, case: Case) -> None:
    plan = _plan(mine, case["ranks"], case["chunks"])
    order = [[c + 1 if kind == "F" else -(c + 1) for kind, _, c in row] for row in plan]
    same("the order (c + 1: forward of c, minus: backward)", np.array(order, dtype=np.int64), case["order"])


EXERCISE = Exercise(
    title="the schedule one forward, one backward",
    kind="I",
    lesson=11,
    minutes=35,
    properties=(
        Property(
            "complete",
            2,
            "every rank does each chunk's F and B once",
            _complete,
            "a list for each rank of ('F', 0, chunk) and ('B', 0, chunk)",
        ),
        Property(
            "runs",
            2,
            "no rank waits for ever",
            _runs,
            "rank r begins with min(ranks - 1 - r, chunks) forwards, then alternates F, B; chunks in order",
        ),
        Property(
            "memory",
            3,
            "rank r holds at most ranks - r chunks",
            _memory,
            "all forwards first would hold every chunk's activations",
        ),
        Property(
            "bubble",
            2,
            "idle time is (ranks - 1)(F + B)",
            _bubble,
            "the warm-up of rank r is ranks - 1 - r forwards, not one more or less",
        ),
        golden("schedule", _golden, "a clock's order, equal"),
    ),
)
