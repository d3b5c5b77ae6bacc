"""LogFMT-10 as a combine format: its bytes, what it makes of a row, and a combine through it."""

import numpy as np
import pytest
from many_ranks import Case

from minidsv3.parallel.logfmt_wire import LOGFMT10, LOW_LATENCY_LOGFMT10
from minidsv3.quant.formats import to_bf16
from minidsv3.quant.logfmt import logfmt_round


@pytest.mark.parametrize("columns, nbytes", [(7168, 9184), (128, 164), (6, 14), (130, 173)])
def test_row_takes_ten_bits_a_number_and_two_ends_a_tile(columns, nbytes):
    assert LOGFMT10.encode(np.ones((3, columns), dtype=np.float32)).shape == (3, nbytes)


@pytest.mark.parametrize("columns", [6, 128, 300])
def test_what_comes_out_is_what_the_format_makes_of_the_row(columns):
    rng = np.random.default_rng(0)
    x = to_bf16(rng.standard_normal((5, columns)) * 10.0 ** rng.integers(-3, 3, (5, 1))).astype(np.float32)
    x[2, : columns // 2] = 0
    got = LOGFMT10.decode(LOGFMT10.encode(x), columns)
    np.testing.assert_allclose(got, logfmt_round(x, 10), rtol=1e-6)
    assert (np.sign(got) == np.sign(x)).mean() > 0.99


def test_rows_of_zeros_and_no_rows_travel():
    assert (LOGFMT10.decode(LOGFMT10.encode(np.zeros((2, 130), dtype=np.float32)), 130) == 0).all()
    assert LOGFMT10.decode(LOGFMT10.encode(np.zeros((0, 130), dtype=np.float32)), 130).shape == (0, 130)


def test_combine_is_near_the_local_one():
    """The combine alone has ten bits, 0.35 % of a normal row; dispatch adds FP8's 2.6 %."""
    case = Case([5, 0, 3, 4], 8, 3, 128)
    (_, y, dx, _), _ = case.on_ranks(2, LOW_LATENCY_LOGFMT10)
    _, expected, expected_dx, _ = case.local()
    for ours, true in ((y, expected), (dx, expected_dx)):
        assert 0.005 < np.linalg.norm(ours - true) / np.linalg.norm(true) < 0.035
