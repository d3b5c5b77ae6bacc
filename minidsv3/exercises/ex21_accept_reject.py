"""Speculative decoding: accept or reject so that the output keeps the model's distribution (lesson 06)."""

from typing import Any

import numpy as np

from .calling import Mine
from .exercise import Exercise, Failed, Property, parts, require, same, sizes
from .golden import Case, golden

Rng = np.random.Generator
DRAWS = 4000


def _distribution(rng: Rng, V: int) -> np.ndarray:
    p = rng.random(V) ** 2 + 0.02
    return p / p.sum()


def _verdict(mine: Mine, p: Any, q: Any, draft: int, rng: Rng) -> tuple[int, bool]:
    token, accepted = parts("the result", mine.run(mine.submission, p, q, draft, rng), 2)
    if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token < len(p):
        raise Failed(f"the token is {token!r}, expected a whole number in 0..{len(p) - 1}")
    if not isinstance(accepted, bool | np.bool_):
        raise Failed(f"accepted is {accepted!r}, expected True or False")
    return int(token), bool(accepted)


def _equal(mine: Mine, rng: Rng) -> None:
    p = _distribution(rng, sizes(rng, 1, 3, 8)[0])
    for draft in range(len(p)):
        token, accepted = _verdict(mine, p, p.copy(), draft, rng)
        require(accepted and token == draft, f"guess {draft} was not kept although p = q")


def _never(mine: Mine, rng: Rng) -> None:
    V = sizes(rng, 1, 4, 8)[0]
    p, q = _distribution(rng, V), np.full(V, 1 / V, dtype=np.float64)
    p[2] = 0
    p /= p.sum()
    for _ in range(50):
        token, accepted = _verdict(mine, p, q, 2, rng)
        require(not accepted and token != 2, "a guess with p = 0 was kept")


def _rate(mine: Mine, rng: Rng) -> None:
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.1, 0.3])
    kept = np.mean([_verdict(mine, p, q, 0, rng)[1] for _ in range(DRAWS)])
    if abs(kept - 1 / 3) > 0.04:  # five standard deviations of 4,000 draws
        raise Failed(f"a guess with p = 0.2 and q = 0.6 was kept in {kept:.3f} of {DRAWS} draws, expected 0.333")
    require(_verdict(mine, p, q, 1, rng)[1], "a guess with p > q was rejected")


def _lossless(mine: Mine, rng: Rng) -> None:
    V = sizes(rng, 1, 4, 6)[0]
    p, q = _distribution(rng, V), _distribution(rng, V)[::-1].copy()
    counts = np.zeros(V, dtype=np.int64)
    for _ in range(DRAWS):
        counts[_verdict(mine, p, q, int(rng.choice(V, p=q)), rng)[0]] += 1
    chi_square = float(((counts - DRAWS * p) ** 2 / (DRAWS * p)).sum())
    if chi_square > 32:  # 5 degrees of freedom exceed it once in 170,000
        worst = int(np.argmax(np.abs(counts / DRAWS - p)))
        raise Failed(f"token {worst} came in {counts[worst] / DRAWS:.3f} of {DRAWS} draws, expected {p[worst]:.3f}")


def _after_rejection(mine: Mine, rng: Rng) -> None:
    """Everything but one token has p < q: what comes after a rejection is certain."""
    p, q = np.array([0.1, 0.1, 0.8]), np.array([0.5, 0.4, 0.1])
    for _ in range(200):
        token, accepted = _verdict(mine, p, q, 0, rng)
        same("the token after a rejection", token, 0 if accepted else 2)


def _golden(mine: Mine, case: Case) -> None:
    """What comes out for each guess that goes in: a table of probabilities, measured."""
    rng, p, q = np.random.default_rng(0), case["p"], case["q"]
    for draft, row in enumerate(case["table"]):
        tokens = [_verdict(mine, p, q, draft, rng)[0] for _ in range(DRAWS)]
        share = np.bincount(tokens, minlength=len(p)) / DRAWS
        same(f"how often each token comes for the guess {draft}", share, row, rtol=0, atol=0.04)


EXERCISE = Exercise(
    title="speculative decoding: accept, reject, and lose nothing",
    kind="I",
    lesson=6,
    minutes=35,
    properties=(
        Property("equal", 1, "where both models agree every guess is kept", _equal, "min(1, p/q) is 1"),
        Property(
            "never",
            1,
            "a guess the model would never make is never kept",
            _never,
            "p = 0: reject, then draw from the rest",
        ),
        Property(
            "rate",
            2,
            "a guess is kept with probability min(1, p/q)",
            _rate,
            "accept if rng.random() < p[draft] / q[draft]",
        ),
        Property(
            "after_rejection",
            2,
            "after a rejection only tokens with p > q come",
            _after_rejection,
            "draw from max(p - q, 0), normalised",
        ),
        Property(
            "lossless",
            3,
            "tokens come with the model's own probabilities (chi-square)",
            _lossless,
            "accepting above a threshold, or drawing from p after a rejection, is not lossless",
        ),
        golden("accept_reject", _golden, f"a table of probabilities, within 0.04 in {DRAWS} draws"),
    ),
)
