"""``simulate dispatch``: what expert parallelism sends, without weights: only the gate's decisions and rows of bytes.

Rows travel at 128 of their columns, since a row of 7,168 is 56 such tiles (128 codes and a scale each) and traffic is
linear in them: the ledger's bytes times 56.
"""

from __future__ import annotations

import argparse
import json
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import plots
from ..autograd import Array
from ..config import PRESETS, ModelConfig
from ..ops.routing import select_experts
from ..parallel import figures
from ..parallel.comm import SimCommunicator
from ..parallel.ledger import Ledger, Ledgered
from ..parallel.placement import load_of_gpu, place
from ..parallel.routes import back, multicast, plan, sum_back
from ..parallel.wire import NORMAL, WIRES, Wire
from ..quant.blockwise import BLOCK
from ..train.routing import read_routing_trace
from .tables import gigabytes, text_table

SWEEP_TOKENS = 512  # a rank, for the table of node limits
SIMPLIFIED = (
    "rows travel at 128 columns and bytes are scaled to the full width; expert ids and marks of an entry take 16 bytes",
    "random scores are independent; a trained router's are not (--routing replays a trace of one)",
    "load after EPLB takes the same tokens as the placement was made from, replicas sharing an expert's load evenly",
)


class Traffic(NamedTuple):
    """One dispatch and combine of all ranks."""

    ledger: Ledger
    nodes_per_token: float  # distinct ones, the token's own included
    ranks_per_token: float
    rows_of_rank: Array  # int64 [R] rows that arrive at each rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``simulate dispatch``."""
    parser.add_argument("--preset", default="deepseek-v3", choices=PRESETS, help="whose gate and row width")
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--gpus-per-node", type=int, help="default: 8, or all ranks if there are fewer")
    parser.add_argument("--tokens", type=int, default=4096, help="of each rank (4096)")
    parser.add_argument("--routing", metavar="FILE", help="replay a routing trace of a run instead of random scores")
    parser.add_argument("--skew", type=float, default=0.0, help="sigma of a lognormal popularity of experts (0: even)")
    parser.add_argument("--replicas", type=int, help="physical experts for EPLB (default: experts + an eighth or more)")
    parser.add_argument("--wire", choices=WIRES, default="normal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ledger", metavar="FILE", help="write the ledger as CSV (at 128 columns)")
    parser.add_argument("--figure", metavar="FILE", help="traffic matrix, node limit, load before and after EPLB")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Route, send, count, print."""
    cfg = ModelConfig.preset(args.preset)
    gpus_per_node = args.gpus_per_node or min(8, args.ranks)
    if args.tokens < 1 or args.skew < 0:
        raise ValueError(f"--tokens {args.tokens} must be positive, --skew {args.skew} not negative")
    if args.routing:
        layers, E = _traced(args.routing, args.ranks)
    else:
        E = cfg.n_routed_experts
        layers = [_routed(cfg, cfg.topk_group, args.tokens, args.ranks, args.skew, args.seed)]
    if E % args.ranks:
        raise ValueError(f"{E} experts are not a multiple of --ranks {args.ranks}")
    width = BLOCK if cfg.hidden_size % BLOCK == 0 else cfg.hidden_size
    traffic = send(layers[0], E, args.ranks, gpus_per_node, WIRES[args.wire], width)
    limits = [] if args.routing else _limits(args, cfg, gpus_per_node)
    load = np.stack([np.bincount(np.concatenate(layer).reshape(-1), minlength=E) for layer in layers])
    replicas = args.replicas or -(-E * 9 // (8 * args.ranks)) * args.ranks
    before, after = _loads(load, replicas, cfg.n_group if not args.routing else 1, args.ranks, gpus_per_node)
    report = _report(args, cfg, traffic, cfg.hidden_size // width, len(layers[0][0]), limits)
    report["load"] = {
        "layers": len(layers), "replicas": replicas, "max_over_mean_before": _peak(before),
        "max_over_mean_after": _peak(after), "before_layer_0": before[0].tolist(), "after_layer_0": after[0].tolist(),
    }  # fmt: skip
    report["simplified"] = list(SIMPLIFIED)
    if args.ledger:
        traffic.ledger.write_csv(args.ledger)
    if args.figure:
        _write_figure(Path(args.figure), traffic, cfg.hidden_size // width, limits, before[0], after[0])
    print(json.dumps(report, indent=1) if args.json else _text(report))
    return 0


def send(topk_idx: list[Array], experts: int, ranks: int, gpus_per_node: int, wire: Wire, width: int) -> Traffic:
    """Dispatch and combine of rows of `width` columns for expert ids [T, K] of every rank, as `wire` sends them."""
    comm = Ledgered(SimCommunicator(ranks, gpus_per_node))
    encoded = {r: wire.dispatch.encode(np.zeros((len(idx), width), dtype=np.float32)) for r, idx in enumerate(topk_idx)}
    chosen = dict(enumerate(topk_idx))
    if wire.direct:
        routes, _ = plan(comm, chosen, experts // ranks, "dispatch", encoded)
    else:
        routes, _ = plan(comm, chosen, experts // ranks, "dispatch routing")
        multicast(comm, encoded, routes, "dispatch")
    if wire.sums_on_the_way:
        partial = {r: np.zeros((route.rows_arrived, width), dtype=np.float32) for r, route in routes.items()}
        sum_back(comm, partial, routes, "combine", wire.combine.encode, lambda rows: wire.combine.decode(rows, width))
    else:
        rows = {r: np.zeros((len(route.entry_order), width), dtype=np.float32) for r, route in routes.items()}
        back(comm, {r: wire.combine.encode(v) for r, v in rows.items()}, routes, "combine", wire.direct)
    tokens = sum(map(len, topk_idx))
    departed = [sum(int(route.hops[n].rows_out.sum()) for route in routes.values()) for n in (0, -1)]
    arrived = np.array([route.rows_arrived for route in routes.values()], dtype=np.int64)
    return Traffic(comm.ledger, departed[0] / tokens, departed[1] / tokens, arrived)


def _routed(cfg: ModelConfig, limit: int, tokens: int, ranks: int, skew: float, seed: int) -> list[Array]:
    """Experts of random tokens of every rank, by the model's own rule: scores uniform, or with popular experts."""
    rng, E = np.random.default_rng(seed), cfg.n_routed_experts
    popularity = np.exp(skew * rng.standard_normal(E)).astype(np.float32)
    idx = []
    for _ in range(ranks):
        scores = rng.random((tokens, E), dtype=np.float32) ** (1 / popularity)  # P(largest) grows with popularity
        idx.append(
            select_experts(
                scores, None, top_k=cfg.num_experts_per_tok, n_group=cfg.n_group, topk_group=limit,
                method=cfg.topk_method,
            )
        )  # fmt: skip
    return idx


