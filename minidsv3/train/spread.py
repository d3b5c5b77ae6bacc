"""A training step spread over ranks: data parallel, experts on their ranks, optimizer states sharded (ZeRO-1).

The step is the one of `train.step`; this file only says what its three outside parts are when the shards of a batch
belong to ranks, one shard a rank:

* `run`: every local rank computes its shard, as a program of its own; losses and loads are gathered from all ranks;
* `add_up`: gradients of what all ranks share are summed by a reduce-scatter, in rank order; an expert's gradient is
  complete where the expert is, since all its tokens were there;
* the optimizer steps only what the local ranks own, a piece of the shared weights for each rank (and no moment exists
  elsewhere), and the ranks gather each other's pieces.

Nothing here depends on which process hosts which rank, so neither do the bits. A checkpoint needs the whole: `gather`
brings moments and experts together first, and the files are the same whatever the number of ranks.

Simplified against the real system: the experts' group is the group of all ranks; a process has room for all experts,
though it uses its own only; gradients travel in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np

from ..autograd import Array, GradientBuffer, Parameter
from ..config import TrainConfig
from ..model.moe import Experts
from ..model.transformer import Transformer
from .optim import BLOCK, AdamW, FlatGradient, FlatParameters, Run


class RanksLike(Protocol):
    """What is asked of `parallel.ranks.Ranks`."""

    comm: Any  # parallel.comm.Communicator

    def run(self, program: Callable[[int], Any]) -> list[Any]: ...


class Alone:
    """One process, no ranks: what a plain run has in place of `OnRanks`."""

    is_root = True
    description: dict[str, Any] | None = None
    dispatcher: Any = None
    add_up: Any = None

    def prepare(self, model: Transformer, cfg: TrainConfig) -> tuple[AdamW, list[FlatGradient]]:
        """The optimizer, and a gradient buffer for each shard."""
        flat = FlatParameters(model)
        return AdamW(flat, cfg), [flat.new_gradient() for _ in range(cfg.shards)]

    def step_run(self, run: Run) -> Run:
        """Who computes shards, given the workers' `run`."""
        return run

    def barrier(self) -> None:
        """Wait for all processes."""

    def gather(self) -> None:
        """Bring weights and moments together at the root."""

    def agree(self, stop: bool) -> bool:
        """Whether any process was asked to stop."""
        return stop

    def from_root(self, compute: Callable[[], float]) -> float:
        """A number that the root computes and everybody gets."""
        return compute()


