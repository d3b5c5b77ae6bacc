"""Twin runs: the same seed, weights and batches under different precisions, so that losses can be subtracted.

A run here is the loop of the trainer without its files: `twin` gives the training loss of every step. Two things make
the difference of two twins. One is chance: the *floor* is the twin of a run whose initial weights all differ by one
unit in the last place, and shows what a difference of nothing grows to over the same steps. The other is rounding in
the forward pass: `rounding_cost` reads the weights of a finished model in another precision. Large learning rates make
more of the first, small ones of the second, which end where the loss is more sharply curved.

`SMALL` is small on purpose (4 sequences of 64 on `tiny`, learning rate 1e-3, which is the preset's by the square root
of the batch): three seeds of five variants take half an hour on one core. What 1.33T tokens do to a 16B model, which is
what the report compares (appendix B.1), does not show here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from ..autograd import Array, no_grad
from ..config import ModelConfig, TrainConfig
from ..data import ByteTokenizer, Loader, load_corpus, split_documents
from ..model.transformer import Transformer
from ..quant.recipe import Recipe
from .machine import keep_freed_memory
from .optim import AdamW, FlatParameters
from .runs import smoothed
from .schedule import sequences_before
from .step import cut, gates, train_step

SMALL: dict[str, Any] = dict(batch_size=4, seq_len=64, learning_rate=1e-3)
TAIL = 200  # smoothed steps at the end over which a difference is averaged
DECAY = 0.9  # of the report's smoothing


class Twin(NamedTuple):
    """A run that is over."""

    model: Transformer
    losses: np.ndarray  # float64 [steps], nats


def twin(
    recipe: Recipe | None,
    cfg: TrainConfig,
    *,
    preset: str = "tiny",
    ulp: bool = False,
    on_step: Callable[[int, Transformer, float], object] | None = None,
) -> Twin:
    """Train; main training loss of each step.

    Parameters
    ----------
    recipe : Recipe, optional
        float32 without.
    cfg : TrainConfig
        Its seed decides weights and batches; AdamW's moments are of the recipe's dtype.
    ulp : bool
        Move every initial weight to the next larger float32.
    on_step : function (step, model, loss), optional
    """
    if recipe is not None:
        cfg = dataclasses.replace(cfg, moments_dtype=recipe.moments_dtype, precision=recipe.name)
    keep_freed_memory()
    train, _ = split_documents(load_corpus(cfg.data).documents)
    loader = Loader(train, ByteTokenizer(), cfg.seq_len, cfg.seed)
    model = Transformer(ModelConfig.preset(preset), recipe)
    model.init_weights(np.random.default_rng(np.random.SeedSequence(cfg.seed, spawn_key=(0,))))
    flat = FlatParameters(model)
    if ulp:
        np.nextafter(flat.data, np.float32(np.inf), out=flat.data)
    optimizer, gradients = AdamW(flat, cfg), [flat.new_gradient() for _ in range(cfg.shards)]
    losses = np.empty(cfg.steps, dtype=np.float64)
    with threadpool_limits(1, user_api="blas"):
        for step in range(1, cfg.steps + 1):
            batch = loader.batch(sequences_before(cfg, step), cfg.batch_size)
            losses[step - 1] = train_step(model, optimizer, gradients, cut(*batch, cfg.shards), cfg, step).main_loss
            if on_step:
                on_step(step, model, losses[step - 1])
    return Twin(model, losses)


def rounding_cost(model: Transformer, recipe: Recipe | None, batches: Sequence[tuple[Array, Array]]) -> float:
    """Relative rise of the main loss when `model` computes as `recipe` says, its weights unchanged."""
    other = Transformer(model.config, recipe)
    for mine, its in zip(other.parameters(), model.parameters()):
        mine.data = its.data
    for gate, trained in zip(gates(other), gates(model)):
        gate.e_score_correction_bias = trained.e_score_correction_bias
    with no_grad():
        losses = [[float(m.loss(*batch).main) for batch in batches] for m in (other, model)]
    return float(np.mean(losses[0]) / np.mean(losses[1])) - 1


def relative_difference(losses: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """``(smoothed losses - smoothed reference) / smoothed reference`` of each step, smoothed as the report does."""
    a, b = smoothed(losses, DECAY), smoothed(reference, DECAY)
    return (a - b) / b


def tail_mean(difference: np.ndarray) -> float:
    """Mean over the last `TAIL` steps, signed."""
    return float(difference[-TAIL:].mean())
