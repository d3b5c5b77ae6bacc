"""One training step, whole: forward, backward, clip, AdamW, balance bias.

The batch is cut into shards. Each shard has its own forward and backward pass into its own gradient; the sums are
taken in the order of the shards. Who computes a shard, and when, is decided by `run` (`map`, or a thread pool's map)
and never changes a bit of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..autograd import Array, backward
from ..config import TrainConfig
from ..model.moe import Gate
from ..model.transformer import Transformer
from .balance import update_bias
from .optim import AdamW, FlatGradient, Run, sum_gradients
from .schedule import bias_update_speed, learning_rate, mtp_weight

Shard = tuple[Array, Array]  # tokens_in, targets: int [B, S]


class StepResult(NamedTuple):
    """What one step reports; losses in nats, means over the batch."""

    loss: float
    main_loss: float
    mtp_loss: float
    balance_loss: float
    grad_norm: float  # before clipping
    lr: float
    expert_load: Array  # int64 [layers with experts, E], whole batch


class NonFiniteError(ArithmeticError):
    """A loss or gradient is NaN or infinite; nothing was updated."""


def train_step(
    model: Transformer,
    optimizer: AdamW,
    gradients: list[FlatGradient],
    shards: list[Shard],
    cfg: TrainConfig,
    step: int,
    run: Run = map,
    add_up: Callable[[list[Array], Run], float] | None = None,
) -> StepResult:
    """Do step number `step` (from 1) on `shards`; `gradients` are one buffer a shard (`FlatParameters.new_gradient`).

    `add_up` adds the shards' gradients and returns the norm of the sum (`sum_gradients` if not given).

    Raises NonFiniteError, before anything is updated, if a loss or the gradient is not finite.
    """
    n, lr = len(shards), learning_rate(cfg, step)

    def shard_losses(i: int) -> tuple[list[float], Array]:
        into = gradients[i].into
        into.begin()
        with np.errstate(over="ignore", invalid="ignore"):  # looked for below, where it can be named
            losses = model.loss(
                *shards[i],
                mtp_weight=mtp_weight(cfg, step),
                balance_weight=cfg.balance_weight,
                recompute=cfg.recompute,
            )
            backward(losses.total, into)
        into.finish()
        return [float(value) for value in losses[:4]], losses.expert_load

    results = list(run(shard_losses, range(n)))
    loss, main, mtp, balance = (math.fsum(values) / n for values in zip(*(losses for losses, _ in results)))
    grad_norm = (add_up or sum_gradients)([gradient.data for gradient in gradients], run) / n
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFiniteError(f"step {step}: loss {loss}, gradient norm {grad_norm}")
    clip = min(1.0, cfg.grad_clip / max(grad_norm, 1e-12))
    optimizer.step(gradients[0].data, step, lr, clip / n, run)

    load = sum(load for _, load in results)  # integers: no order to keep
    for gate, load_of_expert in zip(gates(model), load):
        if gate.e_score_correction_bias is not None:
            update_bias(gate.e_score_correction_bias, load_of_expert, bias_update_speed(cfg, step))
    return StepResult(loss, main, mtp, balance, grad_norm, lr, load)


def gates(model: Transformer) -> list[Gate]:
    """The gates of all layers with experts, MTP modules last."""
    return [module for _, module in model.named_modules() if isinstance(module, Gate)]


def cut(tokens_in: Array, targets: Array, shards: int) -> list[Shard]:
    """Equal pieces of a batch, in order."""
    return list(zip(np.split(tokens_in, shards), np.split(targets, shards)))
