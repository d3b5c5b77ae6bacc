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


def max_vio(load: np.ndarray) -> np.ndarray:
    """MaxVio, (max - mean) / mean over the experts: 0 is perfect balance, E/K - 1 the worst.

    Parameters
    ----------
    load : ndarray [..., E]
        Tokens of each expert; sum over batches first for the global MaxVio, not for the one of each batch.

    Returns
    -------
    ndarray [...], float64

    Raises
    ------
    ValueError
        A load without any token has no mean to compare with.
    """
    load = np.asarray(load)
    if not np.all(load.sum(axis=-1) > 0):
        raise ValueError(f"load of shape {load.shape} has a layer without tokens: MaxVio is not defined")
    mean = load.mean(axis=-1)
    return (load.max(axis=-1) - mean) / mean


def specialisation(load: np.ndarray) -> np.ndarray:
    """Bits that an expert's name tells about the kind of text it was chosen for: 0 if all kinds use experts alike.

    The mutual information of kind and expert, every kind counted alike.

    Parameters
    ----------
    load : ndarray [..., kinds, E]
        Tokens of each kind of text for each expert.

    Returns
    -------
    ndarray [...], float64
        Between 0 and log2 of the number of kinds or experts, whichever is less.

    Raises
    ------
    ValueError
        A kind without any token.
    """
    load = np.asarray(load, dtype=np.float64)
    if not np.all(load.sum(axis=-1) > 0):
        raise ValueError(f"load of shape {load.shape} has a kind without tokens: its share is not defined")
    p = load / load.sum(axis=-1, keepdims=True) / load.shape[-2]  # [..., kind, expert], sums to 1
    apart = p.sum(axis=-1, keepdims=True) * p.sum(axis=-2, keepdims=True)
    terms = np.zeros_like(p)
    np.log2(p / np.where(apart > 0, apart, 1), out=terms, where=p > 0)
    return (p * terms).sum(axis=(-1, -2))
