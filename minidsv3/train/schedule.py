"""Schedules: learning rate, batch size, bias update speed and MTP weight as functions of the step (section 4.2).

All are pure functions of (config, step), so a resumed run needs no scheduler state. Steps count from 1. A phase
``(shape, until, end)`` lasts to the share `until` of all steps and brings the factor to `end`: at once ('constant'),
in a straight line ('linear'), or along half a cosine ('cosine').
"""

from __future__ import annotations

import math

from ..config import TrainConfig

Phases = tuple[tuple[str, float, float], ...]


def phase_factor(phases: Phases, progress: float, start: float = 0.0) -> float:
    """Factor at `progress` in [0, 1]; the first phase begins at `start` from factor 1."""
    before = 1.0
    for shape, until, end in phases:
        if progress <= until:
            if shape == "constant":
                return end
            share = min(max((progress - start) / max(until - start, 1e-12), 0.0), 1.0)
            if shape == "cosine":
                share = 0.5 - 0.5 * math.cos(math.pi * share)
            return before + (end - before) * share
        start, before = until, end
    return before


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """Linear warm-up over `warmup_steps`, then `lr_phases`."""
    if step <= cfg.warmup_steps:
        return cfg.learning_rate * step / cfg.warmup_steps
    warm = min(cfg.warmup_steps / cfg.steps, 1.0)
    return cfg.learning_rate * phase_factor(cfg.lr_phases, step / cfg.steps, warm)


def bias_update_speed(cfg: TrainConfig, step: int) -> float:
    """gamma of the balance bias: 0.001, then 0 for the last 500B tokens in the report."""
    return cfg.bias_update_speed * phase_factor(cfg.bias_phases, step / cfg.steps)


def mtp_weight(cfg: TrainConfig, step: int) -> float:
    """lambda of the MTP loss: 0.3, then 0.1 after 10T tokens in the report."""
    return cfg.mtp_weight * phase_factor(cfg.mtp_phases, step / cfg.steps)


def batch_size(cfg: TrainConfig, step: int) -> int:
    """Sequences of this step: `batch_size`, or on the way to it by a linear ramp, a multiple of `shards`."""
    if cfg.batch_ramp is None:
        return cfg.batch_size
    start, until = cfg.batch_ramp
    share = min(step / (until * cfg.steps), 1.0)
    units = cfg.batch_size / cfg.shards * (start + (1 - start) * share)
    return max(1, math.floor(units)) * cfg.shards


def sequences_before(cfg: TrainConfig, step: int) -> int:
    """Sequences consumed before `step`: the data position, given by the config alone."""
    if cfg.batch_ramp is None:
        return (step - 1) * cfg.batch_size
    return sum(batch_size(cfg, s) for s in range(1, step))
