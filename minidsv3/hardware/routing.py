"""Which way messages take: flows hashed onto links against ideal spreading, and what a failure costs an all-to-all.

ECMP hashes every flow onto one of m equal links, blind to the load. With few large flows, as in training, some links
get several, others none; a transfer is as slow as its fullest link. Spraying packets (adaptive routing) has factor 1.

Failures are looked at on an all-to-all among all GPUs, in nodes of as many GPUs as there are planes: GPU p of a node
has its NIC in plane p. A message between two nodes may take any plane that both still reach if a node's GPUs relay for
each other over NVLink; without relay it stays with its GPU's own NIC, and a GPU whose NIC is dead is cut off.

Simplified: traffic of a plane spreads ideally over the spines that both leaves reach; the relay over NVLink is not the
bottleneck (it is several times faster than a NIC); messages are large, so only bandwidth counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np


def ecmp_idle(flows: int, links: int) -> float:
    """Expected share of links without any of `flows` hashed flows: ``(1 - 1/links)^flows``."""
    _require(flows, links)
    return (1 - 1 / links) ** flows


def ecmp_slowdown(flows: int, links: int) -> float:
    """Expected load of the fullest link over ``flows / links``, which is what spraying packets puts on each; exact.

    ``E[max] = sum_k P(max > k)``; P(max <= k) is flows! / links^flows times the coefficient of x^flows in
    ``(sum_(j<=k) x^j/j!)^links``, taken with Poisson weights so that no factorial is ever written out.
    """
    _require(flows, links)
    mean = flows / links
    j = np.arange(flows + 1, dtype=np.int64)
    log_factorial = np.array([math.lgamma(n + 1) for n in range(flows + 1)])
    weight = np.exp(j * math.log(mean) - mean - log_factorial)  # Poisson(flows / links)
    total = math.exp(flows * math.log(flows) - flows - log_factorial[flows])  # Poisson(flows) at flows
    expected = 0.0
    for k in range(flows):
        within = _power(np.where(j <= k, weight, 0.0), links)[flows] / total
        expected += 1.0 - within
        if within > 1 - 1e-12:
            break
    return expected / mean


def _power(series: np.ndarray, exponent: int) -> np.ndarray:
    """A power series to a whole power, by repeated squaring, cut at its length."""
    result, square = None, series
    while exponent:
        if exponent & 1:
            result = square if result is None else np.convolve(result, square)[: len(series)]
        square, exponent = np.convolve(square, square)[: len(series)], exponent >> 1
    assert result is not None
    return result


def ecmp_monte_carlo(flows: int, links: int, rng: np.random.Generator, trials: int = 2000) -> tuple[float, float]:
    """(slow-down, share of idle links) as means over `trials` random hashes."""
    _require(flows, links)
    chosen = rng.integers(links, size=(trials, flows))
    offset = np.arange(trials, dtype=np.int64)[:, None] * links
    load = np.bincount((chosen + offset).reshape(-1), minlength=trials * links).reshape(trials, links)
    return float(load.max(axis=1).mean() / (flows / links)), float((load == 0).mean())


@dataclass
class Planes:
    """Nodes on several two-layer planes, with what is still alive.

    Parameters
    ----------
    nodes, planes : int
        Node n has one GPU, and one NIC, in every plane, on leaf ``n // nodes_per_leaf``.
    nodes_per_leaf, spines : int
        k/2 each in a fat-tree of k-port switches.

    Attributes
    ----------
    nic_alive : bool [nodes, planes]
    up_alive : bool [planes, leaves, spines]
        Cables between leaf and spine; a dead switch has none.
    """

    nodes: int
    planes: int = 8
    nodes_per_leaf: int = 32
    spines: int = 32
    nic_alive: np.ndarray = field(init=False)
    up_alive: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        for name in ("nodes", "planes", "nodes_per_leaf", "spines"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        self.nic_alive = np.ones((self.nodes, self.planes), dtype=bool)
        self.up_alive = np.ones((self.planes, -(-self.nodes // self.nodes_per_leaf), self.spines), dtype=bool)

    def fail_nic(self, node: int, plane: int) -> None:
        """A NIC, its cable, or the port of the leaf."""
        self.nic_alive[node, plane] = False

    def fail_link(self, plane: int, leaf: int, spine: int) -> None:
        """A cable between leaf and spine."""
        self.up_alive[plane, leaf, spine] = False

    def fail_spine(self, plane: int, spine: int) -> None:
        """A spine switch."""
        self.up_alive[plane, :, spine] = False

    def fail_leaf(self, plane: int, leaf: int) -> None:
        """A leaf switch, and with it the NICs of its nodes in this plane."""
        self.up_alive[plane, leaf] = False
        self.nic_alive[leaf * self.nodes_per_leaf : (leaf + 1) * self.nodes_per_leaf, plane] = False

    def fail_plane(self, plane: int) -> None:
        """A whole plane."""
        self.up_alive[plane] = False
        self.nic_alive[:, plane] = False

    def fail_links_at_random(self, share: float, rng: np.random.Generator) -> None:
        """Each cable between leaf and spine dies with probability `share`."""
        if not 0 <= share <= 1:
            raise ValueError(f"share={share} is not a probability")
        self.up_alive &= rng.random(self.up_alive.shape) >= share

    def reachable(self) -> np.ndarray:
        """bool [nodes, nodes, planes]: whether two nodes reach each other in a plane."""
        leaf = np.arange(self.nodes, dtype=np.int64) // self.nodes_per_leaf
        ways = np.einsum("pls,pms->lmp", self.up_alive, self.up_alive, dtype=np.int64)
        connected = (ways > 0)[leaf][:, leaf] | (leaf[:, None] == leaf)[..., None]
        return connected & self.nic_alive[:, None] & self.nic_alive[None]


@dataclass(frozen=True)
class AllToAll:
    """What an all-to-all suffers: its time over that of the unbroken network (infinite where GPUs are cut off)."""

    slowdown: float
    gpus_cut_off: int  # that reach no other node any more


def all_to_all(network: Planes, relay: bool = True) -> AllToAll:
    """Time of an all-to-all among all GPUs of all nodes, relative to the unbroken network.

    Parameters
    ----------
    network : Planes
    relay : bool
        Whether the GPUs of a node pass on each other's traffic over NVLink (what NCCL calls PXN).
    """
    N, P = network.nodes, network.planes
    other = ~np.eye(N, dtype=bool)  # inside a node NVLink does it
    alive = network.reachable() & other[..., None]
    planes_left = alive.sum(axis=2, keepdims=True)  # of each pair of nodes
    if N > 1 and (not np.all(planes_left[other]) if relay else not np.all(alive[other])):
        alone = np.logical_not(alive.any(axis=1))  # [N, P] GPUs whose own NIC reaches nobody
        return AllToAll(math.inf, int(alone.sum() if not relay else P * np.all(alone, axis=1).sum()))
    weight = alive / np.maximum(planes_left, 1) if relay else alive / P  # [N, N, P] share of a pair's traffic
    nic = weight.sum(axis=1).max()  # in node messages; unbroken: (N - 1) / P
    return AllToAll(float(max(nic, _fullest_cable(network, weight)) * P / max(N - 1, 1)), 0)


def _fullest_cable(network: Planes, weight: np.ndarray) -> float:
    """Load of the fullest leaf-spine cable when each pair of leaves spreads evenly over the spines both reach."""
    leaves = network.up_alive.shape[1]
    starts = np.arange(leaves, dtype=np.int64) * network.nodes_per_leaf
    demand = np.add.reduceat(np.add.reduceat(weight, starts, axis=0), starts, axis=1)  # [leaves, leaves, P]
    demand[np.eye(leaves, dtype=bool)] = 0  # stays under its leaf
    fullest = 0.0
    for p, up in enumerate(network.up_alive):
        ways = (up.astype(np.int64) @ up.T).astype(np.float64)
        share = np.divide(demand[..., p], ways, out=np.zeros_like(ways), where=ways > 0)  # per pair and common spine
        fullest = max(fullest, float(((share @ up) * up).max()))
    return fullest


def _require(flows: int, links: int) -> None:
    if flows < 1 or links < 1:
        raise ValueError(f"flows={flows} and links={links} must be at least 1")
