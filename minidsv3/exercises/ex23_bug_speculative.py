"""Find the bug: verification of a guess (lesson 06). Row 20 of the list: acceptance by a threshold (V3-Lite)."""

from typing import Any

import numpy as np

from .planted import Bug, find_the_bug

CORRECT = '''def verify(p, q, draft, u, v):
    """Token and whether the guess was kept: p, q [V], guess drawn from q, u and v uniform in [0, 1)."""
    ratio = p[draft] / q[draft]
    accepted = bool(u < ratio)
    rest = np.maximum(p - q, 0.0)
    if accepted:
        return int(draft), accepted
    cumulative = np.cumsum(rest) / rest.sum()
    token = int(np.searchsorted(cumulative, v, side="right"))
    return token, accepted'''

BUGS = (
    Bug("    accepted = bool(u < ratio)", "    accepted = bool(p[draft] > 0.8)", "row 20: a threshold is not lossless"),
    Bug(
        "    rest = np.maximum(p - q, 0.0)",
        "    rest = p",
        "after a rejection the token is drawn from p again: guesses of q come too often",
    ),
    Bug("    ratio = p[draft] / q[draft]", "    ratio = q[draft] / p[draft]", "the ratio upside down"),
    Bug(
        "    rest = np.maximum(p - q, 0.0)", "    rest = np.abs(p - q)", "what q has too much of is added, not left out"
    ),
)


def cases(rng: np.random.Generator) -> list[dict[str, Any]]:
    out = []
    for V in (2, 3, 5, 5, 6, 7, 7, 8, 9, 9):
        p, q = rng.random((2, V)) + 0.02
        p, q = p / p.sum(), q / q.sum()
        for draft in range(V):
            out.append(dict(p=p, q=q, draft=draft, u=float(rng.random()), v=float(rng.random())))
    return out


EXERCISE = find_the_bug(
    "find the bug: keeping or rejecting a guess",
    6,
    20,
    CORRECT,
    BUGS,
    cases,
    "summed over guesses and u, each token must come with probability p",
)
