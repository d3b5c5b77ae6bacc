"""Find the bug: the backward pass of a softmax gate (lesson 01). An axis, a factor, an order: all run."""

from typing import Any

import numpy as np

from .exercise import sizes
from .planted import Bug, find_the_bug

CORRECT = '''def softmax_linear_backward(x, w, p, dp):
    """Gradients of p = softmax(x w^T): x [T, D], w [E, D], p and dp [T, E] -> (dx, dw)."""
    along = (dp * p).sum(axis=1, keepdims=True)
    dlogits = p * (dp - along)
    dx = dlogits @ w
    dw = dlogits.T @ x
    return dx, dw'''

BUGS = (
    Bug(
        "    along = (dp * p).sum(axis=1, keepdims=True)",
        "    along = (dp * p).sum(axis=0, keepdims=True)",
        "the wrong axis: rows of different tokens are mixed, shapes agree by broadcasting",
    ),
    Bug(
        "    dlogits = p * (dp - along)",
        "    dlogits = p * dp - along",
        "brackets: the softmax's own weights are missing from the second term",
    ),
    Bug(
        "    along = (dp * p).sum(axis=1, keepdims=True)",
        "    along = dp.mean(axis=1, keepdims=True)",
        "the plain mean instead of the mean weighted by p",
    ),
    Bug(
        "    dw = dlogits.T @ x",
        "    dw = dp.T @ x",
        "the gradient of the output is used for the weight: the softmax is skipped",
    ),
    Bug("    dx = dlogits @ w", "    dx = dp @ w", "the same for the input"),
)


def cases(rng: np.random.Generator) -> list[dict[str, Any]]:
    out = []
    for T, D, E in ((2, 1, 3), tuple(int(n) for n in rng.permutation(sizes(rng, 3)))):
        logits = rng.standard_normal((T, E))
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        out.append(
            dict(x=rng.standard_normal((T, D)), w=rng.standard_normal((E, D)), p=p, dp=rng.standard_normal((T, E)))
        )
    return out


EXERCISE = find_the_bug(
    "find the bug: backward through a softmax",
    1,
    25,
    CORRECT,
    BUGS,
    cases,
    "the rows of dlogits must sum to zero: adding a constant to all logits changes nothing",
)
