"""Find the bug: blocks with power-of-two scales (lesson 08).

Rows 17 (edge blocks: transformers#36026), 18 (ue8m0: the scale rounded after quantising, 2x off: transformers#46763,
DeepSeek-V3#961) and 19 (`weight_scale_inv` multiplies) of the list of errors.
"""

from typing import Any

import numpy as np

from .planted import Bug, find_the_bug

CORRECT = '''def through_blocks(w, block):
    """w [M, N] through blocks with ue8m0 scales, codes rounded to whole numbers up to 448: what is read back."""
    out = np.zeros_like(w)
    for a in range(0, w.shape[0], block):
        for b in range(0, w.shape[1], block):
            part = w[a : a + block, b : b + block]
            amax = max(np.abs(part).max(), 1e-4)
            scale = 2.0 ** np.ceil(np.log2(amax / 448))
            codes = np.clip(np.round(part / scale), -448, 448)
            stored_scale = scale
            out[a : a + block, b : b + block] = codes * stored_scale
    return out'''

BUGS = (
    Bug(
        "            stored_scale = scale",
        "            stored_scale = 2.0 ** np.ceil(np.log2(scale * 1.001))",
        "row 18: rounded up once more after the codes were made: everything is twice as large",
    ),
    Bug(
        "            out[a : a + block, b : b + block] = codes * stored_scale",
        "            out[a : a + block, b : b + block] = codes / stored_scale",
        "row 19: weight_scale_inv is a multiplier in spite of its name",
    ),
    Bug(
        "            scale = 2.0 ** np.ceil(np.log2(amax / 448))",
        "            scale = 2.0 ** np.floor(np.log2(amax / 448))",
        "rounded down: the largest numbers are clipped",
    ),
    Bug(
        "        for b in range(0, w.shape[1], block):",
        "        for b in range(0, w.shape[1] - block + 1, block):",
        "row 17: an edge block narrower than the others is forgotten",
    ),
)


def cases(rng: np.random.Generator) -> list[dict[str, Any]]:
    return [dict(w=rng.standard_normal(shape) * 10.0 ** rng.integers(-2, 3), block=block)
            for shape, block in (((1, 1), 1), ((3, 4), 2), ((5, 7), 3))]  # fmt: skip


EXERCISE = find_the_bug(
    "find the bug: blocks with power-of-two scales",
    8,
    20,
    CORRECT,
    BUGS,
    cases,
    "read a block back: it must be within half a step of what went in, also at the edge",
)
