"""Routing: which experts a token goes to, with which weights, and how its row travels there and back.

Selection (V3 report, section 2.1.2, Eq. 12-16): the affinity s is the sigmoid of the gate's logits (V2: softmax). The
experts are chosen by s + b, where the bias b moves with the load and has no gradient; the weights are made of s alone.
With groups (node-limited routing) a token first keeps the `topk_group` groups with the best score: the sum of the two
best s + b of the group (V2: the best s), everything else is masked with -inf, so a negative bias cannot let a masked
expert win. Ties go to the lowest index. Experts are returned in ascending order: a set, in the order in which the
rows are summed on their way back.

Permute and unpermute are each other's transpose: rows are gathered in expert order, and gathered back (never
scattered, so sums have one order).
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ..autograd import Array, Function, Tensor, Thunk
from .shape import require_shape
from .swiglu import sigmoid


def select_experts(
    scores: Array, bias: Array | None, *, top_k: int, n_group: int, topk_group: int, method: str
) -> Array:
    """Experts of each token.

    Parameters
    ----------
    scores : [T, E] affinities s
    bias : [E] correction bias b, or None
    top_k : experts per token
    n_group, topk_group : groups, and how many of them a token may use
    method : 'noaux_tc' (V3), 'group_limited_greedy' (V2) or 'greedy' (no groups, no bias)

    Returns
    -------
    topk_idx : int64 [T, top_k], ascending in each row
    """
    T, E = scores.shape
    choice = scores + bias.astype(scores.dtype) if bias is not None and method == "noaux_tc" else scores.copy()
    if method != "greedy" and topk_group < n_group:
        grouped = choice.reshape(T, n_group, E // n_group)  # a view
        best = min(2, E // n_group) if method == "noaux_tc" else 1
        group_score = np.partition(grouped, -best, axis=2)[:, :, -best:].sum(axis=2)  # [T, n_group]
        kept = np.zeros((T, n_group), dtype=bool)
        np.put_along_axis(kept, best_indices(group_score, topk_group), True, axis=1)
        grouped[~kept] = -np.inf
    return np.sort(best_indices(choice, top_k), axis=1)


def best_indices(values: Array, k: int) -> Array:
    """Indices of the k largest of each row [T, n] -> int64 [T, k], best first, ties to the lowest index."""
    rows = np.arange(len(values), dtype=np.int64)
    values = np.maximum(values, np.finfo(values.dtype).min)  # a masked -inf stays above what was taken
    best = np.empty((len(values), k), dtype=np.int64)
    for i in range(k):
        best[:, i] = values.argmax(axis=1)  # the first of equal maxima
        values[rows, best[:, i]] = -np.inf
    return best


class GateScoreFunction(Function):
    """Affinities of gate logits [T, E]: 'sigmoid' (V3) or 'softmax' (V2)."""

    def forward(self, logits: Array, *, scoring_func: str) -> Array:
        if scoring_func == "sigmoid":
            scores = sigmoid(logits)
        elif scoring_func == "softmax":
            scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
            scores /= scores.sum(axis=-1, keepdims=True)
        else:
            raise ValueError(f"GateScore: scoring_func={scoring_func!r} is not 'sigmoid' or 'softmax'")
        self._softmax = scoring_func == "softmax"
        self.save(scores)
        return scores

    def backward(self, dscores: Array) -> Array:
        (scores,) = self.saved
        if self._softmax:
            return scores * (dscores - np.vecdot(dscores, scores)[..., None])
        return dscores * scores * (1 - scores)


class GateWeightFunction(Function):
    """Weights of the selected experts: scores [T, E], topk_idx [T, K] -> [T, K].

    The scores of the selected experts, divided by their sum if `normalize`, times `scale`. With one expert per token
    there is nothing to divide by: a normalised weight would be the constant 1 and give the gate no gradient.
    """

    def forward(self, scores: Array, *, topk_idx: Array, normalize: bool, scale: float) -> Array:
        require_shape("GateWeight", "topk_idx", topk_idx, (len(scores), None))
        self._scale, self._shape = scores.dtype.type(scale), scores.shape
        rows = np.arange(len(scores), dtype=np.int64)[:, None]
        weights = scores[rows, topk_idx]  # [T, K]
        self._normalize = normalize and topk_idx.shape[1] > 1
        if self._normalize:
            total = weights.sum(axis=1, keepdims=True) + scores.dtype.type(1e-20)
            weights /= total
            self.save(topk_idx, weights, total)
        else:
            self.save(topk_idx)
        return weights * self._scale

    def backward(self, dweights: Array) -> Array:
        dweights = dweights * self._scale
        topk_idx, *rest = self.saved
        if self._normalize:
            weights, total = rest
            dweights = (dweights - np.vecdot(dweights, weights)[:, None]) / total
        dscores = np.zeros(self._shape, dtype=dweights.dtype)
        dscores[np.arange(len(dscores), dtype=np.int64)[:, None], topk_idx] = dweights
        return dscores


class PermuteFunction(Function):
    """Copy token rows into expert order: x [T, D] -> rows [N, D], N = T K.

    `token_of_row` [N] names the token of each row; `row_of_slot` [T, K] is its inverse, ascending along K.
    """

    def forward(self, x: Array, *, token_of_row: Array, row_of_slot: Array) -> Array:
        require_shape("Permute", "row_of_slot", row_of_slot, (len(x), None))
        self.save(row_of_slot, x, token_of_row)
        return np.take(x, token_of_row, axis=0)

    def again(self) -> Thunk:
        _, x, token_of_row = self.saved
        return partial(np.take, x, token_of_row, axis=0)

    def backward(self, drows: Array) -> Array:
        row_of_slot, *_ = self.saved
        dx = np.take(drows, row_of_slot[:, 0], axis=0)
        for k in range(1, row_of_slot.shape[1]):
            dx += np.take(drows, row_of_slot[:, k], axis=0)
        return dx


class UnpermuteFunction(Function):
    """Weighted sum of each token's expert rows: rows [N, D], weights [T, K] -> [T, D]."""

    def forward(self, rows: Array, weights: Array, *, token_of_row: Array, row_of_slot: Array) -> Array:
        require_shape("Unpermute", "weights", weights, row_of_slot.shape)
        require_shape("Unpermute", "rows", rows, (row_of_slot.size, None))
        self.save(rows, weights, token_of_row, row_of_slot)
        y = np.take(rows, row_of_slot[:, 0], axis=0)
        y *= weights[:, :1]
        for k in range(1, row_of_slot.shape[1]):
            row = np.take(rows, row_of_slot[:, k], axis=0)
            row *= weights[:, k : k + 1]
            y += row
        return y

    def backward(self, dy: Array) -> tuple[Array, Array]:
        rows, weights, token_of_row, row_of_slot = self.saved
        weight_of_row = np.empty((row_of_slot.size, 1), dtype=dy.dtype)
        weight_of_row[row_of_slot.reshape(-1), 0] = weights.reshape(-1)
        dy_of_row = np.take(dy, token_of_row, axis=0)  # [N, D]
        dweights = np.vecdot(dy_of_row, rows)[row_of_slot]  # [T, K]
        dy_of_row *= weight_of_row
        return dy_of_row, dweights


def gate_scores(logits: Tensor, scoring_func: str) -> Tensor:
    """Affinities of gate logits."""
    return GateScoreFunction.apply(logits, scoring_func=scoring_func)


def gate_weights(scores: Tensor, topk_idx: Array, normalize: bool, scale: float) -> Tensor:
    """Weights of the selected experts."""
    return GateWeightFunction.apply(scores, topk_idx=topk_idx, normalize=normalize, scale=scale)


def permute(x: Tensor, token_of_row: Array, row_of_slot: Array) -> Tensor:
    """Token rows in expert order."""
    return PermuteFunction.apply(x, token_of_row=token_of_row, row_of_slot=row_of_slot)


def unpermute(rows: Tensor, weights: Tensor, token_of_row: Array, row_of_slot: Array) -> Tensor:
    """Weighted sums of expert rows in token order."""
    return UnpermuteFunction.apply(rows, weights, token_of_row=token_of_row, row_of_slot=row_of_slot)
