"""How good is the model: bits per byte on the validation text, main head only.

Bits per byte compares across tokenizers: the total of -log2 p over all tokens, divided by the bytes that they spell.
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
