"""Find the bug: scores under RoPE and YaRN (lesson 02).

Rows 14 (layouts mixed up: transformers#39687, vllm#26995, mlx-lm#512) and 15 (mscale^2 forgotten in the softmax scale:
Megatron#1429, llama.cpp#7118; invisible at position 0) of the list of errors.
"""

from typing import Any

import numpy as np

from .planted import Bug, find_the_bug

CORRECT = '''def last_query_weights(q, k, frequencies, factor):
    """Attention weights of the last query over all keys, YaRN with mscale_all_dim = 1: q, k [S, d] -> [S]."""
    S, d = q.shape
    angles = np.arange(S)[:, None] * frequencies
    rotation = np.exp(1j * angles)
    q_pairs = q[:, 0::2] + 1j * q[:, 1::2]
    k_pairs = k[:, 0::2] + 1j * k[:, 1::2]
    q_turned = q_pairs * rotation
    k_turned = k_pairs * rotation
    mscale = 0.1 * np.log(factor) + 1
    scale = mscale**2 / np.sqrt(d)
    scores = scale * (q_turned[-1] * k_turned.conj()).real.sum(axis=1)
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()'''

BUGS = (
    Bug(
        "    scale = mscale**2 / np.sqrt(d)",
        "    scale = 1 / np.sqrt(d)",
        "row 15: mscale^2 is missing; with one key the softmax is 1 and nothing shows",
    ),
    Bug(
        "    scale = mscale**2 / np.sqrt(d)",
        "    scale = mscale / np.sqrt(d)",
        "row 15: mscale once, where query and key would each bring one",
    ),
    Bug(
        "    k_pairs = k[:, 0::2] + 1j * k[:, 1::2]",
        "    k_pairs = k[:, : d // 2] + 1j * k[:, d // 2 :]",
        "row 14: half-split keys against interleaved queries",
    ),
    Bug(
        "    k_turned = k_pairs * rotation",
        "    k_turned = k_pairs * rotation.conj()",
        "keys turned backwards: scores depend on the sum of positions",
    ),
    Bug(
        "    mscale = 0.1 * np.log(factor) + 1",
        "    mscale = 0.1 * np.log2(factor) + 1",
        "row 15: another logarithm, another temperature",
    ),
)


def cases(rng: np.random.Generator) -> list[dict[str, Any]]:
    out = []
    for S, half in ((1, 1), (2, 2), (5, 3)):
        q, k = rng.standard_normal((2, S, 2 * half))
        out.append(dict(q=q, k=k, frequencies=rng.uniform(0.2, 1.0, half), factor=float(rng.integers(4, 41))))
    return out


EXERCISE = find_the_bug(
    "find the bug: scores under RoPE and YaRN",
    2,
    25,
    CORRECT,
    BUGS,
    cases,
    "try one key, then two; compare scores after moving all positions by one",
)
