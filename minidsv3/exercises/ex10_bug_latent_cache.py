"""Find the bug: what MLA appends to its cache (lesson 03).

Row 16 of the errors' list (k_rope made from the latent instead of from x), and its neighbours: a position that starts
at zero for every new token, a norm over what must not be normed.
"""

from typing import Any

import numpy as np

from .exercise import sizes
from .planted import Bug, find_the_bug

CORRECT = '''def cache_entries(x, w_latent, w_rope, norm, frequencies, start):
    """What the cache keeps of new tokens: x [S, D] at positions start.. -> [S, r + d_r]."""
    latent = x @ w_latent.T
    source = x
    rms = np.sqrt((latent**2).mean(axis=1, keepdims=True) + 1e-6)
    latent_normed = norm * latent / rms
    k_rope = source[:, : w_rope.shape[1]] @ w_rope.T
    position = start + np.arange(len(x))
    rotation = np.exp(1j * position[:, None] * frequencies)
    turned = (k_rope[:, 0::2] + 1j * k_rope[:, 1::2]) * rotation
    k_rope_turned = np.stack([turned.real, turned.imag], axis=2).reshape(k_rope.shape)
    return np.concatenate([latent_normed, k_rope_turned], axis=1)'''

BUGS = (
    Bug(
        "    position = start + np.arange(len(x))",
        "    position = np.arange(len(x))",
        "each call counts positions from 0: right for the prompt, wrong for every token after it",
    ),
    Bug(
        "    return np.concatenate([latent_normed, k_rope_turned], axis=1)",
        "    return np.concatenate([latent_normed, k_rope], axis=1)",
        "the key is cached before its rotation",
    ),
    Bug(
        "    rms = np.sqrt((latent**2).mean(axis=1, keepdims=True) + 1e-6)",
        "    rms = np.sqrt((latent**2).mean(axis=0, keepdims=True) + 1e-6)",
        "the norm mixes tokens: an entry depends on what came in the same call",
    ),
    Bug(
        "    source = x",
        "    source = latent",
        "row 16: the rotated key is made from the latent, where it must come from x",
    ),
)


def cases(rng: np.random.Generator) -> list[dict[str, Any]]:
    out = []
    for S, start in ((1, 0), (1, 3), (4, 2)):
        D, half = 6, sizes(rng, 1, 1, 3)[0]
        out.append(
            dict(
                x=rng.standard_normal((S, D)),
                w_latent=rng.standard_normal((D, D)),
                w_rope=rng.standard_normal((2 * half, D)),
                norm=rng.uniform(0.5, 2, D),
                frequencies=rng.uniform(0.2, 1, half),
                start=start,
            )
        )
    return out


EXERCISE = find_the_bug(
    "find the bug: what MLA appends to its cache",
    3,
    25,
    CORRECT,
    BUGS,
    cases,
    "an entry must be the same whether tokens come in one call or one by one",
)
