"""A training run in memory: no folder, no checkpoints, no validation on the way. For lessons and experiments.

It takes the same steps as `trainer.Trainer`, to the bit: same weights from the seed, same batches, same step. What it
leaves out is everything that makes a run safe: files, resume, signals, progress.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from ..config import ModelConfig, TrainConfig
from ..data import ByteTokenizer, Loader, load_corpus, split_documents, validation_windows
from ..model.transformer import Transformer
from ..quant.recipe import Recipe
from .evaluate import bits_per_byte
from .machine import keep_freed_memory
from .optim import AdamW, FlatParameters, Run
from .schedule import batch_size, sequences_before
from .step import StepResult, cut, train_step


class QuickRun(NamedTuple):
    """A trained model and what its steps reported."""

    model: Transformer
    steps: list[StepResult]
    validation: tuple[np.ndarray, np.ndarray, int]  # tokens_in, targets [N, S], bytes (`data.validation_windows`)

    def curve(self, name: str) -> np.ndarray:
        """One number of every step, float64 [steps]."""
        return np.array([getattr(step, name) for step in self.steps], dtype=np.float64)

    def bits_per_byte(self, windows: int = 64, batch: int = 16) -> float:
        """Bits per byte on the first `windows` windows of the validation text."""
        return validation_bits(self.model, self.validation, windows, batch)


def quick_run(
    config: ModelConfig,
    cfg: TrainConfig,
    *,
    recipe: Recipe | None = None,
    run: Run = map,
    on_step: Callable[[int, Transformer, StepResult], object] | None = None,
    make: Callable[[ModelConfig, Recipe | None], Transformer] = Transformer,
) -> QuickRun:
    """Train a fresh model on ``cfg.data`` for ``cfg.steps`` steps.

    Parameters
    ----------
    config, cfg : ModelConfig, TrainConfig
    recipe : Recipe, optional
        Arithmetic in low precision (`quant.recipe.recipe_for`).
    run : map, or a thread pool's map
        Never changes a bit of the result.
    on_step : function (step, model, result), optional
        Called after each step.
    make : function of a ModelConfig and a recipe
        Builds the model: a variant of `Transformer`.

    Raises
    ------
    ValueError
        A vocabulary too small for bytes, or a corpus that is not there.
    """
    keep_freed_memory()
    tokenizer = ByteTokenizer()
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(f"vocab_size={config.vocab_size} is smaller than the {tokenizer.vocab_size} ids of bytes")
    documents, held_out = split_documents(load_corpus(cfg.data).documents)
    loader = Loader(documents, tokenizer, cfg.seq_len, cfg.seed)
    model = make(config, recipe)
    model.init_weights(np.random.default_rng(np.random.SeedSequence(cfg.seed, spawn_key=(0,))))
    flat = FlatParameters(model)
    optimizer, gradients = AdamW(flat, cfg), [flat.new_gradient() for _ in range(cfg.shards)]
    results = []
    with threadpool_limits(1, user_api="blas"):  # as under the trainer: bits depend on BLAS's threads
        for step in range(1, cfg.steps + 1):
            shards = cut(*loader.batch(sequences_before(cfg, step), batch_size(cfg, step)), cfg.shards)
            results.append(train_step(model, optimizer, gradients, shards, cfg, step, run))
            if on_step:
                on_step(step, model, results[-1])
    return QuickRun(model, results, validation_windows(held_out, tokenizer, cfg.seq_len))


def validation_bits(
    model: Transformer, validation: tuple[np.ndarray, np.ndarray, int], windows: int, batch: int = 16
) -> float:
    """Bits per byte on the first `windows` windows alone; a byte is a token here."""
    tokens_in, targets = (part[:windows] for part in validation[:2])
    return bits_per_byte(model, tokens_in, targets, int((targets >= 0).sum()), batch_size=batch)
