"""The latent cache: what it keeps of a token, that growing copies nothing, and that cutting back is exact."""

import ml_dtypes
import numpy as np
import pytest
from reference_model import ODD, odd_config, odd_model, odd_tokens

from minidsv3 import ModelConfig
from minidsv3.generation.cache import PAGE, LatentCache

V3 = ModelConfig.preset("deepseek-v3")
BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
R_KV, D_R = ODD["kv_lora_rank"], ODD["qk_rope_head_dim"]


def filled(batch, S, dtype=np.float64, seed=0, config=None):
    """A cache with S random tokens of each sequence, and what was put in: per layer [B, S, r_kv + d_r]."""
    config = config or odd_config()
    cache, put = LatentCache(config, batch, dtype), []
    rng = np.random.default_rng(seed)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    for layer in cache.layers:
        entry = rng.standard_normal((batch, S, width))
        layer.append(entry[..., : config.kv_lora_rank], entry[..., config.kv_lora_rank :])
        put.append(entry)
    cache.extend(S)
    return cache, put


def held(cache, layer, b):
    """What a layer holds of sequence b, [length, r_kv + d_r], as the numbers that attention would see."""
    pages, scales = cache.layers[layer].pages, cache.layers[layer].scales
    values = [page[b].astype(np.float64) for page in pages]
    if scales:
        values = [value * scale[b] for value, scale in zip(values, scales)]
    return np.concatenate(values)[: cache.lengths[b]]


def one_token(dtype):
    cache = LatentCache(V3, 1, dtype)
    for layer in cache.layers:
        layer.append(np.zeros((1, 1, 512), dtype=np.float32), np.zeros((1, 1, 64), dtype=np.float32))
    cache.extend(1)
    return cache


def test_cache_at_the_v3_shapes_is_70272_bytes_a_token_in_bf16():
    assert one_token(BF16).bytes_per_token == 70_272 == 61 * (512 + 64) * 2


def test_cache_at_the_v3_shapes_against_plain_multi_head_attention():
    """Keys and values of 128 heads of 128 numbers: 56.9 times as much."""
    assert round(61 * 2 * 128 * 128 * 2 / one_token(BF16).bytes_per_token, 1) == 56.9


def test_cache_at_the_v3_shapes_against_its_own_materialised_keys_and_values():
    """128 heads with keys of 192 and values of 128 numbers: 71.1 times as much."""
    assert round(61 * (192 + 128) * 128 * 2 / one_token(BF16).bytes_per_token, 1) == 71.1


def test_cache_at_the_v3_shapes_holds_one_page_a_layer():
    assert one_token(BF16).nbytes == 70_272 * PAGE


@pytest.mark.parametrize(
    ("dtype", "size"), [(np.float64, 8), (np.float32, 4), (BF16, 2)], ids=["float64", "float32", "bfloat16"]
)
def test_cache_keeps_rank_plus_rope_numbers_of_each_token_and_layer(dtype, size):
    cache, _ = filled(2, 3, dtype)
    assert cache.numbers_per_token == 2 * (R_KV + D_R)
    assert cache.bytes_per_token == 2 * (R_KV + D_R) * size
    assert all(page.shape[-1] == R_KV + D_R for layer in cache.layers for page in layer.pages)


def test_cache_in_e4m3_keeps_a_byte_a_number_and_a_scale_a_token():
    assert filled(2, 3, E4M3)[0].bytes_per_token == 2 * (R_KV + D_R + 4)


def test_cache_before_the_first_token_is_empty():
    cache = LatentCache(odd_config(), 3)
    assert (cache.bytes_per_token, cache.nbytes, cache.lengths.tolist()) == (0, 0, [0, 0, 0])


def test_cache_default_is_float32():
    assert filled(1, 1, np.float32)[0].dtype == LatentCache(odd_config(), 1).dtype == np.float32


def test_cache_gives_back_what_was_put_in():
    cache, put = filled(2, 2 * PAGE + 5)
    for layer in range(2):
        for b in range(2):
            np.testing.assert_array_equal(held(cache, layer, b), put[layer][b])


