"""Three ways to attend that are one: keys and values of all tokens, recomputed from the cache, absorbed."""

import tracemalloc

import numpy as np
import pytest
from reference_model import YARN, odd_model, odd_tokens

from minidsv3.generation.cache import PAGE, LatentCache
from minidsv3.ops.latent import absorbed_attention, recomputed_attention

WAYS = [absorbed_attention, recomputed_attention]
VARIANTS = {
    "V3": {},
    "no query latent": dict(q_lora_rank=None),
    "YaRN": dict(rope_scaling=YARN),
    "halves": dict(rope_interleave=False),
}
# Sums in another order, over values of order one, in float64.
ROUNDING = dict(rtol=1e-12, atol=1e-12)


def arguments(B=2, S=3, H=5, d_n=4, d_r=2, d_v=6, r_kv=7, lengths=(9, 4), dtype=np.float64, seed=0):
    """Random queries, pages of different sizes, start, weight, scale."""
    rng = np.random.default_rng(seed)
    stop = max(lengths) + S
    sizes = [stop // 3, stop - stop // 3]
    q = rng.standard_normal((B, S, H, d_n + d_r)).astype(dtype)
    pages = [rng.standard_normal((B, n, r_kv + d_r)).astype(dtype) for n in sizes]
    w = rng.standard_normal((H * (d_n + d_v), r_kv)).astype(dtype)
    return q, pages, np.array(lengths), w, 0.37


def attended_in_loops(q, pages, start, w, scale):
    """Token by token and head by head, with the keys and values written out."""
    cached, (B, S, H, d), r_kv = np.concatenate(pages, axis=1), q.shape, w.shape[1]
    d_n = d - (cached.shape[2] - r_kv)
    up = w.reshape(H, -1, r_kv)
    o = np.empty((B, S, H, up.shape[1] - d_n), dtype=np.float64)
    for b in range(B):
        for s in range(S):
            for h in range(H):
                seen = cached[b, : start[b] + s + 1]
                keys = [np.concatenate([up[h, :d_n] @ token[:r_kv], token[r_kv:]]) for token in seen]
                p = np.exp([scale * (q[b, s, h] @ key) for key in keys])
                o[b, s, h] = sum(p_j * (up[h, d_n:] @ token[:r_kv]) for p_j, token in zip(p / p.sum(), seen))
    return o


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", [(9, 4), (5, 5), (0, 0), (0, 8)])
def test_attention_over_a_cache_equals_loops(way, lengths):
    given = arguments(lengths=lengths)
    np.testing.assert_allclose(way(*given), attended_in_loops(*given), **ROUNDING)


@pytest.mark.parametrize("way", WAYS)
def test_attention_over_a_cache_in_float32_is_float32(way):
    assert way(*arguments(dtype=np.float32)).dtype == np.float32


@pytest.mark.parametrize("way", WAYS)
def test_attention_over_a_cache_leaves_its_arguments_alone(way):
    given = arguments()
    before = [a.copy() for a in (given[0], *given[1], given[3])]
    way(*given)
    for a, b in zip(before, (given[0], *given[1], given[3])):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("way", WAYS)
def test_attention_over_a_cache_does_not_see_what_comes_later(way):
    """Behind a sequence's own end lie other sequences' padding and rejected guesses."""
    q, pages, start, w, scale = arguments(lengths=(9, 4))
    before = way(q, pages, start, w, scale)
    changed = [page.copy() for page in pages]
    changed[1][1, 7 - pages[0].shape[1] :] = 1e3  # of 12 tokens the second sequence has 4 + 3
    np.testing.assert_array_equal(way(q, changed, start, w, scale), before)


def hidden(model, tokens, way, chunks):
    cache, at, parts = LatentCache(model.config, len(tokens), np.float64, attention=way), 0, []
    for n in chunks:
        parts.append(model.decode(tokens[:, at : at + n], cache))
        cache.extend(n)
        at += n
    assert at == tokens.shape[1]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunks", [[11], [1] * 11, [4, 1, 6]], ids=["at once", "token by token", "in chunks"])
def test_decoding_equals_the_training_form(variant, way, chunks):
    model, tokens = odd_model(**VARIANTS[variant]), odd_tokens(2, 11)
    got = model.head(hidden(model, tokens, way, chunks))
    np.testing.assert_allclose(got, model.logits(tokens), **ROUNDING)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunks", [[PAGE + 9], [PAGE - 1, 2, 8], [PAGE, 9]])
def test_decoding_over_the_edge_of_a_page_equals_the_training_form(way, chunks):
    model, tokens = odd_model(), odd_tokens(1, PAGE + 9)
    np.testing.assert_allclose(model.head(hidden(model, tokens, way, chunks)), model.logits(tokens), **ROUNDING)


@pytest.mark.parametrize("way", WAYS)
def test_decoding_of_sequences_of_different_length_equals_each_alone(way):
    model, tokens = odd_model(), odd_tokens(3, 9)
    counts, cache = np.array([5, 2, 4]), LatentCache(model.config, 3, np.float64, attention=way)
    model.decode(tokens[:, :5], cache)
    cache.extend(counts)
    new = np.stack([tokens[b, n : n + 3] for b, n in enumerate(counts)])
    got = model.head(model.decode(new, cache))
    for b, n in enumerate(counts):
        expected = model.logits(tokens[b : b + 1, : n + 3])[0, n:]
        np.testing.assert_allclose(got[b], expected, **ROUNDING)


@pytest.mark.parametrize("depths", [1, 2])
def test_drafting_equals_the_mtp_logits_of_training(depths):
    model, tokens = odd_model(num_nextn_predict_layers=depths), odd_tokens(2, 9)
    cache = LatentCache(model.config, 2, np.float64)
    h, S = model.decode(tokens, cache), tokens.shape[1]
    for k, expected in enumerate(model.mtp_logits(tokens), start=1):
        own = LatentCache(model.config, 2, np.float64, layers=1)
        parts = []
        for a, b in ((0, 4), (4, S - k)):  # in two pieces, so that the module's own cache is used
            parts.append(model.draft(k, h[:, a:b], tokens[:, a + k : b + k], own))
            own.extend(b - a)
        h = np.concatenate(parts, axis=1)
        np.testing.assert_allclose(model.head(h), expected, **ROUNDING)


# A long context: keys of all heads would be L H d_n = 4096 x 16 x 64 numbers, 32 MiB in float64.
L, H, D_N = 4096, 16, 64


def peak_of(compute):
    tracemalloc.start()
    try:
        compute()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_absorbed_step_allocates_nothing_of_all_keys_size():
    q, pages, start, w, scale = arguments(B=1, S=1, H=H, d_n=D_N, d_v=D_N, r_kv=16, lengths=(L - 1,))
    keys = L * H * D_N * 8
    assert peak_of(lambda: recomputed_attention(q, pages, start, w, scale)) > keys
    # Scores of all heads are L H numbers; a few arrays of them, and the latents of order L r_kv.
    assert peak_of(lambda: absorbed_attention(q, pages, start, w, scale)) < keys / 10


def test_decoding_step_of_the_model_allocates_nothing_of_all_keys_size():
    """The same through the layer and its cache of pages."""
    model = odd_model(
        num_attention_heads=H, qk_nope_head_dim=D_N, v_head_dim=D_N, num_hidden_layers=1, first_k_dense_replace=1,
        num_nextn_predict_layers=0,
    )  # fmt: skip
    cache, token = LatentCache(model.config, 1, np.float64), np.array([[3]])
    rng, cfg = np.random.default_rng(0), model.config
    entry = rng.standard_normal((1, L - 1, cfg.kv_lora_rank + cfg.qk_rope_head_dim))
    cache.layers[0].append(entry[..., : cfg.kv_lora_rank], entry[..., cfg.kv_lora_rank :])
    cache.extend(L - 1)
    assert peak_of(lambda: model.decode(token, cache)) < L * H * D_N * 8 / 10
