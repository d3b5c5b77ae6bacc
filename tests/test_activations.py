"""Activations: the formulas against what the tape of a running model really keeps, byte for byte."""

from collections import Counter

import numpy as np
import pytest
from small_runs import batch, model_config, new_model

from minidsv3 import ModelConfig, Transformer
from minidsv3.accounting.activations import PRECISIONS, Kept, Shape, kept_arrays, total_bytes
from minidsv3.autograd import Checkpoint, Function, Tensor, backward, observing, replacing, trace
from minidsv3.model.moe import Routing
from minidsv3.ops.attention import attention
from minidsv3.ops.linear import grouped_linear, linear
from minidsv3.ops.loss import cross_entropy
from minidsv3.ops.norm import RMSNormFunction
from minidsv3.ops.rope import rope
from minidsv3.ops.routing import PermuteFunction, gate_scores, gate_weights
from minidsv3.ops.shape import add, concat_last, reshape, split_last
from minidsv3.ops.swiglu import swiglu
from minidsv3.quant.recipe import recipe_for

MODELS = {
    "moe, mtp": {},
    "no q lora": {"q_lora_rank": None},
    "two mtp": {"num_nextn_predict_layers": 2},
    "no mtp, no shared": {"num_nextn_predict_layers": 0, "n_shared_experts": 0},
    "dense": {"first_k_dense_replace": 2, "num_nextn_predict_layers": 0},
    "two shared, not normalised": {"n_shared_experts": 2, "norm_topk_prob": False},
    "softmax, one expert": {"num_experts_per_tok": 1, "scoring_func": "softmax", "topk_method": "greedy"},
}
OUTSIDE = ("SequenceBalanceLoss", "Checkpoint")  # run by the model, not by a layer


class Tape:
    """Ops of a forward pass with all that they saved, weights left out."""

    def __init__(self):
        self.ops = []

    def __call__(self, event):
        if event.phase == "forward":
            self.ops.append(event.op)

    def arrays(self):
        """(layer, op, array) of everything saved."""
        for op in self.ops:
            words, name = op._scope.split("."), type(op).__name__.removesuffix("Function")
            layer = int(words[2]) if words[:2] == ["model", "layers"] and name not in OUTSIDE else -1
            for array in activations(op, name):
                yield layer, name, array

    def bytes_by_op(self):
        found = Counter()
        for layer, op, array in self.arrays():
            found[layer, op] += array.nbytes
        return found

    def bytes_in_memory(self):
        """Each array once: one that begins where another does is the same, or the beginning of it."""
        found = {}
        for _, _, array in self.arrays():
            place = array.__array_interface__["data"][0]
            found[place] = max(found.get(place, 0), array.nbytes)
        return sum(found.values())


def activations(op, name):
    """What an op saved but for its weight."""
    saved = op._saved or ()
    if name == "Linear":
        return saved[:-1]
    if name == "GroupedLinear":
        return saved[len(op._ranges) :]  # one weight for each expert that has rows
    return (saved[0], saved[2]) if name == "RMSNorm" and saved else saved


class Sent(PermuteFunction):
    """Rows that came over a network: nobody makes them again, and their tokens stayed behind."""

    again = Function.again  # not at all

    def forward(self, x, *, token_of_row, row_of_slot):
        rows = super().forward(x, token_of_row=token_of_row, row_of_slot=row_of_slot)
        self.save(row_of_slot)
        return rows


def record(B, S, run):
    tape = Tape()
    with observing(tape):
        run(*batch(B, S))
    return tape


def formula_by_op(arrays, precision):
    found = Counter()
    for kept in arrays:
        found[-1 if kept.op in OUTSIDE else kept.layer, kept.op] += kept.nbytes(precision)
    return found


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("recompute", [False, True], ids=["none", "full"])
def test_kept_arrays_are_what_every_op_saves(changes, recompute):
    cfg, (B, S) = model_config(**changes), (3, 70)
    model = new_model(cfg)
    tape = record(B, S, lambda x, y: model.loss(x, y, recompute=recompute))
    arrays = kept_arrays(cfg, Shape(B, S, "full" if recompute else "none", "kept", "again"))
    assert formula_by_op(arrays, "fp32") == tape.bytes_by_op()
    assert total_bytes(arrays, "fp32") == tape.bytes_in_memory()


