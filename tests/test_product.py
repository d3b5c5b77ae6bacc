"""Products of FP8 operands against float64 sums of blocks."""

import numpy as np
import pytest

from minidsv3.quant.blockwise import Quantized, quantize_blocks, quantize_tiles, there_and_back
from minidsv3.quant.product import Values, part, product, scaled_product, turned
from minidsv3.quant.tensorcore import deepgemm

RNG = np.random.default_rng(0)
M, N = 70, 140


def operands(K, tiles):
    """Rows and columns of very different size, so that a wrong scale shows."""
    x = (RNG.standard_normal((M, K)) * np.exp(RNG.normal(size=(M, 1)) * 3)).astype(np.float32)
    w = (RNG.standard_normal((N, K)) * np.exp(RNG.normal(size=(1, K)) * 2)).astype(np.float32)
    return quantize_tiles(x), quantize_tiles(w) if tiles else quantize_blocks(w)


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("K", [1, 100, 128, 200, 1000])
def test_scaled_product_is_the_float64_sum_of_scaled_blocks(K, tiles):
    """Two roundings of operands, at most one for each of 128 products and sums, one for each block: 2^-24 of each."""
    a, b = operands(K, tiles)
    want, magnitudes = np.zeros((M, N)), np.zeros((M, N))
    for i, k in enumerate(range(0, K, 128)):
        x, y = (codes[:, k : k + 128].astype(np.float64) for codes in (a.codes, b.codes))
        s_b = b.scales[:, i] if tiles else np.repeat(b.scales[:, i], 128)[:N]
        scale = a.scales[:, i, None].astype(np.float64) * s_b
        want += scale * (x @ y.T)
        magnitudes += scale * (np.abs(x) @ np.abs(y).T)
    roundings = 2 + 2 * min(K, 128) + -(-K // 128)
    assert (np.abs(scaled_product(a, b) - want) <= roundings * 2.0**-24 * magnitudes).all()


def test_values_are_summed_block_by_block():
    """To the bit: the order of FP32 additions is the blocks' own, whatever BLAS does with a long K."""
    x, y = (RNG.standard_normal((rows, 300)).astype(np.float32) for rows in (M, N))
    want = x[:, :128] @ y[:, :128].T
    for k in (slice(128, 256), slice(256, 300)):
        want += x[:, k] @ y[:, k].T
    np.testing.assert_array_equal(product(Values(x), Values(y)), want)


def test_exact_product_is_the_tensor_core():
    """Not only close: bits that only 13 fraction bits give."""
    x, w = (RNG.standard_normal((rows, 200)).astype(np.float32) for rows in (M, N))
    a, b = quantize_tiles(x), quantize_blocks(w)
    fast, exact = (scaled_product(a, b, exact=e) for e in (False, True))
    np.testing.assert_array_equal(exact, deepgemm(*a, *b))
    error = np.abs(exact - fast).max() / np.abs(fast).mean()
    assert 1e-5 < error < 2e-3


@pytest.mark.parametrize("quantise", [lambda x: Values(there_and_back(x, 1, 128, "fp32")), quantize_tiles])
@pytest.mark.parametrize("K", [0, 130])
def test_product_writes_into_out(quantise, K):
    a, b = (quantise(RNG.standard_normal((rows, K)).astype(np.float32)) for rows in (M, N))
    want = product(a, b)
    assert want.dtype == np.float32 and want.shape == (M, N) and (want.any() or K == 0)
    for out in (np.ones((M, N), dtype=np.float32), np.ones((M, N)), np.ones((N, M), dtype=np.float32).T):
        assert product(a, b, out) is out
        np.testing.assert_array_equal(out, want)


def test_part_and_transpose():
    a, _ = operands(200, tiles=True)
    piece = part(turned(a), 128, 200, cuts=[0, 128, 200])
    np.testing.assert_array_equal(piece.scales, a.scales.T[1:])
    assert piece.codes.shape == (72, M)
    np.testing.assert_array_equal(part(a, 3, 9).scales, a.scales[3:9])
    np.testing.assert_array_equal(part(Values(a.scales), 3, 9).values, a.scales[3:9])


def test_codes_and_values_do_not_mix():
    a, b = operands(5, tiles=True)
    with pytest.raises(TypeError, match="one operand has codes"):
        product(Quantized(*a), Values(b.codes.astype(np.float32)))
