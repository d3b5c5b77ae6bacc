"""Speculation with MTP modules loses nothing: same tokens when greedy, same distribution when drawn."""

import importlib

import numpy as np
import pytest
from reference_model import odd_model

from minidsv3.generation import generate, speculative
from minidsv3.generation.cache import LatentCache
from minidsv3.generation.sampler import probabilities

generate_module = importlib.import_module("minidsv3.generation.generate")  # its name is also the function's


def decisive_prompt(model, length, n, seed=0):
    """A prompt whose greedy continuation never hangs on rounding: redrawn until the best logit leads by 1e-4."""
    for attempt in range(20):
        rng = np.random.default_rng([seed, attempt])
        prompt = rng.integers(0, model.config.vocab_size, length).tolist()
        tokens, lead = list(prompt), np.inf
        for _ in range(n):
            logits = model.logits(np.array([tokens]))[0, -1]
            second, first = np.sort(logits)[-2:]
            tokens, lead = [*tokens, int(logits.argmax())], min(lead, first - second)
        if lead > 1e-4:
            return prompt, tokens[length:]
    raise AssertionError("no prompt leads clearly")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("depths", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_speculative_greedy_is_plain_greedy(depths, length, dtype):
    model = odd_model(dtype, num_nextn_predict_layers=depths)
    prompt, expected = decisive_prompt(model, length, 15, seed=depths)
    assert generate(model, [prompt], 15).tokens[0].tolist() == expected
    assert generate(model, [prompt], 15, speculative=True).tokens[0].tolist() == expected


def test_speculative_batch_is_one_by_one():
    model = odd_model(num_nextn_predict_layers=2)
    prompts, expected = zip(*(decisive_prompt(model, n, 10, seed=n) for n in (1, 6, 3)))
    got = generate(model, prompts, 10, speculative=True)
    assert [t.tolist() for t in got.tokens] == list(expected)


def copying_model(sign, depths=2):
    """A model whose next token depends on the last alone, and MTP modules that know it exactly, or get it wrong.

    Layers add nothing; an MTP module passes the newest token's embedding on, as it is or negated.
    """
    model = odd_model(num_nextn_predict_layers=depths, tie_word_embeddings=False)
    D = model.config.hidden_size
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data[...] = 0
        if name.endswith("norm.weight"):
            parameter.data[...] = 1
    for module in model.mtp:
        module.eh_proj.weight.data[...] = np.concatenate([sign * np.eye(D), np.zeros((D, D))], axis=1)
        module.enorm.weight.data[...] = 1
    return model


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_speculative_with_perfect_drafts_keeps_them_all(depths):
    model = copying_model(1, depths)
    n = 4 * (depths + 1) + 1  # the first pass reads the prompt and yields one token
    result = generate(model, [[3, 5]], n, speculative=True)
    assert result.main_passes == 5
    assert result.accepted_by_depth == result.drafted_by_depth == [4] * depths
    assert result.tokens[0].tolist() == generate(model, [[3, 5]], n).tokens[0].tolist()


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_speculative_with_wrong_drafts_is_plain_decoding(depths):
    model = copying_model(-1, depths)
    result = generate(model, [[3, 5]], 9, speculative=True)
    assert result.main_passes == 9
    assert result.accepted_by_depth == [0] * depths
    assert result.drafted_by_depth == [8, *[0] * (depths - 1)]  # behind a wrong guess nobody looks
    assert result.tokens[0].tolist() == generate(model, [[3, 5]], 9).tokens[0].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculative_counters_add_up(temperature):
    model = odd_model(num_nextn_predict_layers=3)
    rng = np.random.default_rng(1)
    result = generate(model, [[1, 2], [3]], 30, temperature=temperature, rng=rng, speculative=True)
    accepted, drafted = result.accepted_by_depth, result.drafted_by_depth
    assert len(accepted) == len(drafted) == 3
    assert all(a <= d for a, d in zip(accepted, drafted))
    assert drafted[1:] == accepted[:-1]  # a guess is looked at where the one before it was kept
    assert drafted[0] == result.main_passes - 2  # at every pass but the first of each prompt
    # Each pass yields its accepted guesses and one token of its own; the last may yield more than was asked for.
    assert 60 <= result.main_passes + sum(accepted) <= 60 + 2 * 3


def tiny_model(depths, vocab_size=4):
    return odd_model(
        vocab_size=vocab_size, num_nextn_predict_layers=depths, num_hidden_layers=1, first_k_dense_replace=1, std=0.25
    )


def exact_distribution(model, prompt, n, temperature, top_p):
    """Probability of every continuation of n tokens, from the model's logits alone."""
    if n == 0:
        return {(): 1.0}
    p = probabilities(model.logits(np.array([prompt]))[0, -1], temperature, top_p)
    found = {}
    for token in np.flatnonzero(p).tolist():
        for rest, q in exact_distribution(model, [*prompt, token], n - 1, temperature, top_p).items():
            found[(token, *rest)] = p[token] * q
    return found


def chi_square(counts, expected):
    """Statistic and degrees of freedom; cells that expect fewer than five are taken together."""
    small = expected < 5
    if small.any():
        counts = np.append(counts[~small], counts[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
    return float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1


@pytest.mark.parametrize(
    ("depths", "temperature", "top_p", "vocab_size", "n"),
    [(1, 1.0, 1.0, 5, 2), (2, 0.7, 1.0, 4, 3), (3, 1.3, 0.8, 3, 3)],
)
def test_speculative_sampling_has_the_plain_distribution(depths, temperature, top_p, vocab_size, n):
    model, prompt, draws = tiny_model(depths, vocab_size), [1, 2, 0], 400
    exact = exact_distribution(model, prompt, n, temperature, top_p)
    rng = np.random.default_rng(11)
    result = generate(
        model, [prompt] * draws, n, temperature=temperature, top_p=top_p, rng=rng, speculative=True
    )  # fmt: skip
    seen = [tuple(t.tolist()) for t in result.tokens]
    assert set(seen) <= set(exact)  # nothing that plain sampling could not draw
    counts = np.array([seen.count(key) for key in exact])
    statistic, freedom = chi_square(counts.astype(float), draws * np.array(list(exact.values())))
    # Three standard deviations above the mean of a chi-square variable: one honest seed in several hundred exceeds it.
    assert freedom > 5 and statistic < freedom + 3 * np.sqrt(2 * freedom)
    # And the test could fail: guesses are rejected often enough to matter.
    assert 0.1 < result.accepted_by_depth[0] / result.drafted_by_depth[0] < 0.9


def test_verified_guess_has_the_models_distribution():
    """One place, many draws: a guess from q, kept or replaced, is distributed like p, and so is what follows it."""
    rng, draws = np.random.default_rng(2), 20_000
    logits = np.log([[0.5, 0.2, 0.1, 0.15, 0.05], [0.1, 0.1, 0.2, 0.3, 0.3]])
    q = np.array([0.1, 0.5, 0.05, 0.05, 0.3])
    counts, following = np.zeros(5), np.zeros(5)
    for guess in rng.choice(5, size=draws, p=q).tolist():
        kept, token = speculative._verify(logits, [guess], [q], (1.0, 1.0, rng))
        counts[guess if kept else token] += 1
        if kept:
            following[token] += 1
    for seen, row in ((counts, logits[0]), (following, logits[1])):
        statistic, freedom = chi_square(seen, seen.sum() * np.exp(row))
        assert statistic < freedom + 3 * np.sqrt(2 * freedom)
    kept_share = np.minimum(np.exp(logits[0]), q).sum()  # Leviathan et al.: the overlap of the two distributions
    assert abs(following.sum() / draws - kept_share) < 3 * np.sqrt(kept_share * (1 - kept_share) / draws)


def test_plain_sampling_has_the_plain_distribution():
    model, prompt, draws = tiny_model(1), [1, 2, 0], 1000
    exact = exact_distribution(model, prompt, 2, 1.0, 1.0)
    result = generate(model, [prompt] * draws, 2, temperature=1.0, rng=np.random.default_rng(4))
    seen = [tuple(t.tolist()) for t in result.tokens]
    counts = np.array([seen.count(key) for key in exact])
    statistic, freedom = chi_square(counts.astype(float), draws * np.array(list(exact.values())))
    assert statistic < freedom + 3 * np.sqrt(2 * freedom)


@pytest.fixture
def caches(monkeypatch):
    """Every cache that is made, in order: the main model's, then those of the modules."""
    made = []

    def make(*args, **kwargs):
        made.append(LatentCache(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(speculative, "LatentCache", make)
    monkeypatch.setattr(generate_module, "LatentCache", make)
    return made


def content(cache, n):
    assert cache.lengths.tolist() == [n]
    return [np.concatenate([page[0] for page in layer.pages])[:n] for layer in cache.layers]


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_speculative_caches_hold_what_a_plain_run_would(depths, caches):
    """Rejected tokens leave no trace, in the main cache and in the modules' own."""
    model = odd_model(num_nextn_predict_layers=depths)
    prompt, expected = decisive_prompt(model, 5, 20, seed=depths)
    result = generate(model, [prompt], 20, speculative=True)
    assert sum(result.accepted_by_depth) < sum(result.drafted_by_depth)  # something was taken back
    main, *modules = caches
    tokens = np.array([[*prompt, *result.tokens[0].tolist()]])
    assert tokens[0, 5:].tolist() == expected
    n = int(main.lengths[0])
    if n >= tokens.shape[1]:  # accepted guesses behind the last token that was asked for
        more = model.logits(tokens)[0, -1:].argmax(axis=-1)
        while tokens.shape[1] <= n:
            tokens = np.append(tokens, [more], axis=1)
            more = model.logits(tokens)[0, -1:].argmax(axis=-1)
    plain = LatentCache(model.config, 1, np.float64)
    h = model.decode(tokens[:, :n], plain)
    plain.extend(n)
    for got, wanted in zip(content(main, n), content(plain, n)):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)  # gemms of other numbers of rows
    for k, module in enumerate(modules, start=1):
        own, stored = LatentCache(model.config, 1, np.float64, layers=1), int(module.lengths[0])
        assert 5 <= stored <= n + 1 - k  # no further than the tokens that follow its positions by k are known
        known = tokens[:, k : k + stored]
        assert known.shape[1] == stored
        h = model.draft(k, h[:, :stored], known, own)
        own.extend(stored)
        np.testing.assert_allclose(content(module, stored)[0], content(own, stored)[0], rtol=0, atol=1e-12)


def test_speculative_keeps_a_number_of_caches_that_does_not_grow(caches):
    generate(odd_model(num_nextn_predict_layers=2), [[1, 2, 3]], 12, speculative=True)
    assert [len(cache.layers) for cache in caches] == [2, 1, 1]