class OnRanks:
    """A run on the ranks of a communicator.

    Parameters
    ----------
    ranks : RanksLike
    dispatcher : object with `dispatch`, `combine` and `experts_of(rank)`
        `parallel.dispatcher.AllToAllTokenDispatcher`; the model is to be built with it.
    description : dict
        Noted in train.json: ranks, gpus_per_node, engine.
    """

    def __init__(self, ranks: RanksLike, dispatcher: Any, description: dict[str, Any]) -> None:
        self.ranks, self.comm, self.dispatcher = ranks, ranks.comm, dispatcher
        self.description: dict[str, Any] | None = description
        self.is_root = 0 in self.comm.local_ranks

    def prepare(self, model: Transformer, cfg: TrainConfig) -> tuple[AdamW, list[FlatGradient]]:
        """Weights flat with the experts first; a buffer for each local rank's shared gradient, one for all experts'.

        Raises ValueError unless the run has one shard for each rank.
        """
        if cfg.shards != self.comm.ranks:
            raise ValueError(f"shards={cfg.shards} is not ranks={self.comm.ranks}: each rank computes one shard")
        experts = [module for _, module in model.named_modules() if isinstance(module, Experts)]
        packed = [p for module in experts for p in (module.gate_up, module.down)]
        self._flat = flat = FlatParameters(model, first=packed)
        self._shared_at = sum(p.data.size for p in packed)
        self.total = np.zeros_like(flat.data)  # the sum: experts' gradients, and this process's pieces of the shared
        self._optimizer = _OwnedAdamW(flat, cfg, self)
        views = flat.views(self.total)
        self._experts_of = {r: self._expert_ranges(packed, r) for r in range(self.comm.ranks)}
        self._optimizer.owned = [r for rank in self.comm.local_ranks for r in self._owned_by(rank)]
        gradients = [FlatGradient(self.total[:0], GradientBuffer({})) for _ in range(self.comm.ranks)]
        for rank in self.comm.local_ranks:
            mine = self.dispatcher.experts_of(rank)
            shared = np.zeros_like(flat.data[self._shared_at :])
            buffer: dict[Parameter, Array] = {
                p: shared[a - self._shared_at : b - self._shared_at].reshape(p.shape)
                for p, (a, b) in flat.ranges.items()
                if a >= self._shared_at
            }
            for module in experts:
                for whole, part in zip((module.gate_up, module.down), module.held(mine)):
                    buffer[part] = views[whole][mine]
            gradients[rank] = FlatGradient(shared, GradientBuffer(buffer))
        return self._optimizer, gradients

    def step_run(self, run: Run) -> Run:
        """See `Alone`."""

        def on_ranks(shard_losses: Callable[[int], Any], shards: Iterable[int]) -> list[Any]:
            results = dict(zip(self.comm.local_ranks, self.ranks.run(shard_losses)))
            losses = self.comm.all_gather({r: np.array(v[0], dtype=np.float64) for r, v in results.items()}, "losses")
            loads = self.comm.all_gather({r: v[1] for r, v in results.items()}, "expert load")
            first = self.comm.local_ranks[0]
            return [(loss.tolist(), load) for loss, load in zip(losses[first], loads[first])]

        return on_ranks

    def add_up(self, shared: list[Array], run: Run = map) -> float:
        """Sum the ranks' gradients into the flat total, in rank order; returns the norm of the whole."""
        local = self.comm.local_ranks
        sums = self.comm.reduce_scatter({rank: shared[rank] for rank in local}, "gradients")
        squares = {}
        for rank in local:
            a, b = self._piece(rank)
            self.total[a:b] = sums[rank]
            squares[rank] = np.array([_square(self.total, self._owned_by(rank))], dtype=np.float64)
        everybody = self.comm.all_gather(squares, "gradient norm")[local[0]]
        square = math.fsum(float(s[0]) for s in everybody)
        return math.sqrt(square) if square >= 0 else math.nan

    def barrier(self) -> None:
        """See `Alone`."""
        self.comm.barrier()

    def share_weights(self) -> None:
        """Every rank sends its piece of the shared weights to all."""
        self._gather_pieces(self._flat.data, "weights")

    def gather(self) -> None:
        """Bring experts and moments together; every process then has the whole."""
        arrays = [self._flat.data, self._optimizer.exp_avg, self._optimizer.exp_avg_sq]
        for array in arrays[1:]:
            self._gather_pieces(array, "checkpoint")
        for array in arrays:
            mine = {r: np.concatenate([array[a:b] for a, b in self._experts_of[r]]) for r in self.comm.local_ranks}
            for rank, part in enumerate(self.comm.all_gather(mine, "checkpoint")[self.comm.local_ranks[0]]):
                if rank not in self.comm.local_ranks:
                    start = 0
                    for a, b in self._experts_of[rank]:
                        array[a:b] = part[start : start + b - a]
                        start += b - a

    def agree(self, stop: bool) -> bool:
        """See `Alone`."""
        flags = self.comm.all_gather(dict.fromkeys(self.comm.local_ranks, np.array([stop], dtype=bool)), "stop")
        return any(bool(flag[0]) for flag in flags[self.comm.local_ranks[0]])

    def from_root(self, compute: Callable[[], float]) -> float:
        """See `Alone`."""
        value = np.array([compute() if self.is_root else 0.0], dtype=np.float64)
        values = self.comm.broadcast(dict.fromkeys(self.comm.local_ranks, value), 0, "evaluation")
        return float(values[self.comm.local_ranks[0]][0])

    def _gather_pieces(self, array: Array, operation: str) -> None:
        local = self.comm.local_ranks
        pieces = {rank: array[slice(*self._piece(rank))] for rank in local}
        for rank, piece in enumerate(self.comm.all_gather(pieces, operation)[local[0]]):
            if rank not in local:
                array[slice(*self._piece(rank))] = piece

    def _piece(self, rank: int) -> tuple[int, int]:
        """The part of the flat shared weights that a rank owns: even pieces, as `reduce_scatter` cuts them."""
        size, R = self._flat.data.size - self._shared_at, self.comm.ranks
        return self._shared_at + size * rank // R, self._shared_at + size * (rank + 1) // R

    def _owned_by(self, rank: int) -> list[tuple[int, int]]:
        return [*self._experts_of[rank], self._piece(rank)]

    def _expert_ranges(self, packed: list[Parameter], rank: int) -> list[tuple[int, int]]:
        """Where the experts of a rank stand in the flat array."""
        mine, ranges = self.dispatcher.experts_of(rank), []
        for parameter in packed:
            start, stop = self._flat.ranges[parameter]
            size = (stop - start) // len(parameter.data)
            ranges.append((start + mine.start * size, start + mine.stop * size))
        return ranges


class _OwnedAdamW(AdamW):
    """AdamW over what the local ranks own; then everybody gets the weights that all share."""

    def __init__(self, flat: FlatParameters, cfg: TrainConfig, spread: OnRanks) -> None:
        super().__init__(flat, cfg)
        self._spread = spread

    def step(self, gradient: Array, step: int, learning_rate: float, scale: float, run: Run = map) -> None:
        """One step with the sum that `OnRanks.add_up` left (`gradient` is one rank's)."""
        super().step(self._spread.total, step, learning_rate, scale)
        self._spread.share_weights()


def _square(flat: Array, ranges: list[tuple[int, int]]) -> float:
    """Squared norm of some ranges, float64 over blocks."""
    blocks = (flat[i : min(i + BLOCK, b)] for a, b in ranges for i in range(a, b, BLOCK))
    return math.fsum(float(np.vecdot(block, block)) for block in blocks)