def test_cache_growing_copies_nothing():
    """The same pages, with the same content, at the same place in memory."""
    cache, _ = filled(2, PAGE - 1)
    pages = [page for layer in cache.layers for page in layer.pages]
    before = [(id(page), page.ctypes.data, page[:, : PAGE - 1].tobytes()) for page in pages]
    for _ in range(3):
        for layer in cache.layers:
            layer.append(np.ones((2, PAGE, R_KV)), np.ones((2, PAGE, D_R)))
        cache.extend(PAGE)
    after = [layer.pages[0] for layer in cache.layers]
    assert [(id(page), page.ctypes.data, page[:, : PAGE - 1].tobytes()) for page in after] == before
    assert [len(layer.pages) for layer in cache.layers] == [4, 4]


def test_cache_of_sequences_of_different_length_puts_each_behind_its_own_end():
    cache = LatentCache(odd_config(), 3, np.float64)
    rng, expected = np.random.default_rng(0), [[], [], []]
    for counts in ([5, 1, 3], [2, 4, 0], [PAGE, 3, 130], [1, 1, 1]):
        S = max(counts)
        entry = rng.standard_normal((3, S, R_KV + D_R))
        for layer in cache.layers:
            layer.append(entry[..., :R_KV], entry[..., R_KV:])
        cache.extend(np.array(counts))
        for b, n in enumerate(counts):
            expected[b] += entry[b, :n].tolist()
    for b in range(3):
        assert held(cache, 1, b).tolist() == expected[b]


@pytest.mark.parametrize("lengths", [5, [5, 5], [0, PAGE + 2], [PAGE, 1]])
def test_cache_truncated_and_continued_is_as_if_never_longer(lengths):
    cache, put = filled(2, PAGE + 3)
    cache.truncate(np.array(lengths))
    entry = np.random.default_rng(9).standard_normal((2, 7, R_KV + D_R))
    for layer in cache.layers:
        layer.append(entry[..., :R_KV], entry[..., R_KV:])
    cache.extend(7)
    for b, length in enumerate(np.broadcast_to(lengths, 2)):
        for layer in range(2):
            expected = np.concatenate([put[layer][b, :length], entry[b]])
            np.testing.assert_array_equal(held(cache, layer, b), expected)


def test_model_after_truncation_computes_what_it_would_have():
    """Rolled back exactly: equal to the bit where the same numbers of rows meet."""
    model, tokens = odd_model(), odd_tokens(2, 9)
    wrong = (tokens + 1) % ODD["vocab_size"]
    plain, cut = (LatentCache(model.config, 2, np.float64) for _ in range(2))
    for cache in (plain, cut):
        model.decode(tokens[:, :4], cache)
        cache.extend(4)
    model.decode(wrong[:, 4:8], cut)
    cut.extend(4)
    cut.truncate(4)
    np.testing.assert_array_equal(model.decode(tokens[:, 4:], cut), model.decode(tokens[:, 4:], plain))


def test_model_padding_that_is_not_counted_leaves_no_trace():
    model, tokens = odd_model(), odd_tokens(1, 6)
    plain, padded = (LatentCache(model.config, 1, np.float64) for _ in range(2))
    model.decode(tokens[:, :4], plain)
    plain.extend(4)
    model.decode(np.concatenate([tokens[:, :4], [[3, 3, 3]]], axis=1), padded)
    padded.extend(4)
    got, expected = (model.decode(tokens[:, 4:], cache) for cache in (padded, plain))
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)  # gemms of 7 and of 4 rows round differently


@pytest.mark.parametrize("lengths", [8, -1, [3, 8], [0, -2]])
def test_truncate_refuses_lengths_that_are_not_there(lengths):
    cache, _ = filled(2, 7)
    with pytest.raises(ValueError, match=r"can't cut sequences of \[7, 7\] tokens to"):
        cache.truncate(lengths)


