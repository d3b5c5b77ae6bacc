"""Hashing against its closed forms, failures against arithmetic and against shortest paths counted by networkx."""

import itertools
import math

import networkx as nx
import numpy as np
import pytest

from minidsv3.hardware.routing import Planes, all_to_all, ecmp_idle, ecmp_monte_carlo, ecmp_slowdown


@pytest.mark.parametrize("flows, links", [(1, 1), (1, 5), (4, 3), (5, 2), (3, 4)])
def test_ecmp_closed_forms_equal_an_enumeration_of_all_hashes(flows, links):
    loads = [np.bincount(way, minlength=links) for way in itertools.product(range(links), repeat=flows)]
    assert ecmp_slowdown(flows, links) == pytest.approx(np.mean([load.max() for load in loads]) * links / flows)
    assert ecmp_idle(flows, links) == pytest.approx(np.mean([(load == 0).mean() for load in loads]))


@pytest.mark.parametrize("flows, links", [(8, 8), (32, 32), (64, 32), (128, 32), (512, 32), (256, 8)])
def test_ecmp_monte_carlo_agrees_with_the_closed_forms(flows, links):
    slowdown, idle = ecmp_monte_carlo(flows, links, np.random.default_rng(3), trials=3000)
    assert slowdown == pytest.approx(ecmp_slowdown(flows, links), rel=0.02)  # standard error below 0.5 %
    assert idle == pytest.approx(ecmp_idle(flows, links), abs=0.005)


def test_ecmp_slowdown_of_published_loads():
    """Monte Carlo by another program: 8 flows on 8 links 2.60, 32/32 3.54, 512/32 1.55."""
    assert [round(ecmp_slowdown(*case), 1) for case in ((8, 8), (32, 32), (512, 32))] == [2.6, 3.5, 1.6]


def planes(**sizes):
    return Planes(**{"nodes": 12, "planes": 4, "nodes_per_leaf": 3, "spines": 3, **sizes})


def test_unbroken_network_has_no_slowdown():
    assert all_to_all(planes()) == all_to_all(planes(), relay=False)
    assert all_to_all(planes()).slowdown == pytest.approx(1)


@pytest.mark.parametrize("fail, gpus", [
    (lambda n: n.fail_plane(2), 12), (lambda n: n.fail_nic(5, 1), 1), (lambda n: n.fail_leaf(3, 2), 3),
], ids=["plane", "nic", "leaf"])  # fmt: skip
def test_relay_spreads_a_lost_nic_over_the_others_and_without_relay_gpus_are_cut_off(fail, gpus):
    network = planes()
    fail(network)
    assert all_to_all(network, relay=True).slowdown == pytest.approx(4 / 3)  # p / (p - 1)
    alone = all_to_all(network, relay=False)
    assert (alone.slowdown, alone.gpus_cut_off) == (math.inf, gpus)


def test_a_plane_of_eight_lost_costs_an_eighth():
    network = Planes(64, 8)
    network.fail_plane(0)
    assert all_to_all(network).slowdown == pytest.approx(8 / 7)


def test_all_planes_lost_cut_everybody_off():
    network = planes()
    for plane in range(4):
        network.fail_plane(plane)
    assert all_to_all(network).gpus_cut_off == 12 * 4


def test_a_spine_lost_costs_what_the_full_leaf_sends_over_one_less():
    """Each leaf sends 3 nodes * 9 others, a quarter of it in this plane, over 2 spines instead of 3."""
    network = planes()
    network.fail_spine(1, 0)
    cable = 3 * 9 / 4 / 2
    assert all_to_all(network).slowdown == pytest.approx(cable / (11 / 4))


def test_cable_load_equals_shortest_paths_counted_on_the_graph():
    """One plane, some cables dead: betweenness of edges between leaves, times the pairs of nodes behind them."""
    network = Planes(10, 1, 2, 4)
    for leaf, spine in ((0, 1), (0, 2), (3, 2), (4, 0)):
        network.fail_link(0, leaf, spine)
    cables = [(("leaf", int(i)), ("spine", int(j))) for i, j in zip(*np.nonzero(network.up_alive[0]))]
    graph = nx.DiGraph([*cables, *((spine, leaf) for leaf, spine in cables)])
    leaves = [("leaf", i) for i in range(5)]
    load = nx.edge_betweenness_centrality_subset(graph, leaves, leaves)
    fullest = max(load.values()) * 2 * 2  # two nodes under each leaf
    assert all_to_all(network).slowdown == pytest.approx(max(9, fullest) / 9)
    assert fullest > 9


def test_random_failures_are_reproducible_and_never_help():
    broken = [Planes(40, 3, 4, 4) for _ in range(3)]
    for network, seed in zip(broken, (1, 1, 2)):
        network.fail_links_at_random(0.2, np.random.default_rng(seed))
    assert np.array_equal(broken[0].up_alive, broken[1].up_alive)
    assert not np.array_equal(broken[0].up_alive, broken[2].up_alive)
    assert min(all_to_all(network).slowdown for network in broken) > 1


def test_impossible_inputs_are_refused():
    with pytest.raises(ValueError, match="flows=0"):
        ecmp_slowdown(0, 4)
    with pytest.raises(ValueError, match="planes=0"):
        Planes(4, 0)
    with pytest.raises(ValueError, match=r"share=1\.5"):
        planes().fail_links_at_random(1.5, np.random.default_rng(0))
