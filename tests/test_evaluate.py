"""Bits per byte against a sum over single tokens."""

import math

import numpy as np
import pytest
from small_runs import new_model

from minidsv3.data import ByteTokenizer, validation_windows
from minidsv3.ops.loss import IGNORED
from minidsv3.train.evaluate import bits_by_position, bits_per_byte
from minidsv3.train.machine import worker_pool

TEXT = [(b"before ", b"the text to predict, twenty nine"), (b"", b"and another one")]


@pytest.fixture(scope="module")
def windows():
    return validation_windows(TEXT, ByteTokenizer(), 7)


def by_token(model, tokens_in, targets, num_bytes):
    """-log2 softmax of each wanted token, one after another in float64."""
    total = 0.0
    for row, wanted in zip(tokens_in, targets):
        for logits, token in zip(model.logits(row[None])[0].astype(np.float64), wanted):
            if token != IGNORED:
                total += math.log2(sum(math.exp(x - logits[token]) for x in logits))
    return total / num_bytes


def test_bits_per_byte_is_the_sum_over_tokens(windows):
    model = new_model(dtype=np.float64)
    # float64; a softmax of 257 numbers
    assert bits_per_byte(model, *windows) == pytest.approx(by_token(model, *windows), rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_bits_per_byte_does_not_depend_on_the_batch(windows, batch_size):
    model = new_model(dtype=np.float64)
    assert bits_per_byte(model, *windows, batch_size=batch_size) == pytest.approx(
        bits_per_byte(model, *windows), rel=1e-12
    )


def test_bits_per_byte_workers_change_no_bit(windows):
    model = new_model()
    with worker_pool(2) as run:
        assert bits_per_byte(model, *windows, batch_size=2, run=run) == bits_per_byte(model, *windows, batch_size=2)


def test_bits_per_byte_of_equal_probabilities_is_log2_of_the_vocabulary(windows):
    model = new_model()
    model.lm_head.weight.data[...] = 0
    assert bits_per_byte(model, *windows) == pytest.approx(math.log2(257), rel=1e-6)  # float32 losses


def test_bits_per_byte_ignores_mtp(windows):
    model = new_model()
    before = bits_per_byte(model, *windows)
    model.mtp[0].eh_proj.weight.data[...] = 9
    assert bits_per_byte(model, *windows) == before


def test_bits_per_byte_leaves_no_gradient(windows):
    model = new_model()
    bits_per_byte(model, *windows)
    assert all(not p.grad.any() for p in model.parameters())


def test_bits_by_position_are_means_over_windows_of_each_position(windows):
    model = new_model(dtype=np.float64)
    tokens_in, targets, _ = windows
    expected = np.full(7, np.nan)
    for at in range(7):
        alone = np.full_like(targets, IGNORED)
        alone[:, at] = targets[:, at]
        if (alone != IGNORED).any():
            expected[at] = by_token(model, tokens_in, alone, (alone != IGNORED).sum())
    np.testing.assert_allclose(bits_by_position(model, tokens_in, targets, batch_size=2), expected, rtol=1e-12)


def test_bits_by_position_sum_to_bits_per_byte(windows):
    model = new_model(dtype=np.float64)
    tokens_in, targets, num_bytes = windows
    total = np.nansum(bits_by_position(model, tokens_in, targets) * (targets != IGNORED).sum(axis=0))
    assert total / num_bytes == pytest.approx(bits_per_byte(model, *windows), rel=1e-12)


def test_bits_by_position_where_nothing_is_predicted_is_nan():
    model = new_model()
    bits = bits_by_position(model, np.array([[1, 2, 3]]), np.array([[2, IGNORED, 4]]))
    assert np.isnan(bits).tolist() == [False, True, False]
