"""Which function computes which published row (`paper`): one small function a table, row name -> `by(function, ...)`.

A function gets the models by name and the inputs of its table, and returns what it can compute. It imports what it
needs inside, so that a capability that is not there leaves its own rows open and no others. No number of a paper
stands here: they are in ``data/published``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from ..config import TrainConfig, data_file
from . import dense, flops, inference, local, params, service
from .paper import Ours, by, v3

Models = dict[str, Any]
Values = dict[str, Any]
ROWS: dict[str, list[Callable[[Models, Values], dict[str, Ours]]]] = {}


def table(name: str) -> Callable[[Callable[..., dict[str, Ours]]], Callable[..., dict[str, Ours]]]:
    """Register a function for (some of) the rows of a table."""

    def register(function: Callable[..., dict[str, Ours]]) -> Callable[..., dict[str, Ours]]:
        ROWS.setdefault(name, []).append(function)
        return function

    return register


def report_layout(inputs: Values) -> Any:
    """The layout that the report trains with (table report-3.2)."""
    from .memory import Layout

    return Layout(**{name: value for name, value in inputs.items() if name in Layout.__dataclass_fields__})


@table("insights-1")
def _caches(m: Models, i: Values) -> dict[str, Ours]:
    names = {"Qwen-2.5 72B": m["qwen2.5-72b"], "LLaMA-3.1 405B": m["llama-3.1-405b"]}
    rows = {"DeepSeek-V3 (MLA)": by(inference.cache_bytes_per_token, v3(m), scale=1e3)}
    rows |= {f"{name} (GQA)": by(inference.cache_bytes_per_token, cfg, scale=1e3) for name, cfg in names.items()}
    unit = inference.cache_bytes_per_token(v3(m))
    return rows | {
        f"{name}, multiple of DeepSeek-V3": by(inference.cache_bytes_per_token, cfg, scale=unit)
        for name, cfg in names.items()
    }


@table("insights-2")
def _training_flops(m: Models, i: Values) -> dict[str, Ours]:
    S, qwen, llama = i["seq_len"], m["qwen2.5-72b"], m["llama-3.1-405b"]
    rows = {f"DeepSeek-V{n} MoE": by(flops.training_flops_per_token, m[f"deepseek-v{n}"], S, scale=1e9) for n in (2, 3)}
    for name, cfg in (("Qwen-72B dense", qwen), ("LLaMa-405B dense", llama)):
        rows[f"{name}, counted as the MoE rows"] = by(dense.dense_training_flops_per_token, cfg, S, scale=1e9)
        rows[f"{name}, 6 (12 L d^2 + V d)"] = by(dense.shortcut_training_flops_per_token, cfg, scale=1e9)
    return rows


@table("insights-2.3.2")
def _expert_parallel_limit(m: Models, i: Values) -> dict[str, Ours]:
    from ..hardware.serving import expert_parallel_limit

    rows: dict[str, Ours] = {}
    sent = {k: i[k] for k in ("tokens", "experts", "hidden_size", "layers", "dispatch_bytes", "combine_bytes")}
    name = "hardware.serving.expert_parallel_limit"
    for fabric, key in (("InfiniBand", "infiniband"), ("GB200 NVL72", "nvlink72")):
        limit = expert_parallel_limit(i[f"{key}_bytes_per_second"], **sent)
        rows[f"one step of dispatch and combine, {fabric}"] = Ours(1e6 * limit.communication_seconds, name)
        rows[f"time per output token, {fabric}"] = Ours(1e3 * limit.token_seconds, name)
        rows[f"tokens per second, {fabric}"] = Ours(limit.tokens_per_second, name)
        if fabric == "InfiniBand":
            rows[f"one layer, two micro-batches, {fabric}"] = Ours(1e6 * limit.layer_seconds, name)
    return rows


@table("insights-mtp")
def _drafts(m: Models, i: Values) -> dict[str, Ours]:
    return {"tokens per main-model pass at the lowest acceptance": by(service.tokens_per_pass, i["acceptance"])}


@table("insights-hardware")
def _routing(m: Models, i: Values) -> dict[str, Ours]:
    from ..hardware.messages import row_bytes

    cfg = v3(m)
    row = row_bytes(cfg.hidden_size, True), row_bytes(cfg.hidden_size, False)
    return {
        "routed experts per GPU, 8 nodes": by(
            service.experts_per_gpu, cfg.n_routed_experts, 0, i["nodes"] * i["gpus_per_node"]
        ),
        "routed experts per group and node": by(service.experts_per_gpu, cfg.n_routed_experts, 0, cfg.n_group),
        "InfiniBand copies of a token, node limit": Ours(cfg.topk_group, "config.ModelConfig.topk_group"),
        "FP8 dispatch against BF16": by(service.times_lower, *row),
        "NVLink to InfiniBand, effective": by(
            service.bandwidth_ratio, i["nvlink_effective"], i["infiniband_effective"]
        ),
    }


@table("insights-hardware")
def _links(m: Models, i: Values) -> dict[str, Ours]:
    from ..hardware import specs

    gpu, nic, old = specs.H800, specs.CX7, specs.A100
    theirs = i["gpt4_a100"] * old.bf16_flops_per_second
    return {
        "NVLink to InfiniBand, peak": by(service.bandwidth_ratio, gpu.nvlink_bytes_per_second, nic.bytes_per_second),
        "peak FLOP/s of 2,048 H800 against 25,000 A100": by(
            service.share_percent, i["h800"] * gpu.bf16_flops_per_second, theirs
        ),
    }


@table("insights-3")
def _topologies(m: Models, i: Values) -> dict[str, Ours]:
    from ..hardware import topology

    dragonfly = tuple(i[f"dragonfly_{x}"] for x in "aphg")
    made: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
        "FT2": (topology.fat_tree_2, (i["ports"],)),
        "MPFT": (topology.multi_plane, (i["ports"], i["planes"])),
        "FT3": (topology.fat_tree_3, (i["ports"],)),
        "SF": (topology.slim_fly, (i["slim_fly_q"],)),
        "DF": (topology.dragonfly, dragonfly),
    }
    rows: dict[str, Ours] = {}
    for name, (make, sizes) in made.items():
        network, computed_by = make(*sizes), f"hardware.topology.{make.__name__}"
        for count in ("endpoints", "switches", "links"):
            rows[f"{name} {count}"] = Ours(getattr(network, count), computed_by)
        rows[f"{name} cost"] = by(network.cost, scale=1e6)
        rows[f"{name} cost per endpoint"] = by(network.cost_per_endpoint, scale=1e3)
    return rows


@table("insights-4")
def _step(m: Models, i: Values) -> dict[str, Ours]:
    tokens, ranks = service.step_tokens(i["sequences"], i["seq_len"]), i["pipeline_ranks"]
    rows: dict[str, Ours] = {}
    for name in ("MPFT", "MRFT"):
        seconds = i[f"step_seconds_{name.lower()}"]
        rows[f"tokens per day, {name}"] = by(flops.tokens_per_day, tokens, seconds, scale=1e9)
        parts = i[f"parts_{name.lower()}"]
        rows[f"time per step, sum of its parts, {name}"] = Ours(float(np.sum(parts)), "numpy.sum")
    rows["bubble, MPFT"] = by(service.bubble_from_parts, i["parts_mpft"], ranks, i["sequences"] // (i["gpus"] // ranks))
    return rows


@table("insights-4")
def _efficiency(m: Models, i: Values) -> dict[str, Ours]:
    from ..hardware import specs

    peak, tokens = specs.H800.bf16_flops_per_second, service.step_tokens(i["sequences"], i["seq_len"])
    rows = {}
    for name in ("MPFT", "MRFT"):
        for text, attention in (("non-causal", "full"), ("causal", "causal")):
            per_token = flops.training_flops_per_token(v3(m), i["seq_len"], attention)
            done = (per_token, tokens, i[f"step_seconds_{name.lower()}"], i["gpus"])
            rows[f"TFLOPS {text}, {name}"] = by(flops.achieved_flops, *done, scale=1e12)
            rows[f"MFU {text}, {name}"] = by(service.share_percent, flops.achieved_flops(*done), peak)
    return rows


@table("insights-5")
def _latencies(m: Models, i: Values) -> dict[str, Ours]:
    from ..hardware import specs

    paths = {"RoCE": (specs.ROCE, (1, 3)), "InfiniBand": (specs.INFINIBAND, (1, 3)), "NVLink": (specs.NVLINK, (1,))}
    return {
        f"{name}, {'same' if switches == 1 else 'cross'} leaf": by(fabric.latency, switches, scale=1e-6)
        for name, (fabric, lengths) in paths.items()
        for switches in lengths
    }


@table("insights-2.2.2")
def _one_machine(m: Models, i: Values) -> dict[str, Ours]:
    machine = local.Machine(i["memory"], i["bandwidth"])
    rows = {"DeepSeek-V2 on a personal machine, tokens per second": m["deepseek-v2"],
            "a dense model of 70B there, tokens per second": m["qwen2.5-72b"]}  # fmt: skip
    return {
        row: Ours(speed, "accounting.local.local_row")
        for row, cfg in rows.items()
        if (speed := local.local_row(cfg, "4-bit", machine, i["context"])["tokens_per_second"]) is not None
    }


@table("report-1")
def _cost(m: Models, i: Values) -> dict[str, Ours]:
    hours = [i[f"{part}_hours"] for part in ("pre_training", "context", "post_training")]
    names, usd = ("pre-training", "context extension", "post-training"), i["usd_per_gpu_hour"]
    rows = {f"{name}, dollars": by(service.dollars, h, usd, scale=1e6) for name, h in zip(names, hours)}
    per_trillion = service.hours_per_trillion(hours[0], i["tokens"])
    clock = (i["tokens"], i["tokens_per_step"], i["step_seconds"], i["gpus"])
    return rows | {
        "GPU hours in all": Ours(sum(hours) / 1e3, "builtins.sum"),
        "dollars in all": by(service.dollars, sum(hours), usd, scale=1e6),
        "GPU hours per trillion tokens": by(service.hours_per_trillion, hours[0], i["tokens"], scale=1e3),
        "days per trillion tokens": by(service.days, per_trillion, i["gpus"]),
        "pre-training hours, from the ISCA paper's step time": by(service.gpu_hours, *clock, scale=1e3),
    }


@table("report-2")
def _bubbles(m: Models, i: Values) -> dict[str, Ours]:
    from ..parallel.schedules import build, peak_live
    from ..parallel.timeline import timeline

    durations = {"F": i["F"], "B": i["B"], "W": i["W"], "Bi": i["B"] - i["W"], "FB": i["FB"]}
    rows: dict[str, Ours] = {}
    for name in ("1F1B", "ZB1P", "DualPipe"):
        plan = build(name.lower(), i["ranks"], i["chunks"])
        middle = i["ranks"] // 2
        rows[f"{name}, bubble"] = Ours(timeline(plan, durations).idle[middle], "parallel.timeline.timeline")
        rows[f"{name}, activations"] = Ours(max(peak_live(plan)), "parallel.schedules.peak_live")
        held = {plan.stage_of(middle, direction) for direction in plan.directions}
        rows[f"{name}, parameters"] = Ours(len(held) * plan.ranks / plan.stages, "parallel.schedules.Schedule.stage_of")
    return rows


@table("report-4.2")
def _recipe(m: Models, i: Values) -> dict[str, Ours]:
    from ..ops import rope
    from ..train import schedule

    cfg, train = v3(m), TrainConfig.preset("deepseek-v3")

    def step(trillions: float) -> int:
        return round(train.steps * trillions / i["trillions"])

    rates = i["phases_at"].items()
    rows = {f"learning rate {name}": by(schedule.learning_rate, train, step(at)) for name, at in rates}
    rows |= {
        "tokens of one step at the full batch": by(service.step_tokens, train.batch_size, train.seq_len),
        "tokens of one step, 32K stage": by(service.step_tokens, *i["context_32k"]),
        "tokens of one step, 128K stage": by(service.step_tokens, *i["context_128k"]),
        "bias update speed until 14.3T tokens": by(schedule.bias_update_speed, train, step(i["bias_at"])),
        "weight of the MTP loss after 10T tokens": by(schedule.mtp_weight, train, step(i["mtp_at"])),
        "standard deviation of the initial weights": Ours(
            cfg.initializer_range, "config.ModelConfig.initializer_range"
        ),
    }
    if cfg.rope_scaling:
        low, high = rope.correction_range(cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling)
        rows |= {
            "YaRN: square root of the temperature": by(rope.yarn_mscale, cfg.rope_scaling["factor"], 1.0),
            "YaRN: softmax scale": by(rope.softmax_scale, cfg.qk_head_dim, cfg.rope_scaling),
            "YaRN: first pair that is blended": Ours(low, "ops.rope.correction_range"),
            "YaRN: last pair that is blended": Ours(high, "ops.rope.correction_range"),
        }
    return rows


@table("report-3.2")
def _layout(m: Models, i: Values) -> dict[str, Ours]:
    from ..hardware.specs import GPUS
    from . import memory

    layout = report_layout(i)
    report = memory.memory_report(v3(m), layout)
    held = {layout.plan.stage_of(0, direction) for direction in layout.plan.directions}
    rows = {
        "GPUs": Ours(layout.gpus, "accounting.memory.Layout.gpus"),
        "nodes that an EP group spans": by(service.nodes_spanned, layout.ep, i["gpus_per_node"]),
        "parameters held twice by DualPipe": Ours(len(held), "parallel.schedules.Schedule.stage_of"),
    }
    share = 100 * report["largest"] / GPUS[i["gpu"]].memory_bytes
    return rows | {"the fullest GPU, share of its memory": Ours(share, "accounting.memory.memory_report")}


@table("report-3.4")
def _deployment(m: Models, i: Values) -> dict[str, Ours]:
    cfg = v3(m)
    links = (i["nvlink_bytes_per_second"], i["infiniband_bytes_per_second"])
    reach = service.experts_at_same_cost(cfg.topk_group, i["experts_per_node"])
    return {
        "prefill, routed experts per GPU": by(
            service.experts_per_gpu, cfg.n_routed_experts, i["prefill_redundant"], i["prefill_gpus"]
        ),
        "decode, experts per GPU": by(
            service.experts_per_gpu, cfg.n_routed_experts, i["decode_extra"], i["decode_gpus"]
        ),
        "NVLink to InfiniBand": by(service.bandwidth_ratio, *links),
        "experts a token could have at the same cost": Ours(reach, "accounting.service.experts_at_same_cost"),
    }


@table("report-3.4")
def _sms(m: Models, i: Values) -> dict[str, Ours]:
    from ..hardware import specs

    return {"share of SMs that communicate": by(service.share_percent, i["communication_sms"], specs.H800.sms)}


@table("report-counts")
def _sizes(m: Models, i: Values) -> dict[str, Ours]:
    cfg = v3(m)
    p, name = params.count_parameters(cfg), "accounting.params.count_parameters"
    join = 2 * cfg.hidden_size**2 * cfg.num_nextn_predict_layers
    drafting = p.mtp_active - join + p.by_part["lm_head"]
    values = {
        "parameters": p.total,
        "activated parameters": p.active_with_head_and_embedding,
        "activated parameters, with head (revised README)": p.active_with_head,
        "activated parameters, with head and embedding (first README)": p.active_with_head_and_embedding,
        "MTP parameters of its own": sum(p.mtp.values()) - join,
        "MTP activated, with head (revised README)": drafting,
        "MTP activated, with head and embedding (first README)": drafting + p.by_part["embedding"],
    }
    stored = params.parameter_report(cfg)["mtp_parameters_as_stored"] / 1e9
    rows = {row: Ours(value / 1e9, name) for row, value in values.items()}
    return rows | {"MTP as stored": Ours(stored, "accounting.params.parameter_report")}


@table("checkpoint-v3")
def _checkpoint(m: Models, i: Values) -> dict[str, Ours]:
    p, c = params.count_parameters(v3(m)), params.count_checkpoint(v3(m))
    rows = {
        "main model, without the gates' bias": Ours(p.total, "accounting.params.count_parameters"),
        "main model, with the gates' bias": Ours(p.total + p.gate_bias, "accounting.params.count_parameters"),
    }
    counted = {"elements in the files": sum(c.elements.values()), "tensors": sum(c.tensors.values()),
               "bytes of the files": sum(c.nbytes.values())}  # fmt: skip
    counted |= {f"{kind} elements": n for kind, n in c.elements.items()}
    counted |= {f"{kind} tensors": n for kind, n in c.tensors.items()}
    return rows | {row: Ours(n, "accounting.params.count_checkpoint") for row, n in counted.items()}


@table("checkpoint-v2")
def _checkpoint_v2(m: Models, i: Values) -> dict[str, Ours]:
    p, name = params.count_parameters(m["deepseek-v2"]), "accounting.params.count_parameters"
    return {
        "parameters": Ours(p.total, name),
        "activated parameters": Ours(p.active_with_head_and_embedding / 1e9, name),
    }


@table("v2-counts")
def _sizes_v2(m: Models, i: Values) -> dict[str, Ours]:
    rows: dict[str, Ours] = {}
    for model, head in (("DeepSeek-V2", False), ("DeepSeek-V2-Lite", True)):
        p, name = params.count_parameters(m[model.lower()]), "accounting.params.count_parameters"
        active = p.active_with_head if head else p.active_with_head_and_embedding
        rows |= {f"{model}, parameters": Ours(p.total / 1e9, name), f"{model}, activated": Ours(active / 1e9, name)}
    return rows


@table("v2-1")
def _cache_widths(m: Models, i: Values) -> dict[str, Ours]:
    cfg = m["deepseek-v2"]
    unit = cfg.num_hidden_layers * cfg.v_head_dim
    rows = {k.upper(): by(inference.cache_numbers_per_token, cfg, k, scale=unit) for k in ("mla", "mha", "mqa")}
    return rows | {
        "MLA, GQA groups of the same cache": by(inference.cache_numbers_per_token, cfg, "mla", scale=2 * unit)
    }


@table("balancing-2")
def _direction(m: Models, i: Values) -> dict[str, Ours]:
    from ..train.balance import max_vio

    runs = json.loads(data_file("measured/balancing.json").read_text(encoding="utf-8"))["runs"]
    vio, loss = {}, {}
    for name in ("free", "controlled"):
        load = np.array([run["load"] for run in runs if run["method"] == name], dtype=np.int64)  # [seeds, Lm, E]
        vio[name] = float(max_vio(load).mean())
        loss[name] = np.array([run["val_bits_per_byte"] for run in runs if run["method"] == name], dtype=np.float64)
    spread = max(float(np.ptp(values)) for values in loss.values())
    not_worse = loss["free"].mean() - loss["controlled"].mean() <= spread
    return {
        "1B: sign of MaxVio, loss-free minus loss-controlled": Ours(
            float(np.sign(vio["free"] - vio["controlled"])), "train.balance.max_vio"
        ),
        "1B: loss-free is not worse than loss-controlled": Ours(float(not_worse), "numpy.ptp"),
        **{f"1B: MaxVio loss-{name}": Ours(value, "train.balance.max_vio") for name, value in vio.items()},
        "3B: tokens": by(service.step_tokens, i["steps_3b"] * i["batch_3b"], i["seq_len"], scale=1e9),
        "1B: tokens": by(service.step_tokens, i["steps_1b"] * i["batch_1b"], i["seq_len"], scale=1e9),
    }


@table("calculators")
def _calculators(m: Models, i: Values) -> dict[str, Ours]:
    from . import memory

    main = dataclasses.replace(v3(m), num_nextn_predict_layers=0)
    stages = memory.memory_report(main, memory.Layout(**i["layout"]))["per_stage"]
    held = [sum(stage[state] for state in memory.STATES[:4]) / 2**30 for stage in stages]
    name = "accounting.memory.memory_report"
    per_token = by(flops.training_flops_per_token, main, i["seq_len"], scale=1e9)
    return {
        "transformers: parameters": Ours(params.count_parameters(main).total, "accounting.params.count_parameters"),
        "Megatron-LM: training FLOPs per token at 4096, causal, no MTP": per_token,
        "SimuMax: weights, gradients and optimizer, first stage": Ours(held[0], name),
        "SimuMax: weights, gradients and optimizer, a middle stage": Ours(held[i["middle_stage"]], name),
    }


@table("deepep-low-latency")
def _low_latency(m: Models, i: Values) -> dict[str, Ours]:
    from ..hardware.messages import row_bytes

    D, K = v3(m).hidden_size, v3(m).num_experts_per_tok
    row = {"dispatch": row_bytes(D, True) + i["header_bytes"], "combine": row_bytes(D, False)}
    return {
        f"EP {ranks}, {kind}": by(service.low_latency_gigabytes_per_second, i["tokens"], K, row[kind], microseconds)
        for kind in row
        for ranks, microseconds in i[f"{kind}_us"].items()
    }


@table("service")
def _economics(m: Models, i: Values) -> dict[str, Ours]:
    cost = (i["mean_nodes"], i["gpus_per_node"], i["usd_per_gpu_hour"])
    experts, cached = v3(m).n_routed_experts, i["cached_tokens"]
    sold = (cached, i["input_tokens"] - cached, i["output_tokens"], i["usd_per_million"])
    return {
        "cost a day": by(service.daily_cost, *cost),
        "share of cached input tokens": by(service.share_percent, cached, i["input_tokens"]),
        "theoretical revenue a day": by(service.revenue, *sold),
        "margin": by(service.margin_percent, i["revenue"], service.daily_cost(*cost)),
        "prefill EP32, routed experts per GPU": by(service.experts_per_gpu, experts, i["redundant"], i["prefill_gpus"]),
        "decode EP144, routed experts per GPU": by(service.experts_per_gpu, experts, i["redundant"], i["decode_gpus"]),
    }


@table("eplb-readme")
def _replicas(m: Models, i: Values) -> dict[str, Ours]:
    from ..parallel import eplb

    weight, printed = np.array(i["weight"], dtype=np.float32), np.array(i["phy2log"], dtype=np.int64)
    phy2log, *_ = eplb.rebalance_experts(weight, i["replicas"], i["groups"], i["nodes"], i["gpus"])
    same = (np.asarray(phy2log) == printed).sum(axis=1)
    return {
        f"slots of layer {n} that hold the printed expert": Ours(int(k), "parallel.eplb.rebalance_experts")
        for n, k in enumerate(same)
    }
