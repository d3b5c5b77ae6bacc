"""``simulate inference``: the limit of expert parallelism, and prefill and decode of one GPU beside the service."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..accounting.published import published_tables
from ..hardware.clock import Setup
from ..hardware.kernels import shape_of
from ..hardware.messages import LIMITED_TO_FOUR, Traffic
from ..hardware.serving import Limit, decode, expert_parallel_limit, prefill
from .simulated_machine import add_machine_arguments, gate_traffic, machine
from .tables import text_table

SIMPLIFIED = (
    "the limit is arithmetic: no latency, 7K is 7000 as in the paper",
    "even routing, all requests equally long, nobody waits for requests; no speculative decoding, no prefix cache",
    "weights and cache are read at the bandwidth that memory-bound kernels of the training profile reach (47 %)",
    "served figures are averages over a day of a real service",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``simulate inference``."""
    add_machine_arguments(parser)
    parser.add_argument("--decode-ranks", type=int, default=144, help="GPUs of a decoding unit (144)")
    parser.add_argument("--prefill-ranks", type=int, default=32, help="GPUs of a prefill unit (32)")
    parser.add_argument("--redundant", type=int, default=32, help="redundant experts (32)")
    parser.add_argument("--requests", type=int, default=88, help="decoding on each GPU (88)")
    parser.add_argument("--context", type=int, default=4989, help="cached tokens of a request (4989)")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of a prompt (4096)")
    parser.add_argument("--prompts", type=int, default=4, help="at once on a GPU (4)")
    parser.add_argument("--tokens", type=int, default=32, help="of the limit: on each GPU (32)")
    parser.add_argument("--bandwidth", type=float, nargs="*", default=[50e9, 900e9], help="of the limit, bytes/s")
    parser.add_argument("--hidden-size", type=int, default=7000, help="of the limit (7000, as printed)")
    parser.add_argument("--no-overlap", action="store_true", help="one micro-batch instead of two that hide each other")
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Compute and print."""
    config, cluster, links = machine(args)
    limits = {
        bandwidth: expert_parallel_limit(
            bandwidth,
            args.tokens,
            config.num_experts_per_tok + config.n_shared_experts,
            args.hidden_size,
            config.num_hidden_layers,
        )
        for bandwidth in args.bandwidth
    }

    def setup(ranks: int, tokens: int, traffic: Traffic) -> Setup:
        return Setup(
            shape_of(config),
            cluster,
            ranks,
            1,
            ranks,
            args.redundant,
            tokens,
            traffic,
            overlap=not args.no_overlap,
            links=links,
        )

    decoded = decode(setup(args.decode_ranks, 1, LIMITED_TO_FOUR), args.requests, args.context)
    traffic = gate_traffic(config, config.topk_group, args.prefill_ranks, links.gpus_per_node)
    filled = prefill(setup(args.prefill_ranks, args.prompt, traffic), args.prompts)
    report: dict[str, Any] = {
        "limits": [{"bytes_per_second": b, **_limit(limit)} for b, limit in limits.items()],
        "decode": {**decoded._asdict(), "tokens_per_second_of_a_request": 1 / decoded.step_seconds},
        "prefill": filled._asdict(),
        "published": {
            row["row"]: float(row["published"])
            for row in published_tables()["clock"].rows
            if row["row"].startswith(("decode", "prefill"))
        },
        "simplified": list(SIMPLIFIED),
    }
    print(json.dumps(report, indent=1) if args.json else _text(report, args))
    return 0


def _limit(limit: Limit) -> dict[str, float]:
    return {
        "communication_us": 1e6 * limit.communication_seconds,
        "layer_us": 1e6 * limit.layer_seconds,
        "token_ms": 1e3 * limit.token_seconds,
        "tokens_per_second": limit.tokens_per_second,
    }


def _text(report: dict[str, Any], args: argparse.Namespace) -> str:
    rows = [
        [
            f"{r['bytes_per_second'] / 1e9:g} GB/s",
            f"{r['communication_us']:.2f}",
            f"{r['layer_us']:.2f}",
            f"{r['token_ms']:.5g}",
            f"{r['tokens_per_second']:,.1f}",
        ]
        for r in report["limits"]
    ]
    blocks = [
        "What the network allows in decoding\n"
        + text_table(["bandwidth", "dispatch + combine, us", "layer, us", "token, ms", "tokens/s"], rows)
    ]
    d, p = report["decode"], report["prefill"]
    given = list(report["published"].values())
    phases = ((f"decode EP {args.decode_ranks}, {args.requests} requests", d, given[0]),
              (f"prefill EP {args.prefill_ranks}, {args.prompts} prompts", p, given[1]))  # fmt: skip
    rows = [
        [name, f"{one['tokens_per_second']:,.0f}", f"{printed:,.0f}", f"{1e3 * one['step_seconds']:.1f}"]
        + [f"{1e6 * one[what]:.0f}" for what in ("compute_seconds", "communication_seconds")]
        for name, one, printed in phases
    ]
    blocks.append(
        text_table(["one GPU", "tokens/s", "published", "step, ms", "layer: compute, us", "communication, us"], rows)
    )
    blocks.append(f"A user sees {d['tokens_per_second_of_a_request']:.1f} tokens/s; the service says 20 to 22.")
    return "\n\n".join([*blocks, "Simplified: " + ";\n  ".join(report["simplified"]) + "."])
