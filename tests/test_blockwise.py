"""Block scales against loops over the blocks."""

import itertools
import math

import numpy as np
import pytest

from minidsv3.quant.blockwise import (
    BLOCK,
    block_scales,
    codes_and_values,
    dequantize,
    quantize_blocks,
    quantize_mx,
    quantize_tiles,
    quantized,
    scale_shape,
    there_and_back,
)  # fmt: skip
from minidsv3.quant.formats import BF16, E4M3, E4M3_MAX, E5M2, E5M6, UE8M0

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


# --- tiles along the tokens, published formulas, MX -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp32", "ue8m0", "fp32-reciprocal"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (129, 4), (300, 5)])
def test_tiles_along_the_tokens_are_tiles_of_the_transpose(shape, kind):
    x = matrix(shape)
    down, across = quantize_tiles(x, kind, axis=0), quantize_tiles(x.T.copy(), kind)
    assert down.scales.shape == (-(-shape[0] // BLOCK), shape[1])
    np.testing.assert_array_equal(down.scales, across.scales.T)
    assert (down.codes.view(np.uint8) == across.codes.view(np.uint8).T).all()
    np.testing.assert_array_equal(dequantize(*down, BLOCK, 1), dequantize(*across, 1, BLOCK).T)


def test_both_published_formulas_by_hand():
    """x / s and x * (1 / s) in float32; the scales are the same, a few codes are not."""
    x = matrix((64, 1024), seed=5).astype(BF16).astype(np.float32)
    scales = np.maximum(np.abs(x).reshape(64, 8, 128).max(axis=2), np.float32(1e-4)) / np.float32(448)
    spread = np.repeat(scales, 128, axis=1)
    for kind, ratio in (("fp32", x / spread), ("fp32-reciprocal", x * (np.float32(1) / spread))):
        codes, got = quantize_tiles(x, kind)
        np.testing.assert_array_equal(got, scales)
        assert (codes.view(np.uint8) == np.clip(ratio, -448, 448).astype(E4M3).view(np.uint8)).all()
    differ = quantize_tiles(x).codes.view(np.uint8) != quantize_tiles(x, "fp32-reciprocal").codes.view(np.uint8)
    assert 0 < differ.sum() < x.size / 500


def test_quantized_panels_do_not_matter():
    x = matrix((2100, 130), seed=6)  # more than one panel, and a ragged last block
    for rows, columns in ((1, 128), (128, 1), (128, 128), (2100, 130)):
        whole = quantized(x, rows, columns, "fp32")
        for i, a in enumerate(range(0, 2100, rows)):
            if i in (0, len(whole.scales) // 2, len(whole.scales) - 1):
                part = quantized(x[a : a + rows], rows, columns, "fp32")
                np.testing.assert_array_equal(part.scales, whole.scales[i : i + 1])
                assert (part.codes.view(np.uint8) == whole.codes[a : a + rows].view(np.uint8)).all()


@pytest.mark.parametrize("rows, columns", [(1, 128), (128, 1), (128, 128), ([0, 1, 129, 131, 200], 1)])
def test_there_and_back_gives_the_values_of_the_codes(rows, columns):
    x = matrix((200, 150), seed=7)
    x[130, :5] = 0, -0.0, 1e-30, -1e-12, 1e-5
    for kind, fmt in (("fp32", E4M3), ("ue8m0", E4M3), ("fp32-reciprocal", E4M3), ("fp32", E5M2), ("ue8m0", E5M6)):
        q = quantized(x, rows, columns, kind, fmt)
        values = dequantize(*q, rows, columns)
        np.testing.assert_array_equal(there_and_back(x, rows, columns, kind, fmt), values)
        (codes, scales), both = codes_and_values(x, rows, columns, kind, fmt)
        assert codes.dtype == q.codes.dtype and codes.tobytes() == q.codes.tobytes()
        np.testing.assert_array_equal(scales, q.scales)
        np.testing.assert_array_equal(both, values)


def test_blocks_of_given_heights_are_quantised_each_alone():
    x, cuts = matrix((700, 130), seed=12), [0, 1, 129, 130, 258, 300, 428, 556, 684, 700]  # more than one panel
    codes, scales = quantized(x, cuts, 128, "fp32")
    assert scales.shape == (9, 2)
    for i, (a, b) in enumerate(itertools.pairwise(cuts)):
        alone = quantize_blocks(x[a:b])
        np.testing.assert_array_equal(alone.scales, scales[i : i + 1])
        assert alone.codes.tobytes() == codes[a:b].tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("function", [quantized, there_and_back, codes_and_values])
def test_quantized_makes_a_bad_tile_nan_and_no_other(function, bad):
    x = matrix((3, 300), seed=8)
    x[1, 140] = bad
    result = function(x, 1, 128, "fp32")
    with np.errstate(invalid="ignore"):
        if function is there_and_back:
            values = [result]
        else:
            values = (
                [dequantize(*result, 1, 128)] if function is quantized else [dequantize(*result[0], 1, 128), result[1]]
            )
    for spread in values:
        assert np.isnan(spread[1, 128:256]).all()
        assert np.isfinite(np.delete(spread, 1, axis=0)).all() and np.isfinite(spread[1, :128]).all()


def test_an_outlier_as_large_as_float32_goes_costs_its_tile_only():
    x = matrix((2, 256), seed=9)
    x[0, 3] = np.finfo(np.float32).max
    values = dequantize(*quantize_tiles(x), 1, BLOCK)
    assert np.isfinite(values).all() and abs(values[0, 3] / x[0, 3] - 1) < 2.0**-4
    assert not values[0, :3].any()  # all else in its tile is lost; the next tile is not
    np.testing.assert_array_equal(values[:, 128:], dequantize(*quantize_tiles(x[:, 128:].copy()), 1, BLOCK))


def test_largest_float_with_power_of_two_scales_rounds_to_2_to_the_128():
    """Its code is 256 and its scale 2^120: right to the nearest, and one step beyond what float32 holds."""
    codes, scales = quantize_tiles(np.full((1, 1), np.finfo(np.float32).max, dtype=np.float32), "ue8m0")
    assert codes.astype(np.float32).tolist() == [[256]] and scales.tolist() == [[2.0**120]]
    with np.errstate(over="ignore"):
        assert dequantize(codes, scales, 1, BLOCK).tolist() == [[np.inf]]


def test_cutting_anew_with_powers_of_two_costs_nothing():
    """1x128 -> 128x1 with UE8M0 scales on both sides: the numbers come through unless they leave E4M3's range."""
    x = np.random.default_rng(10).standard_normal((128, 128)).astype(np.float32)
    once = dequantize(*quantize_tiles(x, "ue8m0"), 1, BLOCK)
    twice = dequantize(*quantize_tiles(once, "ue8m0", axis=0), BLOCK, 1)
    scales = quantize_tiles(once, "ue8m0", axis=0).scales
    normal = np.abs(once) >= scales * 2.0**-6
    assert normal.mean() > 0.95
    np.testing.assert_array_equal(twice[normal], once[normal])
    plain = dequantize(*quantize_tiles(dequantize(*quantize_tiles(x), 1, BLOCK), axis=0), BLOCK, 1)
    assert (plain != dequantize(*quantize_tiles(x), 1, BLOCK)).mean() > 0.5  # with FP32 scales it does cost


ELEMENTS = {"e4m3": (8, 448.0), "e5m2": (15, 57344.0), "e3m2": (4, 28.0), "e2m3": (2, 7.5), "e2m1": (2, 6.0)}


@pytest.mark.parametrize("mode", ["floor", "rceil"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_blocks_by_the_definition(name, mode):
    emax, largest = ELEMENTS[name]
    x = matrix((3, 70), seed=11)
    codes, scales = quantize_mx(x, name, mode)
    assert scales.dtype == UE8M0 and scales.shape == (3, 3)
    for (i, j), block in blocks(x.shape, 1, 32):
        amax = float(np.abs(x[block]).max())
        if mode == "floor":
            power = math.floor(math.log2(amax)) - emax
        else:
            power = math.ceil(math.log2(float(np.float32(amax) * np.float32(1 / largest))))
        assert float(scales[i, j].astype(np.float32)) == 2.0**power
        want = np.clip(x[block] / 2.0**power, -largest, largest).astype(codes.dtype)
        assert (codes[block].view(np.uint8) == want.view(np.uint8)).all()


@pytest.mark.parametrize("mode", ["floor", "rceil"])
def test_mx_marks_a_bad_block_and_keeps_zeros(mode):
    x = np.ones((2, 96), dtype=np.float32)
    x[0, 40], x[1, 70], x[1, :32] = np.nan, np.inf, 0
    codes, scales = quantize_mx(x, "e2m1", mode)
    assert np.isnan(scales.astype(np.float32)).tolist() == [[False, True, False], [False, False, True]]
    assert scales.view(np.uint8)[1, 0] == 0  # 2^-127
    values = dequantize(codes, scales, 1, 32)
    assert np.isnan(values[0, 32:64]).all() and not values[1, :32].any() and (values[1, 32:64] == 1).all()


@pytest.mark.parametrize("arguments, message", [(("bf16",), "no element of MX"), (("e4m3", "ceil"), "mode='ceil'")])
def test_mx_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_mx(np.ones((1, 32), dtype=np.float32), *arguments)


def test_tiles_refuse_another_axis():
    with pytest.raises(ValueError, match="axis=2"):
        quantize_tiles(np.ones((1, 2), dtype=np.float32), axis=2)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_matrices_have_empty_codes(shape):
    for axis in (0, 1):
        codes, scales = quantize_tiles(np.zeros(shape, dtype=np.float32), axis=axis)
        assert codes.shape == shape and dequantize(codes, scales, *((1, BLOCK) if axis else (BLOCK, 1))).shape == shape
