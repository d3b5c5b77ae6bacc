"""Counts and costs of networks against Table 3, and against the graphs themselves."""

import numpy as np
import pytest

from minidsv3.hardware.topology import (
    Prices,
    dragonfly,
    fat_tree_2,
    fat_tree_3,
    mean_switches,
    multi_plane,
    slim_fly,
    table_3,
)

# Insights into DeepSeek-V3, Table 3; the cost column with the digits that endpoints * k$/endpoint give
TABLE_3 = {
    "FT2": (2_048, 96, 2_048, 9e6),
    "MPFT": (16_384, 768, 16_384, 72e6),
    "FT3": (65_536, 5_120, 131_072, 491e6),
    "SF": (32_928, 1_568, 32_928, 146e6),
    "DF": (261_632, 16_352, 384_272, 1_522e6),
}


@pytest.mark.parametrize("topology", table_3(), ids=lambda t: t.name)
def test_counts_are_those_of_table_3(topology):
    assert (topology.endpoints, topology.switches, topology.links) == TABLE_3[topology.name][:3]
    assert topology.ports <= 64


@pytest.mark.parametrize("topology", table_3(), ids=lambda t: t.name)
def test_cost_is_within_one_percent_of_table_3(topology):
    assert topology.cost() == pytest.approx(TABLE_3[topology.name][3], rel=0.01)
    assert topology.cost_per_endpoint() * topology.endpoints == pytest.approx(topology.cost())


def test_cost_is_linear_in_each_price():
    network = fat_tree_2(8)
    assert network.cost(Prices(1, 0, 0)) == 12
    assert network.cost(Prices(0, 1, 0)) == 32
    assert network.cost(Prices(0, 0, 1)) == 32


def test_planes_multiply_the_counts_and_leave_the_price_of_an_endpoint():
    one, five = fat_tree_2(16), multi_plane(16, 5)
    assert (five.endpoints, five.switches, five.links) == (5 * one.endpoints, 5 * one.switches, 5 * one.links)
    assert five.cost_per_endpoint() == one.cost_per_endpoint()


def test_neighbours_of_q_28_that_can_be_built():
    assert (slim_fly(27).endpoints, slim_fly(27).switches, slim_fly(27).links) == (30_618, 1_458, 29_889)
    assert (slim_fly(25).endpoints, slim_fly(25).switches, slim_fly(25).links) == (23_750, 1_250, 23_125)
    assert (slim_fly(27).ports, slim_fly(25).ports, slim_fly(29).ports) == (62, 56, 65)


def test_balanced_dragonfly_has_two_groups_more():
    balanced = dragonfly(32, 16, 16, 513)
    assert (balanced.endpoints, balanced.switches, balanced.links) == (262_656, 16_416, 385_776)


def test_mean_switches_of_a_fat_tree_equals_an_average_over_all_pairs():
    k = 6
    leaf = np.arange(k**3 // 4) // (k // 2)
    pod = leaf // (k // 2)
    switches = np.where(leaf[:, None] == leaf, 1, np.where(pod[:, None] == pod, 3, 5))
    pairs = ~np.eye(len(leaf), dtype=bool)
    assert mean_switches(fat_tree_3(k), k) == pytest.approx(switches[pairs].mean())
    two = np.arange(k * k // 2) // (k // 2)
    pairs = ~np.eye(len(two), dtype=bool)
    assert mean_switches(fat_tree_2(k), k) == pytest.approx(np.where(two[:, None] == two, 1, 3)[pairs].mean())
    assert mean_switches(multi_plane(k, 3), k) == mean_switches(fat_tree_2(k), k)


@pytest.mark.parametrize("wrong, rule", [
    (lambda: fat_tree_2(7), "k=7"), (lambda: fat_tree_3(0), "k=0"), (lambda: multi_plane(8, 0), "planes=0"),
    (lambda: slim_fly(6), "q=6"), (lambda: dragonfly(4, 2, 2, 10), "g=10"), (lambda: dragonfly(4, 2, 2.5, 9), "h=2.5"),
    (lambda: mean_switches(slim_fly(5), 8), "no fat-tree"),
])  # fmt: skip
def test_impossible_networks_are_refused(wrong, rule):
    with pytest.raises(ValueError, match=rule):
        wrong()
