"""Causal attention: against a slow loop, and the properties that a fast form could lose."""

import numpy as np
import pytest

from minidsv3.autograd import Tensor, trace
from minidsv3.ops.attention import QUERY_BLOCK, attention

RNG = np.random.default_rng(37)
B, S, H, D_N, D_R, D_V = 2, 5, 3, 4, 6, 7


def inputs(length=S, dtype=np.float64):
    shapes = (B, length, H, D_N + D_R), (B, length, H, D_N + D_V), (B, length, D_R)
    return [RNG.standard_normal(shape).astype(dtype) for shape in shapes]


def attend(q, kv, k_rope, scale=0.4):
    return attention(Tensor(q), Tensor(kv), Tensor(k_rope), scale).data


def slow_attention(q, kv, k_rope, scale):
    o = np.empty((B, q.shape[1], H, D_V))
    for b, i, h in np.ndindex(o.shape[:3]):
        scores = []
        for j in range(i + 1):
            content = sum(q[b, i, h, c] * kv[b, j, h, c] for c in range(D_N))
            position = sum(q[b, i, h, D_N + c] * k_rope[b, j, c] for c in range(D_R))
            scores.append(scale * (content + position))
        p = np.exp(scores) / np.exp(scores).sum()
        o[b, i, h] = sum(p[j] * kv[b, j, h, D_N:] for j in range(i + 1))
    return o


def test_attention_equals_a_slow_loop():
    arrays = inputs()
    np.testing.assert_allclose(attend(*arrays), slow_attention(*arrays, 0.4), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("size", [1.0, 40.0])  # 40: scores beyond the bound, where row maxima are subtracted
@pytest.mark.parametrize("length, changed", [(S, 3), (QUERY_BLOCK + 7, QUERY_BLOCK + 2), (QUERY_BLOCK + 7, 20)])
def test_attention_sees_nothing_after_itself_to_the_bit(length, changed, size):
    before = [size * a for a in inputs(length)]
    after = [a.copy() for a in before]
    for a in after:
        a[:, changed:] = size * RNG.standard_normal(a[:, changed:].shape)
    bits = attend(*before)[:, :changed], attend(*after)[:, :changed]
    if size == 1.0:
        np.testing.assert_array_equal(*bits)
    else:
        np.testing.assert_allclose(*bits, rtol=1e-9, atol=1e-9)  # the bound may choose the other form


def test_first_query_returns_the_first_value():
    q, kv, k_rope = inputs()
    np.testing.assert_allclose(attend(q, kv, k_rope)[:, 0], kv[:, 0, :, D_N:], rtol=1e-15)


def test_equal_keys_give_the_mean_of_the_values_so_far():
    q, kv, k_rope = inputs()
    kv[..., :D_N], k_rope[...] = 0.5, 0.25
    expected = np.cumsum(kv[..., D_N:], axis=1) / np.arange(1, S + 1)[:, None, None]
    np.testing.assert_allclose(attend(q, kv, k_rope), expected, rtol=1e-13, atol=1e-15)


def test_attention_treats_sequences_apart():
    q, kv, k_rope = inputs()
    alone = attend(q[1:], kv[1:], k_rope[1:])
    np.testing.assert_array_equal(attend(q, kv, k_rope)[1:], alone)


def test_heads_share_the_rotated_key_only():
    """Changing head 1's content keys and values changes head 1 alone; changing k_rope changes all."""
    q, kv, k_rope = inputs()
    other_kv = kv.copy()
    other_kv[:, :, 1] += 1
    changed = [
        h for h in range(H) if not np.array_equal(attend(q, kv, k_rope)[:, :, h], attend(q, other_kv, k_rope)[:, :, h])
    ]
    rope_changed = [
        h for h in range(H) if not np.array_equal(attend(q, kv, k_rope)[:, :, h], attend(q, kv, k_rope * 2)[:, :, h])
    ]
    assert (changed, rope_changed) == ([1], [0, 1, 2])


def test_attention_weights_sum_to_one():
    q, kv, k_rope = inputs()
    kv[..., D_N:] = 1
    np.testing.assert_allclose(attend(q, kv, k_rope), 1, rtol=1e-14)


def test_attention_counts_flops_of_the_causal_half_only():
    with trace() as records:
        attend(*inputs())
    pairs = sum(i + 1 for i in range(S))
    assert records[0].flops == B * H * pairs * 2 * (D_N + D_R + D_V)


def test_attention_of_float32_is_float32():
    assert attend(*inputs(dtype=np.float32)).dtype == np.float32
