"""AdamW over one flat buffer.

All parameters live side by side in one array, and so do a shard's gradients and the two moments. A step is then a walk
over blocks that fit the cache, instead of a few ufuncs per tensor; a sum over shards or a norm is one line. Matrices
come first, vectors (norm weights, which get no weight decay) behind them.

Master weights and gradients are float32; moments are float32, or bfloat16 as in the report (section 3.3.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ..autograd import Array, GradientBuffer, Parameter
from ..config import TrainConfig
from ..model.module import Module
from ..quant.formats import BF16

BLOCK = 1 << 18  # elements, 1 MiB an array: long enough that two workers seldom meet between NumPy's calls
Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]  # map, or a thread pool's map


class FlatGradient(NamedTuple):
    """One shard's gradient: the whole, and the parts that `autograd.backward` writes into."""

    data: Array
    into: GradientBuffer


class FlatParameters:
    """All parameters of a model as views of one array `data`, matrices first (those in `first` before all)."""

    def __init__(self, model: Module, first: Collection[Parameter] = ()) -> None:
        self.parameters = sorted(model.parameters(), key=lambda p: (p not in first, len(p.shape) == 1))  # stable
        sizes = [p.data.size for p in self.parameters]
        stops = np.cumsum(sizes).tolist()
        self.ranges = {p: (stop - size, stop) for p, size, stop in zip(self.parameters, sizes, stops)}
        self.decayed = sum(p.data.size for p in self.parameters if len(p.shape) > 1)
        self.data = np.concatenate([p.data.reshape(-1) for p in self.parameters])
        for parameter, view in self.views(self.data).items():
            parameter.data = view

    def views(self, flat: Array) -> dict[Parameter, Array]:
        """Each parameter's part of a flat array, in its shape."""
        return {p: flat[a:b].reshape(p.shape) for p, (a, b) in self.ranges.items()}

    def new_gradient(self) -> FlatGradient:
        """A flat gradient of zeros and its views."""
        flat = np.zeros_like(self.data)
        return FlatGradient(flat, GradientBuffer(self.views(flat)))


class AdamW:
    """Decoupled weight decay Adam (Loshchilov & Hutter 2019) in blocks."""

    def __init__(self, flat: FlatParameters, cfg: TrainConfig) -> None:
        dtype = BF16 if cfg.moments_dtype == "bfloat16" else flat.data.dtype
        self.flat, self._cfg = flat, cfg
        self.exp_avg = np.zeros(flat.data.size, dtype=dtype)
        self.exp_avg_sq = np.zeros(flat.data.size, dtype=dtype)
        self.owned = [(0, flat.data.size)]  # the ranges that are stepped here; the moments of others stay untouched

    def step(self, gradient: Array, step: int, learning_rate: float, scale: float, run: Run = map) -> None:
        """Move the parameters against ``scale * gradient``; `step` counts from 1 (bias correction)."""
        cfg = self._cfg
        correction1, correction2 = 1 - cfg.adam_beta1**step, 1 - cfg.adam_beta2**step
        fresh1, fresh2 = 1 - cfg.adam_beta1, 1 - cfg.adam_beta2  # weight of the new gradient in either moment

        def update(block: tuple[int, int]) -> None:
            a, b = block
            p, m, v = self.flat.data[a:b], _load(self.exp_avg[a:b]), _load(self.exp_avg_sq[a:b])
            g = gradient[a:b] * p.dtype.type(scale * fresh1)
            m *= cfg.adam_beta1
            m += g
            g *= g
            g *= fresh2 / fresh1**2
            v *= cfg.adam_beta2
            v += g
            if m.dtype != self.exp_avg.dtype:  # copies, to be rounded back
                self.exp_avg[a:b], self.exp_avg_sq[a:b] = m, v
            # m / correction1 / (sqrt(v / correction2) + eps), with the constants drawn together
            np.sqrt(v, out=g)
            g += cfg.adam_eps * math.sqrt(correction2)
            np.divide(m, g, out=g)
            g *= learning_rate * math.sqrt(correction2) / correction1
            if a < self.flat.decayed:
                p *= 1 - learning_rate * cfg.weight_decay
            p -= g

        for _ in run(update, self._blocks()):
            pass

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Owned ranges of at most BLOCK elements that do not straddle the end of the decayed part."""
        end = self.flat.decayed
        for start, stop in self.owned:
            for a, b in ((start, min(stop, end)), (max(start, end), stop)):
                yield from ((i, min(i + BLOCK, b)) for i in range(a, b, BLOCK))

    def named_moments(self, model: Module) -> Iterator[tuple[str, Array]]:
        """Views of both moments under the released name of each tensor: 'exp_avg.model.norm.weight', ..."""
        for kind, flat in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            views = self.flat.views(flat)
            for prefix, module in model.named_modules():
                dot = f"{kind}.{prefix}." if prefix else f"{kind}."
                for name, value in vars(module).items():
                    if isinstance(value, Parameter) and value.parts:
                        yield from ((dot + part, views[value][index]) for part, index in value.parts.items())
                    elif isinstance(value, Parameter):
                        yield dot + name, views[value]


def sum_gradients(gradients: list[Array], run: Run = map) -> float:
    """Add all to the first, in order, and return the norm of the sum (blocks in float64, in order)."""
    total = gradients[0]

    def add(a: int) -> float:
        block = total[a : a + BLOCK]
        for other in gradients[1:]:
            block += other[a : a + BLOCK]
        return float(np.vecdot(block, block))

    square = math.fsum(run(add, range(0, total.size, BLOCK)))
    return math.sqrt(square) if square >= 0 else math.nan


def _load(moment: Array) -> Array:
    """A moment to compute with: itself if float32 or float64, a float32 copy if bfloat16."""
    return moment.astype(np.float32) if moment.dtype == BF16 else moment
