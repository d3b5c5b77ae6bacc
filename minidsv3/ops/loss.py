"""Losses: cross-entropy over the vocabulary, and the sequence-wise balance loss of the routed experts.

Cross-entropy is fused with its softmax: ``log sum exp(logits) - logits[target]``, whose gradient is softmax minus
one-hot. The balance loss (V3 report, Eq. 17-20) is a small nudge inside each sequence, next to the bias that does the
real balancing: ``sum_i f_i P_i`` with f_i the share of the sequence's tokens that expert i got, times E/K, and P_i the
mean of its affinity normalised over *all* experts. f counts and has no gradient; P has.

Against the text: Eq. 18 counts the K best unbiased scores; here, as in the training code that was published for V2,
the experts that were really used are counted (bias and groups included), so the loss never pushes against a routing
that did not happen.
"""

from __future__ import annotations

import numpy as np

from ..autograd import Array, Function, Tensor
from .shape import require_shape

IGNORED = -100


class CrossEntropyFunction(Function):
    """Mean over valid positions of -log softmax(logits)[target]: logits [N, V], targets int [N] -> scalar (nats).

    Targets of -100 are ignored; with no valid target the loss and its gradient are zero.
    """

    def forward(self, logits: Array, *, targets: Array) -> Array:
        require_shape("CrossEntropy", "targets", targets, logits.shape[:-1])
        self._shape, N, V = logits.shape, targets.size, logits.shape[-1]
        logits, targets = logits.reshape(N, V), targets.reshape(N)
        valid = targets != IGNORED
        if valid.any() and not 0 <= int(targets[valid].min()) <= int(targets[valid].max()) < V:
            raise ValueError(f"CrossEntropy: a target is neither {IGNORED} nor in a vocabulary of {V}")
        count, rows = max(int(valid.sum()), 1), np.arange(N, dtype=np.int64)
        safe = np.where(valid, targets, 0)
        E = logits - logits.max(axis=-1, keepdims=True)
        at_target = E[rows, safe]
        np.exp(E, out=E)
        total = E @ np.ones(V, dtype=E.dtype)  # a gemv sums short rows fastest
        losses = np.where(valid, np.log(total) - at_target, 0)
        self._count = count
        self.save(E, total, safe, valid)
        return np.asarray(losses.sum(dtype=np.float64) / count, dtype=logits.dtype)

    def backward(self, dy: Array) -> Array:
        E, total, targets, valid = self.saved
        factor = dy / self._count * valid  # [N]
        dlogits = E * (factor / total)[:, None].astype(E.dtype)
        dlogits[np.arange(len(E), dtype=np.int64), targets] -= factor.astype(E.dtype)
        return dlogits.reshape(self._shape)


class SequenceBalanceLossFunction(Function):
    """Sequence-wise balance loss, mean over sequences: scores [B S, E], topk_idx [B S, K] -> scalar.

    It is 1 when scores and loads are uniform, whatever E and K.
    """

    def forward(self, scores: Array, *, topk_idx: Array, batch: int) -> Array:
        T, E = scores.shape
        require_shape("SequenceBalanceLoss", "topk_idx", topk_idx, (T, None))
        if batch < 1 or T % batch:
            raise ValueError(f"SequenceBalanceLoss: {T} tokens do not make {batch} sequences of one length")
        S, K = T // batch, topk_idx.shape[1]
        sequence = np.repeat(np.arange(batch, dtype=np.int64), S * K)
        counts = np.bincount(sequence * E + topk_idx.reshape(-1), minlength=batch * E).reshape(batch, E)
        f = (counts * (E / (K * S))).astype(scores.dtype)  # Eq. 18
        total = scores.sum(axis=1, keepdims=True) + scores.dtype.type(1e-20)  # all scores may underflow
        share = scores / total  # Eq. 19, s'
        P = share.reshape(batch, S, E).mean(axis=1)  # Eq. 20
        self.save(f, share, total)
        return np.asarray((f * P).sum() / batch, dtype=scores.dtype)

    def backward(self, dy: Array) -> Array:
        f, share, total = self.saved
        T, batch = len(share), len(f)
        dshare = np.repeat(f * (dy / T), T // batch, axis=0)  # [T, E]
        dshare -= np.vecdot(dshare, share)[:, None]
        dshare /= total
        return dshare.astype(share.dtype, copy=False)


def cross_entropy(logits: Tensor, targets: Array) -> Tensor:
    """Mean cross-entropy in nats over the targets that are not -100."""
    return CrossEntropyFunction.apply(logits, targets=targets)


def sequence_balance_loss(scores: Tensor, topk_idx: Array, batch: int) -> Tensor:
    """Sequence-wise balance loss of one layer's routing."""
    return SequenceBalanceLossFunction.apply(scores, topk_idx=topk_idx, batch=batch)
