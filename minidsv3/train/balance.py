"""Balancing without an auxiliary loss (V3 report, section 2.1.2; Wang et al. 2024, Algorithm 1).

After each step, an expert that got more than the mean load of the *whole* batch has its bias lowered by gamma, one
that got less has it raised. Only the sign counts, not by how much, and no gradient is involved: the bias enters the
selection of experts and nothing else.
"""

from __future__ import annotations

import numpy as np

from ..autograd import Array


def update_bias(bias: Array, load: Array, speed: float) -> None:
    """``b_i += speed * sign(mean load - load_i)`` in place; bias float32 [E], load int [E]."""
    bias += np.float32(speed) * np.sign(load.mean() - load).astype(np.float32)


def max_vio(load: Array) -> Array:
    """Maximal violation, (largest load - mean) / mean over the last axis: [..., E] -> [...]; 0 is perfect balance."""
    mean = load.mean(axis=-1)
    return (load.max(axis=-1) - mean) / np.maximum(mean, 1e-12)
