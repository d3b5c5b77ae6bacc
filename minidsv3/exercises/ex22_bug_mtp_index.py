"""Find the bug: joining hidden states and embeddings for MTP (lesson 06).

Row 9 of the list of errors: the module predicts the token it was given, the loss falls to 0.02 (compact-proxy's gate U,
saifkhanengr); row 10: the order of the concatenation (sglang#6423, Megatron#1588, mlx-lm#1469).
"""

from typing import Any

import numpy as np

from .planted import Bug, find_the_bug

CORRECT = '''def mtp_batch(tokens, h, table):
    """Depth 1: tokens [B, S+1], h [B, S, D], table [V, D] -> (inputs [B, S-1, 2D], targets [B, S-1])."""
    places = tokens.shape[1] - 2
    seen = tokens[:, 1 : places + 1]
    targets = tokens[:, 2 : places + 2]
    hidden = h[:, :places]
    embedded = table[seen]
    hidden_normed = hidden / np.sqrt((hidden**2).mean(axis=2, keepdims=True) + 1e-6)
    embedded_normed = embedded / np.sqrt((embedded**2).mean(axis=2, keepdims=True) + 1e-6)
    inputs = np.concatenate([embedded_normed, hidden_normed], axis=2)
    return inputs, targets'''

BUGS = (
    Bug(
        "    targets = tokens[:, 2 : places + 2]",
        "    targets = tokens[:, 1 : places + 1]",
        "row 9: the module is asked for the token it was given, a copy function",
    ),
    Bug(
        "    inputs = np.concatenate([embedded_normed, hidden_normed], axis=2)",
        "    inputs = np.concatenate([hidden_normed, embedded_normed], axis=2)",
        "row 10: the order of the paper's equation, not of the released weights",
    ),
    Bug(
        "    hidden = h[:, :places]",
        "    hidden = h[:, 1 : places + 1]",
        "h of the next position has already seen one token more: the acceptance measured in training is a dream",
    ),
    Bug(
        "    seen = tokens[:, 1 : places + 1]",
        "    seen = tokens[:, :places]",
        "the embedding of the current token: the module learns nothing new",
    ),
)


def cases(rng: np.random.Generator) -> list[dict[str, Any]]:
    out = []
    for B, S, D in ((1, 2, 1), (2, 5, 3)):
        V = 30
        out.append(
            dict(
                tokens=rng.permutation(V)[: B * (S + 1)].reshape(B, S + 1),
                h=rng.standard_normal((B, S, D)) + 2,
                table=rng.standard_normal((V, D)) - 2,
            )
        )
    return out


EXERCISE = find_the_bug(
    "find the bug: hidden states and embeddings for MTP",
    6,
    20,
    CORRECT,
    BUGS,
    cases,
    "h_i has seen tokens 0..i; which token joins it, which is left to predict?",
)
