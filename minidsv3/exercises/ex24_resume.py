"""Resume: a run that was stopped goes on to the same bits (lesson 07)."""

import copy
from typing import Any

import numpy as np

from .calling import Mine
from .exercise import Exercise, Property, require, same, sizes
from .golden import Case, golden

Rng = np.random.Generator


class Run:
    """A training run in small: AdamW on a least-squares problem with random batches.

    State: `weights`, `exp_avg`, `exp_avg_sq` (float64 [n]), `steps` done, `position` in the data, `rng`. `noise` is
    a setting.
    """

    def __init__(self, seed: int, n: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.weights = self.rng.standard_normal(n)
        self.exp_avg = np.zeros(n, dtype=np.float64)
        self.exp_avg_sq = np.zeros(n, dtype=np.float64)
        self.steps = 0
        self.position = 0
        self.noise = 0.1

    def step(self) -> None:
        """One AdamW step on the batch at `position`, with noise from `rng`."""
        self.steps += 1
        batch = np.sin(np.arange(self.position, self.position + len(self.weights), dtype=np.float64))
        self.position += len(self.weights)
        gradient = self.weights - batch + self.noise * self.rng.standard_normal(len(self.weights))
        self.exp_avg[...] = 0.9 * self.exp_avg + 0.1 * gradient
        self.exp_avg_sq[...] = 0.95 * self.exp_avg_sq + 0.05 * gradient**2
        mean, square = self.exp_avg / (1 - 0.9**self.steps), self.exp_avg_sq / (1 - 0.95**self.steps)
        self.weights -= 0.05 * mean / (np.sqrt(square) + 1e-8)


def _pair(mine: Mine, rng: Rng, more: int = 0) -> tuple[Run, Run]:
    """A run, and one that was saved and restored into a fresh object; the first goes `more` steps on in between."""
    seed, n = int(rng.integers(1000)), sizes(rng, 1, 4, 9)[0]
    run = Run(seed, n)
    for _ in range(sizes(rng, 1, 3, 9)[0]):
        run.step()
    reference = copy.deepcopy(run)
    saved = mine.part("save")(run)
    for _ in range(more):
        run.step()
    other = Run(seed + 1, n)
    mine.part("restore")(other, saved)
    return reference, other


def _state(*names: str) -> Any:
    def test(mine: Mine, rng: Rng) -> None:
        reference, other = _pair(mine, rng)
        for name in names:
            same(name, getattr(other, name), getattr(reference, name), rtol=0, atol=0)

    return test


def _generator(mine: Mine, rng: Rng) -> None:
    reference, other = _pair(mine, rng)
    same("the next draw of rng", other.rng.random(), reference.rng.random(), rtol=0, atol=0)


def _apart(mine: Mine, rng: Rng) -> None:
    reference, other = _pair(mine, rng, more=3)
    for _ in range(3):
        reference.step()
        other.step()
    require(np.array_equal(other.weights, reference.weights),
            "the run that went on changed what was saved: weights differ after 3 steps")  # fmt: skip


def _golden(mine: Mine, case: Case) -> None:
    """Without noise: nothing of NumPy's generators is stored."""
    run, other = Run(0, len(case["start"])), Run(1, len(case["start"]))
    run.noise = other.noise = 0.0
    run.weights[...] = case["start"]
    for _ in range(4):
        run.step()
    mine.part("restore")(other, mine.part("save")(run))
    for _ in range(3):
        other.step()
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        same(f"{name} after 4 steps, a restart and 3 more", getattr(other, name), case[name], rtol=1e-9, atol=0)


def _enter(submission: Any, parts: Any) -> None:
    whole = Mine(submission)
    parts.save_and_restore = whole.part("save").submission, whole.part("restore").submission


EXERCISE = Exercise(
    title="resume to the same bits",
    kind="I",
    lesson=7,
    minutes=25,
    allowed=("minidsv3.exercises.ex24_resume.",),  # the run itself
    properties=(
        Property("weights", 1, "weights come back", _state("weights"), "copy the array"),
        Property(
            "moments",
            2,
            "both moments come back",
            _state("exp_avg", "exp_avg_sq"),
            "AdamW has two arrays of state a weight",
        ),
        Property(
            "counters",
            2,
            "step and position in the data come back",
            _state("steps", "position"),
            "bias correction uses the step; a resumed run must not read the same text twice",
        ),
        Property(
            "generator",
            2,
            "the random generator goes on where it stood",
            _generator,
            "rng.bit_generator.state is a dict: save it, set it",
        ),
        Property(
            "bits",
            2,
            "three more steps give the same bits, whatever the first run did since",
            _apart,
            "all of the state, copied: a checkpoint must not share memory with the run, nor a generator",
        ),
        golden("resume", _golden, "rtol 1e-9"),
    ),
    enter=_enter,
)