def test_double_precision_keeps_what_the_formula_says():
    cfg = model_config()
    model = new_model(cfg, dtype=np.float64)
    tape = record(2, 19, model.loss)
    assert total_bytes(kept_arrays(cfg, Shape(2, 19, "none", "kept", "again")), "fp64") == tape.bytes_in_memory()


def test_trace_saves_these_bytes_and_the_weights():
    cfg, (B, S) = model_config(), (2, 21)
    model = new_model(cfg)
    with trace() as records:
        model.loss(*batch(B, S))
    of_weights = 0
    for r in records:  # linears and norms save their weight beside the activation; every expert has rows here
        if r.name in ("LinearFunction", "GroupedLinearFunction", "RMSNormFunction"):
            of_weights += 4 * int(np.prod(r.shapes[1]))
    arrays = kept_arrays(cfg, Shape(B, S, "none", "kept", "again"))
    assert sum(kept.nbytes("fp32") for kept in arrays) + of_weights == sum(r.saved_bytes for r in records)


def report_layer(layer, x, rotation):
    """A decoder layer that keeps what the V3 report keeps: norms, up-projections and SwiGLU are made again."""
    mla, mlp = layer.self_attn, layer.mlp
    cfg = mla._cfg
    (B, S, D), H, d_r = x.shape, cfg.num_attention_heads, cfg.qk_rope_head_dim

    def down(x):
        n = layer.input_layernorm(x)
        kv = mla.kv_a_proj_with_mqa(n)
        return (kv,) if cfg.q_lora_rank is None else (mla.q_a_proj(n), kv)

    def attend(*latents):
        if cfg.q_lora_rank is None:
            q = mla.q_proj(layer.input_layernorm(latents[0]))
        else:
            q = mla.q_b_proj(mla.q_a_layernorm(latents[0]))
        q = rope(reshape(q, (B, S, H, -1)), rotation, cfg.rope_interleave)
        c_kv, k_rope = split_last(latents[1], (cfg.kv_lora_rank, d_r))
        k_rope = reshape(rope(reshape(k_rope, (B, S, 1, d_r)), rotation, cfg.rope_interleave), (B, S, d_r))
        kv = reshape(mla.kv_b_proj(mla.kv_a_layernorm(c_kv)), (B, S, H, -1))
        return attention(q, kv, k_rope, mla._scale)

    latents = Checkpoint.apply(x, run=down)
    latents = (x, *latents) if cfg.q_lora_rank is None else latents
    o = Checkpoint.apply(*latents, run=attend)
    x = add(x, mla.o_proj(reshape(o, (B, S, -1))))
    if not layer._routed:
        gate_up = Checkpoint.apply(x, run=lambda x: linear(layer.post_attention_layernorm(x), mlp.gate_up))
        return add(x, Checkpoint.apply(gate_up, run=lambda g: mlp.down_proj(swiglu(g)))), None

    def enter(x):
        n = reshape(layer.post_attention_layernorm(x), (-1, D))
        shared = (linear(n, mlp.shared_experts.gate_up),) if mlp._has_shared else ()
        return n, linear(n, mlp.gate.weight), *shared

    tokens, logits, *shared = Checkpoint.apply(x, run=enter)
    routing = routed(mlp.gate, logits)
    rows, handle = mlp._dispatcher.dispatch(tokens, routing.topk_idx, routing.topk_weight)
    gate_up = grouped_linear(rows, mlp.experts.gate_up, handle.rows_per_expert)

    def leave(gate_up, weight):
        y = grouped_linear(swiglu(gate_up), mlp.experts.down, handle.rows_per_expert)
        return mlp._dispatcher.combine(y, handle._replace(topk_weight=weight))

    y = Checkpoint.apply(gate_up, routing.topk_weight, run=leave)
    if shared:
        y = add(y, Checkpoint.apply(shared[0], run=lambda g: mlp.shared_experts.down_proj(swiglu(g))))
    return add(x, reshape(y, x.shape)), routing


