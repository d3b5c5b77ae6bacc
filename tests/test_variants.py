"""A variant is another reading of the same arrays, and refuses to be anything else."""

import numpy as np
import pytest

from minidsv3 import ModelConfig, Transformer
from minidsv3.autograd import backward
from minidsv3.model.variants import same_weights
from minidsv3.ops.routing import best_indices
from minidsv3.train.step import gates


@pytest.fixture
def model():
    model = Transformer(ModelConfig.preset("nano"))
    model.init_weights(np.random.default_rng(1), np.float64, std=0.1)
    for gate in gates(model):
        gate.e_score_correction_bias[:] = np.random.default_rng(2).normal(size=16, scale=0.3)
    return model


@pytest.fixture
def tokens():
    return np.random.default_rng(3).integers(0, 257, size=(2, 11))


def test_same_weights_without_changes_computes_the_same(model, tokens):
    np.testing.assert_array_equal(same_weights(model).logits(tokens), model.logits(tokens))


def test_same_weights_shares_parameters_and_buffers(model, tokens):
    other = same_weights(model, rope_interleave=False)
    before = other.logits(tokens)
    assert np.abs(before - model.logits(tokens)).max() > 1e-6
    for mine, its in zip(other.parameters(), model.parameters()):
        assert np.shares_memory(mine.data, its.data)
    for mine, its in zip(gates(other), gates(model)):
        assert mine.e_score_correction_bias is its.e_score_correction_bias


def test_same_weights_takes_another_selection_rule(model, tokens):
    def second_best(scores, bias, *, top_k, **rest):
        return np.sort(best_indices(scores, 2 * top_k)[:, top_k:], axis=1)

    load = [m.loss(tokens[:, :-1], tokens[:, 1:]).expert_load for m in (model, same_weights(model, select=second_best))]
    assert load[0].sum() == load[1].sum() and np.any(load[0] != load[1])


def test_same_weights_can_be_differentiated(model, tokens):
    other = same_weights(model)
    backward(other.loss(tokens[:, :-1], tokens[:, 1:]).total)
    assert np.abs(other.lm_head.weight.grad).max() > 0


def test_same_weights_refuses_another_shape(model):
    with pytest.raises(ValueError, match="hidden_size"):
        same_weights(model, hidden_size=72)
    with pytest.raises(ValueError, match="num_hidden_layers"):
        same_weights(model, num_hidden_layers=3)
