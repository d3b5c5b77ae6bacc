"""Find the bug: a gate with a balancing bias (lesson 04).

Row 1 of the errors' list: bias inside the sigmoid, weights taken from biased scores (wajihullahbaig/deepseekv3-minimal;
vllm#11971, #12002); row 6: normalised over the wrong experts.
"""

from typing import Any

import numpy as np

from .exercise import sizes
from .planted import Bug, find_the_bug

CORRECT = '''def gate(logits, bias, top_k):
    """Experts and weights: logits [T, E], bias [E] -> (topk_idx [T, K] ascending, weights [T, K])."""
    scores = 1 / (1 + np.exp(-logits))
    choice = scores + bias
    best = np.argsort(-choice, axis=1, kind="stable")[:, :top_k]
    topk_idx = np.sort(best, axis=1)
    weights = np.take_along_axis(scores, topk_idx, axis=1)
    total = weights.sum(axis=1, keepdims=True)
    return topk_idx, weights / total'''

BUGS = (
    Bug(
        "    weights = np.take_along_axis(scores, topk_idx, axis=1)",
        "    weights = np.take_along_axis(choice, topk_idx, axis=1)",
        "row 1: the bias steers the output too, not only the choice",
    ),
    Bug(
        "    scores = 1 / (1 + np.exp(-logits))",
        "    scores = 1 / (1 + np.exp(-(logits + bias)))",
        "row 1: bias inside the sigmoid, counted twice and in the weights",
    ),
    Bug(
        "    total = weights.sum(axis=1, keepdims=True)",
        "    total = scores.sum(axis=1, keepdims=True)",
        "row 6: normalised over all experts instead of the chosen ones",
    ),
    Bug("    choice = scores + bias", "    choice = scores - bias", "row 1: an overloaded expert is preferred"),
)


def cases(rng: np.random.Generator) -> list[dict[str, Any]]:
    out = [dict(logits=rng.standard_normal((1, 3)), bias=np.array([0.6, 0.0, -0.5]), top_k=2)]
    K, T, E = sizes(rng, 3)
    out.append(dict(logits=rng.standard_normal((T, E)), bias=rng.normal(0, 0.4, E), top_k=K))
    return out


EXERCISE = find_the_bug(
    "find the bug: a gate with a balancing bias",
    4,
    20,
    CORRECT,
    BUGS,
    cases,
    "the weights must not change when all chosen experts' biases do",
)
