"""How good is the model: bits per byte on the validation text, main head only.

Bits per byte compares across tokenizers: the total of -log2 p over all tokens, divided by the bytes that they spell.
By position, the same sum shows what a longer context gives, and where a model leaves the lengths of its training.
"""

from __future__ import annotations

import math

import numpy as np

from ..autograd import Array, no_grad
from ..model.transformer import Transformer
from ..ops.loss import IGNORED, cross_entropy
from .optim import Run


def bits_per_byte(
    model: Transformer, tokens_in: Array, targets: Array, num_bytes: int, *, batch_size: int = 16, run: Run = map
) -> float:
    """Bits per byte over windows [N, S] (`data.validation_windows`); sums in window order, whoever computes them."""

    def nats(start: int) -> float:
        window, wanted = tokens_in[start : start + batch_size], targets[start : start + batch_size]
        with no_grad():
            loss = float(cross_entropy(model(window), wanted))
        return loss * int(np.count_nonzero(wanted != IGNORED))

    return math.fsum(run(nats, range(0, len(tokens_in), batch_size))) / math.log(2) / num_bytes


def bits_by_position(
    model: Transformer, tokens_in: Array, targets: Array, *, batch_size: int = 16, run: Run = map
) -> Array:
    """Mean -log2 p of a token at each position of the windows [N, S]: float64 [S], NaN where nothing is predicted."""

    def sums(start: int) -> tuple[Array, Array]:
        window, wanted = tokens_in[start : start + batch_size], targets[start : start + batch_size]
        logits, counted = model.logits(window).astype(np.float64), wanted != IGNORED
        largest = logits.max(axis=-1)
        right = np.take_along_axis(logits, np.where(counted, wanted, 0)[..., None], axis=-1)[..., 0]
        nats = np.log(np.exp(logits - largest[..., None]).sum(axis=-1)) + largest - right
        return np.where(counted, nats, 0).sum(axis=0), counted.sum(axis=0)

    totals, counts = map(sum, zip(*run(sums, range(0, len(tokens_in), batch_size))))
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that was promised
        return np.asarray(totals / counts / math.log(2))
