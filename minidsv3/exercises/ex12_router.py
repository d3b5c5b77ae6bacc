"""The router: groups, bias, ties (lesson 04)."""

from typing import Any

import numpy as np

from .calling import Mine
from .exercise import Exercise, Property, same, sizes
from .golden import Case, golden

Rng = np.random.Generator


def _choose(scores: Any, bias: Any, top_k: int, n_group: int, topk_group: int) -> np.ndarray:
    """One token at a time, with sorts of (value, index)."""
    out = []
    for s in scores:
        choice = [float(a + b) for a, b in zip(s, bias)]
        size = len(choice) // n_group
        groups = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(n_group)]
        kept = sorted(range(n_group), key=lambda g: (-groups[g], g))[:topk_group]
        experts = [e for e in range(len(choice)) if e // size in kept]
        out.append(sorted(sorted(experts, key=lambda e: (-choice[e], e))[:top_k]))
    return np.array(out, dtype=np.int64)


def _compare(mine: Mine, scores: Any, bias: Any, top_k: int, n_group: int, topk_group: int) -> None:
    got = mine(scores, bias, top_k=top_k, n_group=n_group, topk_group=topk_group)
    same("the experts", got, _choose(scores, bias, top_k, n_group, topk_group))


def _plain(mine: Mine, rng: Rng) -> None:
    for E, T in ((4, 1), sizes(rng, 2, 6, 12)):
        _compare(mine, rng.random((T, E)), np.zeros(E, dtype=np.float64), 3, 1, 1)


def _ties(mine: Mine, rng: Rng) -> None:
    T, E = sizes(rng, 2, 6, 12)
    _compare(mine, np.full((T, E), 0.5, dtype=np.float64), np.zeros(E, dtype=np.float64), 3, 1, 1)
    _compare(mine, rng.integers(0, 3, (T, E)) / 4, np.zeros(E, dtype=np.float64), 3, 1, 1)


def _bias(mine: Mine, rng: Rng) -> None:
    T, E = sizes(rng, 2, 6, 12)
    _compare(mine, rng.random((T, E)), rng.normal(0, 0.5, E), 3, 1, 1)


def _groups(mine: Mine, rng: Rng) -> None:
    for _ in range(3):
        T, size = sizes(rng, 2, 3, 8)
        _compare(mine, rng.random((T, 4 * size)), rng.normal(0, 0.1, 4 * size), 4, 4, 2)


def _negative(mine: Mine, rng: Rng) -> None:
    """All biased scores below zero: a mask of 0 would win."""
    T, size = sizes(rng, 2, 3, 8)
    _compare(mine, rng.random((T, 4 * size)), rng.uniform(-9, -5, 4 * size), size, 4, 1)


def _golden(mine: Mine, case: Case) -> None:
    settings = {name: case[name] for name in ("top_k", "n_group", "topk_group")}
    same("the experts", mine(case["scores"], case["bias"], **settings), case["topk_idx"])


def _enter(submission: Any, parts: Any) -> None:
    def select(scores: Any, bias: Any, *, top_k: int, n_group: int, topk_group: int, method: str) -> Any:
        return submission(scores, bias, top_k=top_k, n_group=n_group, topk_group=topk_group)

    parts.select = select


EXERCISE = Exercise(
    title="a router with groups, bias and ties",
    kind="I",
    lesson=4,
    minutes=35,
    properties=(
        Property(
            "plain",
            1,
            "without groups: the best experts, ascending",
            _plain,
            "return int64 [T, K], each row sorted by expert number",
        ),
        Property(
            "ties",
            2,
            "equal scores go to the lowest index",
            _ties,
            "np.argsort(-values, kind='stable') keeps the order of equals",
        ),
        Property(
            "bias",
            2,
            "the bias takes part in the choice",
            _bias,
            "choose by score + bias; the weights (not asked here) use the score alone",
        ),
        Property(
            "groups",
            2,
            "only the groups with the best two-expert sums are used",
            _groups,
            "a group's score is the sum of its two best score + bias",
        ),
        Property(
            "negative",
            2,
            "no masked expert wins when all scores are negative",
            _negative,
            "mask with -inf: 0 is larger than a negative score",
        ),
        golden("router", _golden, "equal"),
    ),
    enter=_enter,
)
