"""``report``: the bill of a model: parameters, FLOPs, memory, cache, GPUs, and what one machine can do with it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from ..accounting import flops, inference, local, memory
from ..accounting.dense import AnyConfig, load_config
from ..accounting.params import parameter_report
from ..accounting.published import published_tables
from ..config import PRESETS, ModelConfig, TrainConfig
from ..hardware.specs import GPUS, quantity
from .tables import gigabytes, text_table

DEFAULT = "deepseek-v3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``report WHAT`` and the arguments of each."""
    subparsers = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, (summary, declare, _) in WHAT.items():
        sub = subparsers.add_parser(name, help=summary, description=summary)
        if name != "local":
            sub.add_argument("--preset", help=f"{', '.join(PRESETS)} (default: {DEFAULT})")
            sub.add_argument("--config", metavar="FILE", help="a released config.json instead of a preset")
        sub.add_argument("--json", action="store_true")
        declare(sub)


def run(args: argparse.Namespace) -> int:
    """Compute, print, draw."""
    report, text = WHAT[args.what][2](args)
    print(json.dumps(report, indent=1) if args.json else text)
    return 0


def _config(args: argparse.Namespace) -> AnyConfig:
    if args.preset and args.config:
        raise ValueError("--preset and --config are both given: choose one")
    return load_config(None if args.config else args.preset or DEFAULT, args.config)


def _model(args: argparse.Namespace) -> ModelConfig:
    """The config, which must be one of DeepSeek's family."""
    config = _config(args)
    if not isinstance(config, ModelConfig):
        raise ValueError(
            f"{args.config or args.preset}: model_type={config.model_type!r} is another architecture: report {args.what} "
            f"counts models of DeepSeek's family (kv-cache and local take dense models too)"
        )
    return config


def _params_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("fp8", "bf16", "fp32"), help="of the stored weights (default: as released)")
    _figure_argument(parser)


def _figure_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--figure", metavar="FILE", help="draw it (.png, .svg or .pdf)")


