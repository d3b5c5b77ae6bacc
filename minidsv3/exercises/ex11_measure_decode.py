"""Measure: FLOPs of two ways to decode, and where they cross (lesson 03)."""

from typing import Any

import numpy as np

from ..config import ModelConfig
from ..generation.costs import attention_cost
from .calling import Mine
from .exercise import Exercise, Property, array, require, same

V3 = ModelConfig.preset("deepseek-v3")
CONTEXT = 4096
Rng = np.random.Generator


def _data(mine: Mine) -> dict[str, np.ndarray]:
    data: Any = mine() if callable(mine.submission) else mine.submission
    names = ("new_tokens", "absorbed", "recomputed")
    require(isinstance(data, dict) and set(names) <= set(data), f"the data is no dict with {', '.join(names)}")
    length = len(np.atleast_1d(data["new_tokens"]))
    return {name: array(name, np.asarray(data[name]), (length,)) for name in names}


def _range(mine: Mine, rng: Rng) -> None:
    new = _data(mine)["new_tokens"]
    require(len(new) >= 8 and np.all(np.diff(new) > 0), "new_tokens: at least 8 ascending values are needed")
    require(new[0] == 1 and new[-1] >= 512, "new_tokens must begin at 1 (decoding) and reach 512 (a prompt)")


def _curve(path: str) -> Any:
    def test(mine: Mine, rng: Rng) -> None:
        data = _data(mine)
        expected = [float(attention_cost(V3, path, CONTEXT, int(n)).flops) for n in data["new_tokens"]]
        same(path, data[path].astype(np.float64), np.array(expected), rtol=1e-6)

    return test


def _crossing(mine: Mine, rng: Rng) -> None:
    data = _data(mine)
    cheaper = data["new_tokens"][data["absorbed"] < data["recomputed"]]
    require(len(cheaper) and cheaper[-1] < data["new_tokens"][-1], "the curves do not cross in the measured range")
    after = data["new_tokens"][data["absorbed"] >= data["recomputed"]][0]
    require(
        after / cheaper[-1] <= 1.3, f"the crossing lies somewhere in {cheaper[-1]}..{after}: measure more points there"
    )


EXERCISE = Exercise(
    title="measure: absorbed or recomputed?",
    kind="M",
    lesson=3,
    minutes=30,
    properties=(
        Property(
            "range",
            2,
            "the measurement covers decoding and prompts",
            _range,
            "np.unique(np.geomspace(1, 1024, 60).astype(int))",
        ),
        Property(
            "absorbed",
            2,
            "FLOPs of absorbed attention over 4,096 tokens",
            _curve("absorbed"),
            "generation.costs.attention_cost(cfg, 'absorbed', 4096, n).flops",
        ),
        Property(
            "recomputed",
            2,
            "FLOPs of recomputed attention over 4,096 tokens",
            _curve("recomputed"),
            "the same function with 'recomputed'",
        ),
        Property("crossing", 4, "the crossing is located within 30 %", _crossing, "more points where the curves meet"),
    ),
)
