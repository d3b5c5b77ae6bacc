"""Use yours: the smallest model trains twenty steps with a student's code inside, beside the package's own.

An op enters by `autograd.replacing`; a router, a dispatcher, a quantiser are handed in at construction; a bias rule
takes the place of the package's after each step. `Parts` collects what goes where, from one solution or from many
(``exercises run-mine``). Losses of both runs come back with the figure: same seed, same text, same initial weights, so
a right solution gives the package's curve up to rounding.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..autograd import Function, replacing
from ..config import ModelConfig, TrainConfig
from ..data.synthetic import synthetic
from ..model.transformer import Transformer
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


def parts_of(solutions: Iterable[tuple[str, Any]]) -> Parts:
    """Parts with every solution in its place; those that have none in a training step are left out."""
    parts = Parts()
    for name, submission in solutions:
        if enter := exercise_of(name).enter:
            enter(submission, parts)
    return parts


def train(parts: Parts, steps: int = STEPS, seed: int = 0) -> np.ndarray:
    """Losses (nats) of `steps` steps of `nano` on synthetic text: float64 [steps]."""
    cfg = ModelConfig.preset("nano")
    train_cfg = dataclasses.replace(
        TrainConfig.preset("nano"), steps=steps, warmup_steps=5, batch_size=8, workers=1, seed=seed
    )
    speed = train_cfg.bias_update_speed
    if parts.update_bias:
        train_cfg = dataclasses.replace(train_cfg, bias_update_speed=0.0)
    dispatcher = parts.dispatcher(cfg.n_routed_experts) if parts.dispatcher else None
    model = Transformer(cfg, parts.recipe, dispatcher, parts.select)
    model.init_weights(np.random.default_rng(seed))
    flat = FlatParameters(model)
    optimizer, gradients = AdamW(flat, train_cfg), [flat.new_gradient() for _ in range(train_cfg.shards)]
    text = np.frombuffer(b"".join(d.text.encode("utf-8") for d in synthetic(seed, 100_000)), dtype=np.uint8)
    rng = np.random.default_rng([seed, 1])
    losses = np.empty(steps, dtype=np.float64)
    with ExitStack() as stack:
        for old, new in parts.replacements:
            stack.enter_context(replacing(old, new))
        for step in range(1, steps + 1):
            starts = rng.integers(0, len(text) - train_cfg.seq_len - 1, train_cfg.batch_size)
            window = text[starts[:, None] + np.arange(train_cfg.seq_len + 1, dtype=np.int64)].astype(np.int64)
            shards = cut(window[:, :-1], window[:, 1:], train_cfg.shards)
            result = train_step(model, optimizer, gradients, shards, train_cfg, step)
            losses[step - 1] = result.loss
            for gate, load in zip(gates(model), result.expert_load) if parts.update_bias else ():
                bias = gate.e_score_correction_bias
                if bias is not None and parts.update_bias:
                    bias[...] = parts.update_bias(bias.copy(), load, speed)
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
    own, ours = train(parts_of(solutions.items()), steps), train(Parts(), steps)
    print(f"{steps} steps of nano: loss {own[0]:.3f} -> {own[-1]:.3f} with {', '.join(solutions)}; the package's own "
          f"ends at {ours[-1]:.3f}, largest difference {np.abs(own - ours).max():.1e}")  # fmt: skip
    from .figures import show_losses  # matplotlib takes its time: only for who wants the picture

    return show_losses(own, ours, list(solutions))
