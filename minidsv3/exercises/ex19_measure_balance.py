"""Measure: what the bias rule does to MaxVio (lesson 05)."""

from typing import Any

import numpy as np

from ..train.balance import max_vio
from .calling import Mine
from .exercise import Exercise, Property, array, require, same

Rng = np.random.Generator
EXPERTS = 16


def simulate(speed: float, seed: int = 0, steps: int = 200, tokens: int = 256, top_k: int = 4) -> np.ndarray:
    """Loads int64 [steps, 16] of a gate with skewed affinities under the bias rule: an apparatus to measure with."""
    rng = np.random.default_rng(seed)
    popular, bias = rng.normal(0, 0.8, EXPERTS), np.zeros(EXPERTS, dtype=np.float64)
    loads = np.zeros((steps, EXPERTS), dtype=np.int64)
    for step in range(steps):
        scores = 1 / (1 + np.exp(-(popular + rng.standard_normal((tokens, EXPERTS)))))
        chosen = np.argsort(-(scores + bias), axis=1, kind="stable")[:, :top_k]
        loads[step] = np.bincount(chosen.reshape(-1), minlength=EXPERTS)
        bias += speed * np.sign(loads[step].mean() - loads[step])
    return loads


def _data(mine: Mine) -> dict[str, Any]:
    data = mine() if callable(mine.submission) else mine.submission
    require(isinstance(data, dict) and {"speeds", "loads", "max_vio"} <= set(data),
            "the data is no dict with speeds, loads, max_vio")  # fmt: skip
    return data


def _loads(mine: Mine, rng: Rng) -> None:
    data = _data(mine)
    speeds = [float(s) for s in data["speeds"]]
    require(len(speeds) == len(data["loads"]) and len(speeds) >= 4, "one array of loads for each of at least 4 speeds")
    for speed, loads in zip(speeds, data["loads"]):
        same(f"loads of speed {speed:g}", loads, simulate(speed))


def _sweep(mine: Mine, rng: Rng) -> None:
    speeds = np.array([float(s) for s in _data(mine)["speeds"]])
    require(0.0 in speeds, "speed 0 is missing: without it there is nothing to compare with")
    moving = speeds[speeds > 0]
    require(len(moving) >= 3 and moving.max() / moving.min() >= 100, "speeds above 0 must span a factor of 100")


def _max_vio(mine: Mine, rng: Rng) -> None:
    data = _data(mine)
    expected = np.array([float(max_vio(np.asarray(load)[-50:].sum(axis=0))) for load in data["loads"]])
    same("max_vio", array("max_vio", np.asarray(data["max_vio"], dtype=np.float64), expected.shape), expected)


def _best(mine: Mine, rng: Rng) -> None:
    data = _data(mine)
    speeds, measured = [float(s) for s in data["speeds"]], np.asarray(data["max_vio"], dtype=np.float64)
    require(len(speeds) == len(measured) and 0.0 in speeds, "no value for speed 0")
    without, best = measured[speeds.index(0.0)], measured.min()
    require(
        best < without / 5,
        f"the best speed gives MaxVio {best:.3g}, without the rule it is {without:.3g}: look further",
    )
    moving = [s for s in speeds if s > 0]
    inner = speeds[int(measured.argmin())] not in (0.0, min(moving), max(moving))
    require(inner, "the best speed stands at the edge of the sweep: measure beyond it")


EXERCISE = Exercise(
    title="measure: how fast should the bias move?",
    kind="M",
    lesson=5,
    minutes=35,
    properties=(
        Property(
            "loads",
            2,
            "loads come from the apparatus, one run a speed",
            _loads,
            "simulate(speed) with its default seed",
        ),
        Property(
            "sweep",
            2,
            "speed 0 and three more over a factor of 100",
            _sweep,
            "for example 0, 0.0001, 0.001, 0.01, 0.1, 1",
        ),
        Property(
            "max_vio",
            3,
            "MaxVio of the summed load of the last 50 steps",
            _max_vio,
            "(max - mean) / mean of loads[-50:].sum(axis=0)",
        ),
        Property(
            "best",
            3,
            "the best speed lies inside the sweep and pays",
            _best,
            "too slow has not arrived, too fast swings",
        ),
    ),
)