def routed(gate, logits):
    """What the gate decides from logits that are there already."""
    cfg = gate._cfg
    scores = gate_scores(logits, cfg.scoring_func)
    how = dict(top_k=cfg.num_experts_per_tok, n_group=cfg.n_group, topk_group=cfg.topk_group, method=cfg.topk_method)
    chosen = gate._select(scores.data, gate.e_score_correction_bias, **how)
    return Routing(scores, chosen, gate_weights(scores, chosen, cfg.norm_topk_prob, cfg.routed_scaling_factor))


@pytest.mark.parametrize("name", ["no mtp, no shared", "dense", "two shared, not normalised", "no q lora"])
def test_recomputation_of_the_report_keeps_what_the_formula_says(name):
    cfg = model_config(**{**MODELS[name], "num_nextn_predict_layers": 0})
    model, (B, S) = new_model(cfg), (3, 70)
    x = np.random.default_rng(1).standard_normal((B, S, cfg.hidden_size), dtype=np.float32)
    rotation, gradients = model.rotation(0, S), []
    for run in (lambda layer, x, rotation: layer(x, rotation), report_layer):
        tape, start = Tape(), Tensor(x, requires_grad=True)
        model_gradients = []
        with observing(tape), replacing(PermuteFunction, Sent):
            h = start
            for layer in model.layers:
                h, _ = run(layer, h, rotation)
        kept = tape.bytes_in_memory()
        backward(some_loss(h))
        for parameter in model.parameters():
            if parameter.grad.flags.writeable:
                model_gradients.append(parameter.grad.copy())
                parameter.zero_grad()
        gradients.append([start.grad, *model_gradients])
    layers = range(cfg.num_hidden_layers)
    arrays = kept_arrays(cfg, Shape(B, S, "report", "kept"), layers, ends=False)
    expected = total_bytes([k for k in arrays if k.op != "SequenceBalanceLoss"], "fp32")
    assert kept == expected
    for plain, again in zip(*gradients):
        np.testing.assert_allclose(again, plain, rtol=1e-4, atol=1e-5)  # sums of two paths in another order


def test_recomputation_of_the_report_in_an_mtp_module():
    cfg = model_config()
    model, (B, S) = new_model(cfg), (3, 70)
    module, rng, tape = model.mtp[0], np.random.default_rng(2), Tape()
    h, embedded = (
        Tensor(rng.standard_normal((B, S - 1, cfg.hidden_size), dtype=np.float32), requires_grad=True) for _ in range(2)
    )

    def join(h, embedded):
        return module.eh_proj(concat_last(module.enorm(embedded), module.hnorm(h)))

    with observing(tape), replacing(PermuteFunction, Sent):
        x = Checkpoint.apply(h, embedded, run=join)
        x, _ = report_layer(module.layer, x, model.rotation(0, S - 1))
        module.shared_head.norm(x)
    arrays = kept_arrays(cfg, Shape(B, S, "report", "kept"), range(2, 3), ends=False)
    expected = total_bytes([k for k in arrays if k.op != "SequenceBalanceLoss"], "fp32")
    assert tape.bytes_in_memory() == expected


def some_loss(h):
    """A scalar whose gradient is not the same everywhere."""
    targets = np.arange(h.shape[0] * h.shape[1], dtype=np.int64).reshape(h.shape[:2]) % h.shape[2]
    return cross_entropy(h, targets)