def _traced(path: str, ranks: int) -> tuple[list[list[Array]], int]:
    """Experts [T, K] of every rank, for every layer of a trace; the tokens of all its steps dealt evenly."""
    trace = read_routing_trace(path)
    layers = []
    for layer in range(trace.topk_idx.shape[1]):
        idx = trace.topk_idx[:, layer].reshape(-1, trace.topk_idx.shape[-1]).astype(np.int64)
        idx = idx[idx[:, 0] >= 0]
        per_rank = len(idx) // ranks
        if not per_rank:
            raise ValueError(f"{path} has {len(idx)} tokens in layer {layer}: too few for {ranks} ranks")
        layers.append(list(idx[: per_rank * ranks].reshape(ranks, per_rank, -1)))
    return layers, trace.n_routed_experts


def _limits(args: argparse.Namespace, cfg: ModelConfig, gpus_per_node: int) -> list[dict[str, float]]:
    """Traffic with tokens limited to M = 1, 2, ... groups."""
    E, K, tokens = cfg.n_routed_experts, cfg.num_experts_per_tok, min(args.tokens, SWEEP_TOKENS)
    rows = []
    for limit in range(1, cfg.n_group + 1):
        if K > limit * (E // cfg.n_group) or cfg.n_group == 1:
            continue
        idx = _routed(cfg, limit, tokens, args.ranks, args.skew, args.seed)
        t = send(idx, E, args.ranks, gpus_per_node, NORMAL, 1)
        remote = t.ledger.total_bytes("dispatch", "InfiniBand") / 5  # a row of one column is its code and a scale
        rows.append({
            "node_limit": limit, "nodes_per_token": t.nodes_per_token, "ranks_per_token": t.ranks_per_token,
            "infiniband_rows_per_token": remote / tokens / args.ranks,
        })  # fmt: skip
    return rows


def _loads(load: Array, replicas: int, groups: int, ranks: int, gpus_per_node: int) -> tuple[Array, Array]:
    """Load of every GPU [layers, R] with experts in order, and as EPLB places `replicas` of them."""
    placements = place(load, replicas, groups, ranks // gpus_per_node, ranks)
    phy2log, logcnt = (np.stack([p[i] for p in placements]) for i in (0, 2))
    before = load.reshape(len(load), ranks, -1).sum(axis=2).astype(np.float64)
    return before, load_of_gpu(load, phy2log, logcnt, ranks)


def _peak(load: Array) -> float:
    """Highest load over the mean, mean over layers."""
    return float((load.max(axis=1) / load.mean(axis=1)).mean())


def _report(
    args: argparse.Namespace, cfg: ModelConfig, traffic: Traffic, tiles: int, tokens: int, limits: list[Any]
) -> dict[str, Any]:
    ledger, E, K = traffic.ledger, cfg.n_routed_experts, cfg.num_experts_per_tok
    nodes = args.ranks // (args.gpus_per_node or min(8, args.ranks))
    links = ("NVLink", "InfiniBand", "local")
    sizes = {op: {link: ledger.total_bytes(op, link) * (1 if "routing" in op else tiles) for link in links}
             for op in ledger.operations}  # fmt: skip
    wire = WIRES[args.wire]
    row = np.zeros((1, cfg.hidden_size), dtype=np.float32)
    return {
        "preset": args.preset, "wire": args.wire, "ranks": args.ranks, "nodes": nodes, "tokens_per_rank": tokens,
        "row_bytes": {"dispatch": wire.dispatch.encode(row).nbytes, "combine": wire.combine.encode(row).nbytes},
        "bytes": sizes,
        "nodes_per_token": traffic.nodes_per_token,
        "ranks_per_token": traffic.ranks_per_token,
        "uniform_nodes_per_token": nodes * (1 - comb(E - E // nodes, K) / comb(E, K)),
        "rows_of_rank": traffic.rows_of_rank.tolist(),
        "node_limits": limits,
    }  # fmt: skip


def _text(report: dict[str, Any]) -> str:
    r, load = report, report["load"]
    rows = [[op, *(gigabytes(sizes[link]) for link in ("InfiniBand", "NVLink", "local"))]
            for op, sizes in r["bytes"].items()]  # fmt: skip
    arrived = np.array(r["rows_of_rank"])
    lines = [
        f"{r['preset']}, {r['wire']} wire: {r['ranks']} ranks on {r['nodes']} nodes, {r['tokens_per_rank']:,} tokens "
        f"a rank; a row is {r['row_bytes']['dispatch']:,} bytes to dispatch, {r['row_bytes']['combine']:,} to combine",
        "",
        text_table(["all ranks together", "InfiniBand", "NVLink", "in place"], rows),
        "",
        f"distinct nodes per token {r['nodes_per_token']:.3f}, ranks {r['ranks_per_token']:.3f}; "
        f"a gate without groups would need {r['uniform_nodes_per_token']:.3f} nodes",
        f"rows that arrive at a rank: {arrived.min():,} to {arrived.max():,}, mean {arrived.mean():,.0f}",
    ]
    if r["node_limits"]:
        table = [[str(m["node_limit"]), f"{m['nodes_per_token']:.3f}", f"{m['ranks_per_token']:.3f}",
                  f"{m['infiniband_rows_per_token']:.3f}"] for m in r["node_limits"]]  # fmt: skip
        header = ["node limit M", "nodes per token", "ranks per token", "rows over InfiniBand per token"]
        lines += ["", text_table(header, table)]
    lines += [
        "",
        f"load of the busiest GPU over the mean ({load['layers']} layers): {load['max_over_mean_before']:.3f} with the "
        f"experts in order, {load['max_over_mean_after']:.3f} with {load['replicas']} physical experts placed by EPLB",
        "",
        *(f"simplified: {line}" for line in r["simplified"]),
    ]
    return "\n".join(lines)


def _write_figure(path: Path, traffic: Traffic, tiles: int, limits: list[Any], before: Array, after: Array) -> None:
    panels = 3 if limits else 2
    figure, axes = plots.new_figure(1, panels, panel=(5.2, 4.2))
    with plots.style():
        figures.traffic_matrix(axes[0], traffic.ledger.bytes_of_pair("dispatch") * tiles)
        figures.load_of_gpus(axes[1], before, after)
        if limits:
            values = [[m[k] for m in limits] for k in ("node_limit", "nodes_per_token", "ranks_per_token")]
            figures.node_limits(axes[2], *(np.array(v) for v in values))
    data = {"load_before": before, "load_after": after}
    plots.save(figure, path, data=data, text=plots.description(*axes))
