"""Speculative decoding: the MTP modules draft, the main model verifies (V3 report, sections 2.2 and 5.4.3).

With n confirmed tokens in the main cache, depth 1 guesses token n+1 from (h[n-1], token n), depth 2 guesses n+2 from
depth 1's hidden state and the first guess, and so on. One pass of the main model over the guesses gives its own choice
at each of those places. Guesses are kept up to the first that the model would not have made; what the model says there
is kept instead, so every pass yields at least one token.

Lossless: greedy output is that of plain greedy decoding. When sampling, a guess d drawn from q is kept with
probability min(1, p(d)/q(d)), and after a rejection the token is drawn from the rest, max(p - q, 0) normalised
(Leviathan et al. 2023), so the output has the main model's distribution. (Accepting whenever p(d) is above some
threshold, as is sometimes done, has not.)

Each module has a cache of its own. What was computed from a guess is never counted as stored: cache lengths cover
confirmed tokens only, and the next pass writes over the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..autograd import Array
from ..model.transformer import Transformer
from .cache import LatentCache
from .decoder import Decoder
from .sampler import choose, probabilities

Sampler = tuple[float, float, np.random.Generator | None]  # temperature, top_p, rng


class Drafter:
    """The MTP modules of one sequence: their caches, and the hidden states that each still has to see confirmed."""

    def __init__(self, model: Transformer, decoder: Decoder, page: int) -> None:
        D, dtype = model.config.hidden_size, model.norm.weight.dtype
        self._decoder = decoder
        self._caches = [LatentCache(model.config, 1, dtype, layers=1, page=page) for _ in model.mtp]
        self._waiting = [np.empty((0, D), dtype=dtype) for _ in model.mtp]  # inputs at positions not yet counted

    def propose(self, h: Array, tokens: list[int], sampler: Sampler) -> tuple[list[int], list[Array]]:
        """Guesses for the tokens after `tokens`, and the distribution each was drawn from.

        `h` [n, D] are the main model's hidden states of the positions confirmed since the last call; the main cache
        holds all of `tokens` but the last.
        """
        known, outputs = list(tokens), h
        guesses: list[int] = []
        distributions: list[Array] = []
        stored = len(tokens) - 1  # positions 0 .. stored - 1 have a confirmed main hidden state
        for k, cache in enumerate(self._caches, start=1):
            inputs = np.concatenate([self._waiting[k - 1], outputs])
            first = stored - len(inputs)  # position of inputs[0] = tokens that this module's cache has counted
            following = np.array([known[first + k : stored + k]], dtype=np.int64)
            outputs = self._decoder.draft(k, inputs[None], following, cache)[0]
            confirmed = max(stored + 1 - k, first)  # positions whose following token is no guess
            cache.extend(confirmed - first)
            self._waiting[k - 1] = inputs[confirmed - first : max(stored + 2 - k, first) - first]
            logits = self._decoder.head(outputs[-1])
            guess, distribution = _draw(logits, sampler)
            guesses.append(guess)
            distributions.append(distribution)
            known.append(guess)
        return guesses, distributions


def speculate(
    model: Transformer, decoder: Decoder, page: int, prompt: Array, output: Any, result: Any, sampler: Sampler
) -> None:
    """Continue one prompt into `output` (`generate.Output`), counting passes and acceptance in `result`."""
    cache = LatentCache(model.config, 1, model.norm.weight.dtype, page=page)
    drafter, tokens = Drafter(model, decoder, page), [int(t) for t in prompt]
    guesses: list[int] = []
    distributions: list[Array] = []
    while not output.done:
        new = tokens[int(cache.lengths[0]) :]  # the prompt at first, later the one token the model has not seen
        h = decoder.decode(np.array([new + guesses], dtype=np.int64), cache)[0]
        result.main_passes += 1
        logits = decoder.head(h[len(new) - 1 :])  # what the model says at each guess, and after the last
        kept, token = _verify(logits, guesses, distributions, sampler)
        for depth in range(len(guesses)):
            result.drafted_by_depth[depth] += depth <= kept
            result.accepted_by_depth[depth] += depth < kept
        for t in [*guesses[:kept], token]:
            output.add(t)
            tokens.append(t)
        confirmed = len(new) + kept
        cache.extend(confirmed)
        if not output.done:
            guesses, distributions = drafter.propose(h[:confirmed], tokens, sampler)
    result.cache_bytes_per_token = cache.bytes_per_token


def _verify(logits: Array, guesses: list[int], distributions: list[Array], sampler: Sampler) -> tuple[int, int]:
    """How many guesses stay, and the main model's own token behind them."""
    temperature, top_p, rng = sampler
    for i, guess in enumerate(guesses):
        if temperature == 0:
            token = int(logits[i].argmax())
            if token != guess:
                return i, token
            continue
        assert rng is not None
        p, q = probabilities(logits[i], temperature, top_p), distributions[i]
        if rng.random() * q[guess] >= p[guess]:
            rest = np.maximum(p - q, 0)
            return i, int(rng.choice(len(p), p=rest / rest.sum()))
    return len(guesses), choose(logits[len(guesses)], temperature, top_p, rng)


def _draw(logits: Array, sampler: Sampler) -> tuple[int, Array]:
    """A guess and the distribution it was drawn from (empty for greedy, which needs none)."""
    temperature, top_p, rng = sampler
    if temperature == 0:
        return int(logits.argmax()), np.empty(0, dtype=np.float64)
    assert rng is not None
    q = probabilities(logits, temperature, top_p)
    return int(rng.choice(len(q), p=q)), q
