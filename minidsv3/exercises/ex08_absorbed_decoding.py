"""Decoding over the latent cache itself: absorbed equals naive (lesson 03)."""

import tracemalloc
from typing import Any

import numpy as np

from .calling import Mine
from .exercise import Exercise, Property, array, require, same, sizes
from .golden import ATOL, RTOL, Case, golden

Rng = np.random.Generator


def _case(rng: Rng, L: int, H: int, d_n: int, d_r: int, d_v: int, r: int) -> dict[str, Any]:
    return dict(
        q=rng.standard_normal((H, d_n + d_r)), latent=rng.standard_normal((L, r)), k_rope=rng.standard_normal((L, d_r)),
        w_uk=rng.standard_normal((H, d_n, r)), w_uv=rng.standard_normal((H, d_v, r)), scale=0.3,
    )  # fmt: skip


def _random(rng: Rng) -> dict[str, Any]:
    return _case(rng, *(int(n) for n in rng.permutation(sizes(rng, 6, 2, 11))))


def _naive(q: Any, latent: Any, k_rope: Any, w_uk: Any, w_uv: Any, scale: float) -> np.ndarray:
    """Keys and values of every cached token and head, made and used one by one."""
    H, d_n = w_uk.shape[:2]
    out = np.zeros((H, w_uv.shape[1]), dtype=np.float64)
    for h in range(H):
        scores = [scale * (q[h, :d_n] @ (w_uk[h] @ c) + q[h, d_n:] @ k) for c, k in zip(latent, k_rope)]
        p = np.exp(np.array(scores) - max(scores))
        for weight, c in zip(p / p.sum(), latent):
            out[h] += weight * (w_uv[h] @ c)
    return out


def _one_token(mine: Mine, rng: Rng) -> None:
    case = _case(rng, 1, 3, 4, 2, 5, 6)
    same("the output over one cached token", mine(**case), np.einsum("hvr,r->hv", case["w_uv"], case["latent"][0]))


def _naive_equal(mine: Mine, rng: Rng) -> None:
    for case in (_case(rng, 2, 1, 1, 2, 3, 4), _random(rng), _random(rng)):
        same("the output", mine(**case), _naive(**case))


def _position(mine: Mine, rng: Rng) -> None:
    case = _random(rng)
    case["w_uk"] = np.zeros_like(case["w_uk"])  # only position speaks
    same("the output without content keys", mine(**case), _naive(**case))


def _memory(mine: Mine, rng: Rng) -> None:
    L, H, d, r = 4000, 16, 64, 8
    case = {name: a.astype(np.float32) if isinstance(a, np.ndarray) else a
            for name, a in _case(rng, L, H, d, 4, d, r).items()}  # fmt: skip
    tracemalloc.start()
    try:
        array("the output", mine(**case), (H, d))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    copies = sum(a.nbytes for a in case.values() if isinstance(a, np.ndarray))
    limit = copies + L * H * d * 4 // 2  # keys or values of all tokens would be twice this
    needed = f"{peak - copies:,} bytes for {L} cached tokens; keys alone would be {L * H * d * 4:,}"
    require(peak <= limit, needed)


def _golden(mine: Mine, case: Case) -> None:
    inputs = {name: value for name, value in case.items() if name != "y"}
    same("the output", mine(**inputs), case["y"], RTOL, ATOL)


EXERCISE = Exercise(
    title="absorbed decoding over a latent cache",
    kind="I",
    lesson=3,
    minutes=35,
    properties=(
        Property(
            "one_token",
            2,
            "with one cached token the output is its value",
            _one_token,
            "a softmax over one score is 1: out_h = W^UV_h c",
        ),
        Property(
            "position",
            2,
            "the rotated key part is scored too",
            _position,
            "q = [nope | rope]; the rope part meets k_rope directly, shared by all heads",
        ),
        Property(
            "naive",
            3,
            "equal to attention over keys and values of all heads",
            _naive_equal,
            "q . (W c) = (W^T q) . c, and sum_j p_j W c_j = W sum_j p_j c_j",
        ),
        Property(
            "memory",
            2,
            "keys and values of the cache are never made",
            _memory,
            "no array may have both the cached tokens and d_n or d_v as axes",
        ),
        golden("absorbed_decoding", _golden),
    ),
)
