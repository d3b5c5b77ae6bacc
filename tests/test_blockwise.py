"""Block scales against loops over the blocks."""

import numpy as np
import pytest

from minidsv3.quant.blockwise import BLOCK, block_scales, dequantize, quantize_blocks, quantize_tiles, scale_shape
from minidsv3.quant.formats import E4M3, E4M3_MAX

SIZES = [(1, 1), (3, 5), (127, 129), (128, 128), (130, 257), (300, 70)]
KINDS = ["fp32", "ue8m0"]


def matrix(shape, seed=0):
    """Numbers whose size differs from block to block."""
    rng = np.random.default_rng(seed)
    rows, columns = np.exp(rng.normal(size=(shape[0], 1)) * 2), np.exp(rng.normal(size=(1, shape[1])) * 2)
    return (rng.standard_normal(shape) * rows * columns).astype(np.float32)


def blocks(shape, rows, columns):
    """(index of the scale, slices of the block) of each block."""
    for i, a in enumerate(range(0, shape[0], rows)):
        for j, b in enumerate(range(0, shape[1], columns)):
            yield (i, j), (slice(a, a + rows), slice(b, b + columns))


def dequantized_in_loops(codes, scales, rows, columns):
    values = np.empty(codes.shape, dtype=np.float32)
    for index, block in blocks(codes.shape, rows, columns):
        values[block] = codes[block].astype(np.float32) * np.float32(scales[index])
    return values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SIZES)
def test_quantize_blocks_equals_each_block_alone(shape, kind):
    w = matrix(shape)
    codes, scales = quantize_blocks(w, kind)
    for (i, j), block in blocks(shape, BLOCK, BLOCK):
        alone = quantize_blocks(w[block], kind)
        assert alone.scales.tolist() == [[scales[i, j]]]
        assert alone.codes.view(np.uint8).tolist() == codes[block].view(np.uint8).tolist()


@pytest.mark.parametrize("shape", SIZES)
def test_quantize_blocks_fp32_scale_makes_the_largest_448(shape):
    w = matrix(shape)
    codes, scales = quantize_blocks(w)
    for index, block in blocks(shape, BLOCK, BLOCK):
        assert scales[index] == np.abs(w[block]).max() / np.float32(448)
        assert np.abs(codes[block].astype(np.float32)).max() == E4M3_MAX


@pytest.mark.parametrize("shape", SIZES)
def test_quantize_blocks_ue8m0_scale_is_the_next_power_of_two(shape):
    w = matrix(shape)
    codes, scales = quantize_blocks(w, "ue8m0")
    assert (np.frexp(scales)[0] == 0.5).all()
    for index, block in blocks(shape, BLOCK, BLOCK):
        needed = np.abs(w[block]).max() / np.float32(448)
        assert scales[index] / 2 < needed <= scales[index]
        assert 224 <= np.abs(codes[block].astype(np.float32)).max() <= 448


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_blocks_error_is_half_a_step(kind):
    """Three fraction bits: 2^-4 of the value, or half the smallest subnormal, 2^-10, of the scale."""
    w = matrix((130, 257))
    codes, scales = quantize_blocks(w, kind)
    error = np.abs(dequantize(codes, scales) - w)
    for index, block in blocks(w.shape, BLOCK, BLOCK):
        # The quotient and the product are rounded to float32 too: 1e-6 relative.
        limit = np.maximum(np.abs(w[block]) / 16, scales[index] * 2.0**-10) * (1 + 1e-6)
        assert (error[block] <= limit).all()


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_blocks_of_zeros_are_zeros(kind):
    codes, scales = quantize_blocks(np.zeros((130, 3), dtype=np.float32), kind)
    assert (scales > 0).all() and not dequantize(codes, scales).any()


def test_quantize_blocks_outlier_costs_its_own_block_only():
    w = matrix((256, 256))
    before = quantize_blocks(w)
    w[5, 200] = 1e6
    after = quantize_blocks(w)
    changed = before.scales != after.scales
    assert changed.tolist() == [[False, True], [False, False]]
    np.testing.assert_array_equal(dequantize(*before)[128:], dequantize(*after)[128:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 129), (5, 300)])
def test_quantize_tiles_equals_each_row_alone(shape, kind):
    x = matrix(shape)
    codes, scales = quantize_tiles(x, kind)
    assert scales.shape == (shape[0], -(-shape[1] // BLOCK))
    for (i, j), tile in blocks(shape, 1, BLOCK):
        alone = quantize_blocks(x[tile], kind)
        assert alone.scales[0, 0] == scales[i, j]
        assert alone.codes.view(np.uint8).tolist() == codes[tile].view(np.uint8).tolist()


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("rows, columns", [(BLOCK, BLOCK), (1, BLOCK), (3, 2)])
def test_dequantize_equals_a_loop_over_blocks(shape, rows, columns):
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 0x7F, shape, dtype=np.uint8).view(E4M3)
    scales = rng.uniform(0.1, 9, scale_shape(shape, rows, columns)).astype(np.float32)
    values = dequantize(codes, scales, rows, columns)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, dequantized_in_loops(codes, scales, rows, columns))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_quantize_blocks_gives_e4m3_and_float32(dtype):
    codes, scales = quantize_blocks(matrix((3, 5)).astype(dtype))
    assert codes.dtype == E4M3 and scales.dtype == np.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quantize", [quantize_blocks, quantize_tiles])
def test_quantize_refuses_what_is_not_finite(quantize, bad):
    w = matrix((3, 5))
    w[1, 2] = bad
    with pytest.raises(ValueError, match=r"shape \(3, 5\) holds NaN or Inf"):
        quantize(w)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_quantize_refuses_what_is_no_matrix(shape):
    with pytest.raises(ValueError, match="only matrices"):
        quantize_blocks(np.zeros(shape, dtype=np.float32))


def test_quantize_refuses_an_unknown_kind_of_scale():
    with pytest.raises(ValueError, match="scale='fp16' is not one of 'fp32', 'fp32-reciprocal', 'ue8m0'"):
        quantize_blocks(np.zeros((2, 2), dtype=np.float32), "fp16")


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (2, 3), (3, 2), (2,), (2, 2, 1)])
def test_dequantize_refuses_scales_of_another_shape(shape):
    codes = np.zeros((130, 129), dtype=np.uint8).view(E4M3)
    with pytest.raises(ValueError, match=r"scales of shape .* need \(2, 2\)"):
        dequantize(codes, np.ones(shape, dtype=np.float32))


def test_dequantize_refuses_codes_that_are_no_matrix():
    with pytest.raises(ValueError, match="need a matrix"):
        dequantize(np.zeros(5, dtype=np.uint8).view(E4M3), np.ones((1, 1), dtype=np.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SIZES)
def test_block_scales_are_those_of_quantize_blocks(shape, kind):
    np.testing.assert_array_equal(block_scales(matrix(shape), kind), quantize_blocks(matrix(shape), kind).scales)
