"""Where to put experts, and which to double, so that every GPU gets about the same load (EPLB).

Given the load of each expert, popular ones get more than one *replica*, and the replicas (*physical* experts) are
packed on GPUs. Two greedy rules do it: the next replica goes to the expert whose replicas carry most, and the next
item, heaviest first, goes to the lightest pack that still has room. The hierarchical policy keeps the expert groups of
node-limited routing together on one node; where the groups do not divide over the nodes, the global policy forgets
groups and nodes.

Same results as deepseek-ai/EPLB with a stable sort (upstream does not ask for one, and two replicas of one expert
always tie): ties go to the lowest index, loads are float32. Each step works on all layers at once.
"""

from __future__ import annotations

import numpy as np

from ..autograd import Array


def rebalance_experts(
    weight: Array, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Array, Array, Array]:
    """Replicate and place the experts of every layer.

    Parameters
    ----------
    weight : [L, E]
        Load of each expert (tokens, or any estimate).
    num_replicas : int
        Physical experts a layer, R; a multiple of `num_gpus`, not below E.
    num_groups, num_nodes, num_gpus : int
        Expert groups of the router, nodes, and GPUs in all.

    Returns
    -------
    phy2log : int64 [L, R]
        Expert of each physical expert; GPU g holds the R / num_gpus from ``g * R / num_gpus`` on.
    log2phy : int64 [L, E, most replicas]
        Physical experts of each expert, by replica; -1 where there are fewer.
    logcnt : int64 [L, E]
        Replicas of each expert.

    Raises
    ------
    ValueError
        Sizes that do not divide, fewer replicas than experts, or a load that is negative or not finite.
    """
    weight = np.asarray(weight)
    if weight.ndim != 2 or weight.size == 0:
        raise ValueError(f"weight has shape {weight.shape}, expected [layers, experts]")
    weight = weight.astype(np.float32)
    if not np.isfinite(weight).all() or weight.min() < 0:
        raise ValueError("weight holds a load that is negative or not finite")
    sizes = {"num_groups": num_groups, "num_nodes": num_nodes, "num_gpus": num_gpus, "num_replicas": num_replicas}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} is not positive")
    L, E = weight.shape
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    for name, value, by, divisor in (
        ("experts", E, "num_groups", num_groups),
        ("num_gpus", num_gpus, "num_nodes", num_nodes),
        ("num_replicas", num_replicas, "num_gpus", num_gpus),
    ):
        if value % divisor:
            raise ValueError(f"{name}={value} is not a multiple of {by}={divisor}")
    if num_replicas < E:
        raise ValueError(f"num_replicas={num_replicas} is below the number of experts, {E}")
    phy2log, replica, logcnt = _hierarchical(weight, num_replicas, num_groups, num_nodes, num_gpus)
    log2phy = np.full((L, E, int(logcnt.max())), -1, dtype=np.int64)
    layers = np.arange(L, dtype=np.int64)[:, None]
    log2phy[layers, phy2log, replica] = np.arange(num_replicas, dtype=np.int64)
    return phy2log, log2phy, logcnt


def _hierarchical(weight: Array, R: int, groups: int, nodes: int, gpus: int) -> tuple[Array, Array, Array]:
    """Expert and replica number of each physical expert [L, R], replicas of each expert [L, E]."""
    L, E = weight.shape
    size = E // groups
    # Step 1: groups to nodes. `expert_of_place` lists a node's experts group by group, as the groups were packed.
    node, rank = balanced_packing(weight.reshape(L, groups, size).sum(axis=2), nodes)
    first = (node * (groups // nodes) + rank) * size  # where each group's experts begin
    place_of_expert = (first[:, :, None] + np.arange(size, dtype=np.int64)).reshape(L, E)
    expert_of_place = _inverse(place_of_expert)
    load = np.take_along_axis(weight, expert_of_place, axis=1).reshape(L * nodes, E // nodes)
    # Step 2: replicas, node by node.
    place, replica, count = replicate_experts(load, R // nodes)
    # Step 3: each node's physical experts to its GPUs.
    gpu, rank = balanced_packing(np.take_along_axis(load / count.astype(np.float32), place, axis=1), gpus // nodes)
    physical = _inverse(gpu * (R // gpus) + rank)  # which of the node's replicas stands in each slot
    place = np.take_along_axis(place, physical, axis=1).reshape(L, nodes, -1)
    place = (place + np.arange(0, E, E // nodes, dtype=np.int64)[:, None]).reshape(L, R)
    replica = np.take_along_axis(replica, physical, axis=1).reshape(L, R)
    count = np.take_along_axis(count.reshape(L, E), place_of_expert, axis=1)
    return np.take_along_axis(expert_of_place, place, axis=1), replica, count


def balanced_packing(weight: Array, packs: int) -> tuple[Array, Array]:
    """Pack n items into `packs` packs of n / packs each, heaviest first, each into the lightest with room.

    Parameters
    ----------
    weight : float32 [X, n]
        X independent problems.

    Returns
    -------
    pack, rank : int64 [X, n]
        Of each item: its pack and its place there. One item a pack: item i goes to pack i, unsorted.
    """
    X, n = weight.shape
    if n == packs:
        return np.broadcast_to(np.arange(n, dtype=np.int64), (X, n)).copy(), np.zeros((X, n), dtype=np.int64)
    room, problems = n // packs, np.arange(X, dtype=np.int64)
    order = np.argsort(-weight, axis=1, kind="stable")
    load = np.zeros((X, packs), dtype=np.float32)
    key = load.copy()  # the load, or infinity where there is no room
    filled = np.zeros((X, packs), dtype=np.int64)
    pack, rank = np.empty((X, n), dtype=np.int64), np.empty((X, n), dtype=np.int64)
    for item in order.T:  # the heaviest of each problem, then the next
        lightest = key.argmin(axis=1)
        pack[problems, item], rank[problems, item] = lightest, filled[problems, lightest]
        load[problems, lightest] += weight[problems, item]
        filled[problems, lightest] += 1
        full = filled[problems, lightest] == room
        key[problems, lightest] = np.where(full, np.inf, load[problems, lightest])
    return pack, rank


def replicate_experts(weight: Array, replicas: int) -> tuple[Array, Array, Array]:
    """Give `replicas` - n experts one more replica, each time the one whose replicas carry most.

    Parameters
    ----------
    weight : float32 [X, n]

    Returns
    -------
    expert, replica : int64 [X, replicas]
        Of each physical expert: the n originals first, then the others in the order in which they were made.
    count : int64 [X, n]
    """
    X, n = weight.shape
    problems = np.arange(X, dtype=np.int64)
    expert = np.broadcast_to(np.arange(replicas, dtype=np.int64), (X, replicas)).copy()
    replica = np.zeros((X, replicas), dtype=np.int64)
    count = np.ones((X, n), dtype=np.int64)
    share = weight.copy()
    for i in range(n, replicas):
        heaviest = share.argmax(axis=1)
        expert[:, i], replica[:, i] = heaviest, count[problems, heaviest]
        count[problems, heaviest] += 1
        share[problems, heaviest] = weight[problems, heaviest] / count[problems, heaviest].astype(np.float32)
    return expert, replica, count


def _inverse(permutation: Array) -> Array:
    """The inverse of each row."""
    out = np.empty_like(permutation)
    np.put_along_axis(out, permutation, np.arange(permutation.shape[1], dtype=np.int64)[None], axis=1)
    return out
