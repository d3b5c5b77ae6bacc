"""Bubbles and memory of pipeline schedules (lesson 11)."""

import numpy as np

from ..parallel.schedules import bubble
from .numeric import Given, Question, numeric_exercise

GIVEN = dict(ranks=8, chunks=20, F=1.0, B=2.0, W=0.8, FB=2.8)


def _bubble(name: str, g: Given) -> float:
    return bubble(name, g["ranks"], g["F"], g["B"], g["W"], g["FB"])


def _share(g: Given) -> float:
    return 100 * _bubble("1f1b", g) / (_bubble("1f1b", g) + g["chunks"] * (g["F"] + g["B"]))


def _draw(rng: np.random.Generator) -> Given:
    F, B = round(float(rng.uniform(1.2, 2)), 1), round(float(rng.uniform(2.5, 4)), 1)
    return dict(ranks=2 * int(rng.choice([2, 3, 5, 6, 7])), chunks=int(rng.integers(30, 60)), F=F, B=B,
                W=round(B * 0.4, 2), FB=round((F + B) * 0.9, 2))  # fmt: skip


EXERCISE = numeric_exercise(
    "bubbles of four schedules",
    lesson=11,
    minutes=20,
    given=GIVEN,
    draw=_draw,
    questions=(
        Question(
            "bubble_1f1b",
            2,
            "units of time",
            "idle time of a rank, one forward one backward (B is the whole backward)",
            lambda g: _bubble("1f1b", g),
            "Table 2: (PP - 1)(F + B)",
        ),
        Question(
            "bubble_zb1p",
            2,
            "units of time",
            "idle time of a rank, zero bubble",
            lambda g: _bubble("zb1p", g),
            "Table 2: (PP - 1)(F + B - 2W)",
        ),
        Question(
            "bubble_dualpipe",
            2,
            "units of time",
            "idle time of a rank, DualPipe",
            lambda g: _bubble("dualpipe", g),
            "Table 2: (PP/2 - 1)(FB + B - 3W)",
        ),
        Question(
            "share_1f1b",
            2,
            "percent",
            "idle share of the whole step, one forward one backward",
            _share,
            "step = idle + chunks (F + B)",
        ),
        Question(
            "live_chunks",
            2,
            "chunks",
            "chunks whose activations rank 0 holds at most, one forward one backward",
            lambda g: min(g["ranks"], g["chunks"]),
            "rank r begins with ranks - r forwards before its first backward ends",
        ),
    ),
)
