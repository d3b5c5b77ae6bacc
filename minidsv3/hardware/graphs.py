"""The networks as graphs: built switch by switch, measured with networkx, and broken.

A node is a switch; its attribute ``endpoints`` says how many are plugged into it. An edge is one cable. What
`topology` gives by formula is counted here on the real thing: switches, links, diameter, the number of shortest ways
between two switches, the cut that halves the endpoints.

Slim Fly is the McKay-Miller-Siran graph of a finite field of q elements: 2 q^2 switches (s, x, y), each joined to
switches of its own column whose y differs by an element of a set X (or X'), and to (1, m, c) wherever y = m x + c. With
X the right half of the field's powers, any two switches are at most two hops apart, close to the best possible. Such a
field exists only for prime powers, so there is no graph for Table 3's q = 28; 27 and 25 are its buildable neighbours.

Simplified: one endpoint is one port; cables have no length. Dragonfly with fewer groups than its global ports could
join leaves the ports that are over unplugged.
"""

from __future__ import annotations

import itertools
from typing import Any

import networkx as nx
import numpy as np

from .topology import dragonfly, fat_tree_2, fat_tree_3, slim_fly


def fat_tree_2_graph(k: int) -> nx.Graph:
    """Leaves ("leaf", i) with k/2 endpoints each, every one joined to all spines ("spine", j)."""
    fat_tree_2(k)
    graph = nx.Graph()
    for i in range(k):
        graph.add_node(("leaf", i), endpoints=k // 2)
    for j in range(k // 2):
        graph.add_node(("spine", j), endpoints=0)
    graph.add_edges_from((("leaf", i), ("spine", j)) for i in range(k) for j in range(k // 2))
    return graph


def multi_plane_graph(k: int, planes: int) -> nx.Graph:
    """`planes` fat-trees that no switch joins: nodes ("plane", p, layer, i). Only NVLink inside a node leads across."""
    one = fat_tree_2_graph(k)
    return nx.union_all(nx.relabel_nodes(one, {n: ("plane", p, *n) for n in one}) for p in range(planes))


def fat_tree_3_graph(k: int) -> nx.Graph:
    """k pods of k/2 edge and k/2 aggregation switches; core (j, c) joins the j-th aggregation switch of all pods."""
    fat_tree_3(k)
    half, graph = k // 2, nx.Graph()
    for pod, i in itertools.product(range(k), range(half)):
        graph.add_node(("edge", pod, i), endpoints=half)
        graph.add_node(("aggregation", pod, i), endpoints=0)
    graph.add_nodes_from((("core", j, c) for j in range(half) for c in range(half)), endpoints=0)
    for pod, i, j in itertools.product(range(k), range(half), range(half)):
        graph.add_edge(("edge", pod, i), ("aggregation", pod, j))
        graph.add_edge(("aggregation", pod, i), ("core", i, j))
    return graph


def dragonfly_graph(a: int, p: int, h: int, g: int) -> nx.Graph:
    """Groups of a switches, all joined; global port n of group i leads to group i + n + 1 (mod g), for n < g - 1."""
    dragonfly(a, p, h, g)
    graph = nx.Graph()
    graph.add_nodes_from(itertools.product(range(g), range(a)), endpoints=p)
    for group in range(g):
        graph.add_edges_from(((group, i), (group, j)) for i in range(a) for j in range(i))
        for port in range(g - 1):  # port n is the other side's port g - 2 - n
            other = (group + port + 1) % g
            graph.add_edge((group, port // h), (other, (g - 2 - port) // h))
    return graph


def slim_fly_graph(q: int, endpoints_per_switch: int | None = None) -> nx.Graph:
    """The McKay-Miller-Siran graph of `q`, a prime power of at least 3 that is 4w + d with d in {-1, 0, 1}."""
    counts = slim_fly(q, endpoints_per_switch)
    plus, times = finite_field(q)
    powers = _powers_of_a_generator(times)
    X, Y = _halves(powers, q)
    graph = nx.Graph()
    graph.add_nodes_from(itertools.product((0, 1), range(q), range(q)), endpoints=counts.endpoints // counts.switches)
    for s, steps in ((0, X), (1, Y)):
        graph.add_edges_from(((s, x, y), (s, x, int(plus[y, e]))) for x in range(q) for y in range(q) for e in steps)
    for x, m, c in itertools.product(range(q), repeat=3):
        graph.add_edge((0, x, int(plus[times[m, x], c])), (1, m, c))
    return graph


def _halves(powers: list[int], q: int) -> tuple[list[int], list[int]]:
    """The two sets of differences: about half of the nonzero elements each, with -X = X (Hafner 2004)."""
    if q % 4 != 3:
        return powers[::2], [powers[i % (q - 1)] for i in range(1, q, 2)]
    w = (q + 1) // 4
    first = [powers[i] for i in (*range(0, 2 * w - 1, 2), *range(2 * w - 1, 4 * w - 2, 2))]
    return first, [powers[i % (q - 1)] for i in (*range(1, 2 * w, 2), *range(2 * w, 4 * w - 1, 2))]


def finite_field(q: int) -> tuple[np.ndarray, np.ndarray]:
    """Addition and multiplication tables int64 [q, q] of the field of q elements; 0 and 1 are zero and one.

    Elements are polynomials over the integers mod p, written as numbers in base p, modulo an irreducible polynomial.
    Raises ValueError unless q is a prime power.
    """
    p = next((n for n in range(2, q + 1) if q % n == 0), 0)
    degree = next((d for d in range(1, 64) if p and p**d == q), 0)
    if not degree:
        raise ValueError(f"q={q} is not a prime power: no field has that size, so this Slim Fly cannot be built")
    digits = np.array([[n // p**i % p for i in range(degree)] for n in range(q)], dtype=np.int64)
    base = p ** np.arange(degree, dtype=np.int64)
    plus = (digits[:, None] + digits[None]) % p @ base
    for tail in itertools.product(range(p), repeat=degree):  # x^degree = -(tail) is tried until nonzero has no divisor
        times = _multiplication(digits, np.array(tail, dtype=np.int64), p) @ base
        if np.all(times[1:, 1:] != 0):
            return plus, times
    raise AssertionError("an irreducible polynomial of every degree exists")


def _multiplication(digits: np.ndarray, tail: np.ndarray, p: int) -> np.ndarray:
    """Products [q, q, degree] of all pairs of polynomials, with x^degree = tail."""
    q, degree = digits.shape
    total = np.zeros((q, q, degree), dtype=np.int64)
    shifted = np.broadcast_to(digits[:, None], (q, q, degree)).copy()  # a x^i
    for i in range(degree):
        total += digits[None, :, i, None] * shifted
        shifted = (
            np.roll(shifted, 1, axis=-1) * (np.arange(degree, dtype=np.int64) > 0) + shifted[..., -1:] * tail
        ) % p
    return total % p


def _powers_of_a_generator(times: np.ndarray) -> list[int]:
    """1, g, g^2, ... of the lowest element g that runs through all nonzero elements."""
    q = len(times)
    for g in range(1, q):
        powers = [1]
        while (following := int(times[powers[-1], g])) != 1:
            powers.append(following)
        if len(powers) == q - 1:
            return powers
    raise AssertionError("the nonzero elements of a finite field are cyclic")


def endpoints(graph: nx.Graph) -> int:
    """All endpoints of a network."""
    return sum(nx.get_node_attributes(graph, "endpoints").values())


def diameter(graph: nx.Graph) -> int:
    """Hops between the two switches with endpoints that are farthest apart; switches on the way are one more.

    Raises ValueError if some cannot reach each other.
    """
    hosts = _hosts(graph)
    farthest = 0
    for source in hosts:
        distance = nx.single_source_shortest_path_length(graph, source)
        if any(target not in distance for target in hosts):
            raise ValueError("the network is in pieces")
        farthest = max(farthest, *(distance[target] for target in hosts))
    return farthest


def path_diversity(graph: nx.Graph, source: Any, target: Any) -> tuple[int, int]:
    """(number of shortest ways, number of ways without a common cable) between two switches."""
    shortest = sum(1 for _ in nx.all_shortest_paths(graph, source, target))
    return shortest, nx.edge_connectivity(graph, source, target)


def bisection(graph: nx.Graph, rng: np.random.Generator, tries: int = 8) -> int:
    """Cables that halving the endpoints cuts: the least that was found, so an upper bound (the exact one is NP-hard).

    Tried are the halves in the order of construction and `tries` random ones; for each the smallest cut that separates
    the two halves (a maximal flow) is exact. Bisection is full when the cut is half the endpoints.
    """
    hosts = _hosts(graph)
    if len(hosts) < 2:
        raise ValueError("a network of one switch has no halves")
    orders = [np.arange(len(hosts), dtype=np.int64)] + [rng.permutation(len(hosts)) for _ in range(tries)]
    return min(_cut(graph, [hosts[i] for i in order[: len(hosts) // 2]], hosts) for order in orders)


def _cut(graph: nx.Graph, half: list[Any], hosts: list[Any]) -> int:
    """Size of the smallest cut between the endpoints of `half` and those of the other switches."""
    flow = nx.DiGraph()
    for u, v in graph.edges:
        flow.add_edge(u, v, capacity=1)
        flow.add_edge(v, u, capacity=1)
    chosen = set(half)
    for node in hosts:
        ends = ("source", node) if node in chosen else (node, "sink")
        flow.add_edge(*ends, capacity=graph.nodes[node]["endpoints"])
    return int(nx.maximum_flow_value(flow, "source", "sink"))


def _hosts(graph: nx.Graph) -> list[Any]:
    """Switches with endpoints."""
    return [node for node, ports in graph.nodes(data="endpoints") if ports]
