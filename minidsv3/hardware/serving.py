"""Inference: the limit that the network sets to decoding, and what prefill and decode reach on a GPU.

The limit (Insights into DeepSeek-V3, section 2.3.2) is pure arithmetic: with two micro-batches whose computation and
communication hide each other, a layer can't be faster than two dispatches and two combines,

    (1 + 2) bytes * tokens * 9 experts * 7000 / bandwidth     120.96 us at 50 GB/s, 61 layers: 14.76 ms, 67.8 tokens/s

`decode` and `prefill` compose a step from kernels and messages as `clock` does, with the same constants: weights and
cache are read, gemms and attention computed, and the slower of computation and communication of the two micro-batches
is what a layer takes.

Simplified: even routing (EPLB has done its work), all requests equally long, no scheduling, no sampling, no prefix
cache; the served figures beside ours are day averages of a real service with all of these.
"""

from __future__ import annotations

from typing import NamedTuple

from .chunks import OVERLAPPED, Setup
from .kernels import Gemm, gemm_seconds, layer_work, mlp_gemms, seconds
from .messages import low_latency_seconds, normal_seconds, row_bytes


class Limit(NamedTuple):
    """What the network allows."""

    communication_seconds: float  # one dispatch and one combine
    layer_seconds: float
    token_seconds: float
    tokens_per_second: float


def expert_parallel_limit(
    bytes_per_second: float,
    tokens: int = 32,
    experts: int = 9,
    hidden_size: int = 7000,
    layers: int = 61,
    dispatch_bytes: float = 1,
    combine_bytes: float = 2,
) -> Limit:
    """The paper's limit of decoding; its own numbers (with 7K read as 7000) are the defaults."""
    if not bytes_per_second > 0:
        raise ValueError(f"bytes_per_second={bytes_per_second} must be positive")
    once = (dispatch_bytes + combine_bytes) * tokens * experts * hidden_size / bytes_per_second
    return Limit(once, 2 * once, layers * 2 * once, 1 / (layers * 2 * once))


class Serving(NamedTuple):
    """One phase on one GPU."""

    step_seconds: float
    tokens_per_second: float  # of the GPU
    compute_seconds: float  # of a layer, both micro-batches
    communication_seconds: float


def decode(setup: Setup, requests: int, context: int) -> Serving:
    """One decoding step of `requests` on each GPU behind `context` cached tokens; low-latency kernels, all SMs compute.

    The latent cache is absorbed: keys and values of all heads are the r_kv + d_r numbers of a token.
    """
    m, eff, gpu = setup.model, setup.efficiencies, setup.cluster.gpu
    half = requests / 2
    D, H = m.hidden_size, m.heads
    latent = m.kv_lora_rank + m.qk_rope_head_dim
    projections = [(D, m.q_lora_rank), (m.q_lora_rank, H * m.qk_head_dim), (D, latent), (H * m.v_head_dim, D)]
    projections = projections if m.q_lora_rank else [(D, H * m.qk_head_dim), *projections[2:]]
    gemms = [Gemm(half, a, b) for a, b in projections]
    gemms += [
        Gemm(half * H, a, b, H) for a, b in ((m.qk_nope_head_dim, m.kv_lora_rank), (m.kv_lora_rank, m.v_head_dim))
    ]
    attention = sum(gemm_seconds(g, gpu, eff, 1.0, setup.fp8) for g in gemms)
    flops = 2.0 * half * H * context * (latent + m.kv_lora_rank)
    cache_bytes = 2.0 * half * context * latent
    attention += max(flops / (eff.attention_forward * gpu.bf16_flops_per_second),
                     cache_bytes / (eff.memory * gpu.memory_bytes_per_second))  # fmt: skip
    rows = half * m.num_experts_per_tok * setup.traffic.busiest
    mlp = sum(gemm_seconds(g, gpu, eff, 1.0, setup.fp8) for g in mlp_gemms(m, half, True, rows, setup.experts_per_rank))
    dispatch, combine = m.hidden_size * (1 + 4 / 128) + 16, row_bytes(m.hidden_size, False)
    messages = sum(
        low_latency_seconds(half, row, m.num_experts_per_tok, setup.expert_ranks, setup.links)
        for row in (dispatch, combine)
    )
    head = gemm_seconds(Gemm(requests, D, m.vocab_size), gpu, eff, 1.0, fp8=False)
    return _served(setup, requests, 2 * (attention + mlp), 2 * messages, head)


def prefill(setup: Setup, sequences: int) -> Serving:
    """`sequences` prompts of ``setup.tokens`` tokens on each GPU, forward only, two micro-batches, normal kernels."""
    m, eff, gpu = setup.model, setup.efficiencies, setup.cluster.gpu
    share = 1 - eff.communication_sms / gpu.sms
    work = layer_work(m, setup.tokens, True, setup.experts_per_rank, setup.traffic.busiest, setup.fp8)
    compute = sequences * sum(seconds(work[p], gpu, eff, share, setup.fp8) for p in ("attention F", "mlp F"))
    messages = sum(
        normal_seconds(setup.tokens, row_bytes(m.hidden_size, fp8), setup.traffic, setup.expert_ranks, setup.links)
        / OVERLAPPED[kind]
        for kind, fp8 in (("dispatch", setup.fp8), ("combine", False))
    )
    return _served(setup, sequences * setup.tokens, compute, sequences * messages, 0.0)


def _served(setup: Setup, tokens: float, compute: float, messages: float, head: float) -> Serving:
    layer = max(compute, messages) if setup.overlap else compute + messages
    dense = setup.model.dense_layers * compute  # about the same computation, no messages
    step = (setup.model.layers - setup.model.dense_layers) * layer + dense + head
    return Serving(step, tokens / step, compute, messages)
