"""The bias rule against a loop over experts, and MaxVio against its formula."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidsv3.train.balance import max_vio, update_bias

loads = st.lists(st.integers(0, 50), min_size=2, max_size=9)


def bias_by_loop(bias, load, speed):
    """Algorithm 1 of Wang et al. 2024 for one expert after another, in whole numbers."""
    moved = []
    for b, count in zip(bias, load):
        error = sum(load) - count * len(load)  # E times (mean load - load_i), exact
        moved.append(b + speed * ((error > 0) - (error < 0)))
    return moved


@given(loads)
def test_update_bias_is_the_sign_rule(load):
    bias = np.linspace(-0.5, 0.25, len(load), dtype=np.float32)
    expected = bias_by_loop(bias.astype(np.float64), load, 0.125)
    update_bias(bias, np.array(load), 0.125)
    assert bias == pytest.approx(expected, abs=1e-6)  # one float32 sum of numbers below 1


def test_update_bias_lowers_the_overloaded_and_raises_the_idle():
    bias = np.zeros(4, dtype=np.float32)
    update_bias(bias, np.array([90, 10, 0, 20]), 0.001)
    assert np.sign(bias).tolist() == [-1, 1, 1, 1]


def test_update_bias_leaves_an_expert_at_the_mean():
    bias = np.array([0.5, 0.5, 0.5], dtype=np.float32)
    update_bias(bias, np.array([7, 5, 3]), 0.25)
    assert bias.tolist() == [0.25, 0.5, 0.75]


def test_update_bias_moves_by_gamma_however_large_the_violation():
    small, large = np.zeros((2, 3), dtype=np.float32)
    update_bias(small, np.array([11, 10, 9]), 0.01)
    update_bias(large, np.array([1000, 15, 0]), 0.01)
    assert np.abs(small[[0, 2]]).tolist() == np.abs(large[[0, 2]]).tolist()


def test_update_bias_keeps_float32():
    bias = np.zeros(3, dtype=np.float32)
    update_bias(bias, np.array([1, 2, 6]), 0.001)
    assert bias.dtype == np.float32


def test_update_bias_with_speed_zero_changes_no_bit():
    bias = np.array([0.1, -0.2, 0.3], dtype=np.float32)
    before = bias.tobytes()
    update_bias(bias, np.array([1, 2, 6]), 0.0)
    assert bias.tobytes() == before


def test_update_bias_repeated_evens_out_a_fixed_preference():
    scores = np.array([0.5, 0.45, 0.4, 0.1]) + np.random.default_rng(0).normal(0, 0.02, size=(500, 4))
    bias = np.zeros(4, dtype=np.float32)
    for _ in range(600):
        load = np.bincount((scores + bias).argmax(axis=1), minlength=4)
        update_bias(bias, load, 0.001)
    assert max_vio(load) < 0.3  # 3.0 at the beginning, when one expert takes every token


def test_max_vio_is_the_excess_over_the_mean():
    assert max_vio(np.array([[6, 3, 3], [4, 4, 4]])).tolist() == [0.5, 0.0]


def test_max_vio_of_a_layer_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="layer without tokens"):
        max_vio(np.array([[1, 2], [0, 0]]))
