"""Redundant experts at work: which replica a token goes to, and how replicas stay equal.

`eplb` decides which experts get replicas and where they stand; a `Placement` is its result for one layer. Routing
chooses experts, so a placement only renames them: the n-th token that a rank sends to an expert goes to its
n-th replica in turn. To the model a replica is the same expert; its output does not change but for the order of sums.

In training each replica sees part of the expert's tokens. `sum_replica_gradients` gives every replica the sum of all,
added in replica order: equal gradients to the bit, and so equal weights after any step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..autograd import Array
from .comm import Communicator, Parts
from .eplb import rebalance_experts
from .routes import sum_rows


class Placement(NamedTuple):
    """Replicas of one layer's E experts on R ranks, P physical experts in all, P / R a rank in order."""

    expert_of_physical: Array  # int64 [P]
    physical_of_replica: Array  # int64 [E, most replicas], -1 where there are fewer
    replicas: Array  # int64 [E]

    @property
    def num_physical(self) -> int:
        """Physical experts in all."""
        return len(self.expert_of_physical)

    def physical_of_token(self, topk_idx: Array) -> Array:
        """Physical experts [T, K] for experts [T, K]: the tokens of each expert take its replicas in turn."""
        expert = topk_idx.reshape(-1)
        order = np.argsort(expert, kind="stable")
        load = np.bincount(expert, minlength=len(self.replicas))
        turn = np.empty(len(expert), dtype=np.int64)  # how many of the rank's tokens asked for this expert before
        turn[order] = np.arange(len(expert), dtype=np.int64) - np.repeat(np.cumsum(load) - load, load)
        return self.physical_of_replica[expert, turn % self.replicas[expert]].reshape(topk_idx.shape)

    def replica_of_physical(self) -> Array:
        """Number of each physical expert among the replicas of its expert: int64 [P]."""
        replica = np.empty(self.num_physical, dtype=np.int64)
        expert, number = np.nonzero(self.physical_of_replica >= 0)
        replica[self.physical_of_replica[expert, number]] = number
        return replica


def place(load: Array, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> list[Placement]:
    """A placement for each layer, from loads [L, E] (`eplb.rebalance_experts`)."""
    layers = zip(*rebalance_experts(load, num_replicas, num_groups, num_nodes, num_gpus))
    return [Placement(*layer) for layer in layers]


def load_of_gpu(load: Array, phy2log: Array, logcnt: Array, num_gpus: int) -> Array:
    """Load of each GPU if replicas share an expert's load evenly: loads [L, E] -> float64 [L, num_gpus]."""
    share = np.take_along_axis(load / logcnt, phy2log, axis=1)  # [L, P]
    return share.reshape(len(load), num_gpus, -1).sum(axis=2)


def sum_replica_gradients(
    comm: Communicator, gradients: dict[int, Array], placement: Placement, operation: str = "replica gradients"
) -> dict[int, Array]:
    """Gradients [P / R, ...] of every local rank's physical experts -> for each the sum over its expert's replicas.

    Every replica sends to every other one and adds what comes in replica order, itself included.
    """
    per_rank = placement.num_physical // comm.ranks
    replica, expert = placement.replica_of_physical(), placement.expert_of_physical
    source, target = np.nonzero(expert[:, None] == expert)  # all pairs of replicas, [pairs] each
    order = np.lexsort((replica[source], target))  # to each target in replica order
    source, target = source[order], target[order]
    send = {}
    for r, gradient in gradients.items():
        mine = source // per_rank == r
        counts = np.bincount(target[mine] // per_rank, minlength=comm.ranks)
        send[r] = Parts(np.take(gradient, source[mine] - r * per_rank, axis=0), counts)
    sums = {}
    for r, (rows, _) in comm.all_to_all_v(send, operation).items():
        here = target // per_rank == r
        arrival = np.argsort(source[here] // per_rank, kind="stable")  # rows came by source rank
        in_order = np.empty_like(rows)
        in_order[arrival] = rows
        sums[r] = sum_rows(in_order, target[here] - r * per_rank, per_rank)
    return sums
