"""YaRN's frequencies: which channel pairs are stretched, and how far (lesson 02)."""

import math
from typing import Any

import numpy as np

from .calling import Mine
from .exercise import Exercise, Property, array, require, same, sizes
from .golden import Case, golden, stored

Rng = np.random.Generator
THETA = 10000.0


def _case(rng: Rng) -> dict[str, float]:
    d_r = 2 * sizes(rng, 1, 12, 32)[0]
    return dict(d_r=d_r, theta=THETA, factor=float(rng.integers(4, 41)), context=4096, beta_fast=32.0, beta_slow=1.0)


def _ends(mine: Mine, rng: Rng) -> None:
    case = _case(rng)
    plain = THETA ** (-np.arange(0, case["d_r"], 2, dtype=np.float64) / case["d_r"])
    got = array("the frequencies", mine(**case), plain.shape)
    same("frequency 0", got[0], plain[0], rtol=1e-9)
    same("the last frequency", got[-1], plain[-1] / case["factor"], rtol=1e-9, atol=0)


def _order(mine: Mine, rng: Rng) -> None:
    for _ in range(4):
        case = _case(rng)
        plain = THETA ** (-np.arange(0, case["d_r"], 2, dtype=np.float64) / case["d_r"])
        got = array("the frequencies", mine(**case), plain.shape)
        ratio = plain / got
        require(np.all(np.diff(got) < 0), "a slower pair got a higher frequency than a faster one")
        inside = np.all(ratio > 1 - 1e-9) and np.all(ratio < case["factor"] * (1 + 1e-9))
        require(inside, "a pair is stretched by less than 1 or more than factor")


def _no_stretch(mine: Mine, rng: Rng) -> None:
    case = _case(rng) | dict(factor=1.0)
    plain = THETA ** (-np.arange(0, case["d_r"], 2, dtype=np.float64) / case["d_r"])
    same("the frequencies for factor 1", mine(**case), plain, rtol=1e-9)


def _ramp(mine: Mine, rng: Rng) -> None:
    for _ in range(4):
        case = _case(rng)
        d_r, expected = int(case["d_r"]), []
        ends = [d_r * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(THETA)) for turns in (32.0, 1.0)]
        low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), d_r - 1)
        for j in range(d_r // 2):  # pair by pair
            share = min(max((j - low) / max(high - low, 0.001), 0.0), 1.0)
            plain = THETA ** (-2 * j / d_r)
            expected.append(plain * (1 - share) + plain / case["factor"] * share)
        same("the frequencies", mine(**case), np.array(expected), rtol=1e-9, atol=0)


def _golden(mine: Mine, case: Case) -> None:
    """DeepSeek-V3's own numbers."""
    settings = {name: value for name, value in case.items() if name != "frequencies"}
    same("the frequencies", mine(**settings), case["frequencies"], rtol=1e-9, atol=0)


def _enter(submission: Any, parts: Any) -> None:
    """Nano under V3's own YaRN: its four channel pairs lie before, on and behind the ramp."""
    case, names = stored("yarn_ramp"), ("factor", "beta_fast", "beta_slow")
    settings = {name: case[name] for name in names}
    parts.rope_scaling = dict(type="yarn", original_max_position_embeddings=case["context"], **settings)

    def frequencies(cfg: Any) -> Any:
        return submission(cfg.qk_rope_head_dim, cfg.rope_theta, context=case["context"], **settings)

    parts.frequencies = frequencies


EXERCISE = Exercise(
    title="YaRN's ramp over the channel pairs",
    kind="I",
    lesson=2,
    minutes=25,
    properties=(
        Property(
            "ends",
            2,
            "the fastest pair stays, the slowest is divided by factor",
            _ends,
            "the ramp is 0 at the fast end and 1 at the slow end",
        ),
        Property("order", 2, "frequencies fall, each stretched by 1 to factor", _order, "clip the ramp to [0, 1]"),
        Property(
            "no_stretch",
            2,
            "factor 1 changes nothing",
            _no_stretch,
            "blend f and f / factor with weights that sum to 1",
        ),
        Property(
            "ramp",
            3,
            "the blend is linear between the two correction pairs",
            _ramp,
            "low = floor(pair of beta_fast), high = ceil(pair of beta_slow); the ramp counts pairs, not channels",
        ),
        golden("yarn_ramp", _golden, "DeepSeek-V3's own frequencies, rtol 1e-9"),
    ),
    enter=_enter,
)
