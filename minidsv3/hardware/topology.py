"""Networks by their counts: what a fat-tree, Slim Fly or Dragonfly costs, and how many switches a message passes.

The published comparison (Insights into DeepSeek-V3, Table 3) in closed form, with k ports a switch:

    FT2   two-layer fat-tree         k^2/2 endpoints   3k/2 switches     k^2/2 links between switches
    MPFT  p planes of FT2            p times as many: each GPU of a node has its NIC in another plane
    FT3   three-layer fat-tree       k^3/4             5k^2/4            k^3/2
    SF    Slim Fly MMS(q), q = 4w+d  2 q^2 p           2 q^2             q^2 k', k' = (3q-d)/2, p = ceil(k'/2)
    DF    Dragonfly (a, p, h, g)     g a p             g a               g a (a-1)/2 + g a h/2

The graphs themselves are in `graphs`, routing and failures in `routing`.

Simplified: Table 3's unit prices are not published. `PRICES` are *calibrated* so that one price a switch, an endpoint
cable and a cable between switches gives all five published costs within 0.8 %; the three are not unique (switch price
and cable price trade against each other), so use them for this comparison only. Two of the published columns are no
buildable networks: 28 is no prime power, so there is no MMS graph for it, and 511 groups leave 2 of 512 global ports
of a group without a partner, which the formula counts as links all the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class Prices(NamedTuple):
    """US dollars."""

    switch: float
    endpoint_cable: float
    cable: float  # between switches


PRICES = Prices(35_000.0, 780.0, 1_971.0)  # calibrated on Table 3, see above


@dataclass(frozen=True)
class Topology:
    """A network by its counts.

    Attributes
    ----------
    endpoints, switches, links : int
        `links` are those between switches.
    ports : int
        Ports of a switch that are in use.
    switches_on_longest_path : int
        Of the shortest ways between two endpoints.
    """

    name: str
    endpoints: int
    switches: int
    links: int
    ports: int
    switches_on_longest_path: int

    def cost(self, prices: Prices = PRICES) -> float:
        """US dollars for switches and cables."""
        cables = self.endpoints * prices.endpoint_cable + self.links * prices.cable
        return self.switches * prices.switch + cables

    def cost_per_endpoint(self, prices: Prices = PRICES) -> float:
        """US dollars an endpoint."""
        return self.cost(prices) / self.endpoints


def fat_tree_2(k: int = 64) -> Topology:
    """Two-layer fat-tree of k-port switches: k leaves with k/2 endpoints each, k/2 spines."""
    _require_even(k)
    return Topology("FT2", k * k // 2, 3 * k // 2, k * k // 2, k, 3)


def multi_plane(k: int = 64, planes: int = 8) -> Topology:
    """`planes` separate two-layer fat-trees; a message stays in its plane."""
    _require(planes=planes)
    one = fat_tree_2(k)
    return Topology("MPFT", planes * one.endpoints, planes * one.switches, planes * one.links, k, 3)


def fat_tree_3(k: int = 64) -> Topology:
    """Three-layer fat-tree: k pods of k/2 edge and k/2 aggregation switches, (k/2)^2 cores."""
    _require_even(k)
    return Topology("FT3", k**3 // 4, 5 * k * k // 4, k**3 // 2, k, 5)


def slim_fly(q: int = 28, endpoints_per_switch: int | None = None) -> Topology:
    """Slim Fly from the McKay-Miller-Siran graph of `q` = 4w + d, d in {-1, 0, 1}; by default ceil(k'/2) endpoints."""
    _require(q=q)
    d = {0: 0, 1: 1, 3: -1}.get(q % 4)
    if d is None or q < 3:
        raise ValueError(f"q={q} is not 4w + d with d in -1, 0, 1 and w >= 1")
    degree = (3 * q - d) // 2
    p = math.ceil(degree / 2) if endpoints_per_switch is None else endpoints_per_switch
    _require(endpoints_per_switch=p)
    return Topology("SF", 2 * q * q * p, 2 * q * q, q * q * degree, degree + p, 3)


def dragonfly(a: int = 32, p: int = 16, h: int = 16, g: int = 511) -> Topology:
    """Dragonfly: g groups of a fully connected routers, each with p endpoints and h global links; g <= a h + 1."""
    _require(a=a, p=p, h=h, g=g)
    if g > a * h + 1:
        raise ValueError(f"g={g} groups need g - 1 global ports each, a * h = {a * h} are there")
    links = g * a * (a - 1) // 2 + g * a * h // 2
    return Topology("DF", g * a * p, g * a, links, a - 1 + h + p, 4)


def table_3() -> list[Topology]:
    """The five networks of Table 3, from 64-port switches."""
    return [fat_tree_2(64), multi_plane(64, 8), fat_tree_3(64), slim_fly(28), dragonfly(32, 16, 16, 511)]


def mean_switches(topology: Topology, k: int) -> float:
    """Switches between two random endpoints of a fat-tree of k-port switches: FT2, a plane of MPFT, or FT3."""
    leaf = k // 2
    others = (topology.endpoints if topology.name == "FT3" else fat_tree_2(k).endpoints) - 1
    if topology.name in ("FT2", "MPFT"):
        return 3 - 2 * (leaf - 1) / others
    if topology.name == "FT3":
        return 5 - 2 * (leaf * leaf - 1) / others - 2 * (leaf - 1) / others
    raise ValueError(f"{topology.name} is no fat-tree: its mean comes from its graph")


def _require_even(k: int) -> None:
    _require(k=k)
    if k % 2:
        raise ValueError(f"k={k} ports cannot be halved between up and down")


def _require(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r} is not a whole number of at least 1")
