"""What a layer computes, kernel by kernel, and how fast kernels run: FLOPs, bytes, and the efficiency of each class.

A layer is cut into parts as in DualPipe: attention and MLP, each forward (F), backward for the input (B) and for the
weights (W). A part is a list of gemms, the core attention, and bytes that pass through memory-bound kernels (norms,
casts, transposes, SwiGLU, permutations). Time is composed from these counts and five efficiencies:

    gemm        max(FLOPs / (gemm efficiency * peak * share of SMs), bytes / (memory efficiency * bandwidth))
    attention   causal FLOPs, 2.5 times as many backward (five products instead of two), / rate
    the rest    bytes / (memory efficiency * bandwidth)

Where each efficiency is from stands in `FITTED_ON`: they are rates of *kernel classes* in DeepSeek's published
training profile (H800, 112 of 132 SMs for computation); none is fitted on a step time.

Simplified: elementwise kernels are as fused as the report says (norm and cast in one pass, SwiGLU with its cast) and
read and write each number once; FP8 scales (1/32 of the bytes), routing metadata and launch gaps are left out;
recomputed up-projections are inside the gemm rate, which counts useful FLOPs only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from .specs import GPU, H800

PARTS = ("attention F", "attention B", "attention W", "mlp F", "mlp B", "mlp W")
PROFILE = "DeepSeek's published training profile (profile-data, train.json), 112 of 132 SMs"


@dataclass(frozen=True)
class Efficiencies:
    """Shares of the peak that kernel classes reach, and the SMs that communication keeps; sources in `FITTED_ON`."""

    fp8_gemm: float = 759e12 / (H800.fp8_flops_per_second * 112 / 132)
    bf16_gemm: float = 556e12 / (H800.bf16_flops_per_second * 112 / 132)
    attention_forward: float = 556e12 / (H800.bf16_flops_per_second * 112 / 132)
    attention_backward: float = 455e12 / (H800.bf16_flops_per_second * 112 / 132)
    memory: float = 0.468
    communication_sms: float = 20.0


FITTED_ON = {
    "fp8_gemm": f"{PROFILE}: all FP8 gemms of a forward-backward pair, 57.4 TFLOP in 75.6 ms = 759 TFLOPS",
    "bf16_gemm": f"{PROFILE} has no BF16 gemm: the rate of its BF16 attention kernel, 556 TFLOPS",
    "attention_forward": f"{PROFILE}: core attention forward, 556 TFLOPS, causal",
    "attention_backward": f"{PROFILE}: core attention backward, 455 TFLOPS, causal, 2.5 times the forward FLOPs",
    "memory": f"{PROFILE}: kernels that are neither gemm nor attention, 8 ms a layer pair for the 12.6 GB counted here",
    "communication_sms": "DeepSeek-V3 report, section 3.2.2: 20 of 132 SMs",
}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model, under the names of the released config.json.

    `layers` counts decoder layers, the first `dense_layers` of them without routed experts; `mtp` modules follow.
    """

    hidden_size: int
    layers: int
    dense_layers: int
    mtp: int
    heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    vocab_size: int

    @property
    def qk_head_dim(self) -> int:
        """d_n + d_r."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


def shape_of(config: Any) -> ModelShape:
    """The sizes of a ``config.ModelConfig``."""
    names = {"layers": "num_hidden_layers", "dense_layers": "first_k_dense_replace", "mtp": "num_nextn_predict_layers",
             "heads": "num_attention_heads"}  # fmt: skip
    values = {f.name: getattr(config, names.get(f.name, f.name)) for f in dataclasses.fields(ModelShape)}
    return ModelShape(**{**values, "q_lora_rank": config.q_lora_rank or 0})


class Gemm(NamedTuple):
    """``rows x inner -> outer``; `weights` matrices of inner x outer share the rows (experts, heads)."""

    rows: float
    inner: int
    outer: int
    weights: float = 1

    @property
    def flops(self) -> float:
        """A multiply-add is two."""
        return 2 * self.rows * self.inner * self.outer

    def bytes(self, width: float) -> float:
        """Weights and input once at `width` bytes a number, output once in BF16."""
        return width * (self.weights * self.inner * self.outer + self.rows * self.inner) + 2 * self.rows * self.outer


class Work(NamedTuple):
    """What one part does for one micro-batch on one GPU."""

    gemms: tuple[Gemm, ...]
    attention_flops: float  # of the core attention
    backward: bool  # of the core attention
    bytes: float  # through memory-bound kernels


def attention_gemms(m: ModelShape, tokens: float) -> tuple[Gemm, ...]:
    """MLA's five projections (without q LoRA: four)."""
    D, H, q = m.hidden_size, m.heads, m.heads * m.qk_head_dim
    queries = [(D, m.q_lora_rank), (m.q_lora_rank, q)] if m.q_lora_rank else [(D, q)]
    latents = [(D, m.kv_lora_rank + m.qk_rope_head_dim), (m.kv_lora_rank, H * (m.qk_nope_head_dim + m.v_head_dim))]
    return tuple(Gemm(tokens, a, b) for a, b in [*queries, *latents, (H * m.v_head_dim, D)])


