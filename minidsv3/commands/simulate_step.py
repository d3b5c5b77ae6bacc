"""``simulate step``: how long one training step takes, composed from kernels and messages, beside what was published.

Every flag changes an input of the composition and nothing else; with any of them the step of the unchanged machine
stands beside the new one. What is simplified is said in the last lines of the output.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ..accounting import flops
from ..accounting.predictions import median_unfitted_error, residuals
from ..accounting.published import published_tables
from ..config import ModelConfig
from ..hardware.clock import Clock, Setup, Step, constants, step
from ..hardware.kernels import shape_of
from ..hardware.messages import LIMITED_TO_FOUR, Links, Traffic, ledger_seconds, straggler_seconds
from ..hardware.specs import FABRICS
from ..parallel.ledger import read_ledger_csv
from ..parallel.schedules import SCHEDULES, build
from ..parallel.timeline import timeline
from .simulated_machine import NETWORKS, add_machine_arguments, gate_traffic, machine, traced_traffic
from .tables import text_table

PARTS = ("1F", "bubble", "1B", "1W", "1F1B", "optimizer")
SIMPLIFIED = (
    "layers are spread over stages by a rule (V3: 15 stages of 4, the last with both heads); the real map is unknown",
    "chunks that overlap with nothing wait for their messages, and their weight parts run on no second stream",
    "routing is even unless --routing says otherwise; no stragglers, no checkpoints, no other jobs on the network",
    "messages between stages delay the next chunk and take no bandwidth from dispatch and combine",
    "kernel efficiencies are those of one published profile (H800), for every model and machine",
)
SIZES = ("preset", "config", "gpus", "pp", "ep", "micro_batches", "seq_len")
WHAT_IF = ("hardware", "schedule", "precision", "node_limit", "no_overlap", "gemm_speed", "routing", "infiniband_speed",
           "network_speed", "network", "fabric", "lost_planes", "hashed_flows")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``simulate step``."""
    add_machine_arguments(parser)
    parser.add_argument("--gpus", type=int, default=2048)
    parser.add_argument("--pp", type=int, default=16, help="pipeline ranks (16)")
    parser.add_argument("--ep", type=int, default=64, help="GPUs that share the experts (64)")
    parser.add_argument("--micro-batches", type=int, default=120, help="of each pipeline (120)")
    parser.add_argument("--seq-len", type=int, default=4096, help="tokens of a micro-batch (4096)")
    parser.add_argument("--schedule", choices=SCHEDULES, default="dualpipe")
    parser.add_argument("--precision", choices=("fp8", "bf16"), default="fp8", help="of gemms and dispatch (fp8)")
    parser.add_argument("--node-limit", type=int, metavar="M", help="nodes a token may go to (the model's topk_group)")
    parser.add_argument("--no-overlap", action="store_true", help="forward and backward chunks one after the other")
    parser.add_argument("--gemm-speed", type=float, default=1.0, metavar="X", help="gemms X times as fast")
    parser.add_argument("--routing", metavar="FILE", help="a routing trace (safetensors) in place of an even gate")
    parser.add_argument("--ledger", metavar="FILE", help="a traffic ledger (CSV): also print seconds per operation")
    parser.add_argument("--train-tokens", type=float, default=14.8e12, help="for hours and dollars (14.8e12)")
    parser.add_argument("--constants", action="store_true", help="also print every fitted constant and its source")
    parser.add_argument("--trace", metavar="FILE", help="write the step as a Chrome trace (Perfetto opens it)")
    parser.add_argument("--figure", metavar="FILE", help="where the seconds go (.png, .svg, .pdf)")
    parser.add_argument("--what-if", metavar="FILE", help="figure of the step under a dozen changes, one at a time")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Predict, print, write."""
    config, setup = make_setup(args)
    plan = build(args.schedule, args.pp, args.micro_batches)
    result = step(setup, plan, timeline)
    report = _report(args, config, setup, result)
    if args.trace:
        _write_trace(args.trace, setup, result)
    if args.figure:
        _write_figure(args.figure, report)
    if args.what_if:
        _write_what_if(args)
    print(json.dumps(report, indent=1) if args.json else _text(report))
    return 0


def make_setup(args: argparse.Namespace) -> tuple[ModelConfig, Setup]:
    """The setup that the flags describe."""
    config, cluster, links = machine(args)
    if not args.gemm_speed > 0:
        raise ValueError(f"--gemm-speed {args.gemm_speed} must be positive")
    setup = Setup(
        shape_of(config),
        cluster,
        args.gpus,
        args.pp,
        args.ep,
        tokens=args.seq_len,
        fp8=args.precision == "fp8",
        overlap=not args.no_overlap,
        links=links,
        traffic=_traffic(args, config, links),
    )
    eff = setup.efficiencies
    faster = dataclasses.replace(
        eff, fp8_gemm=eff.fp8_gemm * args.gemm_speed, bf16_gemm=eff.bf16_gemm * args.gemm_speed
    )
    latency = FABRICS[args.fabric].latency(NETWORKS[args.network]().switches_on_longest_path) / args.network_speed
    return config, dataclasses.replace(setup, efficiencies=faster, hop_latency_seconds=latency)


def _traffic(args: argparse.Namespace, config: ModelConfig, links: Links) -> Traffic:
    """Where tokens go: from a trace, or from the model's gate on random scores (V3's own numbers need no draw)."""
    if args.routing:
        return traced_traffic(args.routing, args.ep, links.gpus_per_node)
    limit = config.topk_group if args.node_limit is None else args.node_limit
    if not 1 <= limit <= config.n_group:
        raise ValueError(f"--node-limit {limit} must lie between 1 and n_group={config.n_group}")
    v3 = (config.n_routed_experts, config.num_experts_per_tok, config.n_group) == (256, 8, 8)
    if v3 and (limit, args.ep, links.gpus_per_node) == (4, 64, 8):
        return LIMITED_TO_FOUR
    return gate_traffic(config, limit, args.ep, links.gpus_per_node)


def _report(args: argparse.Namespace, config: ModelConfig, setup: Setup, result: Step) -> dict[str, Any]:
    tokens = setup.data_ranks * args.micro_batches * setup.tokens
    report: dict[str, Any] = {
        "step_seconds": result.seconds,
        "parts_seconds": result.parts,
        "tokens_per_step": tokens,
        "tokens_per_day": flops.tokens_per_day(tokens, result.seconds),
    }
    for attention in ("causal", "full"):
        per_token = flops.training_flops_per_token(config, setup.tokens, attention)
        achieved = flops.achieved_flops(per_token, tokens, result.seconds, setup.gpus)
        report[f"tflops_{attention}"] = achieved / 1e12
        report[f"mfu_{attention}"] = achieved / setup.cluster.gpu.bf16_flops_per_second
    hours = args.train_tokens / tokens * result.seconds / 3600 * setup.gpus
    report |= {
        "train_tokens": args.train_tokens,
        "gpu_hours": hours,
        "usd": hours * setup.cluster.usd_per_gpu_hour,
        "nodes_per_token": setup.traffic.nodes_per_token,
        "ranks_per_token": setup.traffic.ranks_per_token,
        "busiest_rank": setup.traffic.busiest,
        "chunk_seconds": _chunks(setup, args.schedule),
        "peak_live_chunks": max(result.timeline.peak_live),
    }
    defaults = argparse.ArgumentParser()
    add_arguments(defaults)
    if any(getattr(args, name) != defaults.get_default(name) for name in WHAT_IF):
        base = argparse.Namespace(**{**vars(args), **{name: defaults.get_default(name) for name in WHAT_IF}})
        before = step(make_setup(base)[1], build(base.schedule, base.pp, base.micro_batches), timeline)
        report["unchanged"] = {"step_seconds": before.seconds, "parts_seconds": before.parts}
    elif all(getattr(args, name) == defaults.get_default(name) for name in SIZES):
        report["published"] = published_step()
        found = residuals()
        report["median_unfitted_error"] = median_unfitted_error(found)
        report["residuals"] = [{**r._asdict(), "relative": r.relative} for r in found]
    if args.ledger:
        rows = read_ledger_csv(args.ledger)
        late = straggler_seconds(rows)
        report |= {"ledger_seconds": ledger_seconds(rows, setup.links), "straggler_seconds": late,
                   "step_seconds_with_stragglers": result.seconds + late}  # fmt: skip
    if args.constants:
        report["constants"] = [dict(zip(("name", "value", "unit", "fitted_on"), row)) for row in constants()]
    return report | {"simplified": list(SIMPLIFIED)}


def published_step() -> dict[str, Any]:
    """Table 4 (MPFT) and the report's GPU hours."""
    tables = published_tables()
    given = tables["insights-4"].inputs
    parts = dict(zip(PARTS, given["parts_mpft"]))
    printed = {row["row"]: float(row["published"]) for row in tables["insights-4"].rows}
    return {
        "step_seconds": given["step_seconds_mpft"],
        "parts_seconds": parts,
        "tokens_per_day": printed["tokens per day, MPFT"] * 1e9,
        "gpu_hours": tables["report-1"].inputs["pre_training_hours"],
        "tflops_causal": printed["TFLOPS causal, MPFT"],
        "tflops_full": printed["TFLOPS non-causal, MPFT"],
        "mfu_causal": printed["MFU causal, MPFT"] / 100,
        "mfu_full": printed["MFU non-causal, MPFT"] / 100,
    }


