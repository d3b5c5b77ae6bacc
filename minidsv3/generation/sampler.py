"""Choosing tokens: greedy, temperature, top-p.

Simple on purpose: every token runs the whole context through the model again. What a cache saves is the subject of
the inference lessons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..autograd import Array
from ..model.transformer import Transformer


def sample(
    model: Transformer,
    prompt: Sequence[int] | Array,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    rng: np.random.Generator | None = None,
    context: int | None = None,
    stream: Callable[[int], object] | None = None,
) -> Array:
    """Tokens that continue `prompt`, int64 [max_new_tokens].

    Parameters
    ----------
    prompt : int [S], S >= 1
    temperature : float
        0 takes the most likely token; otherwise logits are divided by it. Needs `rng` when above 0.
    top_p : float in (0, 1]
        Draw only from the most likely tokens that together have this probability.
    context : int, optional
        The model sees at most this many last tokens.
    stream : function of one token, optional
        Called with each token as it is chosen.
    """
    tokens = [int(t) for t in prompt]
    if not tokens:
        raise ValueError("the prompt is empty: give at least one token")
    if max_new_tokens < 0 or (context is not None and context < 1):
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 0 or more, context={context} at least 1")
    for _ in range(max_new_tokens):
        seen = np.array([tokens[-context:] if context else tokens], dtype=np.int64)
        token = choose(model.logits(seen)[0, -1], temperature, top_p, rng)
        tokens.append(token)
        if stream:
            stream(token)
    return np.array(tokens[len(prompt) :], dtype=np.int64)


def choose(logits: Array, temperature: float, top_p: float, rng: np.random.Generator | None) -> int:
    """One token from logits [V]."""
    if not (temperature >= 0 and 0 < top_p <= 1):
        raise ValueError(f"temperature={temperature} must be >= 0 and top_p={top_p} in (0, 1]")
    if temperature == 0:
        return int(logits.argmax())
    if rng is None:
        raise ValueError(f"temperature={temperature} draws at random: give an rng")
    return int(rng.choice(len(logits), p=probabilities(logits, temperature, top_p)))


def probabilities(logits: Array, temperature: float, top_p: float) -> Array:
    """The distribution that `choose` draws from, float64 [V]."""
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")  # ties to the lowest token
    kept = np.cumsum(p[order]) - p[order] < top_p  # always the first
    p[order[~kept]] = 0
    return p / p.sum()