def test_stages_together_keep_what_the_whole_model_does():
    cfg, shape = model_config(num_hidden_layers=5), Shape(2, 33, "report")
    pieces = [kept_arrays(cfg, shape, range(a, b), ends=b == 6) for a, b in ((0, 2), (2, 3), (3, 6))]
    assert Counter(k for piece in pieces for k in piece) == Counter(kept_arrays(cfg, shape))


def test_every_choice_keeps_less_than_the_one_before():
    cfg = ModelConfig.preset("deepseek-v3")
    sizes = [total_bytes(kept_arrays(cfg, Shape(1, 4096, r)), "bf16") for r in ("none", "report", "full")]
    assert sizes[0] > 2 * sizes[1] > 4 * sizes[2]
    formats = [total_bytes(kept_arrays(cfg, Shape(1, 4096, "report")), p) for p in ("fp64", "fp32", "bf16", "fp8")]
    assert formats == sorted(formats, reverse=True)


@pytest.mark.parametrize(
    ("role", "nbytes"),
    [("stream", 3 * 300 * 2), ("linear", 3 * 300 + 3 * 3 * 4), ("attended", 3 * 450 + 3 * 3), ("exact", 3 * 300 * 4)],
)
def test_fp8_caching_counts_codes_and_scales(role, nbytes):
    assert Kept(0, "", "", 3, 300, role).nbytes("fp8") == nbytes  # 300 numbers are three tiles


def test_fp8_caching_is_what_the_recipe_keeps():
    """The real FP8 recipe on the tape: inputs of linears and of SwiGLU, codes and scales; rows stay as if sent."""
    cfg, (B, S) = model_config(num_nextn_predict_layers=0, hidden_size=160, v_head_dim=50), (2, 33)

    class Norm(RMSNormFunction):
        again = Function.again

    model = Transformer(cfg, recipe_for("fp8"))
    model.init_weights(np.random.default_rng(0))
    with replacing(RMSNormFunction, Norm), replacing(PermuteFunction, Sent):
        tape = record(B, S, model.loss)
    kept = {}
    for op in tape.ops:
        name = type(op).__name__.removesuffix("Function")
        if name in ("Linear", "GroupedLinear", "SwiGLU") and "layers.1" in op._scope:
            kept.setdefault((op._scope.split("layers.1.")[1], name), []).append(activations(op, name))
    formula = {k.array: k for k in kept_arrays(cfg, Shape(B, S)) if k.layer == 1}
    for place, op, array in (
        ("self_attn.q_a_proj", "Linear", "1.attention_in"),
        ("self_attn.q_b_proj", "Linear", "1.c_q"),
        ("self_attn.kv_b_proj", "Linear", "1.c_kv"),
        ("mlp.experts", "GroupedLinear", "1.rows"),
        ("mlp.experts", "SwiGLU", "1.experts.gate_up"),
        ("mlp.shared_experts", "SwiGLU", "1.shared.gate_up"),
    ):
        assert sum(a.nbytes for a in kept[place, op][0]) == formula[array].nbytes("fp8"), array
    assert kept["mlp.experts", "GroupedLinear"][1] == ()  # SwiGLU's output is made again
    (behind_attention,) = kept["self_attn.o_proj", "Linear"][0]  # E5M6: 12 bits, held in 16, its scales in 32
    codes, scales = behind_attention.codes, behind_attention.scales
    assert formula["1.attended"].nbytes("fp8") == codes.size * 12 // 8 + scales.size


def test_an_array_asked_for_in_two_precisions_is_kept_in_the_wider():
    twice = [Kept(0, "Linear", "x", 4, 128, role) for role in ("linear", "stream")]
    assert total_bytes(twice, "fp8") == 4 * 128 * 2


@pytest.mark.parametrize("shape", [Shape(0, 5), Shape(1, 1), Shape(1, 9, "some"), Shape(1, 9, "none", "half")])
def test_impossible_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"micro-batch|recompute=|scores="):
        kept_arrays(model_config(), shape)
    assert set(PRECISIONS) == {"fp64", "fp32", "bf16", "fp8"}
