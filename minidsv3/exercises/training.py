"""Use yours: the smallest model trains twenty steps with a student's code inside, beside the package's own.

An op enters by `autograd.replacing`; a router, a dispatcher, a quantiser are handed in at construction; a bias rule
takes the place of the package's after each step, frequencies that of the model's, and with save and restore the run
is stopped in the middle and a fresh one goes on. `Parts` collects what goes where, from one solution or from many
(``exercises run-mine``). Losses of both runs come back with the figure: same seed, same text, same initial weights, so
a right solution gives the package's curve up to rounding.

What has no place here: decoding (absorbed attention, accept and reject), placement and order of ranks (EPLB, the
schedule, all-to-all as one function), the MTP targets, which the model cuts itself, and the promoted sum, which a
Python function of one sum would have to be asked for millions of times a step.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..autograd import Function, replacing
from ..config import ModelConfig, TrainConfig
from ..data.synthetic import synthetic
from ..model.transformer import Transformer
from ..ops.rope import rotation_magnitude
from ..ops.routing import select_experts
from ..train.optim import AdamW, FlatParameters
from ..train.step import cut, gates, train_step
from .checker import evaluate, exercise_of, grading, lines

STEPS = 20


@dataclass
class Parts:
    """Where students' code goes; what nobody fills stays the package's."""

    replacements: list[tuple[type[Function], type[Function]]] = field(default_factory=list)
    select: Callable[..., np.ndarray] = select_experts
    dispatcher: Callable[[int], Any] | None = None  # number of experts -> dispatcher
    update_bias: Callable[[np.ndarray, np.ndarray, float], np.ndarray] | None = None
    recipe: Any = None
    frequencies: Callable[[ModelConfig], np.ndarray] | None = None  # of RoPE's channel pairs
    save_and_restore: tuple[Callable[[Any], Any], Callable[[Any, Any], None]] | None = None
    rope_scaling: dict[str, Any] | None = None  # a setting: the run that is compared with has it too

    def package(self) -> Parts:
        """The same settings, with the package's own code."""
        return Parts(rope_scaling=self.rope_scaling)


def parts_of(solutions: Iterable[tuple[str, Any]]) -> Parts:
    """Parts with every solution in its place; those that have none in a training step are left out."""
    parts = Parts()
    for name, submission in solutions:
        if enter := exercise_of(name).enter:
            enter(submission, parts)
    return parts


class _Run:
    """A training run of `nano` on synthetic text, with students' parts in it."""

    def __init__(self, parts: Parts, steps: int, seed: int) -> None:
        cfg = dataclasses.replace(ModelConfig.preset("nano"), rope_scaling=parts.rope_scaling)
        settings = dataclasses.replace(
            TrainConfig.preset("nano"), steps=steps, warmup_steps=5, batch_size=8, workers=1, seed=seed
        )
        if parts.update_bias:  # then nobody else moves the bias
            settings = dataclasses.replace(settings, bias_update_speed=0.0)
        self._parts, self._settings = parts, settings
        dispatcher = parts.dispatcher(cfg.n_routed_experts) if parts.dispatcher else None
        self.model = _Model(cfg, parts.recipe, dispatcher, parts.select)
        self.model.frequencies = parts.frequencies
        self.model.init_weights(np.random.default_rng(seed))
        self.flat = FlatParameters(self.model)
        self.optimizer = AdamW(self.flat, self._settings)
        self.gradients = [self.flat.new_gradient() for _ in range(self._settings.shards)]
        text = b"".join(d.text.encode("utf-8") for d in synthetic(0, 100_000))
        self._text = np.frombuffer(text, dtype=np.uint8)
        self.steps, self.position, self.rng = 0, 0, np.random.default_rng([seed, 1])

    def step(self) -> float:
        """One step; its loss in nats. What is read depends on `position` and on `rng`."""
        cfg, length = self._settings, self._settings.seq_len + 1
        self.steps += 1
        starts = (self.position + self.rng.integers(0, len(self._text), cfg.batch_size)) % (len(self._text) - length)
        self.position += cfg.batch_size * cfg.seq_len
        window = self._text[starts[:, None] + np.arange(length, dtype=np.int64)].astype(np.int64)
        shards = cut(window[:, :-1], window[:, 1:], cfg.shards)
        result = train_step(self.model, self.optimizer, self.gradients, shards, cfg, self.steps)
        speed = TrainConfig.preset("nano").bias_update_speed
        for gate, load in zip(gates(self.model), result.expert_load) if self._parts.update_bias else ():
            bias = gate.e_score_correction_bias
            if bias is not None and self._parts.update_bias:
                bias[...] = self._parts.update_bias(bias.copy(), load, speed)
        return result.loss

    def state(self) -> SimpleNamespace:
        """What exercise 24 calls a run: the arrays themselves, not copies."""
        moments = dict(exp_avg=self.optimizer.exp_avg, exp_avg_sq=self.optimizer.exp_avg_sq)
        return SimpleNamespace(
            weights=self.flat.data, **moments, steps=self.steps, position=self.position, rng=self.rng
        )

    def stopped_and_restored(self, save: Callable[[Any], Any], restore: Callable[[Any, Any], None]) -> _Run:
        """A fresh run with the state that a student saved from this one (the balancing bias is carried over here)."""
        saved, fresh = save(self.state()), _Run(self._parts, self._settings.steps, self._settings.seed + 1)
        back = fresh.state()
        restore(back, saved)
        fresh.flat.data[...] = back.weights
        fresh.optimizer.exp_avg[...], fresh.optimizer.exp_avg_sq[...] = back.exp_avg, back.exp_avg_sq
        fresh.steps, fresh.position, fresh.rng = back.steps, back.position, back.rng
        for new, old in zip(gates(fresh.model), gates(self.model)):
            if new.e_score_correction_bias is not None and old.e_score_correction_bias is not None:
                new.e_score_correction_bias[...] = old.e_score_correction_bias
        return fresh


