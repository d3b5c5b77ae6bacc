"""A short run in memory: what the lessons train, without a run folder.

The same step, schedule, data order and first weights as `Trainer`, and so the same numbers; but nothing is written,
resumed or validated, and one thread does the work. Whoever wants a run to keep takes `Trainer`, or the command
``python -m minidsv3 train``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..autograd import Array
from ..config import ModelConfig, TrainConfig, replace_settings
from ..data import ByteTokenizer, Loader, load_corpus, split_documents
from ..model.transformer import Transformer
from .optim import AdamW, FlatParameters
from .schedule import batch_size, sequences_before
from .step import cut, gates, train_step


class ShortRun(NamedTuple):
    """A trained model, and its run step by step (N steps, Lm layers with experts, E experts)."""

    model: Transformer
    train: TrainConfig
    step: Array  # int64 [N], from 1
    main_loss: Array  # float64 [N] nats per token
    mtp_loss: Array  # float64 [N] nats per token
    balance_loss: Array  # float64 [N] sum over layers, 1 each where all is even
    load: Array  # int64 [N, Lm, E] tokens of each expert, MTP modules last
    bias: Array  # float32 [N, Lm, E] balance bias after the step


def short_run(preset: str, *, make: Callable[[ModelConfig], Transformer] = Transformer, **settings: Any) -> ShortRun:
    """Train preset `preset` with `settings` changed (fields of `ModelConfig` and `TrainConfig`).

    Parameters
    ----------
    preset : str
        'nano', 'tiny' or 'small'.
    make : function of a ModelConfig
        Builds the model: a variant of `Transformer`, or one with a recipe or another selection rule.
    **settings
        As ``--set`` of the command line; ``data`` is 'synthetic' unless given.

    Raises
    ------
    ValueError
        An unknown setting, a vocabulary too small for bytes, or a corpus that is not there.
    """
    config, train = replace_settings(
        ModelConfig.preset(preset), TrainConfig.preset(preset), {"data": "synthetic"} | settings
    )
    tokenizer = ByteTokenizer()
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(f"vocab_size={config.vocab_size} is smaller than the {tokenizer.vocab_size} ids of bytes")
    documents, _ = split_documents(load_corpus(train.data).documents)
    loader = Loader(documents, tokenizer, train.seq_len, train.seed)
    model = make(config)
    model.init_weights(np.random.default_rng(np.random.SeedSequence(train.seed, spawn_key=(0,))))
    flat = FlatParameters(model)
    optimizer, gradients = AdamW(flat, train), [flat.new_gradient() for _ in range(train.shards)]
    results, biases = [], []
    for step in range(1, train.steps + 1):
        batch = loader.batch(sequences_before(train, step), batch_size(train, step))
        results.append(train_step(model, optimizer, gradients, cut(*batch, train.shards), train, step))
        biases.append(_biases(model))
    main, mtp, balance = np.array([[r.main_loss, r.mtp_loss, r.balance_loss] for r in results]).T
    steps = np.arange(1, train.steps + 1, dtype=np.int64)
    load = np.array([r.expert_load for r in results])
    return ShortRun(model, train, steps, main, mtp, balance, load, np.array(biases))


def _biases(model: Transformer) -> Array:
    """A copy of all balance biases, [Lm, E]; of a gate without one (V2), zeros."""
    E = model.config.n_routed_experts
    found = [gate.e_score_correction_bias for gate in gates(model)]
    return np.array([np.zeros(E, dtype=np.float32) if bias is None else bias for bias in found])
