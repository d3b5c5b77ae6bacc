"""Routing: who is selected, with which weight, and the way of the rows; held against the text in loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_model import chosen_experts

from minidsv3.autograd import Tensor, backward
from minidsv3.config import ModelConfig
from minidsv3.model.moe import Gate
from minidsv3.ops.linear import linear
from minidsv3.ops.routing import best_indices, gate_scores, gate_weights, permute, select_experts, unpermute
from minidsv3.ops.shape import add, positions, reshape

RNG = np.random.default_rng(29)
NOAUX = dict(top_k=2, n_group=4, topk_group=2, method="noaux_tc")


def selected(scores, bias=None, **rule):
    scores = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    bias = None if bias is None else np.asarray(bias, dtype=np.float32)
    return select_experts(scores, bias, **{**NOAUX, **rule}).tolist()


@st.composite
def routing_cases(draw):
    """Scores on a coarse grid, so that ties are common; biases of either sign."""
    n_group, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    topk_group = draw(st.integers(1, n_group))
    method = draw(st.sampled_from(["noaux_tc", "group_limited_greedy", "greedy"]))
    E = n_group * size
    top_k = draw(st.integers(1, E if method == "greedy" else topk_group * size))
    grid = st.integers(0, 8).map(lambda i: i / 8)
    scores = draw(st.lists(st.lists(grid, min_size=E, max_size=E), min_size=1, max_size=5))
    bias = draw(st.lists(st.integers(-16, 16).map(lambda i: i / 8), min_size=E, max_size=E))
    return np.array(scores), np.array(bias), dict(top_k=top_k, n_group=n_group, topk_group=topk_group, method=method)


@settings(deadline=None, max_examples=300)
@given(routing_cases())
def test_selection_equals_the_text_in_loops(case):
    scores, bias, rule = case
    biased = scores + bias if rule["method"] == "noaux_tc" else scores
    expected = [chosen_experts(list(row), **rule) for row in biased]
    assert select_experts(scores, bias, **rule).tolist() == expected


@settings(deadline=None, max_examples=100)
@given(routing_cases(), st.integers(-(2**6), 2**6).map(lambda i: i / 8))
def test_selection_ignores_a_bias_that_all_experts_share(case, shift):
    scores, bias, rule = case
    np.testing.assert_array_equal(select_experts(scores, bias, **rule), select_experts(scores, bias + shift, **rule))


def test_bias_decides_who_is_selected():
    assert selected([0.9, 0.5, 0.4, 0.1], [-1, 0, 0, 1], n_group=1, topk_group=1) == [[1, 3]]


def test_weights_are_made_of_unbiased_scores():
    """Pitfall 1: the bias enters the selection and nothing else."""
    scores = np.array([[0.9, 0.5, 0.4, 0.1]])
    idx = select_experts(scores, np.array([-1, 0, 0, 1.0]), top_k=2, n_group=1, topk_group=1, method="noaux_tc")
    weights = gate_weights(Tensor(scores), idx, True, 2.5).data
    np.testing.assert_allclose(weights, [[2.5 * 0.5 / 0.6, 2.5 * 0.1 / 0.6]], rtol=1e-15)


def test_bias_is_no_parameter_and_gets_no_gradient():
    """Pitfall 3: a buffer of the gate, moved by the balance rule only."""
    gate = Gate(ModelConfig.preset("nano"))
    assert [name for name, _ in gate.named_parameters()] == ["weight"]
    assert [(name, b.dtype) for name, b in gate.named_buffers()] == [("e_score_correction_bias", np.float32)]


def test_masked_group_cannot_win_with_negative_biases():
    """Pitfall 4: masked with 0 instead of -inf, experts 2 and 3 would beat the biased scores below zero."""
    scores, bias = [0.9, 0.8, 0.2, 0.1], [-2, -2, -2, -2]
    assert selected(scores, bias, n_group=2, topk_group=1) == [[0, 1]]


def test_group_score_is_the_sum_of_its_two_best():
    """Pitfall 5: by the maximum the first group would win."""
    assert selected([0.9, 0.0, 0.0, 0.6, 0.5, 0.0], n_group=2, topk_group=1) == [[3, 4]]


def test_v2_group_score_is_the_best_one():
    rule = dict(n_group=2, topk_group=1, method="group_limited_greedy")
    assert selected([0.9, 0.0, 0.1, 0.6, 0.5, 0.0], **rule) == [[0, 2]]


def test_group_score_counts_the_bias():
    scores, bias = [0.5, 0.5, 0.4, 0.4], [0, 0, 0.2, 0.2]
    assert selected(scores, bias, n_group=2, topk_group=1) == [[2, 3]]


def test_groups_of_one_expert_have_its_score():
    assert selected([0.1, 0.4, 0.3, 0.2], n_group=4, topk_group=2) == [[1, 2]]


def test_v2_methods_ignore_a_bias():
    bias = [9, 0, 0, 0]
    assert selected([0.1, 0.4, 0.3, 0.2], bias, method="greedy") == [[1, 2]]


def test_greedy_method_ignores_groups():
    assert selected([0.9, 0.0, 0.8, 0.0], n_group=2, topk_group=1, method="greedy") == [[0, 2]]


@pytest.mark.parametrize("method", ["noaux_tc", "group_limited_greedy", "greedy"])
def test_ties_go_to_the_lowest_index(method):
    assert selected(np.full(8, 0.5), n_group=4, topk_group=2, top_k=3, method=method) == [[0, 1, 2]]


def test_selection_returns_ascending_indices_of_int64():
    idx = select_experts(RNG.random((20, 8)), None, **NOAUX)
    assert idx.dtype == np.int64 and (np.diff(idx, axis=1) > 0).all()


def test_selection_leaves_scores_as_they_were():
    scores = RNG.random((5, 8))
    kept = scores.copy()
    select_experts(scores, None, **NOAUX)
    np.testing.assert_array_equal(scores, kept)


def test_selection_of_no_tokens_is_empty():
    assert select_experts(np.empty((0, 8)), None, **NOAUX).shape == (0, 2)


@settings(deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8), st.data())
def test_best_indices_are_a_stable_descending_sort(values, data):
    k = data.draw(st.integers(1, len(values)))
    expected = sorted(range(len(values)), key=lambda i: -values[i])[:k]
    assert best_indices(np.array([values], dtype=np.float64), k).tolist() == [expected]


def test_best_indices_take_masked_entries_last_and_once():
    assert best_indices(np.array([[-np.inf, 1.0, -np.inf]]), 3).tolist() == [[1, 0, 2]]


# --------------------------------------------------------------------------------------------- scores and weights


def test_sigmoid_scores_do_not_compete():
    logits = np.array([[0.0, 2.0, -2.0]])
    np.testing.assert_allclose(gate_scores(Tensor(logits), "sigmoid").data, 1 / (1 + np.exp(-logits)), rtol=1e-15)


def test_softmax_scores_sum_to_one():
    scores = gate_scores(Tensor(50 * RNG.standard_normal((5, 7))), "softmax").data
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-14)


def test_normalised_weights_sum_to_the_scale():
    idx = select_experts(RNG.random((5, 8)), None, **NOAUX)
    weights = gate_weights(Tensor(RNG.random((5, 8))), idx, True, 2.5).data
    np.testing.assert_allclose(weights.sum(axis=1), 2.5, rtol=1e-14)


def test_unnormalised_weights_are_scaled_scores():
    scores, idx = RNG.random((2, 8)), np.array([[1, 5], [0, 7]])
    expected = [[16 * scores[t, e] for e in idx[t]] for t in range(2)]
    np.testing.assert_allclose(gate_weights(Tensor(scores), idx, False, 16.0).data, expected, rtol=1e-15)


def test_top_1_normalised_keeps_the_gates_gradient():
    """Pitfall 8: divided by itself, the weight would be the constant 1 and the gate would learn nothing."""
    logits = Tensor(RNG.standard_normal((3, 4)), requires_grad=True)
    scores = gate_scores(logits, "sigmoid")
    weights = gate_weights(scores, best_indices(scores.data, 1), True, 1.0)
    total = reshape(weights, (1, 3))
    backward(add(*(reshape(positions(total, t, t + 1), ()) for t in range(3))))
    best = logits.data.argmax(axis=1)
    s = 1 / (1 + np.exp(-logits.data.max(axis=1)))
    np.testing.assert_allclose(logits.grad[range(3), best], s * (1 - s), rtol=1e-13)


def test_weights_survive_scores_that_underflow():
    scores = np.zeros((2, 4), dtype=np.float32)
    weights = gate_weights(Tensor(scores), np.array([[0, 1], [2, 3]]), True, 1.0).data
    np.testing.assert_array_equal(weights, 0)


def test_gate_computes_in_float32_whatever_the_recipe():
    """A routing decision is a comparison: the gate's product never goes through the recipe's gemm."""
    gate = Gate(ModelConfig.preset("nano"))
    gate.init_weights(np.random.default_rng(0))
    x = RNG.standard_normal((5, 64)).astype(np.float32)
    routing = gate(Tensor(x))
    expected = gate_scores(linear(Tensor(x), gate.weight), "sigmoid").data
    assert routing.scores.dtype == routing.topk_weight.dtype == np.float32
    np.testing.assert_array_equal(routing.scores.data, expected)


# ------------------------------------------------------------------------------------------------- rows and back


TOKEN_OF_ROW = np.array([0, 2, 1, 2, 0, 1])  # experts: 0 0 | 1 1 | 2 2
ROW_OF_SLOT = np.array([[0, 4], [2, 5], [1, 3]])


def test_permute_copies_the_rows_of_each_expert():
    x = RNG.standard_normal((3, 4))
    np.testing.assert_array_equal(permute(Tensor(x), TOKEN_OF_ROW, ROW_OF_SLOT).data, [x[t] for t in TOKEN_OF_ROW])


def test_unpermute_sums_each_tokens_rows_in_ascending_order_of_experts():
    rows, weights = RNG.standard_normal((6, 4)), RNG.random((3, 2))
    y = unpermute(Tensor(rows), Tensor(weights), TOKEN_OF_ROW, ROW_OF_SLOT).data
    expected = [weights[t, 0] * rows[a] + weights[t, 1] * rows[b] for t, (a, b) in enumerate(ROW_OF_SLOT)]
    np.testing.assert_array_equal(y, expected)


def test_unpermute_is_the_transpose_of_permute():
    """<permute(x), r> = <x, unpermute(r)> for weights of one."""
    x, rows = RNG.standard_normal((3, 4)), RNG.standard_normal((6, 4))
    there = permute(Tensor(x), TOKEN_OF_ROW, ROW_OF_SLOT).data
    back = unpermute(Tensor(rows), Tensor(np.ones((3, 2))), TOKEN_OF_ROW, ROW_OF_SLOT).data
    assert float((there * rows).sum()) == pytest.approx(float((x * back).sum()), rel=1e-14)
