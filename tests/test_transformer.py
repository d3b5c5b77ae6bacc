"""The whole model: gradients, counts, names, precision, and equality with its equations in loops."""

import numpy as np
import pytest
from reference_model import ODD, V2_ROUTING, YARN, Reference, odd_config, odd_model, odd_tokens

from minidsv3 import ModelConfig, Transformer, record
from minidsv3.autograd import backward, no_grad, trace
from minidsv3.gradcheck import check_gradients
from minidsv3.ops.plain import using_plain_ops

TOKENS, TARGETS = odd_tokens(), odd_tokens(seed=6)
DENSE = dict(first_k_dense_replace=2, num_nextn_predict_layers=0)
VARIANTS = {
    "V3": {},
    "dense": DENSE,
    "MoE without MTP": dict(num_nextn_predict_layers=0),
    "MTP depth 2": dict(num_nextn_predict_layers=2),
    "tied": dict(tie_word_embeddings=True),
    "V2": V2_ROUTING,
    "V2-Lite": {**V2_ROUTING, "topk_method": "greedy", "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "no query latent": dict(q_lora_rank=None),
    "no shared experts": dict(n_shared_experts=0),
    "top 1": dict(num_experts_per_tok=1),
    "halves": dict(rope_interleave=False),
    "YaRN": dict(rope_scaling=YARN),
}


def variants(*names):
    return pytest.mark.parametrize("changes", [VARIANTS[n] for n in names or VARIANTS], ids=names or VARIANTS.keys())


def check_model_gradients(changes, **options):
    """A few coordinates of every parameter; a step of 1e-6 moves scores far less than the gaps between experts."""
    model = odd_model(num_hidden_layers=2, **changes)

    def loss(*_):
        return model.loss(TOKENS, TARGETS, mtp_weight=0.7, balance_weight=0.5, **options).total

    check_gradients(loss, list(model.parameters()), samples=2, rtol=1e-5, atol=1e-8)  # differences of a loss near 10


@variants()
def test_model_gradient_agrees_with_central_differences(changes):
    check_model_gradients(changes)


@variants("V3", "MTP depth 2", "tied")
def test_recomputed_gradient_agrees_with_central_differences(changes):
    check_model_gradients(changes, recompute=True)


@variants("MTP depth 2", "V2")
def test_plain_gradient_agrees_with_central_differences(changes):
    with using_plain_ops():
        check_model_gradients(changes)


@variants("V3", "dense", "MTP depth 2", "V2")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_recompute_gives_loss_and_gradients_of_the_same_bits(changes, dtype):
    results = []
    for recompute in (False, True):
        model = odd_model(dtype, **changes)
        losses = model.loss(TOKENS, TARGETS, balance_weight=0.1, recompute=recompute)
        backward(losses.total)
        results.append([*(t.data for t in losses[:4]), losses.expert_load, *(p.grad for p in model.parameters())])
    assert all(np.array_equal(kept, again) for kept, again in zip(*results, strict=True))


def test_recompute_keeps_less():
    def saved_bytes(recompute):
        with trace() as records:
            odd_model(np.float32).loss(TOKENS, TARGETS, recompute=recompute)
        return sum(r.saved_bytes for r in records if r.phase == "forward")

    assert saved_bytes(True) < saved_bytes(False) / 3


def test_every_parameter_gets_a_gradient():
    model = odd_model()
    backward(model.loss(np.tile(TOKENS, (3, 1)), np.tile(TARGETS, (3, 1)), balance_weight=0.1).total)
    assert [name for name, p in model.named_parameters() if ".experts." not in name and not p.grad.any()] == []


# ---------------------------------------------------------------------------------------------------- equations


@variants("V3", "dense", "MoE without MTP", "tied", "V2", "V2-Lite", "no query latent", "no shared experts", "top 1")
def test_logits_equal_the_equations_in_loops(changes):
    """Pitfalls 1, 4, 5, 14 and 16 at once: no term, no order of channels and no selection differs."""
    model = odd_model(**changes)
    np.testing.assert_allclose(model.logits(TOKENS), Reference(model).logits(TOKENS), rtol=0, atol=1e-10)


def test_layers_are_where_the_config_says():
    model = odd_model(num_hidden_layers=4, first_k_dense_replace=2)
    kinds = [type(layer.mlp).__name__ for layer in model.layers]
    assert kinds == ["MLP", "MLP", "MoE", "MoE"]


def test_main_loss_is_the_mean_of_what_the_logits_say():
    model = odd_model()
    logits = model.logits(TOKENS)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = np.mean([-log_p[b, s, TARGETS[b, s]] for b, s in np.ndindex(TARGETS.shape)])
    assert float(model.loss(TOKENS, TARGETS).main) == pytest.approx(expected, rel=1e-13)


def test_balance_loss_is_the_sum_over_layers_with_experts():
    """Pitfalls 6 and 7: from the gates' own scores and selection; and it is part of the total."""
    model = odd_model(num_hidden_layers=3, num_nextn_predict_layers=2)
    with record() as r:
        losses = model.loss(TOKENS, TARGETS, mtp_weight=0.0, balance_weight=0.25)
    by_layer = [float(e.output) for e in r if e.name.endswith(":SequenceBalanceLoss")]
    assert len(by_layer) == 4 and float(losses.balance) == pytest.approx(sum(by_layer), rel=1e-14)
    assert float(losses.total) == pytest.approx(float(losses.main) + 0.25 * sum(by_layer), rel=1e-14)


def test_expert_load_lists_layers_with_experts_and_mtp_last():
    losses = odd_model(num_hidden_layers=3, num_nextn_predict_layers=2).loss(TOKENS, TARGETS)
    assert losses.expert_load.sum(axis=1).tolist() == [4 * 14, 4 * 14, 4 * 12, 4 * 10]


def test_dense_model_has_no_load_and_no_balance_loss():
    losses = odd_model(**DENSE).loss(TOKENS, TARGETS)
    assert losses.expert_load.shape == (0, ODD["n_routed_experts"]) and float(losses.balance) == 0


def test_later_tokens_do_not_change_earlier_logits_to_the_bit():
    model, other = odd_model(**DENSE), TOKENS.copy()
    other[:, 4:] = (other[:, 4:] + 1) % ODD["vocab_size"]
    np.testing.assert_array_equal(model.logits(TOKENS)[:, :4], model.logits(other)[:, :4])


def test_later_tokens_do_not_change_earlier_logits_through_experts():
    model, other = odd_model(), TOKENS.copy()
    other[:, 4:] = (other[:, 4:] + 1) % ODD["vocab_size"]
    before, after = model.logits(TOKENS)[:, :4], model.logits(other)[:, :4]
    np.testing.assert_allclose(before, after, rtol=0, atol=1e-12)  # an expert's gemm has another number of rows


def test_sequences_of_a_batch_do_not_meet():
    model = odd_model()
    alone = np.concatenate([model.logits(TOKENS[b : b + 1]) for b in range(2)])
    np.testing.assert_allclose(model.logits(TOKENS), alone, rtol=0, atol=1e-12)  # as above


def test_logits_leave_no_tape_and_forward_does():
    model = odd_model()
    assert isinstance(model.logits(TOKENS), np.ndarray)
    assert model(TOKENS).requires_grad
    with no_grad():
        assert not model(TOKENS).requires_grad


def test_one_token_is_enough_without_mtp():
    assert odd_model(num_nextn_predict_layers=0).logits([[3]]).shape == (1, 1, 29)


# ---------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@variants("V3", "V2", "YaRN", "halves", "tied")
def test_every_array_of_a_forward_pass_has_the_models_dtype(changes, dtype):
    model = odd_model(dtype, **changes)
    with record() as r:
        model.loss(TOKENS, TARGETS)
        model.mtp_logits(TOKENS)
    kinds = {(e.name, str(a.dtype)) for e in r for a in (*e.inputs, *e.outputs) if a.dtype.kind in "fc"}
    complex_of = {"float32": "complex64", "float64": "complex128"}  # rotation tables
    allowed = {np.dtype(dtype).name, complex_of[np.dtype(dtype).name]}
    assert {entry for entry in kinds if entry[1] not in allowed} == set()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_gradient_has_the_models_dtype(dtype, plain):
    model = odd_model(dtype)
    with trace() as records:
        if plain:
            with using_plain_ops():
                backward(model.loss(TOKENS, TARGETS).total)
        else:
            backward(model.loss(TOKENS, TARGETS).total)
    assert records and {p.grad.dtype for p in model.parameters()} == {np.dtype(dtype)}


def test_float32_model_agrees_with_its_float64_twin():
    single, double = (odd_model(dtype).logits(TOKENS) for dtype in (np.float32, np.float64))
    np.testing.assert_allclose(single, double, rtol=0, atol=2e-4)  # logits of about 5, three layers of float32


def test_same_seed_gives_the_same_weights():
    one, two = (odd_model(np.float32, seed=9) for _ in range(2))
    assert all(np.array_equal(a.data, b.data) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_other_seed_gives_other_weights():
    one, two = (odd_model(np.float32, seed=seed) for seed in (9, 10))
    assert not np.array_equal(one.lm_head.weight.data, two.lm_head.weight.data)


def test_float64_model_has_the_float32_weights():
    single, double = (odd_model(dtype) for dtype in (np.float32, np.float64))
    assert all(np.array_equal(a.data, b.data) for a, b in zip(single.parameters(), double.parameters(), strict=True))


@pytest.mark.parametrize("std", [None, 0.006])
def test_initial_weights_have_the_stated_spread(std):
    model = Transformer(ModelConfig.preset("nano"))
    model.init_weights(np.random.default_rng(0), std=std)
    matrices = np.concatenate([p.data.ravel() for p in model.parameters() if len(p.shape) > 1])
    # 400,000 draws: the sample's spread is known to 0.1 %
    assert (matrices.std(), matrices.mean()) == pytest.approx((std or 0.02, 0), rel=0.01, abs=1e-4)


def test_initial_norms_are_one_and_biases_zero():
    model = Transformer(odd_config())
    model.init_weights(np.random.default_rng(0))
    assert all((p.data == 1).all() for _, p in model.named_parameters() if len(p.shape) == 1)
    assert not any(b.any() for _, b in model.named_buffers())


def test_weights_come_in_two_precisions_only():
    with pytest.raises(ValueError, match="dtype=float16 is not float32 or float64"):
        Transformer(odd_config()).init_weights(np.random.default_rng(0), np.float16)


# ----------------------------------------------------------------------------------------------- names and counts


def count(model, prefix=""):
    return sum(p.data.size for name, p in model.named_parameters() if name.startswith(prefix))


@pytest.fixture(scope="module")
def v3():
    return Transformer(ModelConfig.preset("deepseek-v3"))


def test_v3_has_its_671_billion_parameters(v3):
    """The main model, without the correction biases; summed over the released tensors."""
    assert count(v3) - count(v3, "model.layers.61.") == 671_026_404_352


def test_v3_mtp_module_has_its_parameters(v3):
    assert count(v3, "model.layers.61.") == 11_610_067_968


def test_v3_correction_biases_are_one_per_routed_expert(v3):
    assert sum(b.size for _, b in v3.named_buffers()) == 59 * 256


@pytest.mark.parametrize(
    "prefix, parameters",
    [
        ("model.layers.0.self_attn.", 187_107_328),
        ("model.layers.0.mlp.", 396_361_728),
        ("model.layers.3.mlp.experts.255.", 44_040_192),
        ("model.layers.3.mlp.gate.", 1_835_008),
        ("model.layers.3.mlp.", 11_320_164_352),
        ("model.layers.3.", 11_507_286_016),
        ("model.embed_tokens.", 926_679_040),
        ("lm_head.", 926_679_040),
        ("model.norm.", 7_168),
    ],
)
def test_v3_part_has_its_parameters(v3, prefix, parameters):
    assert count(v3, prefix) == parameters


def test_v2_has_its_236_billion_parameters():
    assert count(Transformer(ModelConfig.preset("deepseek-v2"))) == 235_741_434_880


def test_packed_and_listed_parameters_have_one_count(v3):
    assert sum(int(np.prod(p.shape)) for p in v3.parameters()) == count(v3)


RELEASED = {
    "model.embed_tokens.weight": (129280, 7168),
    "model.layers.0.self_attn.q_a_proj.weight": (1536, 7168),
    "model.layers.0.self_attn.q_a_layernorm.weight": (1536,),
    "model.layers.0.self_attn.q_b_proj.weight": (24576, 1536),
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
    "model.layers.0.self_attn.kv_a_layernorm.weight": (512,),
    "model.layers.0.self_attn.kv_b_proj.weight": (32768, 512),
    "model.layers.0.self_attn.o_proj.weight": (7168, 16384),
    "model.layers.0.input_layernorm.weight": (7168,),
    "model.layers.0.post_attention_layernorm.weight": (7168,),
    "model.layers.2.mlp.gate_proj.weight": (18432, 7168),
    "model.layers.2.mlp.up_proj.weight": (18432, 7168),
    "model.layers.2.mlp.down_proj.weight": (7168, 18432),
    "model.layers.3.mlp.gate.weight": (256, 7168),
    "model.layers.3.mlp.experts.255.gate_proj.weight": (2048, 7168),
    "model.layers.3.mlp.experts.255.up_proj.weight": (2048, 7168),
    "model.layers.3.mlp.experts.255.down_proj.weight": (7168, 2048),
    "model.layers.60.mlp.shared_experts.down_proj.weight": (7168, 2048),
    "model.layers.61.enorm.weight": (7168,),
    "model.layers.61.hnorm.weight": (7168,),
    "model.layers.61.eh_proj.weight": (7168, 14336),
    "model.layers.61.shared_head.norm.weight": (7168,),
    "model.layers.61.mlp.experts.0.up_proj.weight": (2048, 7168),
    "model.norm.weight": (7168,),
    "lm_head.weight": (129280, 7168),
}


def test_v3_weights_have_their_released_names_and_shapes(v3):
    shapes = {name: p.shape for name, p in v3.named_parameters() if name in RELEASED}
    assert shapes == RELEASED


def test_v3_biases_have_their_released_names(v3):
    names = [name for name, _ in v3.named_buffers()]
    assert names == [f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in range(3, 62)]


def test_v3_embedding_and_head_are_two_matrices(v3):
    """Pitfall 21: V3 ties nothing; each is 926.7 M parameters."""
    assert v3.lm_head.weight is not v3.embed_tokens.weight


def test_names_are_unique():
    names = [name for name, _ in odd_model(num_nextn_predict_layers=2).named_parameters()]
    assert len(names) == len(set(names))


def test_tied_weights_are_listed_once():
    model = odd_model(tie_word_embeddings=True)
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in names and names.count("model.embed_tokens.weight") == 1
    assert sum(p is model.embed_tokens.weight for p in model.parameters()) == 1


def test_tied_weight_gets_the_gradients_of_both_its_uses():
    """Equal weights, tied and untied: the tied gradient is the sum of the two."""
    tied, untied = odd_model(tie_word_embeddings=True), odd_model()
    for (_, a), (_, b) in zip(tied.named_parameters(), untied.named_parameters()):
        b.data[...] = a.data
    for (_, a), (_, b) in zip(tied.named_buffers(), untied.named_buffers()):
        b[...] = a
    untied.lm_head.weight.data[...] = tied.embed_tokens.weight.data
    for model in (tied, untied):
        backward(model.loss(TOKENS, TARGETS).total)
    expected = untied.embed_tokens.weight.grad + untied.lm_head.weight.grad
    np.testing.assert_allclose(tied.embed_tokens.weight.grad, expected, rtol=1e-12, atol=1e-15)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([1, 2, 3], r"tokens must be int \[B, S\] with B, S >= 1, got int64 \(3,\)"),
        ([[1.0, 2.0]], r"tokens must be int .* got float64 \(1, 2\)"),
        ([[True, False]], "got bool"),
        (np.empty((0, 4), dtype=np.int64), r"got int64 \(0, 4\)"),
        (np.empty((2, 0), dtype=np.int64), r"got int64 \(2, 0\)"),
        ([[1, 29]], r"tokens 1\.\.29 exceed a vocabulary of 29"),
        ([[-1, 2]], r"tokens -1\.\.2 exceed a vocabulary of 29"),
    ],
)
def test_bad_tokens_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        odd_model().logits(tokens)


def test_targets_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"targets have shape \(2, 6\), tokens_in \(2, 7\)"):
        odd_model().loss(TOKENS, TARGETS[:, 1:])


def test_target_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="neither -100 nor in a vocabulary of 29"):
        odd_model().loss(TOKENS, TARGETS + 29)


def test_model_without_weights_is_refused():
    with pytest.raises(ValueError, match="the model has no weights yet: call init_weights"):
        Transformer(odd_config()).logits(TOKENS)


def test_error_in_the_model_names_the_module_of_the_backward(monkeypatch):
    from minidsv3.ops.swiglu import SwiGLUFunction

    def broken(self, dy):
        raise ArithmeticError("no derivative")

    loss = odd_model().loss(TOKENS, TARGETS).total
    monkeypatch.setattr(SwiGLUFunction, "backward", broken)
    with pytest.raises(ArithmeticError) as error:
        backward(loss)
    assert error.value.__notes__ == ["in the backward of SwiGLUFunction, made by model.layers.2.mlp.shared_experts"]
