"""The short way of decoding: equal to the modules it stands for, and out of the way when somebody looks."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from reference_model import ODD, V2_ROUTING, YARN, odd_config, odd_model, odd_tokens

import minidsv3
from minidsv3 import LatentCache, Transformer, generate
from minidsv3.autograd import observing, replacing
from minidsv3.generation.decoder import FEW, Decoder
from minidsv3.model.moe import LocalTokenDispatcher
from minidsv3.ops.latent import recomputed_attention
from minidsv3.ops.linear import Gemm
from minidsv3.ops.norm import RMSNormFunction
from minidsv3.ops.routing import select_experts

VARIANTS = {
    "V3": {},
    "no groups": dict(n_group=1, topk_group=1),
    "as many groups as allowed": dict(n_group=4, topk_group=4),
    "V2": V2_ROUTING,
    "V2 greedy, normalised": {**V2_ROUTING, "topk_method": "greedy", "norm_topk_prob": True},
    "sigmoid without bias": dict(topk_method="greedy"),
    "one expert": dict(num_experts_per_tok=1),
    "unnormalised": dict(norm_topk_prob=False),
    "three shared experts": dict(n_shared_experts=3),
    "no shared expert": dict(n_shared_experts=0),
    "no query latent": dict(q_lora_rank=None),
    "YaRN": dict(rope_scaling=YARN),
    "halves": dict(rope_interleave=False),
    "odd content width": dict(qk_nope_head_dim=7),
    "tied": dict(tie_word_embeddings=True),
    "all dense": dict(first_k_dense_replace=2),
    "none dense": dict(first_k_dense_replace=0, rms_norm_eps=1e-3),
}
# The same sums in another order, over values of order one.
ROUNDING = {np.float64: dict(rtol=1e-12, atol=1e-12), np.float32: dict(rtol=1e-5, atol=1e-5)}


@pytest.fixture
def alone(monkeypatch):
    """A decoder that may not ask its model."""

    def make(model):
        def refuse(*args, **kwargs):
            raise AssertionError("handed over to the model")

        decoder = Decoder(model)
        monkeypatch.setattr(decoder, "_model", FrontOf(model, decode=refuse, draft=refuse, head=refuse))
        return decoder

    return make


class FrontOf:
    """An object with some attributes of its own, and all others of another."""

    def __init__(self, behind, **own):
        self.__dict__.update(own, _behind=behind)

    def __getattr__(self, name):
        return getattr(self._behind, name)


def steps(who, tokens, cache, sizes):
    """Hidden states [B, S, D] of `tokens` in pieces of the given sizes."""
    parts, at = [], 0
    for n in sizes:
        parts.append(who.decode(tokens[:, at : at + n], cache))
        cache.extend(n)
        at += n
    return np.concatenate(parts, axis=1)


def two_caches(model, batch, **how):
    return [LatentCache(model.config, batch, model.norm.weight.dtype, **how) for _ in range(2)]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoder_equals_the_model(variant, dtype, alone):
    model, tokens = odd_model(dtype, **VARIANTS[variant]), odd_tokens(1, 11)
    ours, theirs = two_caches(model, 1)
    decoder = alone(model)
    got = steps(decoder, tokens, ours, [1, 1, 3, 1, 2, 1, 1, 1])
    expected = steps(model, tokens, theirs, [11])
    assert got.dtype == dtype
    np.testing.assert_allclose(got, expected, **ROUNDING[dtype])
    np.testing.assert_allclose(decoder.head(got[:, :3]), model.head(expected[:, :3]), **ROUNDING[dtype])
    for a, b in zip(ours.layers, theirs.layers):
        np.testing.assert_allclose(a.pages[0][:, :11], b.pages[0][:, :11], **ROUNDING[dtype])


@pytest.mark.parametrize("page", [1, 3, 4, 100])
def test_decoder_over_several_pages_equals_the_model(page, alone):
    model, tokens = odd_model(), odd_tokens(2, 10)
    ours, theirs = two_caches(model, 2, page=page)[0], LatentCache(model.config, 2, np.float64)
    got = steps(alone(model), tokens, ours, [1, 2, 3, 1, 1, 2])
    np.testing.assert_allclose(got, steps(model, tokens, theirs, [10]), **ROUNDING[np.float64])


@pytest.mark.parametrize("S", [1, 2])
def test_decoder_with_sequences_of_different_length_equals_the_model(S, alone):
    model, tokens = odd_model(), odd_tokens(3, 9)
    caches = two_caches(model, 3)
    for cache in caches:
        model.decode(tokens[:, :7], cache)
        cache.extend(np.array([7, 2, 4]))
    got, expected = (who.decode(tokens[:, 7 : 7 + S], c) for who, c in zip((alone(model), model), caches))
    np.testing.assert_allclose(got, expected, **ROUNDING[np.float64])


def test_decoder_after_truncation_is_as_if_never_longer(alone):
    model, tokens = odd_model(), odd_tokens(1, 6)
    plain, cut = two_caches(model, 1)
    decoder = alone(model)
    expected = steps(decoder, tokens, plain, [1] * 6)
    steps(decoder, tokens[:, :4], cut, [4])
    steps(decoder, (tokens[:, :3] + 1) % ODD["vocab_size"], cut, [3])
    cut.truncate(4)
    np.testing.assert_array_equal(steps(decoder, tokens[:, 4:], cut, [1, 1]), expected[:, 4:])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("variant", ["V3", "V2", "no query latent", "YaRN", "halves", "three shared experts"])
def test_decoder_drafts_equal_the_models(variant, dtype, alone):
    model = odd_model(dtype, num_nextn_predict_layers=2, **VARIANTS[variant])
    decoder, tokens = alone(model), odd_tokens(2, 9)
    h = model.decode(tokens[:, :7], LatentCache(model.config, 2, dtype))
    for depth in (1, 2):
        ours, theirs = two_caches(model, 2, layers=1)
        following = tokens[:, depth : depth + 7]
        expected = model.draft(depth, h, following, theirs)
        got = []
        for a, b in ((0, 1), (1, 4), (4, 5), (5, 7)):
            got.append(decoder.draft(depth, h[:, a:b], following[:, a:b], ours))
            ours.extend(b - a)
        np.testing.assert_allclose(np.concatenate(got, axis=1), expected, **ROUNDING[dtype])
        h = expected


def test_decoder_result_is_not_overwritten_by_the_next(alone):
    model, tokens = odd_model(), odd_tokens(1, 2)
    decoder, (cache, _) = alone(model), two_caches(model, 1)
    first = decoder.decode(tokens[:, :1], cache)
    before, logits = first.copy(), decoder.head(first)
    kept = logits.copy()
    cache.extend(1)
    decoder.head(decoder.decode(tokens[:, 1:], cache))
    np.testing.assert_array_equal(first, before)
    np.testing.assert_array_equal(logits, kept)


def test_decoder_sees_weights_that_change_in_place(alone):
    model, tokens = odd_model(), odd_tokens(1, 3)
    decoder = alone(model)
    for _, parameter in model.named_parameters():
        parameter.data[...] = parameter.data * 1.5
    for _, bias in model.named_buffers():
        bias[...] = -bias
    ours, theirs = two_caches(model, 1)
    got, expected = steps(decoder, tokens, ours, [1, 1, 1]), steps(model, tokens, theirs, [3])
    np.testing.assert_allclose(got, expected, **ROUNDING[np.float64])


def test_decoder_allocates_nothing_of_the_size_of_keys_or_values(alone):
    """One step over 600 tokens: less than a tenth of what their keys and values would take."""
    model = odd_model(num_attention_heads=31, qk_nope_head_dim=64, v_head_dim=64)
    decoder, (cache, _) = alone(model), two_caches(model, 1, page=1000)
    model.decode(odd_tokens(1, 600), cache)
    cache.extend(600)
    decoder.decode(odd_tokens(1, 1), cache)
    tracemalloc.start()
    decoder.decode(odd_tokens(1, 1), cache)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 600 * 31 * 64 * 8 / 10


class Doubled(RMSNormFunction):
    """Another norm, to be noticed."""

    def forward(self, x, w, *, eps):
        return 2 * super().forward(x, w, eps=eps)


def test_decoding_can_be_recorded():
    model = odd_model()
    expected = generate(model, [[1, 2]], 3).tokens[0].tolist()
    with minidsv3.record() as r:
        assert generate(model, [[1, 2]], 3).tokens[0].tolist() == expected
    assert (
        len([entry for entry in r if entry.name == "model.layers.1.mlp.gate"]) == 3
    )  # the prompt, and twice one token
    assert len([entry for entry in r if entry.name == "lm_head"]) == 3


def test_decoding_uses_ops_that_replace_others():
    model, tokens = odd_model(), odd_tokens(1, 2)
    decoder, caches = Decoder(model), [LatentCache(model.config, 1, np.float64) for _ in range(3)]
    with replacing(RMSNormFunction, Doubled):
        replaced, expected = (who.decode(tokens, cache) for who, cache in zip((decoder, model), caches))
    np.testing.assert_array_equal(replaced, expected)
    assert not np.allclose(replaced, decoder.decode(tokens, caches[2]))


def test_decoder_hands_over_while_somebody_observes():
    model, seen = odd_model(), []
    with observing(seen.append):
        Decoder(model).decode(odd_tokens(1, 1), LatentCache(model.config, 1, np.float64))
    assert "module" in {event.phase for event in seen}


class Halved(Gemm):
    """Half of every product, to be noticed."""

    def fprop(self, x, w, out=None, kept=None):
        return np.multiply(super().fprop(x, w), 0.5, out=out)


class HalvedRecipe:
    def gemm(self, layer):
        return Halved()

    def rounding(self, place):
        return None

    def store(self, op):
        return None


class RoundingRecipe(HalvedRecipe):
    """Exact products of rounded embeddings."""

    def gemm(self, layer):
        return None

    def rounding(self, place):
        return (lambda x: np.round(x, 1)) if place == "embed_tokens" else None


class CountingDispatcher(LocalTokenDispatcher):
    calls = 0

    def dispatch(self, *args):
        type(self).calls += 1
        return super().dispatch(*args)


def last_experts(scores, bias, *, top_k, **how):
    """Another selection rule: always the last experts."""
    T, E = scores.shape
    return np.tile(np.arange(E - top_k, E, dtype=np.int64), (T, 1))


@pytest.mark.parametrize("handed_in", [
    dict(recipe=HalvedRecipe()), dict(recipe=RoundingRecipe()), dict(select=last_experts),
    dict(dispatcher=CountingDispatcher(ODD["n_routed_experts"])),
], ids=["recipe", "rounding", "select", "dispatcher"])  # fmt: skip
def test_decoder_uses_what_was_handed_to_the_model(handed_in):
    model, tokens = Transformer(odd_config(), **handed_in), odd_tokens(1, 4)
    model.init_weights(np.random.default_rng(0), np.float64, std=0.3)
    ours, theirs = two_caches(model, 1)
    before = CountingDispatcher.calls
    got = steps(Decoder(model), tokens, ours, [1, 1, 1, 1])
    assert CountingDispatcher.calls - before == (4 if "dispatcher" in handed_in else 0)
    np.testing.assert_allclose(got, steps(model, tokens, theirs, [4]), **ROUNDING[np.float64])
    plain = Transformer(odd_config())
    plain.init_weights(np.random.default_rng(0), np.float64, std=0.3)
    same = np.allclose(got, steps(plain, tokens, two_caches(plain, 1)[0], [4]))
    assert same == ("dispatcher" in handed_in)  # the others change the numbers


@pytest.mark.parametrize(
    "how", [dict(dtype=ml_dtypes.bfloat16), dict(dtype=np.float64, attention=recomputed_attention)]
)
def test_decoder_over_another_cache_is_the_model(how):
    model, tokens = odd_model(), odd_tokens(2, 2)
    a, b = (LatentCache(model.config, 2, **how) for _ in range(2))
    np.testing.assert_array_equal(Decoder(model).decode(tokens, a), model.decode(tokens, b))


def test_decoder_of_many_tokens_is_the_model():
    model, tokens = odd_model(), odd_tokens(1, FEW + 1)
    a, b = two_caches(model, 1)
    np.testing.assert_array_equal(Decoder(model).decode(tokens, a), model.decode(tokens, b))


@pytest.mark.parametrize("tokens", [[[29]], [[-1]], [[1.0]], [3], [[]]])
def test_decoder_refuses_what_the_model_refuses(tokens):
    model = odd_model()
    with pytest.raises(ValueError, match="tokens"):
        Decoder(model).decode(np.array(tokens), LatentCache(model.config, 1, np.float64))


def test_decoder_of_a_model_without_weights_is_refused():
    model = Transformer(odd_config())
    with pytest.raises(ValueError, match="no weights yet"):
        Decoder(model).decode(np.array([[1]]), LatentCache(model.config, 1))


def test_decoder_gate_breaks_ties_like_the_model(alone):
    """Equal scores: the lowest index wins."""
    model, tokens = odd_model(n_group=1, topk_group=1), odd_tokens(1, 3)
    for layer in model.layers[1:]:
        layer.mlp.gate.weight.data[...] = 0
        layer.mlp.gate.e_score_correction_bias[...] = 0
    ours, theirs = two_caches(model, 1)
    got, expected = steps(alone(model), tokens, ours, [1, 2]), steps(model, tokens, theirs, [3])
    np.testing.assert_allclose(got, expected, **ROUNDING[np.float64])
    chosen = select_experts(np.full((1, 12), 0.5), np.zeros(12), top_k=4, n_group=1, topk_group=1, method="noaux_tc")
    assert chosen.tolist() == [[0, 1, 2, 3]]


def test_decoder_takes_activations_that_overflow_an_exponential(alone):
    model, tokens = odd_model(np.float32), odd_tokens(1, 1)
    for layer in model.layers:
        mlp = layer.mlp
        (mlp.experts if hasattr(mlp, "experts") else mlp).gate_up.data[...] *= 1e3
    ours, theirs = two_caches(model, 1)
    np.testing.assert_allclose(alone(model).decode(tokens, ours), model.decode(tokens, theirs), rtol=1e-4, atol=1e-5)
