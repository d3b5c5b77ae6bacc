"""``simulate network``: Table 3 and Table 5, what hashing costs, and what failures cost."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ..accounting.published import published_tables
from ..hardware import graphs, routing, specs, topology
from .tables import text_table

FLOWS = ((8, 8), (32, 32), (64, 32), (128, 32), (512, 32), (256, 8))
SIMPLIFIED = (
    "prices are calibrated on Table 3 (they are not published) and not unique; cables have no length",
    "q = 28 (SF) and 511 groups (DF) of Table 3 are counts only; the graphs are of buildable sizes",
    "failures: traffic spreads ideally over what is alive, the relay over NVLink is no bottleneck, messages are large",
    "bisection is the least of several halvings, an upper bound",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``simulate network``."""
    parser.add_argument("--ports", type=int, default=64, help="of a switch (64)")
    parser.add_argument("--planes", type=int, default=8)
    parser.add_argument("--slim-fly", type=int, default=28, metavar="Q", help="q of the MMS graph (28)")
    parser.add_argument("--dragonfly", type=int, nargs=4, default=[32, 16, 16, 511], metavar=("A", "P", "H", "G"))
    parser.add_argument("--nodes", type=int, default=256, help="nodes in the failure experiments (256)")
    parser.add_argument("--trials", type=int, default=2000, help="of each Monte Carlo (2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", metavar="FILE", help="cost per endpoint, and all-to-all under failures")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Compute all, print."""
    report = {
        "table_3": _networks(args),
        "table_5": _latencies(),
        "graphs": _graphs(args.seed),
        "ecmp": _hashing(args),
        "failures": _failures(args),
        "prices_usd": topology.PRICES._asdict(),
        "simplified": list(SIMPLIFIED),
    }
    if args.figure:
        _write_figure(args)
    print(json.dumps(report, indent=1) if args.json else _text(report))
    return 0


def _networks(args: argparse.Namespace) -> list[dict[str, Any]]:
    k = args.ports
    found = [
        topology.fat_tree_2(k),
        topology.multi_plane(k, args.planes),
        topology.fat_tree_3(k),
        topology.slim_fly(args.slim_fly),
        topology.dragonfly(*args.dragonfly),
    ]
    printed = {row["row"]: float(row["published"]) for row in published_tables()["insights-3"].rows}
    standard = found == topology.table_3()
    rows = []
    for t in found:
        row: dict[str, Any] = {
            "network": t.name,
            "endpoints": t.endpoints,
            "switches": t.switches,
            "links": t.links,
            "ports": t.ports,
            "cost_usd": t.cost(),
            "cost_per_endpoint_usd": t.cost_per_endpoint(),
            "switches_on_longest_path": t.switches_on_longest_path,
        }
        for fabric in (specs.INFINIBAND, specs.ROCE):
            row[f"latency_us_{fabric.name.lower()}"] = 1e6 * fabric.latency(t.switches_on_longest_path)
        if standard:
            row["published"] = {name: printed[f"{t.name} {name}"] for name in ("endpoints", "switches", "links")}
            row["published"]["cost_usd"] = 1e6 * printed[f"{t.name} cost"]
        rows.append(row)
    return rows


def _latencies() -> list[dict[str, Any]]:
    printed = {row["row"]: float(row["published"]) for row in published_tables()["insights-5"].rows}
    rows = []
    for fabric, switches in ((specs.ROCE, (1, 3)), (specs.INFINIBAND, (1, 3)), (specs.NVLINK, (1,))):
        for n in switches:
            path = f"{fabric.name}, {'same' if n == 1 else 'cross'} leaf"
            rows.append({"path": path, "switches": n, "us": 1e6 * fabric.latency(n), "published_us": printed[path]})
    return rows


def _graphs(seed: int) -> list[dict[str, Any]]:
    """Buildable examples, measured: counts, diameter, path diversity, bisection."""
    rng = np.random.default_rng(seed)
    examples = [
        ("FT2, k = 16", graphs.fat_tree_2_graph(16), topology.fat_tree_2(16)),
        ("FT3, k = 8", graphs.fat_tree_3_graph(8), topology.fat_tree_3(8)),
        ("SF, q = 9", graphs.slim_fly_graph(9), topology.slim_fly(9)),
        ("DF, a = 8, p = h = 4, g = 33", graphs.dragonfly_graph(8, 4, 4, 33), topology.dragonfly(8, 4, 4, 33)),
    ]
    rows = []
    for name, graph, counts in examples:
        hosts = [n for n, ports in graph.nodes(data="endpoints") if ports]
        shortest, disjoint = graphs.path_diversity(graph, hosts[0], hosts[-1])
        rows.append(
            {
                "network": name,
                "switches": graph.number_of_nodes(),
                "links": graph.number_of_edges(),
                "counts_agree": (graph.number_of_nodes(), graph.number_of_edges()) == (counts.switches, counts.links),
                "diameter": graphs.diameter(graph),
                "shortest_paths": shortest,
                "disjoint_paths": disjoint,
                "bisection_of_half_the_endpoints": graphs.bisection(graph, rng, 2) / (counts.endpoints / 2),
            }
        )
    return rows


def _hashing(args: argparse.Namespace) -> list[dict[str, Any]]:
    rng = np.random.default_rng(args.seed)
    rows = []
    for flows, links in FLOWS:
        slowdown, idle = routing.ecmp_monte_carlo(flows, links, rng, args.trials)
        rows.append(
            {
                "flows": flows,
                "links": links,
                "slowdown": routing.ecmp_slowdown(flows, links),
                "monte_carlo": slowdown,
                "idle": routing.ecmp_idle(flows, links),
                "idle_monte_carlo": idle,
            }
        )
    return rows


def _failures(args: argparse.Namespace) -> list[dict[str, Any]]:
    half = args.ports // 2
    last = args.planes - 1
    events = {
        "nothing": lambda n: None,
        "one NIC": lambda n: n.fail_nic(0, last),
        "one leaf": lambda n: n.fail_leaf(last, 0),
        "one spine": lambda n: n.fail_spine(last, 0),
        "5 % of leaf-spine cables": lambda n: n.fail_links_at_random(0.05, np.random.default_rng(args.seed)),
        "one plane": lambda n: n.fail_plane(last),
    }
    rows = []
    for name, fail in events.items():
        row: dict[str, Any] = {"failure": name}
        for relay in (True, False):
            network = routing.Planes(args.nodes, args.planes, half, half)
            fail(network)
            result = routing.all_to_all(network, relay)
            key = "relay" if relay else "no_relay"
            row[f"slowdown_{key}"] = result.slowdown if math.isfinite(result.slowdown) else None
            row[f"gpus_cut_off_{key}"] = result.gpus_cut_off
        rows.append(row)
    cores = (args.ports // 2) ** 2
    rows.append(
        {
            "failure": f"one of {cores} cores of FT3",
            "slowdown_relay": cores / (cores - 1),
            "gpus_cut_off_relay": 0,
            "slowdown_no_relay": cores / (cores - 1),
            "gpus_cut_off_no_relay": 0,
        }
    )
    return rows


def _write_figure(args: argparse.Namespace) -> None:
    from .. import plots
    from ..hardware.figures import all_to_all_under_failures, cost_per_endpoint

    even, fields = range(16, 65, 8), (5, 7, 9, 11, 13, 16, 17, 19, 23, 25, 27)  # at most 64 ports; buildable q
    families = {
        "FT2": [topology.fat_tree_2(k) for k in even],
        "MPFT": [topology.multi_plane(64, p) for p in (1, 2, 4, 8, 16)],
        "FT3": [topology.fat_tree_3(k) for k in even],
        "SF": [topology.slim_fly(q) for q in fields],
        "DF": [topology.dragonfly(2 * h, h, h, 2 * h * h + 1) for h in range(3, 17)],
    }
    sizes = {name: [t.endpoints for t in ts] for name, ts in families.items()}
    costs = {name: [t.cost_per_endpoint() for t in ts] for name, ts in families.items()}
    shares, times = np.linspace(0, 0.2, 9), {}
    for lost in (0, 1, 2):
        values = []
        for share in shares:
            network = routing.Planes(args.nodes, args.planes, args.ports // 2, args.ports // 2)
            network.fail_links_at_random(float(share), np.random.default_rng(args.seed))
            for plane in range(lost):
                network.fail_plane(plane)
            values.append(routing.all_to_all(network).slowdown)
        times[f"{lost or 'no'} plane{'' if lost == 1 else 's'} lost"] = values
    with plots.style():
        figure, axes = plots.new_figure(1, 2, panel=(6.0, 4.0))
        cost_per_endpoint(axes[0], sizes, costs)
        all_to_all_under_failures(axes[1], [float(s) for s in shares], times)
    data = {
        f"{name} {what}": values
        for name in sizes
        for what, values in (("endpoints", sizes[name]), ("usd", costs[name]))
    }
    plots.save(figure, Path(args.figure), data={**data, "dead": shares, **times}, text=plots.description(*axes))


def _text(report: dict[str, Any]) -> str:
    def published(row: dict[str, Any], name: str, scale: int = 1) -> str:
        shown = f"{row[name]:,}" if scale == 1 else f"{row[name] / scale:,.1f}"
        return shown if "published" not in row else f"{shown} ({row['published'][name] / scale:,.0f})"

    rows = [
        [
            r["network"],
            published(r, "endpoints"),
            published(r, "switches"),
            published(r, "links"),
            published(r, "cost_usd", 10**6),
            f"{r['cost_per_endpoint_usd'] / 1e3:.2f}",
            str(r["switches_on_longest_path"]),
            f"{r['latency_us_infiniband']:.2f}",
            f"{r['latency_us_roce']:.2f}",
        ]
        for r in report["table_3"]
    ]
    blocks = [
        "Table 3, published in brackets\n"
        + text_table(
            [
                "network",
                "endpoints",
                "switches",
                "links",
                "cost M$",
                "k$/endpoint",
                "switches on path",
                "IB us",
                "RoCE us",
            ],
            rows,
        )
    ]
    rows = [[r["path"], f"{r['us']:.2f}", f"{r['published_us']:.2f}"] for r in report["table_5"]]
    blocks.append("Table 5\n" + text_table(["path", "us", "published"], rows))
    rows = [
        [
            r["network"],
            str(r["switches"]),
            str(r["links"]),
            str(r["diameter"]),
            str(r["shortest_paths"]),
            str(r["disjoint_paths"]),
            f"{r['bisection_of_half_the_endpoints']:.2f}",
        ]
        for r in report["graphs"]
    ]
    blocks.append(
        "Built\n"
        + text_table(
            ["graph", "switches", "links", "diameter", "shortest ways", "disjoint ways", "bisection / full"], rows
        )
    )
    rows = [
        [f"{r['flows']} on {r['links']}", f"{r['slowdown']:.2f}", f"{r['monte_carlo']:.2f}", f"{100 * r['idle']:.0f} %"]
        for r in report["ecmp"]
    ]
    blocks.append(
        "Flows hashed on links (spraying packets: 1.00)\n"
        + text_table(["flows", "slow-down", "Monte Carlo", "idle links"], rows)
    )

    def slowdown(value: float | None, cut: int) -> str:
        return f"{value:.3f}" if value is not None else f"{cut} GPUs cut off"

    rows = [
        [
            r["failure"],
            slowdown(r["slowdown_relay"], r["gpus_cut_off_relay"]),
            slowdown(r["slowdown_no_relay"], r["gpus_cut_off_no_relay"]),
        ]
        for r in report["failures"]
    ]
    blocks.append(
        "An all-to-all after a failure (unbroken = 1)\n"
        + text_table(["failure", "with relay over NVLink", "without"], rows)
    )
    return "\n\n".join([*blocks, "Simplified: " + ";\n  ".join(report["simplified"]) + "."])