def _params(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    report = parameter_report(_model(args), args.dtype)
    if args.figure:
        from ..accounting import figures

        figures.save_parameters(args.figure, report)
    rows = [[name.replace("_", " "), f"{value:,}"] for name, value in report.items() if isinstance(value, int)]
    parts = [[name.replace("_", " "), f"{value:,}", f"{value / report['parameters']:.2%}"] for name, value in report["by_part"].items()]
    stored = [
        [kind, f"{n:,}", f"{report['tensors_by_dtype'][kind]:,}", f"{report['bytes_by_dtype'][kind]:,}"]
        for kind, n in report["by_dtype"].items()
    ]
    texts = [text_table(["", "numbers"], rows), text_table(["part", "parameters", "share"], parts),
             text_table([f"stored ({report['stored_as']})", "elements", "tensors", "bytes"], stored)]  # fmt: skip
    return report, "\n\n".join(texts)


def _flops_arguments(parser: argparse.ArgumentParser) -> None:
    given = published_tables()["insights-4"].inputs
    parser.add_argument("--context", type=int, default=given["seq_len"], help="tokens of a sequence (%(default)s)")
    parser.add_argument("--step-seconds", type=float, help="time of a training step, for TFLOPS and MFU")
    parser.add_argument("--tokens-per-step", type=float, help="tokens of that step (default: the report's full batch)")
    parser.add_argument("--gpus", type=int, default=given["gpus"], help="GPUs of that step (%(default)s)")
    parser.add_argument("--gpu", default=given["gpu"], help=f"{', '.join(GPUS)} (%(default)s): BF16 peak for the MFU")
    _figure_argument(parser)


def _flops(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    cfg, S = _model(args), args.context
    by_part = {part: value / S for part, value in flops.forward_flops(cfg, S).items()}
    decode = flops.decode_flops(cfg, S)
    report: dict[str, Any] = {
        "context": S,
        "forward_per_token": flops.forward_flops_per_token(cfg, S),
        "backward_per_token": 2 * flops.forward_flops_per_token(cfg, S),
        "training_per_token_causal": flops.training_flops_per_token(cfg, S),
        "training_per_token_full": flops.training_flops_per_token(cfg, S, "full"),
        "decode_per_token": sum(decode[part] for part in flops.COUNTED),
        "forward_by_part": by_part,
        "decode_by_part": decode,
    }
    text = text_table(
        ["GFLOP per token", "forward", "decode"],
        [[part.replace("_", " "), f"{value / 1e9:,.3f}", f"{decode.get(part, 0) / 1e9:,.3f}"] for part, value in by_part.items()],
    )
    lines = [text, "", "gate and MTP are not in the totals, as published",
             *(f"{name.replace('_', ' ')}: {report[name] / 1e9:,.2f} GFLOP" for name in report if name.endswith(("token", "causal", "full")))]  # fmt: skip
    if args.step_seconds is not None:
        report |= _efficiency(args, report)
        lines += [
            f"{kind}: {report[f'tflops{key}']:.2f} TFLOPS a GPU, MFU {report[f'mfu{key}']:.2%}"
            for kind, key in (("causal", ""), ("full", "_full"))
        ]
    if args.figure:
        from ..accounting import figures

        figures.save_flops(args.figure, cfg)
    return report, "\n".join(lines)


def _efficiency(args: argparse.Namespace, report: dict[str, Any]) -> dict[str, float]:
    """TFLOPS of a GPU and share of the BF16 peak; the causal count has the plain names."""
    train = TrainConfig.preset(DEFAULT)
    tokens = args.tokens_per_step or train.batch_size * train.seq_len
    peak, found = _gpu(args.gpu).bf16_flops_per_second, {}
    for attention, key in (("causal", ""), ("full", "_full")):
        done = flops.achieved_flops(report[f"training_per_token_{attention}"], tokens, args.step_seconds, args.gpus)
        found[f"tflops{key}"], found[f"mfu{key}"] = done / 1e12, done / peak
    return found


def _gpu(name: str) -> Any:
    if name.lower() not in GPUS:
        raise ValueError(f"gpu={name!r} is not one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


_LAYOUT = {"pp": "pipeline stages", "ep": "expert-parallel ranks", "tp": "tensor-parallel ranks",
           "dp": "data-parallel ranks; the GPUs are PP x TP x DP, and EP groups lie inside", "zero": "ZeRO level 0-3",
           "micro_batch": "sequences of a micro-batch", "micro_batches": "micro-batches of a step and pipeline",
           "seq_len": "tokens of a sequence"}  # fmt: skip


def _memory_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Without flags: the layout of the report for deepseek-v3, one GPU for other models."
    for name, text in _LAYOUT.items():
        also = ["--context"] if name == "seq_len" else []
        parser.add_argument(f"--{name.replace('_', '-')}", *also, type=int, help=text, dest=name)
    parser.add_argument("--schedule", help="1f1b, zb1p, dualpipe or dualpipev")
    parser.add_argument("--recompute", help="none, report (section 3.2.3) or full")
    parser.add_argument("--precision", help="fp8, bf16 or fp32, single states replaced: bf16,moments=fp32")
    parser.add_argument("--gpu", default=published_tables()["report-3.2"].inputs["gpu"], help="whose memory to compare with (%(default)s)")
    _figure_argument(parser)


def _layout(args: argparse.Namespace, cfg: ModelConfig) -> memory.Layout:
    """The flags over the defaults: of the report for DeepSeek-V3, else one GPU a stage."""
    names = {field.name for field in fields(memory.Layout)}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    as_report = {k: v for k, v in published_tables()["report-3.2"].inputs.items() if k in names}
    if args.config or (args.preset or DEFAULT) != DEFAULT:
        as_report = {"dp": max(1, given.get("ep", 1) // max(1, given.get("tp", 1)))}
        as_report["micro_batches"] = max(memory.Layout.micro_batches, 2 * given.get("pp", 1))
        as_report["seq_len"] = min(memory.Layout.seq_len, cfg.max_position_embeddings)
    return memory.Layout(**{**as_report, **given})


def _memory(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    cfg = _model(args)
    layout = _layout(args, cfg)
    report, capacity = memory.memory_report(cfg, layout), _gpu(args.gpu).memory_bytes
    if args.figure:
        from ..accounting import figures

        figures.save_memory(args.figure, report, capacity)
    rows = [
        [str(s["stage"]), _layers(s["layers"]), str(s["micro_batches_in_flight"]), *(f"{s[k] / 1e9:,.2f}" for k in (*memory.STATES, "total"))]
        for s in report["per_stage"]
    ]
    head = (f"{layout.gpus:,} GPUs: PP {layout.pp}, EP {layout.ep}, TP {layout.tp}, DP {layout.dp}, ZeRO-{layout.zero}, "
            f"{layout.schedule}, micro-batch {layout.micro_batch} x {layout.seq_len}, recompute {layout.recompute}, {layout.precision}")  # fmt: skip
    table = text_table(["GPU of stage", "layers", "in flight", *(f"{k} GB" for k in (*memory.STATES, "total"))], rows)
    return report, f"{head}\n\n{table}\n\nthe fullest GPU: {gigabytes(report['largest'])}, {report['largest'] / capacity:.0%} of {args.gpu}"


def _layers(layers: list[int]) -> str:
    """[0, 1, 2, 58, 59] -> '0-2, 58-59'."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def _cache_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, default=4096, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (%(default)s)")
    parser.add_argument("--precision", default="bf16", choices=list(inference.BYTES), help="of the cache (%(default)s)")
    _figure_argument(parser)


def _cache(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    report = inference.cache_report(_config(args), args.context, args.batch, args.precision)
    if args.figure:
        from ..accounting import figures

        figures.save_caches(args.figure, report["by_model"])
    rows = [[name, f"{n:,}", f"{n / report['by_model'][DEFAULT]:.2f}x"] for name, n in report["by_model"].items()]
    head = (f"{report['bytes_per_token']:,} bytes a token; {args.batch:,} x {args.context:,} tokens: {gigabytes(report['bytes_total'])}; "
            f"plain multi-head attention of these heads would keep {report['bytes_per_token_as_mha'] / report['bytes_per_token']:.1f} times as much")  # fmt: skip
    return report, f"{head}\n\n" + text_table(["model", "bytes a token", f"of {DEFAULT}"], rows)


def _gpus_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", default="h800", help=f"{', '.join(GPUS)}, or a memory like 80GB (%(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="sequences that decode at once (%(default)s)")
    parser.add_argument("--context", type=int, default=4096, help="tokens of each (%(default)s)")
    parser.add_argument("--precision", default="fp8", choices=list(inference.BYTES), help="of the weights (%(default)s)")
    parser.add_argument("--cache", default="bf16", choices=list(inference.BYTES), help="precision of the cache (%(default)s)")
    parser.add_argument("--tp", type=int, help="GPUs that share what is not an expert (default: the best of 1, 2, 4, 8)")
    parser.add_argument("--reserve", type=float, default=0.1, help="share of the memory kept free (%(default)s)")


def _gpus(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    cfg = _model(args)
    known = args.gpu.lower() in GPUS
    capacity = _gpu(args.gpu).memory_bytes if known or not args.gpu[:1].isdigit() else quantity(args.gpu, "B")
    report = inference.gpus_needed(
        cfg, capacity, batch=args.batch, context=args.context, precision=args.precision, cache=args.cache, tp=args.tp,
        reserve=args.reserve,
    )  # fmt: skip
    report["gpu"] = args.gpu
    text = (
        f"{report['gpus']} x {args.gpu} ({gigabytes(capacity)}) hold the weights ({args.precision}) and {args.batch:,} sequences of "
        f"{args.context:,} tokens\n\n"
        f"on the fullest GPU {gigabytes(report['bytes_per_gpu'])}: weights {gigabytes(report['weight_bytes'])}, "
        f"cache {gigabytes(report['cache_bytes'])}\n"
        f"TP {report['tp']} for attention; {report['experts_per_gpu']} experts of each layer a GPU, "
        f"{report['redundant_experts']} slots over for redundant ones; {args.reserve:.0%} of the memory kept free"
    )
    return report, text


def _local_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", help="one model instead of five")
    parser.add_argument("--config", metavar="FILE", help="a config.json instead of a preset")
    parser.add_argument("--memory", required=True, help="like 128GB")
    parser.add_argument("--bandwidth", required=True, help="of the memory, like 270GB/s")
    parser.add_argument("--disk", help="bandwidth of a disk that holds what does not fit, like 7GB/s")
    parser.add_argument("--context", type=int, default=4096, help="tokens (%(default)s)")


def _local(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    chosen = args.preset or args.config
    models = {chosen: _config(args)} if chosen else None
    disk = None if args.disk is None else quantity(args.disk, "B/s")
    machine = local.Machine(quantity(args.memory, "B"), quantity(args.bandwidth, "B/s"), disk)
    tables = published_tables()
    acceptance = tables["insights-mtp"].inputs["acceptance"]
    report = local.local_report(machine, args.context, models, acceptance)
    published = [row for row in tables["insights-2.2.2"].rows]
    report["published"] = {row["row"]: float(row["published"]) for row in published}
    rows = [
        [r["model"], r["kind"], r["precision"], gigabytes(r["weight_bytes"]), "yes" if r["fits"] else f"{r['share_in_memory']:.0%}",
         f"{r['longest_context']:,}", f"{r['bytes_read_per_token'] / 1e9:,.2f}", _rate(r["tokens_per_second"]), _rate(r["tokens_per_second_with_mtp"])]
        for r in report["rows"]
    ]  # fmt: skip
    header = ["model", "kind", "precision", "weights", "fits", "longest context", "GB read a token", "tokens/s at most", "with MTP"]
    lines = [text_table(header, rows, left=3), "", "published (the machines are not named):"]
    lines += [f"  {row['row']}: {row['published']} ({row.get('note', '')})" for row in published]
    return report, "\n".join(lines)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


Handler = Callable[[argparse.Namespace], tuple[dict[str, Any], str]]
WHAT: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Handler]] = {
    "params": ("parameters, active parameters, stored tensors and bytes", _params_arguments, _params),
    "flops": ("FLOPs per token forward, in training and in decoding; MFU of a step time", _flops_arguments, _flops),
    "memory": ("bytes of every training GPU under PP x EP x TP x DP", _memory_arguments, _memory),
    "kv-cache": ("cache bytes per token, beside other models", _cache_arguments, _cache),
    "gpus": ("how many GPUs hold the model for a batch and a context", _gpus_arguments, _gpus),
    "local": ("does it fit into one machine, and how fast can it be", _local_arguments, _local),
}
