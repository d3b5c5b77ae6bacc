"""Dispatch and combine: rows to their experts and back (lesson 04)."""

from typing import Any

import numpy as np

from ..model.moe import LocalHandle
from ..ops.routing import permute, unpermute
from .calling import Mine
from .exercise import Exercise, Property, array, same, sizes
from .exercise import parts as tuple_of
from .golden import ATOL, RTOL, Case, golden

Rng = np.random.Generator


def _case(rng: Rng) -> tuple[np.ndarray, int]:
    K, T, E = sizes(rng, 3, 2, 9)
    topk_idx = np.sort(np.argsort(rng.random((T, E)), axis=1)[:, :K], axis=1)
    return topk_idx, E


def _planned(mine: Mine, topk_idx: np.ndarray, E: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    (T, K), names = topk_idx.shape, ("rows_per_expert", "token_of_row", "row_of_slot")
    got = tuple_of("the plan", mine.part("plan")(topk_idx, E), 3)
    shapes = ((E,), (T * K,), (T, K))
    counts, token_of_row, row_of_slot = (array(n, a, s) for n, a, s in zip(names, got, shapes))
    for name, value, stop in (("token_of_row", token_of_row, T), ("row_of_slot", row_of_slot, T * K)):
        inside = np.clip(value, 0, stop - 1)
        same(name, value, inside.astype(np.int64))
    return counts, token_of_row, row_of_slot


def _counts(mine: Mine, rng: Rng) -> None:
    for topk_idx, E in ((np.array([[1]], dtype=np.int64), 3), _case(rng)):
        counts, _, _ = _planned(mine, topk_idx, E)
        same("rows_per_expert", counts, np.array([int((topk_idx == e).sum()) for e in range(E)], dtype=np.int64))


def _order(mine: Mine, rng: Rng) -> None:
    topk_idx, E = _case(rng)
    _, token_of_row, _ = _planned(mine, topk_idx, E)
    walked = [t for e in range(E) for t in range(len(topk_idx)) if e in topk_idx[t]]
    same("token_of_row", token_of_row, np.array(walked, dtype=np.int64))


def _inverse(mine: Mine, rng: Rng) -> None:
    topk_idx, E = _case(rng)
    rows = [(t, k) for e in range(E) for t in range(len(topk_idx)) for k in np.flatnonzero(topk_idx[t] == e)]
    expected = np.empty(topk_idx.shape, dtype=np.int64)
    for row, slot in enumerate(rows):
        expected[slot] = row
    same("row_of_slot", _planned(mine, topk_idx, E)[2], expected)


def _combine(mine: Mine, rng: Rng) -> None:
    topk_idx, _ = _case(rng)
    (T, K), D = topk_idx.shape, 5
    row_of_slot = rng.permutation(T * K).reshape(T, K)
    rows, weights = rng.standard_normal((T * K, D)), rng.random((T, K))
    expected = np.zeros((T, D), dtype=np.float64)
    for t, k in np.ndindex(T, K):
        expected[t] += weights[t, k] * rows[row_of_slot[t, k]]
    same("the combined rows", mine.part("combine")(rows, weights, row_of_slot), expected)


def _golden(mine: Mine, case: Case) -> None:
    names = ("rows_per_expert", "token_of_row", "row_of_slot")
    for name, got in zip(names, _planned(mine, case["topk_idx"], case["experts"])):
        same(name, got, case[name])
    got = mine.part("combine")(case["rows"], case["weights"], case["row_of_slot"])
    same("the combined rows", got, case["y"], RTOL, ATOL)


def _enter(submission: Any, parts: Any) -> None:
    plan = Mine(submission).part("plan").submission

    class Dispatcher:
        def __init__(self, experts: int) -> None:
            self._E = experts

        def dispatch(self, x: Any, topk_idx: Any, topk_weight: Any) -> Any:
            counts, token_of_row, row_of_slot = plan(topk_idx, self._E)
            handle = LocalHandle(counts, token_of_row, row_of_slot, topk_weight)
            return permute(x, handle.token_of_row, handle.row_of_slot), handle

        def combine(self, rows: Any, handle: Any) -> Any:
            return unpermute(rows, handle.topk_weight, handle.token_of_row, handle.row_of_slot)

    parts.dispatcher = Dispatcher


EXERCISE = Exercise(
    title="dispatch and combine: rows to their experts and back",
    kind="I",
    lesson=4,
    minutes=35,
    properties=(
        Property(
            "counts",
            2,
            "every row is counted at its expert",
            _counts,
            "np.bincount(..., minlength=E): an expert without rows has a 0",
        ),
        Property(
            "order",
            3,
            "rows are sorted by expert, tokens in order within one",
            _order,
            "a stable argsort of topk_idx.reshape(-1); its slots divided by K are the tokens",
        ),
        Property(
            "inverse",
            2,
            "row_of_slot says where each slot's row went",
            _inverse,
            "the inverse of a permutation p: inverse[p] = arange",
        ),
        Property(
            "combine",
            2,
            "a token gets the weighted sum of its rows",
            _combine,
            "rows[row_of_slot] is [T, K, D]; sum over K with the weights",
        ),
        golden("dispatch", _golden),
    ),
    enter=_enter,
)
