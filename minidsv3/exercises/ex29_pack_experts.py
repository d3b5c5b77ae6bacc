"""EPLB's packing: heaviest first, into the lightest pack with room; and who gets a replica (lesson 10)."""

import numpy as np

from ..parallel.eplb import balanced_packing, replicate_experts
from .calling import Mine
from .exercise import Exercise, Property, array, same, sizes
from .golden import Case, golden

Rng = np.random.Generator


def _weights(rng: Rng, room: int, packs: int) -> np.ndarray:
    return rng.permutation(np.arange(3, 3 + room * packs, dtype=np.float64) ** 1.5)


def _pack(mine: Mine, weight: np.ndarray, packs: int) -> np.ndarray:
    return array("the packs", mine.part("pack")(weight, packs), weight.shape)


def _room(mine: Mine, rng: Rng) -> None:
    for room, packs in ((1, 2), sizes(rng, 2, 2, 6)):
        weight = _weights(rng, room, packs)
        weight[-1] *= 100  # one item outweighs all others: its pack is never the lightest again
        got = _pack(mine, weight, packs)
        counts = np.array([int((got == p).sum()) for p in range(packs)], dtype=np.int64)
        same("items of each pack", counts, np.full(packs, room, dtype=np.int64))


def _greedy(mine: Mine, rng: Rng) -> None:
    for room, packs in ((2, 2), sizes(rng, 2, 2, 6)):
        weight = _weights(rng, room, packs)
        expected, load, filled = np.zeros(len(weight), dtype=np.int64), [0.0] * packs, [0] * packs
        for item in sorted(range(len(weight)), key=lambda i: -weight[i]):
            p = min((q for q in range(packs) if filled[q] < room), key=lambda q: load[q])
            expected[item], load[p], filled[p] = p, load[p] + weight[item], filled[p] + 1
        same("the packs", _pack(mine, weight, packs), expected)


def _ties(mine: Mine, rng: Rng) -> None:
    weight = np.full(12, 2.0, dtype=np.float64)
    same(
        "the packs of equal weights", _pack(mine, weight, 4), balanced_packing(weight[None].astype(np.float32), 4)[0][0]
    )


def _replicas(mine: Mine, rng: Rng) -> None:
    for n in (2, *sizes(rng, 1, 4, 9)):
        weight = np.round(100 * rng.random(n) ** 3 + 1)
        replicas = n + sizes(rng, 1, 2, 7)[0]
        expected = replicate_experts(weight[None].astype(np.float32), replicas)[2][0]
        got = array("replicas", mine.part("replicas")(weight, replicas), (n,))
        same("replicas of each expert", got, expected)


def _golden(mine: Mine, case: Case) -> None:
    """Recorded from EPLB itself."""
    same("the packs", _pack(mine, case["weight"], case["packs"]), case["pack_of_item"])
    got = array("replicas", mine.part("replicas")(case["load"], case["count"]), case["load"].shape)
    same("replicas of each expert", got, case["replicas"])


EXERCISE = Exercise(
    title="packing and replicating experts as EPLB does",
    kind="I",
    lesson=10,
    minutes=30,
    properties=(
        Property("room", 2, "every pack gets the same number of items", _room, "a pack with n / packs items is full"),
        Property(
            "greedy",
            2,
            "heaviest first, into the lightest pack with room",
            _greedy,
            "sort by weight, heaviest first; argmin over the packs that have room",
        ),
        Property(
            "ties",
            2,
            "ties go to the lowest index",
            _ties,
            "a stable sort of -weight, and the first of equally light packs",
        ),
        Property(
            "replicas",
            3,
            "the next replica goes where a replica carries most",
            _replicas,
            "compare weight / count, and count starts at 1",
        ),
        golden("pack_experts", _golden, "recorded from EPLB itself, equal"),
    ),
)
