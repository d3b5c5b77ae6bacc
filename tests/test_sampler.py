"""Choosing tokens against loops and counted frequencies."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import new_model

from minidsv3.generation import sample
from minidsv3.generation.sampler import choose, probabilities

LOGITS = np.log(np.array([0.5, 0.05, 0.3, 0.15]))


@pytest.fixture(scope="module")
def model():
    model = new_model()
    for p in model.parameters():
        p.data *= 5  # far from uniform
    return model


def nucleus(p, top_p):
    """The smallest set of the likeliest tokens that reaches `top_p`, by adding one after another."""
    chosen, total = [], 0.0
    for token in sorted(range(len(p)), key=lambda i: (-p[i], i)):
        chosen.append(token)
        total += p[token]
        if total >= top_p:
            break
    return chosen


def test_sample_greedy_is_the_argmax_loop(model):
    tokens = [256, 65, 66]
    for _ in range(8):
        tokens.append(int(model.logits(np.array([tokens]))[0, -1].argmax()))
    assert sample(model, [256, 65, 66], 8).tolist() == tokens[3:]


def test_sample_context_limits_what_the_model_sees(model):
    tokens = [256, 65, 66, 67, 68]
    for _ in range(6):
        tokens.append(int(model.logits(np.array([tokens[-4:]]))[0, -1].argmax()))
    assert sample(model, tokens[:5], 6, context=4).tolist() == tokens[5:]


def test_sample_streams_each_token_as_it_is_chosen(model):
    seen = []
    tokens = sample(model, [1, 2], 5, stream=seen.append)
    assert seen == tokens.tolist() and all(type(token) is int for token in seen)


def test_sample_same_seed_same_tokens(model):
    runs = [sample(model, [7], 9, temperature=1.0, rng=np.random.default_rng(s)).tolist() for s in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


def test_sample_returns_int64_without_the_prompt(model):
    tokens = sample(model, np.array([5, 6, 7]), 2)
    assert tokens.dtype == np.int64 and tokens.shape == (2,)


def test_sample_of_no_token_is_empty(model):
    assert sample(model, [5], 0).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompt=[]), "the prompt is empty"),
        (dict(temperature=-0.1), "temperature=-0.1"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(temperature=1.0, top_p=0.0), "top_p=0.0"),
        (dict(temperature=1.0, top_p=1.1), "top_p=1.1"),
        (dict(temperature=1.0), "give an rng"),
        (dict(context=0), "context=0"),
        (dict(context=-3), "context=-3"),
        (dict(max_new_tokens=-1), "max_new_tokens=-1"),
        (dict(prompt=[257]), "257"),
        (dict(prompt=[-1]), "-1"),
    ],
)
def test_sample_names_the_wrong_argument(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(model, **{"prompt": [1], "max_new_tokens": 1, **arguments})


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_probabilities_are_powers_of_the_softmax(temperature):
    powers = np.exp(LOGITS) ** (1 / temperature)
    np.testing.assert_allclose(probabilities(LOGITS, temperature, 1.0), powers / powers.sum(), rtol=1e-12)


# the sums 0.5, 0.8, 0.95 are not met exactly: at equality either set would be right
@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, [0]), (0.49, [0]), (0.51, [0, 2]), (0.79, [0, 2]), (0.9, [0, 2, 3])]
)
def test_probabilities_keep_the_likeliest_that_reach_top_p(top_p, kept):
    assert np.flatnonzero(probabilities(LOGITS, 1.0, top_p)).tolist() == kept


@given(st.lists(st.floats(-8, 8), min_size=1, max_size=9), st.floats(0.001, 0.999), st.floats(0.2, 3))
def test_probabilities_are_the_nucleus_renormalised(logits, top_p, temperature):
    logits = np.array(logits)
    p = np.exp(logits / temperature)
    p /= p.sum()
    got = probabilities(logits, temperature, top_p)
    assert got.sum() == pytest.approx(1) and len(got) == len(logits)
    # a hair to each side of top_p, where rounding may decide
    allowed = [sorted(nucleus(p, top_p + hair)) for hair in (-1e-9, 1e-9)]
    kept = np.flatnonzero(got).tolist()
    assert kept in allowed
    np.testing.assert_allclose(got[kept], p[kept] / p[kept].sum(), rtol=1e-9)


def test_probabilities_always_keep_one():
    assert probabilities(np.array([0.0, 1.0, 1.0]), 1.0, 1e-12).tolist() == [0.0, 1.0, 0.0]


def test_probabilities_of_huge_logits_do_not_overflow():
    assert probabilities(np.array([1e4, -1e4], dtype=np.float32), 0.1, 1.0).tolist() == [1.0, 0.0]


def test_choose_frequencies_are_the_probabilities():
    rng, draws = np.random.default_rng(0), 4000
    counts = np.bincount([choose(LOGITS, 1.0, 0.9, rng) for _ in range(draws)], minlength=4)
    expected = np.array([0.5, 0, 0.3, 0.15]) / 0.95
    assert counts[1] == 0
    np.testing.assert_allclose(counts / draws, expected, atol=0.03)  # four standard deviations: 4 * 0.5 / sqrt(4000)
