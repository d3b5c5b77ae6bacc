"""The clock: how long a training step of DeepSeek-V3 takes, composed from kernels and messages.

    kernels   `kernels.layer_work`: FLOPs and bytes of every part of a layer, with an efficiency for each class
    messages  `messages.normal_seconds`: dispatch and combine from three constants of DeepEP's benchmark
    chunks    `chunks.Clock`: layers of a stage, alone (communication waits) or overlapped (two streams)
    step      chunks placed by a schedule, and the optimizer; the timeline is handed in, this room knows no schedules

Where every constant is from: `constants()`. Compute efficiencies and the slow-down of overlapped messages come from
kernel times of the published profile, link rates from DeepEP's benchmark; nothing is fitted on a step time.

Simplified: a message between stages delays the next chunk, but does not occupy links; routing is even unless
`Traffic.busiest` says otherwise; gradients are summed after the last chunk; no stragglers, no checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .chunks import OVERLAPPED, Clock, Setup
from .kernels import FITTED_ON, PROFILE, Efficiencies, attention_gemms
from .messages import Links


class Step(NamedTuple):
    """One step: seconds, means over the pipeline ranks where they differ. The parts are those of Table 4 and add up."""

    seconds: float
    parts: dict[str, float]  # 1F, bubble, 1B, 1W, 1F1B, optimizer
    timeline: Any


def optimizer_seconds(clock: Clock, held: int, copies: float) -> float:
    """Seconds to sum gradients (FP32), step the rank's share (ZeRO-1) and gather the weights (BF16).

    Weights of attention, shared experts and heads are on all GPUs of a stage: summed inside each node over NVLink, then
    across nodes, an eighth of them on each GPU. Experts have one copy an expert-parallel group, on different nodes.

    Parameters
    ----------
    clock : Clock
    held : int
        Stages on each rank.
    copies : float
        Pipeline ranks that hold the same stage: 2 in DualPipe.
    """
    s, links = clock.setup, clock.setup.links
    m, holders = s.model, s.data_ranks * copies
    expert, dense_ffn = 3 * m.hidden_size * m.moe_intermediate_size, 3 * m.hidden_size * m.intermediate_size
    attention = sum(g.inner * g.outer for g in attention_gemms(m, 1))
    slowest = 0.0
    for stage in clock.stages:
        routed = sum(stage.layers)
        everywhere = len(stage.layers) * attention + routed * m.n_shared_experts * expert
        everywhere += (len(stage.layers) - routed) * dense_ffn + (m.vocab_size * m.hidden_size if stage.heads else 0)
        own = routed * s.experts_per_rank * expert
        moved = 4 + 2  # bytes of a weight: FP32 gradients one way, BF16 weights the other
        inside = everywhere * _ring(links.gpus_per_node) / links.nvlink_bytes_per_second
        across = everywhere / links.gpus_per_node * _ring(holders / links.gpus_per_node)
        across += own * _ring(holders / s.expert_ranks)
        stepped = (everywhere + own * s.expert_ranks) / holders
        state = 2 * (4 + 2 + 2) + 4 + 2  # master and moments read and written, gradient read, weight written
        memory = s.efficiencies.memory * s.cluster.gpu.memory_bytes_per_second
        seconds = moved * (inside + across / links.infiniband_bytes_per_second) + state * stepped / memory
        slowest = max(slowest, seconds)
    return held * slowest


def _ring(members: float) -> float:
    """Share of the bytes that one member of a reduce-scatter sends."""
    return 1 - 1 / members if members > 1 else 0.0


def step(setup: Setup, schedule: Any, timeline: Callable[..., Any]) -> Step:
    """Predict a training step.

    Parameters
    ----------
    setup : Setup
    schedule : parallel.schedules.Schedule
        Whose `ranks` are the setup's pipeline ranks.
    timeline : function
        ``parallel.timeline.timeline``; this room does not import it.
    """
    if schedule.ranks != setup.pipeline_ranks:
        raise ValueError(f"the schedule has {schedule.ranks} ranks, pipeline_ranks={setup.pipeline_ranks}")
    clock = Clock(setup, schedule.stages)
    parts = dict.fromkeys(("1F", "bubble", "1B", "1W", "1F1B", "optimizer"), 0.0)

    def duration(rank: int, op: tuple) -> float:
        stage = schedule.stage_of(rank, op[1])
        return clock.duration(op[0], stage, schedule.stage_of(rank, op[3]) if op[0] == "FB" else None)

    for rank, row in enumerate(schedule):
        for op in row:
            stage = schedule.stage_of(rank, op[1])
            if op[0] == "FB":
                parts["1F1B"] += duration(rank, op)
            elif op[0] == "B":
                parts["1B"] += clock.duration("Bi", stage)
                parts["1W"] += clock.duration("W", stage)
            else:
                parts[{"F": "1F", "Bi": "1B", "W": "1W"}[op[0]]] += duration(rank, op)
    times = timeline(schedule, duration, hop=clock.hop)
    parts["bubble"] = sum(times.idle)
    parts = {name: value / schedule.ranks for name, value in parts.items()}
    held = len(schedule.directions)
    parts["optimizer"] = optimizer_seconds(clock, held, held * schedule.ranks / schedule.stages)
    return Step(times.makespan + parts["optimizer"], parts, times)


def constants() -> list[tuple[str, float, str, str]]:
    """(name, value, unit, what it was fitted on) of everything that is not a data-sheet number."""
    found = [
        (f"efficiency: {name}", getattr(Efficiencies(), name), "SMs" if "sms" in name else "of the peak", source)
        for name, source in FITTED_ON.items()
    ]
    fitted = "DeepEP's benchmark, 18 published numbers (data/published/deepep_kernels.json)"
    links = Links()
    found += [
        ("InfiniBand", links.infiniband_bytes_per_second / 1e9, "GB/s", fitted),
        ("NVLink", links.nvlink_bytes_per_second / 1e9, "GB/s", fitted),
        ("low latency", links.low_latency_seconds * 1e6, "us", fitted),
    ]
    source = f"{PROFILE}: kernel times at EP64, 4,096 tokens a rank, over their time alone"
    return found + [(f"overlapped {kind}", rate, "of its rate alone", source) for kind, rate in OVERLAPPED.items()]
