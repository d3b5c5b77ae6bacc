"""Built networks against the closed forms, and against the theory of their diameters."""

import networkx as nx
import numpy as np
import pytest

from minidsv3.hardware.graphs import (
    bisection,
    diameter,
    dragonfly_graph,
    endpoints,
    fat_tree_2_graph,
    fat_tree_3_graph,
    finite_field,
    multi_plane_graph,
    path_diversity,
    slim_fly_graph,
)
from minidsv3.hardware.topology import dragonfly, fat_tree_2, fat_tree_3, multi_plane, slim_fly

BUILT = [
    (fat_tree_2_graph, fat_tree_2, (6,)), (fat_tree_3_graph, fat_tree_3, (6,)),
    (dragonfly_graph, dragonfly, (4, 3, 2, 9)), (dragonfly_graph, dragonfly, (8, 4, 4, 33)),
    *((slim_fly_graph, slim_fly, (q,)) for q in (3, 4, 5, 7, 8, 9, 11, 13, 16, 17)),
]  # fmt: skip


@pytest.mark.parametrize("build, count, sizes", BUILT, ids=[f"{b.__name__}{s}" for b, _, s in BUILT])
def test_graph_has_the_counts_and_the_diameter_of_the_formula(build, count, sizes):
    graph, expected = build(*sizes), count(*sizes)
    assert graph.number_of_nodes() == expected.switches
    assert graph.number_of_edges() == expected.links
    assert endpoints(graph) == expected.endpoints
    assert diameter(graph) + 1 == expected.switches_on_longest_path
    assert max(d + graph.nodes[n]["endpoints"] for n, d in graph.degree) == expected.ports


@pytest.mark.parametrize("q, degree", [(5, 7), (7, 11), (8, 12), (9, 13), (11, 17), (16, 24), (17, 25)])
def test_slim_fly_is_regular_with_diameter_2(q, degree):
    graph = slim_fly_graph(q)
    assert {d for _, d in graph.degree} == {degree}
    assert nx.diameter(graph) == 2


def test_slim_fly_of_five_is_the_hoffman_singleton_graph():
    """The best possible: degree 7, diameter 2, and as many switches as that allows (Moore bound 50)."""
    assert nx.is_isomorphic(slim_fly_graph(5), nx.hoffman_singleton_graph())


@pytest.mark.parametrize("q", [6, 10, 28])
def test_slim_fly_is_refused_without_a_field(q):
    with pytest.raises(ValueError, match=r"prime power|4w"):
        slim_fly_graph(q)


@pytest.mark.parametrize("q", [4, 5, 8, 9, 25, 27])
def test_finite_field_holds_the_axioms(q):
    plus, times = finite_field(q)
    everything = np.arange(q)
    for table, neutral in ((plus, 0), (times, 1)):
        assert np.array_equal(table, table.T)
        assert np.array_equal(table[neutral], everything)
        assert np.array_equal(table[table[:, :, None], everything], table[everything[:, None, None], table])
    assert np.array_equal(np.sort(plus, axis=1), np.tile(everything, (q, 1)))
    assert np.array_equal(np.sort(times[1:, 1:], axis=1), np.tile(everything[1:], (q - 1, 1)))
    assert np.array_equal(times[:, plus], plus[times[:, :, None], times[:, None, :]])  # a (b + c) = ab + ac


def test_dragonfly_of_every_group_count_joins_all_groups_once():
    for g in (2, 5, 8, 9):
        graph = dragonfly_graph(4, 3, 2, g)
        between = [(u[0], v[0]) for u, v in graph.edges if u[0] != v[0]]
        assert len(between) == g * (g - 1) // 2 == len({frozenset(pair) for pair in between})
        assert max(d for _, d in graph.degree) <= 3 + 2


def test_planes_are_not_joined():
    graph = multi_plane_graph(4, 3)
    assert nx.number_connected_components(graph) == 3
    assert graph.number_of_edges() == multi_plane(4, 3).links
    with pytest.raises(ValueError, match="pieces"):
        diameter(graph)


def test_path_diversity_of_fat_trees():
    """k/2 spines between two leaves; (k/2)^2 cores between pods, but only k/2 cables leave an edge switch."""
    assert path_diversity(fat_tree_2_graph(6), ("leaf", 0), ("leaf", 5)) == (3, 3)
    assert path_diversity(fat_tree_3_graph(6), ("edge", 0, 0), ("edge", 4, 1)) == (9, 3)


def test_bisection_of_fat_trees_is_full_and_dragonfly_is_not():
    rng = np.random.default_rng(0)
    assert bisection(fat_tree_2_graph(8), rng) == 32 // 2
    assert bisection(fat_tree_3_graph(4), rng) == 16 // 2
    assert bisection(dragonfly_graph(4, 2, 2, 9), rng) < 72 // 2


def test_bisection_counts_a_broken_cable():
    graph = fat_tree_2_graph(4)
    for spine in (0, 1):
        graph.remove_edge(("leaf", 0), ("spine", spine))
    assert bisection(graph, np.random.default_rng(0)) == 2  # leaf 0 can neither send nor receive
