"""The balancing rule: the bias moves by the sign of the load's error (lesson 05)."""

from typing import Any

import numpy as np

from .calling import Mine
from .exercise import Exercise, Property, array, same, sizes
from .golden import ATOL, RTOL, Case, golden

Rng = np.random.Generator


def _load(rng: Rng) -> np.ndarray:
    E = sizes(rng, 1, 4, 12)[0]
    load = rng.integers(0, 50, E)
    load[:2] = 0, 60  # one below, one above the mean
    return load


def _zero(E: int) -> np.ndarray:
    return np.zeros(E, dtype=np.float32)


def _direction(mine: Mine, rng: Rng) -> None:
    load = _load(rng)
    got = array("the bias", mine(_zero(len(load)), load, 0.25), load.shape)
    same("the sign of the change", np.sign(got).astype(np.int64), np.sign(load.mean() - load).astype(np.int64))


def _size(mine: Mine, rng: Rng) -> None:
    for speed in (0.25, 0.001):
        load = _load(rng)
        moved = np.abs(array("the bias", mine(_zero(len(load)), load, speed), load.shape))
        same("the size of the change", moved, np.where(load == load.mean(), 0, speed).astype(np.float32))


def _balanced(mine: Mine, rng: Rng) -> None:
    bias = rng.standard_normal(5).astype(np.float32)
    same("the bias under an even load", mine(bias, np.full(5, 7, dtype=np.int64), 0.25), bias)


def _adds_up(mine: Mine, rng: Rng) -> None:
    load = _load(rng)
    bias, walked = (rng.standard_normal(len(load)) / 4).astype(np.float32), []
    for b, n in zip(bias, load):
        mean = sum(int(v) for v in load) / len(load)
        walked.append(b + np.float32(0.125 if n < mean else -0.125 if n > mean else 0.0))
    got = array("the bias", mine(bias, load, 0.125), bias.shape, np.float32)
    same("the new bias", got - bias, np.array(walked, dtype=np.float32) - bias)


def _golden(mine: Mine, case: Case) -> None:
    for step, load in enumerate(case["load"]):
        before, after = case["bias"][step : step + 2]
        same(f"the bias after step {step + 1}", mine(before, load, case["speed"]), after, RTOL, ATOL)


def _enter(submission: Any, parts: Any) -> None:
    parts.update_bias = submission


EXERCISE = Exercise(
    title="balancing without an auxiliary loss: the bias rule",
    kind="I",
    lesson=5,
    minutes=15,
    properties=(
        Property(
            "direction",
            3,
            "overloaded experts go down, the others up",
            _direction,
            "b += speed * sign(mean - load): who got too much becomes less attractive",
        ),
        Property(
            "size", 3, "every change is exactly speed", _size, "only the sign counts, not how far the load is off"
        ),
        Property("balanced", 1, "an even load changes nothing", _balanced, "sign(0) is 0, and the old bias stays"),
        Property(
            "adds_up",
            2,
            "the change is added to the old bias, in float32",
            _adds_up,
            "return bias + change as float32; the bias is a state that accumulates",
        ),
        golden("bias_update", _golden),
    ),
    enter=_enter,
)
