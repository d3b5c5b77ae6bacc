"""EPLB: the golden placements, a second implementation in slow loops, and the rules that any placement obeys."""

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest

from minidsv3.parallel.eplb import balanced_packing, rebalance_experts, replicate_experts

# Outputs of deepseek-ai/EPLB@d52c72d with a stable sort; what ties mean is said in the file.
GOLDEN = json.loads((Path(__file__).parent / "golden" / "eplb.json").read_text(encoding="utf-8"))["cases"]


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array, dtype=np.int64).tobytes()).hexdigest()


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_placement_equals_the_golden_one(case):
    weight = np.array(case["weight"], dtype=case["dtype"])
    sizes = (case[f"num_{name}"] for name in ("replicas", "groups", "nodes", "gpus"))
    phy2log, log2phy, logcnt = rebalance_experts(weight, *sizes)
    np.testing.assert_array_equal(phy2log, case["phy2log"])
    np.testing.assert_array_equal(logcnt, case["logcnt"])
    assert log2phy.shape == tuple(case["log2phy_shape"])
    for name, array in (("phy2log", phy2log), ("log2phy", log2phy), ("logcnt", logcnt)):
        assert digest(array) == case[f"sha256_{name}"]


def pack_slowly(weight, packs):
    """Lists and loops: (pack, rank) of each item."""
    n = len(weight)
    if n == packs:
        return list(range(n)), [0] * n
    load, members = [np.float32(0)] * packs, [[] for _ in range(packs)]
    pack, rank = [0] * n, [0] * n
    for item in sorted(range(n), key=lambda i: -weight[i]):
        chosen = min((p for p in range(packs) if len(members[p]) < n // packs), key=lambda p: load[p])
        pack[item], rank[item] = chosen, len(members[chosen])
        members[chosen].append(item)
        load[chosen] = np.float32(load[chosen] + weight[item])
    return pack, rank


def place_slowly(weight, R, G, N, P):
    """One layer, step by step as the rules are told: expert and replica number on every slot of every GPU."""
    weight = [np.float32(w) for w in weight]
    E = len(weight)
    if G % N:
        G = N = 1
    size = E // G
    groups = [list(range(g * size, (g + 1) * size)) for g in range(G)]
    node, rank = pack_slowly([np.array([weight[e] for e in g], dtype=np.float32).sum() for g in groups], N)
    slots = []
    for n in range(N):
        mine = sorted((g for g in range(G) if node[g] == n), key=lambda g: rank[g])
        experts = [e for g in mine for e in groups[g]]
        count = dict.fromkeys(experts, 1)
        physical = [(e, 0) for e in experts]
        while len(physical) < R // N:
            heaviest = max(experts, key=lambda e: np.float32(weight[e] / np.float32(count[e])))
            physical.append((heaviest, count[heaviest]))
            count[heaviest] += 1
        gpu, place = pack_slowly([np.float32(weight[e] / np.float32(count[e])) for e, _ in physical], P // N)
        for g in range(P // N):
            here = sorted((i for i in range(len(physical)) if gpu[i] == g), key=lambda i: place[i])
            slots += [physical[i] for i in here]
    return slots


@pytest.mark.parametrize("L, E, R, G, N, P", [
    (3, 12, 16, 4, 2, 8), (2, 24, 30, 3, 3, 15), (4, 16, 16, 4, 4, 8), (2, 20, 36, 5, 2, 12), (3, 16, 48, 2, 2, 48),
    (2, 18, 18, 6, 3, 3), (1, 7, 21, 1, 1, 3), (2, 32, 40, 8, 1, 5),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["integers", "ties", "floats"])
def test_placement_equals_the_rules_in_loops(L, E, R, G, N, P, kind):
    rng = np.random.default_rng(E * R + P)
    weight = {"integers": rng.integers(0, 200, (L, E)), "ties": rng.integers(0, 3, (L, E)),
              "floats": rng.lognormal(size=(L, E))}[kind]  # fmt: skip
    phy2log, log2phy, logcnt = rebalance_experts(weight, R, G, N, P)
    for layer in range(L):
        slots = place_slowly(weight[layer], R, G, N, P)
        assert phy2log[layer].tolist() == [e for e, _ in slots]
        for e in range(E):
            mine = {number: slot for slot, (expert, number) in enumerate(slots) if expert == e}
            assert logcnt[layer, e] == len(mine)
            padded = [mine[i] for i in range(len(mine))] + [-1] * (log2phy.shape[2] - len(mine))
            assert log2phy[layer, e].tolist() == padded


def test_maps_are_each_others_inverse():
    weight = np.random.default_rng(0).zipf(1.5, (5, 64))
    phy2log, log2phy, logcnt = rebalance_experts(weight, 80, 8, 4, 16)
    for layer in range(5):
        assert np.bincount(phy2log[layer], minlength=64).tolist() == logcnt[layer].tolist()
        for e in range(64):
            replicas = log2phy[layer, e, : logcnt[layer, e]]
            assert (phy2log[layer, replicas] == e).all() and (log2phy[layer, e, logcnt[layer, e] :] == -1).all()
    assert log2phy.shape[2] == logcnt.max()


def test_hierarchical_policy_keeps_a_group_on_one_node():
    weight = np.random.default_rng(1).lognormal(size=(3, 32))
    phy2log, _, _ = rebalance_experts(weight, 48, 8, 4, 16)
    node_of_slot = np.arange(48) // 12
    for layer in phy2log:
        for group in range(8):
            assert len(set(node_of_slot[layer // 4 == group])) == 1


def test_packs_of_one_are_not_sorted():
    pack, rank = balanced_packing(np.array([[1, 5, 3]], dtype=np.float32), 3)
    assert pack.tolist() == [[0, 1, 2]] and rank.tolist() == [[0, 0, 0]]


def test_replicas_go_to_the_heaviest_share_first_of_equals():
    expert, replica, count = replicate_experts(np.array([[6, 6, 1]], dtype=np.float32), 7)
    assert expert.tolist() == [[0, 1, 2, 0, 1, 0, 1]] and replica.tolist() == [[0, 0, 0, 1, 1, 2, 2]]
    assert count.tolist() == [[3, 3, 1]]


@pytest.mark.parametrize("sizes, said", [
    ((16, 5, 1, 8), "experts=12 is not a multiple of num_groups=5"),
    ((16, 4, 2, 7), "num_gpus=7 is not a multiple of num_nodes=2"),
    ((18, 4, 2, 8), "num_replicas=18 is not a multiple of num_gpus=8"),
    ((8, 4, 2, 8), "num_replicas=8 is below the number of experts, 12"),
    ((16, 0, 2, 8), "num_groups=0"), ((16, 4, 2, -8), "num_gpus=-8"),
])  # fmt: skip
def test_sizes_that_do_not_divide_are_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        rebalance_experts(np.ones((2, 12)), *sizes)


@pytest.mark.parametrize("weight", [np.ones(12), np.ones((0, 12)), np.full((1, 12), np.nan), -np.ones((1, 12))])
def test_loads_that_are_none_are_refused(weight):
    with pytest.raises(ValueError, match="weight"):
        rebalance_experts(weight, 16, 4, 2, 8)


def test_61_layers_with_288_replicas_take_less_than_a_second():
    weight = np.random.default_rng(2).lognormal(size=(61, 256))
    start = time.process_time()
    for sizes in ((288, 8, 4, 32), (288, 8, 18, 144), (320, 8, 40, 320)):
        rebalance_experts(weight, *sizes)
    assert time.process_time() - start < 1
