"""What a decoder layer does to one token, on vectors: the functions that `Decoder` strings together.

Each function here *prepares* a step: it takes views of a module's weights, makes the buffers that the step writes to,
and returns the step itself, which makes no array but the scores over the cache. The mathematics stands in `model.mla`
and `model.moe`; the steps follow it line by line, with these liberties:

* ``w.dot(x, out)`` for every product: of all ways to call BLAS on a vector it costs least to start;
* the softmax factor is taken into the norm of the query's latent, and the softmax's denominator out of the sum over
  the cache, where there are fewer numbers to divide;
* the weighted sum of experts, the shared ones with weight one, is a vector times a matrix;
* the k best of a few scores are found by looking k times.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np

from ..autograd import Array
from ..config import ModelConfig
from ..model.layers import MLP, RMSNorm
from ..model.mla import MLA
from ..model.module import Module
from ..model.moe import MoE
from ..model.transformer import DecoderLayer
from ..ops.routing import select_experts
from .cache import LayerCache

Vector = Callable[[Array], Array]  # the result lies in a buffer that the next call overwrites
Attend = Callable[[Array, Array, LayerCache, int, int], None]  # x, rotation, cache, sequence, position
FeedForward = Callable[[Array], None]


def layer_steps(layer: Module, cfg: ModelConfig) -> tuple[Attend, FeedForward]:
    """The two halves of a decoder layer, each of which adds to a vector x."""
    assert isinstance(layer, DecoderLayer)
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    if isinstance(mlp, MoE):
        return attention_step(layer.input_layernorm, layer.self_attn, cfg), routed_step(norm, mlp, cfg)
    assert isinstance(mlp, MLP)
    return attention_step(layer.input_layernorm, layer.self_attn, cfg), dense_step(norm, mlp)


def norm_step(norm: RMSNorm, out: Array | None = None, scale: float = 1.0) -> Vector:
    """``scale w x / rms(x)``."""
    w, eps = norm.weight.data, norm._eps
    y, D = np.empty_like(w) if out is None else out, len(w)

    def normed(x: Array) -> Array:
        factor = scale / sqrt(float(x.dot(x)) / D + eps)  # before y is written, which may be x
        np.multiply(x, w, y)
        np.multiply(y, factor, y)
        return y

    return normed


def rotation_step(source: Array, target: Array, interleave: bool) -> Callable[[Array], None]:
    """Turns `source` [..., d_r] by a rotation [d_r/2] into `target`."""
    complex_dtype = np.complex128 if source.dtype == np.float64 else np.complex64
    if interleave:
        pairs, turned = source.view(complex_dtype), target.view(complex_dtype)
        return lambda rotation: np.multiply(pairs, rotation, turned)
    half = source.shape[-1] // 2
    z = np.empty((*source.shape[:-1], half), dtype=complex_dtype)

    def rotate(rotation: Array) -> None:
        z.real, z.imag = source[..., :half], source[..., half:]
        np.multiply(z, rotation, z)
        target[..., :half], target[..., half:] = z.real, z.imag

    return rotate


def attention_step(norm: RMSNorm, mla: MLA, cfg: ModelConfig) -> Attend:
    """``x += o_proj(attention(norm(x)))`` for a vector x."""
    H, d_n, d_r, d_v, r_kv = (
        cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim, cfg.kv_lora_rank,
    )  # fmt: skip
    w_kv_a, w_o = mla.kv_a_proj_with_mqa.weight.data, mla.o_proj.weight.data
    w_kv_b = mla.kv_b_proj.weight.data.reshape(H, d_n + d_v, r_kv)
    w_uk, w_uv = w_kv_b[:, :d_n], w_kv_b[:, d_n:].swapaxes(1, 2)  # [H, d_n, r_kv], [H, r_kv, d_v]
    dtype, scale = w_o.dtype, mla._scale
    entry = np.empty(r_kv + d_r, dtype=dtype)  # what the cache keeps of this token
    q, query = (np.empty((H, width), dtype=dtype) for width in (d_n + d_r, r_kv + d_r))
    attended, o, y = np.empty_like(query), np.empty((H, d_v), dtype=dtype), np.empty(len(w_o), dtype=dtype)
    largest, total = np.empty((H, 1), dtype=dtype), np.empty((H, 1), dtype=dtype)
    q_nope, query_nope, latent, o_rows = q[:, None, :d_n], query[:, None, :r_kv], attended[:, None, :r_kv], o[:, None]
    q_flat, o_flat, c_kv = q.reshape(-1), o.reshape(-1), entry[:r_kv]
    normed, normed_c_kv = norm_step(norm), norm_step(mla.kv_a_layernorm, c_kv)
    rotate_q = rotation_step(q[:, d_n:], query[:, r_kv:], cfg.rope_interleave)
    rotate_k = rotation_step(entry[r_kv:], entry[r_kv:], cfg.rope_interleave)
    if cfg.q_lora_rank is None:
        w_q, compressed = mla.q_proj.weight.data, None
    else:
        w_q_a, w_q = mla.q_a_proj.weight.data, mla.q_b_proj.weight.data
        normed_c_q = norm_step(mla.q_a_layernorm, scale=scale)  # scores are linear in it: one multiplication less
        compressed = np.empty(cfg.q_lora_rank, dtype=dtype)

    def attend(x: Array, rotation: Array, cache: LayerCache, b: int, at: int) -> None:
        inputs = normed(x)
        w_kv_a.dot(inputs, entry)  # [c_kv | k_rope] before norm and rotation
        if compressed is None:
            np.multiply(w_q.dot(inputs, q_flat), scale, q_flat)
        else:
            w_q.dot(normed_c_q(w_q_a.dot(inputs, compressed)), q_flat)
        normed_c_kv(c_kv)
        rotate_k(rotation)
        past = cache.put(b, at, entry)  # [L, r_kv + d_r]
        np.matmul(q_nope, w_uk, query_nope)  # W^UK goes into the query
        rotate_q(rotation)
        p = query.dot(past.T)  # [H, L]
        np.subtract(p, np.maximum.reduce(p, axis=1, out=largest, keepdims=True), p)
        np.exp(p, p)
        np.add.reduce(p, axis=1, out=total, keepdims=True)
        p.dot(past, attended)  # its last d_r columns mean nothing: leaving them out would cost more
        np.divide(attended, total, attended)
        np.matmul(latent, w_uv, o_rows)  # W^UV comes behind the sum
        np.add(x, w_o.dot(o_flat, y), x)

    return attend


def swiglu_step(hidden: Array) -> tuple[Array, Callable[[], None]]:
    """Buffer [..., F] for ``silu(gate) up`` of `hidden` [..., 2, F], and what fills it."""
    gate, up = hidden[..., 0, :], hidden[..., 1, :]
    y = np.empty(gate.shape, dtype=hidden.dtype)

    def activate() -> None:
        np.negative(gate, y)
        np.exp(y, y)
        np.add(y, 1, y)
        np.divide(gate, y, y)
        np.multiply(y, up, y)

    return y, activate


def dense_step(norm: RMSNorm, mlp: MLP) -> FeedForward:
    """``x += mlp(norm(x))``."""
    w_up, w_down = mlp.gate_up.data, mlp.down_proj.weight.data
    hidden, y, normed = np.empty(len(w_up), dtype=w_up.dtype), np.empty(len(w_down), dtype=w_up.dtype), norm_step(norm)
    activated, activate = swiglu_step(hidden.reshape(2, -1))

    def feed_forward(x: Array) -> None:
        w_up.dot(normed(x), hidden)
        activate()
        np.add(x, w_down.dot(activated, y), x)

    return feed_forward


def routed_step(norm: RMSNorm, moe: MoE, cfg: ModelConfig) -> FeedForward:
    """``x += sum_i g_i E_i(norm(x)) + E_shared(norm(x))``."""
    D, F, K, n = cfg.hidden_size, cfg.moe_intermediate_size, cfg.num_experts_per_tok, cfg.n_shared_experts
    w_up, w_down = list(moe.experts.gate_up.data), list(moe.experts.down.data)  # a view for each expert
    dtype, normed, gate = w_up[0].dtype, norm_step(norm), gate_step(moe, cfg)
    hidden = np.empty((K + n, 2, F), dtype=dtype)  # chosen experts, then the shared ones
    activated, activate = swiglu_step(hidden)
    outputs, weights, y = np.empty((K + 1, D), dtype=dtype), np.ones(K + 1, dtype=dtype), np.empty(D, dtype=dtype)
    slots = list(zip(hidden.reshape(K + n, -1), activated, outputs))[:K]
    if n:
        shared_up = moe.shared_experts.gate_up.data.reshape(2, n, F, D)  # one FFN, n times as wide
        shared_hidden = hidden[K:].swapaxes(0, 1)
        shared_down, shared_activated = moe.shared_experts.down_proj.weight.data, activated[K:].reshape(-1)
    else:
        outputs, weights = outputs[:K], weights[:K]

    def feed_forward(x: Array) -> None:
        inputs = normed(x)
        chosen = gate(inputs, weights)
        for e, (h, _, _) in zip(chosen, slots):
            w_up[e].dot(inputs, h)
        if n:
            np.matmul(shared_up, inputs, shared_hidden)
        activate()
        for e, (_, a, out) in zip(chosen, slots):
            w_down[e].dot(a, out)
        if n:
            shared_down.dot(shared_activated, outputs[K])
        np.add(x, weights.dot(outputs, y), x)

    return feed_forward


def gate_step(moe: MoE, cfg: ModelConfig) -> Callable[[Array, Array], list[int]]:
    """Writes the weights of the chosen experts into its second argument and returns their indices, ascending."""
    gate, K, scaling = moe.gate, cfg.num_experts_per_tok, cfg.routed_scaling_factor
    w, normalize = gate.weight.data, cfg.norm_topk_prob and K > 1
    scores, choice = np.empty(len(w), dtype=w.dtype), np.empty(len(w), dtype=w.dtype)
    method, sigmoid = cfg.topk_method, cfg.scoring_func == "sigmoid"
    by_score_alone = gate._select is select_experts and (method == "greedy" or cfg.topk_group == cfg.n_group)

    def select(inputs: Array, weights: Array) -> list[int]:
        w.dot(inputs, scores)
        bias = gate.e_score_correction_bias
        if sigmoid:
            np.negative(scores, scores)
            np.exp(scores, scores)
            np.add(scores, 1, scores)
            np.reciprocal(scores, scores)
        else:
            np.subtract(scores, scores.max(), scores)
            np.exp(scores, scores)
            np.divide(scores, scores.sum(), scores)
        if by_score_alone:
            if bias is None:
                choice[...] = scores
            else:
                np.add(scores, bias, choice)
            chosen = []
            for _ in range(K):
                e = int(choice.argmax())  # the first of equal maxima
                chosen.append(e)
                choice[e] = -np.inf
            chosen.sort()
        else:
            chosen = gate._select(
                scores[None], bias, top_k=K, n_group=cfg.n_group, topk_group=cfg.topk_group, method=method
            )[0].tolist()
        picked = [float(scores[e]) for e in chosen]
        factor = scaling / (sum(picked) + 1e-20) if normalize else scaling
        for k, score in enumerate(picked):
            weights[k] = score * factor
        return chosen

    return select
