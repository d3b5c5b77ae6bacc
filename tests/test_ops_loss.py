"""Losses: against slow loops, and the properties that training relies on."""

import math

import numpy as np
import pytest

from minidsv3.autograd import Tensor, backward
from minidsv3.ops.loss import cross_entropy, sequence_balance_loss
from minidsv3.ops.routing import gate_scores

RNG = np.random.default_rng(31)
LOGITS = RNG.standard_normal((2, 5, 11))
TARGETS = np.array([[4, -100, 0, 10, 4], [1, 2, -100, -100, 7]])


def slow_cross_entropy(logits, targets):
    losses = []
    for row, target in zip(logits.reshape(-1, logits.shape[-1]).tolist(), targets.reshape(-1).tolist()):
        if target != -100:
            losses.append(math.log(sum(math.exp(v) for v in row)) - row[target])
    return sum(losses) / len(losses)


def slow_balance_loss(scores, topk_idx, batch):
    """Eq. 17-20 for each sequence, then the mean over sequences."""
    (T, E), K = scores.shape, topk_idx.shape[1]
    S, losses = T // batch, []
    for b in range(batch):
        tokens, loss = range(b * S, (b + 1) * S), 0.0
        for i in range(E):
            f_i = E / (K * S) * sum(1 for t in tokens if i in topk_idx[t])
            P_i = sum(scores[t, i] / sum(scores[t]) for t in tokens) / S
            loss += f_i * P_i
        losses.append(loss)
    return sum(losses) / batch


def routing(T=10, E=7, K=3, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.random((T, E))
    return scores, np.sort(np.argsort(-scores + 0.5 * rng.random((T, E)), axis=1)[:, :K], axis=1)


def test_cross_entropy_equals_a_slow_loop():
    assert float(cross_entropy(Tensor(LOGITS), TARGETS)) == pytest.approx(
        slow_cross_entropy(LOGITS, TARGETS), rel=1e-14
    )


def test_cross_entropy_of_uniform_logits_is_log_v():
    assert float(cross_entropy(Tensor(np.full((4, 11), 3.0)), np.arange(4))) == pytest.approx(math.log(11), rel=1e-15)


def test_cross_entropy_ignores_a_constant_added_to_the_logits():
    loss = float(cross_entropy(Tensor(LOGITS), TARGETS))
    assert float(cross_entropy(Tensor(LOGITS + 1e4), TARGETS)) == pytest.approx(loss, rel=1e-11)  # 1e4 costs 4 digits


def test_cross_entropy_stays_finite_for_huge_logits():
    logits = np.array([[1e4, -1e4, 0.0]], dtype=np.float32)
    assert float(cross_entropy(Tensor(logits), np.array([1]))) == 2e4


def test_ignored_targets_change_neither_loss_nor_gradient():
    changed = LOGITS.copy()
    changed[TARGETS == -100] = 7.0
    results = []
    for logits in (LOGITS, changed):
        x = Tensor(logits, requires_grad=True)
        loss = cross_entropy(x, TARGETS)
        backward(loss)
        results.append((float(loss), x.grad))
    assert results[0][0] == results[1][0] and not results[0][1][TARGETS == -100].any()


def test_all_targets_ignored_gives_zero_loss_and_gradient():
    x = Tensor(LOGITS, requires_grad=True)
    loss = cross_entropy(x, np.full((2, 5), -100))
    backward(loss)
    assert float(loss) == 0 and not x.grad.any()


def test_cross_entropy_gradient_is_softmax_minus_one_hot():
    x = Tensor(LOGITS, requires_grad=True)
    backward(cross_entropy(x, TARGETS))
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=-1, keepdims=True)
    for b, s in np.ndindex(TARGETS.shape):
        expected = np.zeros(11) if TARGETS[b, s] == -100 else (p[b, s] - np.eye(11)[TARGETS[b, s]]) / 7
        np.testing.assert_allclose(x.grad[b, s], expected, rtol=1e-13, atol=1e-16)


def test_balance_loss_equals_the_text_in_loops():
    scores, topk_idx = routing()
    loss = float(sequence_balance_loss(Tensor(scores), topk_idx, 2))
    assert loss == pytest.approx(slow_balance_loss(scores, topk_idx, 2), rel=1e-14)


@pytest.mark.parametrize("E, K", [(4, 1), (6, 2), (12, 4)])
def test_balance_loss_is_one_for_uniform_scores_and_loads(E, K):
    S = 2 * E
    topk_idx = np.array([[(t + k) % E for k in range(K)] for t in range(S)])
    assert float(sequence_balance_loss(Tensor(np.full((S, E), 0.3)), topk_idx, 1)) == pytest.approx(1, rel=1e-14)


def test_balance_loss_is_e_over_k_when_one_set_of_experts_takes_all():
    scores = np.array([[1.0, 1.0, 0, 0, 0, 0]] * 5)
    assert float(sequence_balance_loss(Tensor(scores), np.array([[0, 1]] * 5), 1)) == pytest.approx(6 / 2, rel=1e-14)


def test_balance_loss_is_a_mean_over_sequences_not_of_batch_means():
    """Pitfall 6: two sequences that use opposite experts are each unbalanced, though the batch is balanced."""
    scores, topk_idx = np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3), np.array([[0]] * 3 + [[1]] * 3)
    by_sequence = float(sequence_balance_loss(Tensor(scores), topk_idx, 2))
    as_one = float(sequence_balance_loss(Tensor(scores), topk_idx, 1))
    assert (by_sequence, as_one) == pytest.approx((2.0, 1.0), rel=1e-14)


def test_balance_loss_normalises_over_all_experts():
    """Pitfall 6: the affinity of experts that nobody chose still counts in the denominator of Eq. 19."""
    few = np.array([[0.8, 0.2, 0.0], [0.8, 0.2, 0.0]])
    more = np.array([[0.8, 0.2, 1.0], [0.8, 0.2, 1.0]])
    idx = np.array([[0], [0]])
    ratio = float(sequence_balance_loss(Tensor(more), idx, 1)) / float(sequence_balance_loss(Tensor(few), idx, 1))
    assert ratio == pytest.approx(0.5, rel=1e-14)


def test_balance_loss_counts_the_experts_that_were_used():
    """Pitfall 6: the dispatched routing, not the K best scores."""
    scores = np.array([[0.9, 0.1]] * 3)
    assert float(sequence_balance_loss(Tensor(scores), np.array([[1]] * 3), 1)) == pytest.approx(2 * 0.1, rel=1e-14)


def test_balance_loss_gradient_reaches_the_gate():
    """Pitfall 7: the loss is there to move the gate's logits."""
    logits = Tensor(RNG.standard_normal((10, 7)), requires_grad=True)
    _, topk_idx = routing()
    backward(sequence_balance_loss(gate_scores(logits, "sigmoid"), topk_idx, 2))
    assert (np.abs(logits.grad).max(axis=1) > 1e-6).all()


def test_balance_loss_gradient_lowers_the_crowded_expert():
    scores = Tensor(np.full((4, 3), 0.5), requires_grad=True)
    backward(sequence_balance_loss(scores, np.zeros((4, 1), dtype=np.int64), 1))
    assert (scores.grad[:, 0] > 0).all() and (scores.grad[:, 1:] < 0).all()


def test_balance_loss_survives_scores_that_underflow():
    scores = Tensor(np.zeros((4, 3), dtype=np.float32), requires_grad=True)
    loss = sequence_balance_loss(scores, np.zeros((4, 1), dtype=np.int64), 1)
    backward(loss)
    assert float(loss) == 0 and np.isfinite(scores.grad).all()
