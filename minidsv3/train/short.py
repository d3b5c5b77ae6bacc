"""A short run by its settings: what the lessons train in one line, and its history as arrays.

`quick.quick_run` does the work; this reads presets and settings as the command line does, trains on the generated
texts unless told otherwise, and keeps load and balance bias of every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..autograd import Array
from ..config import ModelConfig, TrainConfig, replace_settings
from ..model.layers import Recipe
from ..model.transformer import Transformer
from .quick import quick_run
from .step import gates


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


def short_run(
    preset: str, *, make: Callable[[ModelConfig, Recipe | None], Transformer] = Transformer, **settings: Any
) -> ShortRun:
    """Train preset `preset` with `settings` changed (fields of `ModelConfig` and `TrainConfig`).

    Parameters
    ----------
    preset : str
        'nano', 'tiny' or 'small'.
    make
        Builds the model, as for `quick_run`.
    **settings
        As ``--set`` of the command line; ``data`` is 'synthetic' unless given.

    Raises
    ------
    ValueError
        An unknown setting, a vocabulary too small for bytes, or a corpus that is not there.
    """
    settings = {"data": "synthetic"} | settings
    config, train = replace_settings(ModelConfig.preset(preset), TrainConfig.preset(preset), settings)
    biases: list[Array] = []
    run = quick_run(config, train, make=make, on_step=lambda step, model, result: biases.append(_biases(model)))
    main, mtp, balance = (run.curve(f"{name}_loss") for name in ("main", "mtp", "balance"))
    load = np.array([result.expert_load for result in run.steps])
    steps = np.arange(1, train.steps + 1, dtype=np.int64)
    return ShortRun(run.model, train, steps, main, mtp, balance, load, np.array(biases))


def _biases(model: Transformer) -> Array:
    """A copy of all balance biases, [Lm, E]; of a gate without one (V2), zeros."""
    E = model.config.n_routed_experts
    found = [gate.e_score_correction_bias for gate in gates(model)]
    return np.array([np.zeros(E, dtype=np.float32) if bias is None else bias for bias in found])
