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
from ..hardware.specs import GPU, GPUS, quantity
from .tables import gigabytes, text_table

DEFAULT = "deepseek-v3"
Result = tuple[dict[str, Any], str]  # for --json, and as text
PRECISIONS = list(inference.BYTES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``report WHAT`` and the arguments of each."""
    subparsers = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, (summary, declare, _) in WHAT.items():
        sub = subparsers.add_parser(name, help=summary, description=summary)
        default = "five models" if name == "local" else DEFAULT
        sub.add_argument("--preset", help=f"{', '.join(PRESETS)} (default: {default})")
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
            f"{args.config or args.preset}: model_type={config.model_type!r} is another architecture: report "
            f"{args.what} counts models of DeepSeek's family (kv-cache and local take dense models too)"
        )
    return config


def _gpu(name: str) -> GPU:
    if name.lower() not in GPUS:
        raise ValueError(f"gpu={name!r} is not one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _figure_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--figure", metavar="FILE", help="draw it (.png, .svg or .pdf)")


def _params_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("fp8", "bf16", "fp32"), help="of the stored weights (default: as released)")
    _figure_argument(parser)


def _params(args: argparse.Namespace) -> Result:
    report = parameter_report(_model(args), args.dtype)
    if args.figure:
        from ..accounting import figures

        figures.save_parameters(args.figure, report)
    rows = [[_plain(name), f"{value:,}"] for name, value in report.items() if isinstance(value, int)]
    total = report["parameters"]
    parts = [[_plain(name), f"{size:,}", f"{size / total:.2%}"] for name, size in report["by_part"].items()]
    columns = ("by_dtype", "tensors_by_dtype", "bytes_by_dtype")
    stored = [[kind, *(f"{report[column][kind]:,}" for column in columns)] for kind in report["by_dtype"]]
    texts = [
        text_table(["", "numbers"], rows),
        text_table(["part", "parameters", "share"], parts),
        text_table([f"stored ({report['stored_as']})", "elements", "tensors", "bytes"], stored),
    ]
    return report, "\n\n".join(texts)


def _flops_arguments(parser: argparse.ArgumentParser) -> None:
    given = published_tables()["insights-4"].inputs
    parser.add_argument("--context", type=int, default=given["seq_len"], help="tokens of a sequence (%(default)s)")
    parser.add_argument("--step-seconds", type=float, help="time of a training step, for TFLOPS and MFU")
    parser.add_argument("--tokens-per-step", type=float, help="tokens of that step (default: the report's full batch)")
    parser.add_argument("--gpus", type=int, default=given["gpus"], help="GPUs of that step (%(default)s)")
    parser.add_argument("--gpu", default=given["gpu"], help=f"{', '.join(GPUS)} (%(default)s): BF16 peak for the MFU")
    _figure_argument(parser)


def _flops(args: argparse.Namespace) -> Result:
    cfg, S = _model(args), args.context
    forward = {part: value / S for part, value in flops.forward_flops(cfg, S).items()}
    decode = flops.decode_flops(cfg, S)
    totals = {
        "forward_per_token": flops.forward_flops_per_token(cfg, S),
        "backward_per_token": 2 * flops.forward_flops_per_token(cfg, S),
        "training_per_token_causal": flops.training_flops_per_token(cfg, S),
        "training_per_token_full": flops.training_flops_per_token(cfg, S, "full"),
        "decode_per_token": sum(decode[part] for part in flops.COUNTED),
    }
    report = {"context": S, **totals, "forward_by_part": forward, "decode_by_part": decode}
    rows = [[_plain(p), f"{n / 1e9:,.3f}", f"{decode.get(p, 0) / 1e9:,.3f}"] for p, n in forward.items()]
    lines = [text_table(["GFLOP per token", "forward", "decode"], rows), "", "without gate and MTP, as published:"]
    lines += [f"  {_plain(name)}: {value / 1e9:,.2f} GFLOP" for name, value in totals.items()]
    if args.step_seconds is not None:
        report |= _efficiency(args, report)
        for kind, key in (("causal", ""), ("full", "_full")):
            lines.append(f"  {kind}: {report[f'tflops{key}']:.2f} TFLOPS a GPU, MFU {report[f'mfu{key}']:.2%}")
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


_LAYOUT = {
    "pp": "pipeline stages",
    "ep": "expert-parallel ranks",
    "tp": "tensor-parallel ranks",
    "dp": "data-parallel ranks: the GPUs are PP x TP x DP, and EP groups lie inside",
    "zero": "ZeRO level 0-3",
    "micro_batch": "sequences of a micro-batch",
    "micro_batches": "micro-batches of a step and pipeline",
    "seq_len": "tokens of a sequence",
}


def _memory_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Without flags: the layout of the report for deepseek-v3, one GPU for other models."
    for name, text in _LAYOUT.items():
        also = ["--context"] if name == "seq_len" else []
        parser.add_argument(f"--{name.replace('_', '-')}", *also, type=int, help=text, dest=name)
    parser.add_argument("--schedule", help="1f1b, zb1p, dualpipe or dualpipev")
    parser.add_argument("--recompute", help="none, report (section 3.2.3) or full")
    parser.add_argument("--precision", help="fp8, bf16 or fp32, single states replaced: bf16,moments=fp32")
    default = published_tables()["report-3.2"].inputs["gpu"]
    parser.add_argument("--gpu", default=default, help="whose memory to compare with (%(default)s)")
    _figure_argument(parser)


def _layout(args: argparse.Namespace, cfg: ModelConfig) -> memory.Layout:
    """The flags over the defaults: of the report for DeepSeek-V3, else one GPU a stage and EP group."""
    names = {field.name for field in fields(memory.Layout)}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    default = {k: v for k, v in published_tables()["report-3.2"].inputs.items() if k in names}
    ep, tp = given.get("ep", default["ep"]), given.get("tp", 1)
    if tp * default["dp"] % ep:
        default["dp"] = max(1, ep // tp)
    if args.config or (args.preset or DEFAULT) != DEFAULT:
        default = {
            "dp": max(1, given.get("ep", 1) // max(1, given.get("tp", 1))),
            "micro_batches": max(memory.Layout.micro_batches, 2 * given.get("pp", 1)),
            "seq_len": min(memory.Layout.seq_len, cfg.max_position_embeddings),
        }
    return memory.Layout(**{**default, **given})


def _memory(args: argparse.Namespace) -> Result:
    cfg = _model(args)
    layout = _layout(args, cfg)
    report, capacity = memory.memory_report(cfg, layout), _gpu(args.gpu).memory_bytes
    if args.figure:
        from ..accounting import figures

        figures.save_memory(args.figure, report, capacity)
    columns = (*memory.STATES, "total")
    rows = [
        [
            str(s["stage"]),
            _runs(s["layers"]),
            str(s["micro_batches_in_flight"]),
            *(f"{s[k] / 1e9:,.2f}" for k in columns),
        ]
        for s in report["per_stage"]
    ]
    head = (
        f"{layout.gpus:,} GPUs: PP {layout.pp}, EP {layout.ep}, TP {layout.tp}, DP {layout.dp}, ZeRO-{layout.zero}, "
        f"{layout.schedule}, micro-batch {layout.micro_batch} x {layout.seq_len}, recompute {layout.recompute}, "
        f"{layout.precision}"
    )
    table = text_table(["GPU of rank", "layers", "in flight", *(f"{k} GB" for k in columns)], rows)
    fullest = f"{gigabytes(report['largest'])}, {report['largest'] / capacity:.0%} of {args.gpu}"
    return report, f"{head}\n\n{table}\n\nthe fullest GPU: {fullest}"


def _runs(layers: list[int]) -> str:
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
    parser.add_argument("--precision", default="bf16", choices=PRECISIONS, help="of the cache (%(default)s)")
    _figure_argument(parser)


def _cache(args: argparse.Namespace) -> Result:
    report = inference.cache_report(_config(args), args.context, args.batch, args.precision)
    if args.figure:
        from ..accounting import figures

        figures.save_caches(args.figure, report["by_model"])
    unit = report["by_model"][DEFAULT]
    rows = [[name, f"{n:,}", f"{n / unit:.2f}x"] for name, n in report["by_model"].items()]
    more = report["bytes_per_token_as_mha"] / report["bytes_per_token"]
    head = (
        f"{report['bytes_per_token']:,} bytes a token, {gigabytes(report['bytes_total'])} for {args.batch:,} x "
        f"{args.context:,} tokens; plain multi-head attention of these heads would keep {more:.1f} times as much"
    )
    return report, f"{head}\n\n" + text_table(["model", "bytes a token", f"of {DEFAULT}"], rows)


def _gpus_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", default="h800", help=f"{', '.join(GPUS)}, or a memory like 80GB (%(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="sequences that decode at once (%(default)s)")
    parser.add_argument("--context", type=int, default=4096, help="tokens of each (%(default)s)")
    parser.add_argument("--precision", default="fp8", choices=PRECISIONS, help="of the weights (%(default)s)")
    parser.add_argument("--cache", default="bf16", choices=PRECISIONS, help="precision of the cache (%(default)s)")
    parser.add_argument("--tp", type=int, help="GPUs that share what is no expert (default: the best of 1, 2, 4, 8)")
    parser.add_argument("--reserve", type=float, default=0.1, help="share of the memory kept free (%(default)s)")


def _gpus(args: argparse.Namespace) -> Result:
    cfg = _model(args)
    capacity = quantity(args.gpu, "B") if args.gpu[:1].isdigit() else _gpu(args.gpu).memory_bytes
    chosen = {name: getattr(args, name) for name in ("batch", "context", "precision", "cache", "tp", "reserve")}
    report = {"gpu": args.gpu, **inference.gpus_needed(cfg, capacity, **chosen)}
    text = (
        f"{report['gpus']} x {args.gpu} ({gigabytes(capacity)}) hold the weights ({args.precision}) and {args.batch:,} "
        f"sequences of {args.context:,} tokens\n\n"
        f"on the fullest GPU {gigabytes(report['bytes_per_gpu'])}: weights {gigabytes(report['weight_bytes'])}, "
        f"cache {gigabytes(report['cache_bytes'])}\n"
        f"TP {report['tp']} for attention; {report['experts_per_gpu']} experts of each layer a GPU, "
        f"{report['redundant_experts']} slots over for redundant ones; {args.reserve:.0%} of the memory kept free"
    )
    return report, text


def _local_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memory", required=True, help="like 128GB")
    parser.add_argument("--bandwidth", required=True, help="of the memory, like 270GB/s")
    parser.add_argument("--disk", help="bandwidth of a disk that holds what does not fit, like 7GB/s")
    parser.add_argument("--context", type=int, default=4096, help="tokens (%(default)s)")


def _local(args: argparse.Namespace) -> Result:
    chosen, tables = args.preset or args.config, published_tables()
    disk = None if args.disk is None else quantity(args.disk, "B/s")
    machine = local.Machine(quantity(args.memory, "B"), quantity(args.bandwidth, "B/s"), disk)
    acceptance = tables["insights-mtp"].inputs["acceptance"]
    report = local.local_report(machine, args.context, {chosen: _config(args)} if chosen else None, acceptance)
    published = tables["insights-2.2.2"].rows
    report["published"] = {row["row"]: float(row["published"]) for row in published}
    header = [
        "model",
        "kind",
        "precision",
        "weights",
        "fits",
        "longest context",
        "GB a token",
        "tokens/s <=",
        "with MTP",
    ]
    lines = [text_table(header, [_local_row(row) for row in report["rows"]], left=3), "", "published:"]
    lines += [f"  {row['row']}: {row['published']} ({row.get('note', '')})" for row in published]
    return report, "\n".join(lines)


def _local_row(row: dict[str, Any]) -> list[str]:
    fits = "yes" if row["fits"] else f"{row['share_in_memory']:.0%}"
    rates = (row["tokens_per_second"], row["tokens_per_second_with_mtp"])
    return [
        *(row[name] for name in ("model", "kind", "precision")),
        gigabytes(row["weight_bytes"]),
        fits,
        f"{row['longest_context']:,}",
        f"{row['bytes_read_per_token'] / 1e9:,.2f}",
        *("-" if rate is None else f"{rate:,.1f}" for rate in rates),
    ]


WHAT: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], Result]]] = {
    "params": ("parameters, active parameters, stored tensors and bytes", _params_arguments, _params),
    "flops": ("FLOPs per token forward, in training and in decoding; MFU of a step time", _flops_arguments, _flops),
    "memory": ("bytes of every training GPU under PP x EP x TP x DP", _memory_arguments, _memory),
    "kv-cache": ("cache bytes per token, beside other models", _cache_arguments, _cache),
    "gpus": ("how many GPUs hold the model for a batch and a context", _gpus_arguments, _gpus),
    "local": ("does it fit into one machine, and how fast can it be", _local_arguments, _local),
}
