"""Serving and training as a business: experts on GPUs, hours and dollars, and ratios that the papers print.

Plain arithmetic of the papers' sections on deployment; each function is one line of a published calculation, so that a
student can change an input. Extended ring: nothing of the package needs it but `paper_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..parallel.schedules import bubble, build, parts


def experts_per_gpu(experts: int, redundant: int, gpus: int) -> float:
    """Experts of one layer on each GPU when `redundant` ones are held twice."""
    return (experts + redundant) / gpus


def nodes_spanned(ranks: int, gpus_per_node: int) -> float:
    """Nodes of a group of ranks."""
    return ranks / gpus_per_node


def tokens_per_pass(acceptance: float) -> float:
    """Tokens that one pass of the main model gives, when a draft of one token is accepted so often."""
    return 1 + acceptance


def gpu_hours(tokens: float, tokens_per_step: float, step_seconds: float, gpus: int) -> float:
    """GPU hours to train on `tokens`."""
    return tokens / tokens_per_step * step_seconds * gpus / 3600


def dollars(hours: float, usd_per_gpu_hour: float) -> float:
    """Rent."""
    return hours * usd_per_gpu_hour


def hours_per_trillion(hours: float, tokens: float) -> float:
    """GPU hours for 10^12 tokens."""
    return hours / (tokens / 1e12)


def days(hours: float, gpus: int) -> float:
    """Days on `gpus` GPUs."""
    return hours / gpus / 24


def daily_cost(nodes: float, gpus_per_node: int, usd_per_gpu_hour: float) -> float:
    """Rent of a day."""
    return dollars(nodes * gpus_per_node * 24, usd_per_gpu_hour)


def revenue(cached: float, uncached: float, output: float, usd_per_million: Sequence[float]) -> float:
    """Sales of tokens at prices for cached and uncached input and for output."""
    return sum(tokens * usd / 1e6 for tokens, usd in zip((cached, uncached, output), usd_per_million))


def margin_percent(earned: float, cost: float) -> float:
    """Profit over cost."""
    return 100 * (earned / cost - 1)


def bandwidth_ratio(fast: float, slow: float) -> float:
    """How many times faster one link is."""
    return fast / slow


def experts_at_same_cost(nodes: int, experts_per_node: float) -> float:
    """Experts that a token can reach while its copies between nodes stay `nodes` (report, section 3.2.2)."""
    return nodes * experts_per_node


def low_latency_gigabytes_per_second(tokens: int, experts: int, bytes_per_row: float, microseconds: float) -> float:
    """DeepEP's bandwidth of its low-latency kernels: one row for every token and expert."""
    return tokens * experts * bytes_per_row / microseconds / 1e3


def bubble_from_parts(seconds: Sequence[float], ranks: int, micro_batches: int) -> float:
    """DualPipe's bubble formula, with durations from the parts of a step and the chunks of the real schedule.

    Parameters
    ----------
    seconds : (F, bubble, B, W, F&B, optimizer) of one step, as printed; mean over the ranks.
    """
    F, _, B, W, FB, _ = seconds
    plan = build("dualpipe", ranks, micro_batches)
    count = {"F": 0, "B": 0, "W": 0, "FB": 0}  # lone forwards, input parts, weight parts, pairs
    for row in plan:
        for instruction in row:
            if instruction[0] == "FB":
                count["FB"] += 1
                continue
            for kind, _, _ in parts(instruction):
                count["B" if kind == "Bi" else kind] += 1
                count["W"] += kind == "B"  # a full backward has a weight part too
    f, b, w, fb = (t * ranks / count[k] for t, k in ((F, "F"), (B, "B"), (W, "W"), (FB, "FB")))
    return bubble("dualpipe", ranks, f, b + w, w, fb)


def times_lower(part: float, whole: float) -> float:
    """How much less `part` is than `whole`, in percent (negative)."""
    return 100 * (part / whole - 1)


def share_percent(part: float, whole: float) -> float:
    """Percent."""
    return 100 * part / whole


def step_tokens(sequences: int, seq_len: int) -> int:
    """Tokens of one step."""
    return sequences * seq_len