def test_truncate_keeps_a_copy_of_the_lengths():
    cache, _ = filled(2, 7)
    lengths = np.array([3, 4])
    cache.truncate(lengths)
    lengths[:] = 6
    assert cache.lengths.tolist() == [3, 4]


def test_positions_follow_each_sequence():
    cache, _ = filled(2, 7)
    assert cache.positions(3).tolist() == [7, 8, 9]
    cache.truncate([2, 5])
    assert cache.positions(3).tolist() == [[2, 3, 4], [5, 6, 7]]


def test_cache_in_bf16_errs_by_half_a_step():
    """Seven fraction bits: 2^-8 of the value."""
    cache, put = filled(2, PAGE + 5, BF16)
    for b in range(2):
        assert (np.abs(held(cache, 0, b) - put[0][b]) <= np.abs(put[0][b]) * 2.0**-8 * (1 + 1e-6)).all()


def test_cache_in_e4m3_errs_by_half_a_step():
    """Three fraction bits: 2^-4 of the value, or 2^-10 of a token's scale near zero."""
    cache, put = filled(2, PAGE + 5, E4M3)
    for b in range(2):
        scale = np.abs(put[0][b]).max(axis=-1, keepdims=True) / 448
        limit = np.maximum(np.abs(put[0][b]) / 16, scale * 2.0**-10) * (1 + 1e-6)
        assert (np.abs(held(cache, 0, b) - put[0][b]) <= limit).all()


@pytest.mark.parametrize(("dtype", "limit"), [(BF16, 0.016), (E4M3, 0.25)], ids=["bfloat16", "e4m3"])
def test_model_with_a_narrow_cache_stays_close(dtype, limit):
    """Relative to the spread of the hidden states; the limits are about four times what is measured."""
    model, tokens = odd_model(np.float32, first_k_dense_replace=2), odd_tokens(2, 20)  # a gate would jump
    wide, narrow = LatentCache(model.config, 2), LatentCache(model.config, 2, dtype)
    expected, got = model.decode(tokens, wide), model.decode(tokens, narrow)
    assert got.dtype == np.float32
    assert 0 < np.sqrt(np.mean((got - expected) ** 2)) < limit * expected.std()


def test_mtp_cache_has_one_layer():
    assert len(LatentCache(odd_config(), 1, layers=1).layers) == 1


@pytest.mark.parametrize("dtype", [np.float16, np.int8, ml_dtypes.float8_e5m2])
def test_cache_refuses_other_dtypes(dtype):
    with pytest.raises(ValueError, match="is not float32, float64, bfloat16 or float8_e4m3fn"):
        LatentCache(odd_config(), 1, dtype)


@pytest.mark.parametrize("batch", [0, -3])
def test_cache_refuses_an_empty_batch(batch):
    with pytest.raises(ValueError, match=f"batch={batch} is not positive"):
        LatentCache(odd_config(), batch)


@pytest.mark.parametrize("page", [1, 4, 9, 100])
def test_cache_put_is_append_and_returns_what_the_sequence_holds(page):
    cache, put = filled(2, 9)
    other = LatentCache(odd_config(), 2, np.float64, page=page)
    for at in range(9):
        for b in (1, 0):
            for layer, entries in zip(other.layers, put):
                np.testing.assert_array_equal(layer.put(b, at, entries[b, at]), entries[b, : at + 1])
    other.extend(9)
    for layer in range(2):
        np.testing.assert_array_equal(held(other, layer, 1), held(cache, layer, 1))


def test_cache_in_one_page_gives_a_view():
    cache = LatentCache(odd_config(), 1, np.float64, page=20)
    past = cache.layers[0].put(0, 0, np.ones(R_KV + D_R))
    assert past.base is not None and np.shares_memory(past, cache.layers[0].pages[0])


def test_cache_refuses_an_empty_page():
    with pytest.raises(ValueError, match="page=0 is not positive"):
        LatentCache(odd_config(), 1, page=0)
