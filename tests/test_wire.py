"""Number formats of dispatch and combine."""

import numpy as np
import pytest

from minidsv3.parallel.wire import BF16_ROWS, FP8, RAW, WIRES
from minidsv3.quant.blockwise import dequantize, quantize_tiles
from minidsv3.quant.formats import BF16, to_bf16

X = np.random.default_rng(0).standard_normal((5, 300)).astype(np.float32)


@pytest.mark.parametrize("columns, nbytes", [(7168, 7392), (128, 132), (300, 312), (3, 7)])
def test_fp8_row_takes_a_byte_a_number_and_a_float_a_tile(columns, nbytes):
    assert FP8.encode(np.ones((2, columns), dtype=np.float32)).shape == (2, nbytes)


def test_fp8_rows_are_those_of_tiles():
    np.testing.assert_array_equal(FP8.decode(FP8.encode(X), 300), dequantize(*quantize_tiles(X), rows=1))


def test_fp8_rows_can_be_chosen_before_they_are_decoded():
    order = np.array([4, 0, 0, 2])
    np.testing.assert_array_equal(FP8.decode(FP8.encode(X)[order], 300), FP8.decode(FP8.encode(X), 300)[order])


def test_bf16_rows_take_two_bytes_a_number():
    sent = BF16_ROWS.encode(X)
    assert sent.dtype == BF16 and sent.nbytes == 2 * X.size
    np.testing.assert_array_equal(BF16_ROWS.decode(sent, 300), to_bf16(X).astype(np.float32))


def test_raw_rows_are_as_they_are():
    assert RAW.decode(RAW.encode(X), 300) is X


@pytest.mark.parametrize("name", WIRES)
def test_no_rows_travel_too(name):
    for fmt in (WIRES[name].dispatch, WIRES[name].combine):
        assert fmt.decode(fmt.encode(X[:0]), 300).shape == (0, 300)