def mlp_gemms(m: ModelShape, tokens: float, routed: bool, expert_rows: float, experts: float) -> tuple[Gemm, ...]:
    """Gate and up side by side, then down: of the dense FFN, or of shared experts and the routed ones."""
    D = m.hidden_size
    if not routed:
        return Gemm(tokens, D, 2 * m.intermediate_size), Gemm(tokens, m.intermediate_size, D)
    F, shared = m.moe_intermediate_size, m.n_shared_experts * m.moe_intermediate_size
    found = (Gemm(expert_rows, D, 2 * F, experts), Gemm(expert_rows, F, D, experts))
    return (Gemm(tokens, D, 2 * shared), Gemm(tokens, shared, D), *found) if shared else found


def layer_work(
    m: ModelShape, tokens: int, routed: bool, experts: float, busiest: float = 1.0, fp8: bool = True
) -> dict[str, Work]:
    """The six parts of a layer for a micro-batch of one sequence of `tokens`, on one GPU.

    Parameters
    ----------
    experts : float
        Routed experts on this GPU; it gets the rows of as many tokens as it sends.
    busiest : float
        Rows of the busiest of them over the mean: everybody waits for it.
    """
    K = m.num_experts_per_tok
    attention, mlp = attention_gemms(m, tokens), mlp_gemms(m, tokens, routed, tokens * K * busiest, experts)
    core = 2.0 * m.heads * (m.qk_head_dim + m.v_head_dim) * tokens * tokens / 2  # causal: half the square
    stored = 1 if fp8 else 2  # bytes of a number that waits for a gemm
    through = _bytes_per_token(m, routed, K * busiest, stored)
    gemms = {"attention": attention, "mlp": mlp}
    return {
        part: Work(
            gemms[part.split()[0]],
            {"attention F": core, "attention B": 2.5 * core}.get(part, 0.0),
            part.endswith("B"),
            through[part] * tokens,
        )
        for part in PARTS
    }


def _bytes_per_token(m: ModelShape, routed: bool, rows: float, stored: int) -> dict[str, float]:
    """Bytes that memory-bound kernels read and write per token, BF16 but for what waits for a gemm (`stored`)."""
    D, H, q, kv = m.hidden_size, m.heads, m.heads * m.qk_head_dim, m.heads * (m.qk_nope_head_dim + m.v_head_dim)
    v, r = m.heads * m.v_head_dim, m.q_lora_rank + m.kv_lora_rank
    F = m.moe_intermediate_size * (rows + m.n_shared_experts) if routed else m.intermediate_size
    cast, norm, add = 2 + stored, 2 + stored, 6  # read BF16 and write; norm and cast in one pass; residual sum
    keys = 2 * (H * m.qk_nope_head_dim + q)  # key = [k_nope | k_rope], the same k_rope for all heads
    rope = 4 * H * m.qk_rope_head_dim
    linears = sum(g.inner + g.outer for g in attention_gemms(m, 1))
    found = {
        "attention F": norm * (D + r) + rope + keys + cast * v + add * D,
        "attention B": cast * D + norm * (D + r) + keys  # gradient of the output; norms and keys once more
        + 4 * v + 10 * q + rope + keys + cast * (q + kv) + 6 * r + 6 * D + add * D,
        "attention W": (1 + 2 * stored) * linears,  # both operands once more, transposed, in tiles of the other axis
        "mlp F": norm * D + (4 + stored) * F + add * D,
        "mlp B": cast * D + (6 + 4 * stored) * F + 6 * D + add * D,
        "mlp W": (1 + 2 * stored) * (3 * F + 2 * D),
    }  # fmt: skip
    if routed:  # permuted to the experts, summed per rank on the way back, each way
        found["mlp F"] += 2 * D + 2 * stored * rows * D + 4 * rows * D
        found["mlp B"] += 2 * stored * rows * D + 4 * rows * D
        found["mlp W"] += (1 + 2 * stored) * 2 * rows * D
    return found


def seconds(work: Work, gpu: GPU, eff: Efficiencies, sm_share: float = 1.0, fp8: bool = True) -> float:
    """Time of a part when `sm_share` of the SMs compute."""
    total = sum(gemm_seconds(g, gpu, eff, sm_share, fp8) for g in work.gemms)
    rate = eff.attention_backward if work.backward else eff.attention_forward
    total += work.attention_flops / (rate * gpu.bf16_flops_per_second * sm_share)
    return total + work.bytes / (eff.memory * gpu.memory_bytes_per_second)


def gemm_seconds(gemm: Gemm, gpu: GPU, eff: Efficiencies, sm_share: float = 1.0, fp8: bool = True) -> float:
    """The longer of computing and moving; FP8 or BF16 operands."""
    peak = eff.fp8_gemm * gpu.fp8_flops_per_second if fp8 else eff.bf16_gemm * gpu.bf16_flops_per_second
    moving = gemm.bytes(1 if fp8 else 2) / (eff.memory * gpu.memory_bytes_per_second)
    return max(gemm.flops / (peak * sm_share), moving)
