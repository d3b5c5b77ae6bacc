"""Activations: what the tape keeps of a forward pass until its backward, array by array.

`kept_arrays` lists, in the order of the ops, every array that an op of the model hands to `save`; the tests run the
model and find the same bytes op by op. An array that two ops keep (the output of a norm feeds two projections) has one
name and counts once. Weights are not activations and are left out.

Three choices of what to recompute:

    'none'    nothing: all that the ops save
    'report'  as the V3 report (section 3.2.3): the outputs of RMSNorms, of MLA's up-projections and of SwiGLU are made
              again, and the expert's outputs with them (the weight of a token is applied before its row travels back)
    'full'    every layer keeps its input alone (``train --set recompute=true``)

and four precisions. 'fp64' and 'fp32' are the tape's own; 'bf16' keeps activations in two bytes but gates, row sums and
the loss in FP32; 'fp8' caches as section 3.3.3: inputs of FP8 linears and of SwiGLU in E4M3 with a scale for 128, the
input of the linear after attention in E5M6 (12 bits) with a power of two, latents and the residual stream in BF16.

Two more choices tell this package from a cluster. `scores='kept'` is its attention, which keeps the exponentials; a
fused kernel recomputes them from the row sums ('recomputed'), and no one could train at 4096 tokens otherwise.
`cheap='again'` says that what costs no gemm is made again even where nothing else is: the inputs of linear layers that
an RMSNorm or SwiGLU made, and the rows of the experts, which stand in this process and would cost a second all-to-all
on a cluster ('kept').

Simplified: indices are int64 here and int32 or less in kernels; routing is balanced, every expert gets its share.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..config import ModelConfig
from ..ops.attention import QUERY_BLOCK

RECOMPUTE = ("none", "report", "full")
SCORES = ("kept", "recomputed")
CHEAP = ("kept", "again")
TILE = 128

# precision -> role -> (bits a number, bytes of the scale of a tile of 128)
_BITS: dict[str, dict[str, tuple[int, int]]] = {
    "fp64": dict.fromkeys(("stream", "linear", "attended", "exact"), (64, 0)),
    "fp32": dict.fromkeys(("stream", "linear", "attended", "exact"), (32, 0)),
    "bf16": {**dict.fromkeys(("stream", "linear", "attended"), (16, 0)), "exact": (32, 0)},
    "fp8": {"stream": (16, 0), "linear": (8, 4), "attended": (12, 1), "exact": (32, 0)},
}
_BITS = {name: {**bits, "index": (64, 0), "bool": (8, 0)} for name, bits in _BITS.items()}
PRECISIONS = tuple(_BITS)


class Kept(NamedTuple):
    """One array [rows, width] that an op saves."""

    layer: int  # -1: embedding, final norm, head and losses; MTP modules stand behind the last layer
    op: str  # the Function's name without its ending
    array: str  # equal names are one array
    rows: int
    width: int
    role: str  # 'stream', 'linear', 'attended', 'exact', 'index' or 'bool': what decides its bytes

    def nbytes(self, precision: str) -> int:
        """Bytes, scales included."""
        bits, scale = _BITS[precision][self.role]
        return -(-self.rows * self.width * bits // 8) + self.rows * -(-self.width // TILE) * scale


class Shape(NamedTuple):
    """Of one micro-batch, and how it is run."""

    batch: int
    seq_len: int
    recompute: str = "none"
    scores: str = "recomputed"
    cheap: str = "kept"


def total_bytes(arrays: list[Kept], precision: str) -> int:
    """Bytes of the arrays, each once; where two ops ask for it in two precisions, the wider is kept."""
    largest: dict[str, int] = {}
    for kept in arrays:
        largest[kept.array] = max(largest.get(kept.array, 0), kept.nbytes(precision))
    return sum(largest.values())


def kept_arrays(cfg: ModelConfig, shape: Shape, layers: range | None = None, ends: bool = True) -> list[Kept]:
    """All that a forward pass with loss keeps.

    Parameters
    ----------
    layers : range, optional
        Layers of one pipeline stage, MTP modules behind the last one; all of them by default.
    ends : bool
        Whether final norm, head and the losses of main model and MTP are in it (embedding: tokens only).

    Raises
    ------
    ValueError
        An unknown choice, or sizes that are not positive.
    """
    B, S, recompute, scores, cheap = shape
    choices = (("recompute", recompute, RECOMPUTE), ("scores", scores, SCORES), ("cheap", cheap, CHEAP))
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
    if not (B > 0 and S > cfg.num_nextn_predict_layers):
        raise ValueError(f"micro-batch of {B} x {S} tokens: both must be positive, and the second exceed the MTP depth")
    L = cfg.num_hidden_layers
    layers = range(L + cfg.num_nextn_predict_layers) if layers is None else layers
    found: list[Kept] = []
    for layer in layers:
        depth = max(0, layer - L + 1)
        found += _module(cfg, shape._replace(seq_len=S - depth), layer, depth)
    if ends:
        found += _ends(cfg, B, S, recompute, cheap == "again")
    return found


def _module(cfg: ModelConfig, shape: Shape, layer: int, depth: int) -> Iterator[Kept]:
    """One decoder layer, or the MTP module of this depth around one."""
    T, D = shape.batch * shape.seq_len, cfg.hidden_size

    def keep(op: str, array: str, width: int, role: str = "stream", rows: int = T) -> Kept:
        return Kept(layer, op, f"{layer}.{array}", rows, width, role)

    if depth:  # the hidden states are a slice of what the head, or the module before, keeps
        above = Kept(layer, "RMSNorm", "h" if depth == 1 else f"h{depth - 1}", T, D, "stream")
        if shape.recompute != "none":
            yield from (above._replace(op="Checkpoint"), keep("Checkpoint", "embedded", D))
        else:
            yield from (keep("RMSNorm", "embedded", D), keep("RMSNorm", "enorm.r", 1, "exact"))
            yield from (above, keep("RMSNorm", "hnorm.r", 1, "exact"), keep("Linear", "joined", 2 * D))
    if shape.recompute == "full":
        if not depth:
            yield keep("Checkpoint", "x", D)
    else:
        everything = shape.recompute == "none"
        rows = [
            *(_attention if everything else _attention_report)(cfg, shape),
            *(_ffn(cfg, T, layer, shape.cheap == "again") if everything else _ffn_report(cfg, T, layer)),
        ]
        yield from (Kept(layer, op, f"{layer}.{array}", n, width, role) for op, array, n, width, role in rows)
        if depth:
            yield from (keep("RMSNorm", "y", D), keep("RMSNorm", "shared_head.r", 1, "exact"))
    if cfg.is_moe_layer(layer):
        E = cfg.n_routed_experts
        yield keep("SequenceBalanceLoss", "balance.f", E, "exact", shape.batch)
        yield keep("SequenceBalanceLoss", "balance.share", E, "exact")
        yield keep("SequenceBalanceLoss", "balance.total", 1, "exact")


Row = tuple[str, str, int, int, str]  # op, array, rows, width, role


def _attention(cfg: ModelConfig, shape: Shape) -> Iterator[Row]:
    """Norm and MLA, all kept."""
    B, S, scores = shape.batch, shape.seq_len, shape.scores
    T, D, H, r_kv = B * S, cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank
    yield "RMSNorm", "x", T, D, "stream"
    yield "RMSNorm", "input_norm.r", T, 1, "exact"
    again = shape.cheap == "again"  # what a norm made
    if not again:  # q_a_proj (or q_proj) and kv_a_proj_with_mqa keep the same array
        yield from [("Linear", "attention_in", T, D, "linear")] * 2
    if cfg.q_lora_rank is not None:
        yield "RMSNorm", "q_latent", T, cfg.q_lora_rank, "stream"
        yield "RMSNorm", "q_norm.r", T, 1, "exact"
        if not again:
            yield "Linear", "c_q", T, cfg.q_lora_rank, "linear"
    yield "RMSNorm", "kv_latent", T, r_kv, "stream"
    yield "RMSNorm", "kv_norm.r", T, 1, "exact"
    if not again:
        yield "Linear", "c_kv", T, r_kv, "linear"
    yield "Attention", "queries", T, H * cfg.qk_head_dim, "stream"
    yield "Attention", "keys", T, H * cfg.qk_head_dim, "stream"
    yield "Attention", "values", T, H * cfg.v_head_dim, "stream"
    yield "Attention", "attended", T, H * cfg.v_head_dim, "attended"
    yield "Attention", "row_sums", T, H, "exact"
    if scores == "kept":
        yield "Attention", "exponentials", B * H, _exponentials(S), "stream"
    yield "Linear", "attended", T, H * cfg.v_head_dim, "attended"
    yield "RMSNorm", "x_ffn", T, D, "stream"
    yield "RMSNorm", "ffn_norm.r", T, 1, "exact"


def _exponentials(S: int) -> int:
    """Scores of one head that `ops.attention` keeps: a block of queries looks at the keys up to its own end."""
    return sum((min(a + QUERY_BLOCK, S) - a) * min(a + QUERY_BLOCK, S) for a in range(0, S, QUERY_BLOCK))


def _attention_report(cfg: ModelConfig, shape: Shape) -> Iterator[Row]:
    """Norm and MLA when norms and up-projections are made again: inputs, latents, the result."""
    T, D, H = shape.batch * shape.seq_len, cfg.hidden_size, cfg.num_attention_heads
    yield "Checkpoint", "x", T, D, "stream"
    if cfg.q_lora_rank is not None:
        yield "Checkpoint", "q_latent", T, cfg.q_lora_rank, "stream"
    yield "Checkpoint", "kv_latent", T, cfg.kv_lora_rank + cfg.qk_rope_head_dim, "stream"
    if shape.scores == "recomputed":  # a fused backward starts from the row sums
        yield "Attention", "row_sums", T, H, "exact"
    yield "Linear", "attended", T, H * cfg.v_head_dim, "attended"
    yield "Checkpoint", "x_ffn", T, D, "stream"


def _ffn(cfg: ModelConfig, T: int, layer: int, again: bool) -> Iterator[Row]:
    """Dense FFN, or gate, experts and shared experts; SwiGLU's outputs and the experts' rows unless made `again`."""
    D, K = cfg.hidden_size, cfg.num_experts_per_tok
    if not cfg.is_moe_layer(layer):
        yield from _swiglu(T, D, cfg.intermediate_size, "ffn_in", "dense", again)
        return
    F, N = cfg.moe_intermediate_size, T * K
    yield "Linear", "ffn_in", T, D, "stream"  # the gate's input, in high precision
    yield from _gate(cfg, T)
    if again:
        yield "Permute", "ffn_in", T, D, "stream"
        yield "Permute", "token_of_row", N, 1, "index"
    else:
        yield "GroupedLinear", "rows", N, D, "linear"
    yield "SwiGLU", "experts.gate_up", N, 2 * F, "linear"
    if not again:
        yield "GroupedLinear", "experts.hidden", N, F, "linear"
    yield "Unpermute", "expert_rows", N, D, "stream"
    yield "Unpermute", "topk_weight", T, K, "exact"
    yield "Unpermute", "token_of_row", N, 1, "index"
    yield "Unpermute", "row_of_slot", T, K, "index"
    if cfg.n_shared_experts:
        yield from _swiglu(T, D, cfg.n_shared_experts * F, "ffn_in", "shared", again)


def _swiglu(T: int, D: int, F: int, x: str, name: str, again: bool) -> Iterator[Row]:
    if not (again and name == "dense"):  # the experts' input comes from their norm through a change of shape
        yield "Linear", x, T, D, "linear"
    yield "SwiGLU", f"{name}.gate_up", T, 2 * F, "linear"
    if not again:
        yield "Linear", f"{name}.hidden", T, F, "linear"


def _gate(cfg: ModelConfig, T: int) -> Iterator[Row]:
    """Scores, choice and weights, and the map of the dispatch."""
    E, K = cfg.n_routed_experts, cfg.num_experts_per_tok
    yield "GateScore", "scores", T, E, "exact"
    yield "GateWeight", "topk_idx", T, K, "index"
    if cfg.norm_topk_prob and K > 1:
        yield "GateWeight", "normalised", T, K, "exact"
        yield "GateWeight", "score_sum", T, 1, "exact"
    yield "Permute", "row_of_slot", T, K, "index"


def _ffn_report(cfg: ModelConfig, T: int, layer: int) -> Iterator[Row]:
    """FFN when norm and SwiGLU are made again: the inputs of SwiGLU, and the rows as they were dispatched."""
    K, F = cfg.num_experts_per_tok, cfg.moe_intermediate_size
    if not cfg.is_moe_layer(layer):
        yield "Checkpoint", "dense.gate_up", T, 2 * cfg.intermediate_size, "linear"
        return
    yield from _gate(cfg, T)
    yield "GroupedLinear", "rows", T * K, cfg.hidden_size, "linear"
    yield "Checkpoint", "experts.gate_up", T * K, 2 * F, "linear"
    yield "Checkpoint", "topk_weight", T, K, "exact"
    if cfg.n_shared_experts:
        yield "Checkpoint", "shared.gate_up", T, 2 * cfg.n_shared_experts * F, "linear"


def _ends(cfg: ModelConfig, B: int, S: int, recompute: str, again: bool) -> Iterator[Kept]:
    """Tokens, final norm, and head and cross-entropy of the main model and of every MTP depth."""
    D, V = cfg.hidden_size, cfg.vocab_size
    yield Kept(-1, "RMSNorm", "x_final", B * S, D, "stream")
    yield Kept(-1, "RMSNorm", "final_norm.r", B * S, 1, "exact")
    for depth in range(cfg.num_nextn_predict_layers + 1):
        T, k = B * (S - depth), depth or ""
        yield Kept(-1, "Embedding", f"tokens{k}", T, 1, "index")
        if not again or (depth and recompute != "none"):  # what a Checkpoint gives is nobody's to make again
            yield Kept(-1, "Linear", f"h{k}", T, D, "stream")
        yield Kept(-1, "CrossEntropy", f"exponentials{k}", T, V, "exact")
        yield Kept(-1, "CrossEntropy", f"total{k}", T, 1, "exact")
        yield Kept(-1, "CrossEntropy", f"targets{k}", T, 1, "index")
        yield Kept(-1, "CrossEntropy", f"valid{k}", T, 1, "bool")