class _Model(Transformer):
    """The model, with a student's RoPE frequencies where there are some."""

    frequencies: Callable[..., np.ndarray] | None = None

    def rotation(self, start: int, stop: int) -> np.ndarray:
        """Rotation of positions start..stop-1: complex [stop - start, d_r/2]."""
        table = super().rotation(start, stop)
        if self.frequencies is None:
            return table
        angles = np.arange(start, stop, dtype=np.float64)[:, None] * self.frequencies(self.config)
        return (rotation_magnitude(self.config.rope_scaling) * np.exp(1j * angles)).astype(table.dtype)


def train(parts: Parts, steps: int = STEPS, seed: int = 0) -> np.ndarray:
    """Losses (nats) of `steps` steps of `nano` on synthetic text: float64 [steps]."""
    losses = np.empty(steps, dtype=np.float64)
    with ExitStack() as stack:
        for old, new in parts.replacements:
            stack.enter_context(replacing(old, new))
        run = _Run(parts, steps, seed)
        for step in range(steps):
            if parts.save_and_restore and step == steps // 2:
                run = run.stopped_and_restored(*parts.save_and_restore)
            losses[step] = run.step()
    return losses


def use(name: str, submission: Any, steps: int = STEPS) -> Any:
    """Train `nano` with a solution inside, if it passes its check: the loss curve beside the package's.

    Returns
    -------
    plots.Picture, or None where the check does not pass or the exercise has no place in a training step.
    """
    if grading():
        print(f"{name}: not trained while a class is graded")
        return None
    exercise, results = exercise_of(name), evaluate(name, submission)
    failed = [r for r in results if r.detail]
    if failed:
        print(f"{name} does not pass yet, so the model keeps the package's own:")
        print("\n".join(lines(failed)))
        return None
    if exercise.enter is None:
        print(f"{name} passes; it has no place in a training step")
        return None
    if os.environ.get("MINIDSV3_FAST") == "1":
        steps = min(steps, 2)
    return compare_losses({name: submission}, steps)


def compare_losses(solutions: dict[str, Any], steps: int = STEPS) -> Any:
    """Both loss curves of solutions that have a place in a training step, as a picture."""
    parts = parts_of(solutions.items())
    own, ours = train(parts, steps), train(parts.package(), steps)
    print(f"{steps} steps of nano: loss {own[0]:.3f} -> {own[-1]:.3f} with {', '.join(solutions)}; the package's own "
          f"ends at {ours[-1]:.3f}, largest difference {np.abs(own - ours).max():.1e}")  # fmt: skip
    from .figures import show_losses  # matplotlib takes its time: only for who wants the picture

    return show_losses(own, ours, list(solutions))