def _chunks(setup: Setup, schedule: str) -> dict[str, float]:
    """Seconds of a middle stage's chunks; FB is its pair with its neighbour."""
    clock = Clock(setup, 2 * setup.pipeline_ranks if schedule == "dualpipev" else None)
    middle = len(clock.stages) // 2
    kinds = {kind: clock.duration(kind, middle) for kind in ("F", "B", "Bi", "W")}
    return {**kinds, "FB": clock.duration("FB", middle, max(middle - 1, 0)), "hop": clock.hop}


def _write_trace(path: str, setup: Setup, result: Step) -> None:
    from ..hardware.trace import spans_of_schedule, spans_of_streams, write_trace

    pair = spans_of_streams(Clock(setup, result.timeline.schedule.stages).pair(1, 1), "one overlapped pair")
    write_trace(path, spans_of_schedule(result.timeline) + pair)


def _beside(report: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """What stands beside the prediction: the publication, the unchanged machine, or nothing."""
    name = next((name for name in ("published", "unchanged") if name in report), "")
    return name, report.get(name)


def _write_figure(path: str, report: dict[str, Any]) -> None:
    from .. import plots
    from ..hardware.figures import where_the_seconds_go

    name, beside = _beside(report)
    if beside is None:
        raise ValueError("--figure: at these sizes nothing is published or changed that could stand beside the step")
    label = "published (Table 4)" if name == "published" else "unchanged machine"
    steps = {"predicted": report["parts_seconds"], label: beside["parts_seconds"]}
    with plots.style():
        figure, (ax,) = plots.new_figure(panel=(8.2, 3.2))
        where_the_seconds_go(ax, steps)
    data = {"part": list(PARTS), **{bar: [parts[p] for p in PARTS] for bar, parts in steps.items()}}
    plots.save(figure, Path(path), data=data, text=plots.description(ax))


CHANGES: dict[str, dict[str, Any]] = {
    "half the InfiniBand": {"infiniband_speed": 0.5},
    "twice the InfiniBand": {"infiniband_speed": 2.0},
    "infinite network": {"network_speed": math.inf},
    "gemms twice as fast": {"gemm_speed": 2.0},
    "BF16 gemms and dispatch": {"precision": "bf16"},
    "8 nodes a token, not 4": {"node_limit": 8},
    "no overlap": {"no_overlap": True},
    "1F1B": {"schedule": "1f1b"},
    "ZB1P": {"schedule": "zb1p"},
    "64 flows hashed on 32 links": {"hashed_flows": 64},
    "one plane of 8 lost": {"lost_planes": 1},
}


def _write_what_if(args: argparse.Namespace) -> None:
    from .. import plots
    from ..hardware.figures import step_by_what_if

    seconds = {}
    for name, change in {"as asked for": {}, **CHANGES}.items():
        changed = argparse.Namespace(**{**vars(args), **change})
        plan = build(changed.schedule, changed.pp, changed.micro_batches)
        seconds[name] = step(make_setup(changed)[1], plan, timeline).seconds
    with plots.style():
        figure, (ax,) = plots.new_figure(panel=(7.4, 4.4))
        step_by_what_if(ax, seconds)
    data = {"change": list(seconds), "seconds": list(seconds.values())}
    plots.save(figure, Path(args.what_if), data=data, text=plots.description(ax))


def _text(report: dict[str, Any]) -> str:
    published, (name, beside) = report.get("published"), _beside(report)
    blocks = []
    if published:
        error = 100 * report["median_unfitted_error"]
        blocks.append(
            f"Median error of what was not fitted: {error:.1f} %. Step {report['step_seconds']:.2f} s, published "
            f"{published['step_seconds']:.3f} s."
        )
    rows = [
        ["step", f"{report['step_seconds']:.4g}"],
        *([f"  {p}", f"{report['parts_seconds'][p]:.4g}"] for p in PARTS),
    ]
    if beside:
        others = [beside["step_seconds"], *(beside["parts_seconds"][p] for p in PARTS)]
        ours = [report["step_seconds"], *(report["parts_seconds"][p] for p in PARTS)]
        rows = [[*row, f"{b:.4g}", _percent(a, b)] for row, a, b in zip(rows, ours, others)]
    blocks.append(text_table(["seconds", "predicted", *([name, "difference"] if beside else [])], rows))
    blocks.append("\n".join(_totals(report, published)))
    chunk = report["chunk_seconds"]
    blocks.append(
        "Chunks of a middle stage, ms: "
        + ", ".join(f"{k} {1e3 * v:.1f}" for k, v in chunk.items())
        + f"; at most {report['peak_live_chunks']} chunks alive on a rank"
    )
    if "ledger_seconds" in report:
        rows_ = [[op, f"{1e3 * s:.3f}"] for op, s in report["ledger_seconds"].items()]
        late, total = report["straggler_seconds"], report["step_seconds_with_stragglers"]
        told = f"Stragglers add {late:.3g} s: a step takes {total:.4g} s."
        blocks.append("Ledger\n" + text_table(["operation", "ms"], rows_) + f"\n{told}")
    if "constants" in report:
        rows_ = [[c["name"], f"{c['value']:.4g} {c['unit']}", c["fitted_on"]] for c in report["constants"]]
        blocks.append(text_table(["constant", "value", "fitted on"], rows_, left=3))
    if "residuals" in report:
        blocks += [residual_table(report["residuals"], fitted) for fitted in (False, True)]
    blocks.append("Simplified: " + ";\n  ".join(report["simplified"]) + ".")
    return "\n\n".join(blocks)


def _totals(report: dict[str, Any], published: dict[str, Any] | None) -> list[str]:
    def line(text: str, key: str, scale: float, digits: int) -> str:
        also = f"   (published {published[key] / scale:,.{digits}f})" if published else ""
        return f"{text}: {report[key] / scale:,.{digits}f}{also}"

    return [
        line("tokens a day, billions", "tokens_per_day", 1e9, 1),
        line("TFLOPS of a GPU, causal", "tflops_causal", 1, 0),
        line("TFLOPS of a GPU, full attention", "tflops_full", 1, 0),
        line("MFU causal, %", "mfu_causal", 0.01, 2),
        line("MFU full attention, %", "mfu_full", 0.01, 2),
        line(f"GPU hours for {report['train_tokens'] / 1e12:g}T tokens, thousands", "gpu_hours", 1e3, 0),
        f"  at the price of the machine: {report['usd'] / 1e6:,.2f} million dollars",
        f"a token goes to {report['nodes_per_token']:.2f} nodes, {report['ranks_per_token']:.2f} GPUs; "
        f"the busiest GPU has {report['busiest_rank']:.2f} times the mean",
    ]


def residual_table(found: list[dict[str, Any]], fitted: bool) -> str:
    """Published beside predicted, one kind."""
    rows = [
        [r["quantity"], f"{r['published']:,.5g}", f"{r['predicted']:,.5g}", r["unit"], f"{100 * r['relative']:+.1f} %"]
        for r in found
        if r["fitted"] == fitted
    ]
    title = "Fitted: DeepEP's benchmark, three constants" if fitted else "Not fitted"
    return f"{title}\n" + text_table(["quantity", "published", "predicted", "unit", "residual"], rows)


def _percent(value: float, base: float) -> str:
    return f"{100 * (value / base - 1):+.1f} %" if base else "-"
