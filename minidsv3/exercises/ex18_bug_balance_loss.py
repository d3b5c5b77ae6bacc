"""Find the bug: the sequence-wise balance loss (lesson 05).

Row 6 of the list of errors: a product of batch means instead of a mean over sequences (PaddleNLP#11160: "about 20x too
large"), another normalisation, another count (Megatron#2767, #1438).
"""

from typing import Any

import numpy as np

from .planted import Bug, find_the_bug

CORRECT = '''def balance_loss(scores, topk_idx):
    """Eq. 17-20 without alpha, mean over sequences: scores [B, S, E] > 0, topk_idx [B, S, K]."""
    B, S, E = scores.shape
    K = topk_idx.shape[2]
    chosen = np.zeros((B, S, E))
    np.put_along_axis(chosen, topk_idx, 1.0, axis=2)
    f = chosen.sum(axis=1) * E / (K * S)
    share = scores / scores.sum(axis=2, keepdims=True)
    P = share.mean(axis=1)
    return (f * P).sum(axis=1).mean()'''

BUGS = (
    Bug(
        "    return (f * P).sum(axis=1).mean()",
        "    return (f.mean(axis=0) * P.mean(axis=0)).sum()",
        "row 6: a product of batch means: an imbalance inside one sequence is hidden by another",
    ),
    Bug(
        "    f = chosen.sum(axis=1) * E / (K * S)",
        "    f = chosen.sum(axis=1) * E / S",
        "row 6: K is missing, the loss is K for a perfect balance",
    ),
    Bug(
        "    share = scores / scores.sum(axis=2, keepdims=True)",
        "    share = np.exp(scores) / np.exp(scores).sum(axis=2, keepdims=True)",
        "row 6: a softmax on top of sigmoid scores: nearly flat, no gradient worth having",
    ),
    Bug(
        "    share = scores / scores.sum(axis=2, keepdims=True)",
        "    share = scores * chosen / (scores * chosen).sum(axis=2, keepdims=True)",
        "row 6: normalised over the chosen experts instead of all",
    ),
)


def cases(rng: np.random.Generator) -> list[dict[str, Any]]:
    out = []
    for B, S, E, K in ((2, 1, 3, 2), (3, 4, 7, 2)):
        scores = rng.random((B, S, E)) + 0.05
        out.append(dict(scores=scores, topk_idx=np.sort(np.argsort(-scores, axis=2)[..., :K], axis=2)))
    return out


EXERCISE = find_the_bug(
    "find the bug: the sequence-wise balance loss",
    5,
    20,
    CORRECT,
    BUGS,
    cases,
    "what must the loss be when scores and loads are uniform, whatever E, K and S?",
)
