"""What the simulations are asked to run on: flags for model, machine and network, and the traffic of a gate."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import numpy as np

from ..accounting.dense import load_config
from ..config import ModelConfig
from ..hardware.messages import Links, Traffic, traffic_of
from ..hardware.routing import ecmp_slowdown
from ..hardware.specs import CLUSTERS, Cluster, read_cluster
from ..hardware.topology import Topology, dragonfly, fat_tree_2, fat_tree_3, multi_plane, slim_fly
from ..ops.routing import select_experts
from ..train.routing import read_routing_trace

TOKENS_OF_MONTE_CARLO = 20_000
NETWORKS: dict[str, Callable[[], Topology]] = {
    "mpft": multi_plane,
    "ft2": fat_tree_2,
    "ft3": fat_tree_3,
    "slim-fly": slim_fly,
    "dragonfly": dragonfly,
}


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that `inference` has too."""
    parser.add_argument("--preset", default="deepseek-v3")
    parser.add_argument("--config", metavar="FILE", help="a config.json instead of a preset")
    parser.add_argument(
        "--hardware",
        default="h800",
        metavar="FILE",
        help=f"a JSON file (schema: minidsv3/hardware/specs.py, a unit on every field) or {', '.join(CLUSTERS)}",
    )
    parser.add_argument("--infiniband-speed", type=float, default=1.0, metavar="X", help="InfiniBand X times as fast")
    parser.add_argument("--network-speed", type=float, default=1.0, metavar="X", help="all links; inf is allowed")
    parser.add_argument("--network", choices=NETWORKS, default="mpft", help="how many switches a message passes (mpft)")
    parser.add_argument("--fabric", choices=("infiniband", "roce"), default="infiniband", help="latency of a switch")
    parser.add_argument("--lost-planes", type=int, default=0, metavar="N", help="of 8, relayed over NVLink")
    parser.add_argument("--hashed-flows", type=int, metavar="N", help="ECMP: N flows hashed on 32 uplinks")


def machine(args: argparse.Namespace) -> tuple[ModelConfig, Cluster, Links]:
    """Model, cluster and achieved link rates that the flags ask for."""
    config = load_config(args.preset, args.config)
    if not isinstance(config, ModelConfig):
        raise ValueError(f"{args.config or args.preset} is a dense model: the clock knows models with experts")
    cluster = CLUSTERS[args.hardware] if args.hardware in CLUSTERS else read_cluster(args.hardware)
    for name in ("infiniband_speed", "network_speed"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be positive")
    if not 0 <= args.lost_planes < 8:
        raise ValueError(f"--lost-planes {args.lost_planes} must leave one of 8")
    slower = 8 / (8 - args.lost_planes)
    if args.hashed_flows:
        slower *= ecmp_slowdown(args.hashed_flows, 32)
    peak = CLUSTERS["h800"]
    links = dataclasses.replace(Links(), gpus_per_node=int(cluster.gpus_per_node)).faster(
        cluster.nic.bytes_per_second / peak.nic.bytes_per_second * args.infiniband_speed * args.network_speed / slower,
        cluster.gpu.nvlink_bytes_per_second / peak.gpu.nvlink_bytes_per_second * args.network_speed,
    )
    return config, cluster, links


def gate_traffic(config: ModelConfig, limit: int, ranks: int, gpus_per_node: int) -> Traffic:
    """Traffic of the model's gate on random scores, by Monte Carlo (seed 0); rows are taken as even."""
    E, rng = config.n_routed_experts, np.random.default_rng(0)
    scores = rng.random((TOKENS_OF_MONTE_CARLO, E), dtype=np.float32)
    topk_idx = select_experts(
        scores,
        np.zeros(E, dtype=np.float32),
        top_k=config.num_experts_per_tok,
        n_group=config.n_group,
        topk_group=limit,
        method=config.topk_method,
    )
    return traffic_of(topk_idx, E, ranks, gpus_per_node)._replace(busiest=1.0)


def traced_traffic(path: str, ranks: int, gpus_per_node: int) -> Traffic:
    """Traffic of a routing trace (`train.routing`), mean over steps and layers, busiest rank of each layer.

    A small model's few experts are spread over as many nodes as `ranks` fill, one to a rank. Raises ValueError when
    neither the trace's experts divide among the ranks nor the ranks among the experts.
    """
    trace = read_routing_trace(path)
    E = trace.n_routed_experts
    if E % ranks and ranks % E:
        raise ValueError(f"{path}: {E} experts and {ranks} ranks do not divide each other")
    if E < ranks:
        ranks, gpus_per_node = E, max(1, gpus_per_node * E // ranks)
    each = [traffic_of(layer, E, ranks, gpus_per_node) for layer in trace.topk_idx.transpose(1, 0, 2, 3)]
    return Traffic(*np.mean(each, axis=0).tolist())
