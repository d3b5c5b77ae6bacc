"""LogFMT against its definition, number by number."""

import math

import numpy as np
import pytest

from minidsv3.quant.formats import BF16
from minidsv3.quant.logfmt import compared, logfmt10, logfmt_decode, logfmt_encode, logfmt_round

RNG = np.random.default_rng(0)


def levels(tile, bits):
    """All magnitudes that LogFMT has for a tile of Python floats, zero first."""
    logs = [math.log(abs(v)) for v in tile if v]
    high = max(logs)
    low = max(min(logs), high - math.log(2.0**32))
    step = (high - low) / (2 ** (bits - 1) - 2)
    return [0.0] + [math.exp(low + step * k) for k in range(2 ** (bits - 1) - 1)]


@pytest.mark.parametrize("bits", [3, 8, 10])
@pytest.mark.parametrize("scale", [1.0, 1e-20])
def test_logfmt_takes_the_nearest_level_in_linear_space(bits, scale):
    x = (RNG.standard_normal((3, 200)) * scale).astype(np.float32)
    x[0, 5], x[1, :] = 0, np.exp(RNG.uniform(-40, 0, 200)) * scale  # wider than the 32 binades
    got = logfmt_round(x, bits)
    for i, columns in ((i, slice(a, a + 128)) for i in range(3) for a in (0, 128)):
        levels_here = levels(x[i, columns].tolist(), bits)
        for value, rounded in zip(x[i, columns].tolist(), got[i, columns].tolist()):
            distance = min(abs(abs(value) - level) for level in levels_here)
            # logarithms and exponentials are good to some 1e-15, the result is a float32
            assert abs(abs(value) - abs(rounded)) <= distance * (1 + 1e-9) + abs(value) * 1.2e-7
            assert rounded == 0 or math.copysign(1, value) == math.copysign(1, rounded)


def test_logfmt_keeps_zero_the_largest_and_the_smallest():
    x = np.array([[0.0, 3.5, -1e-3, 0.25, -0.0]], dtype=np.float32)
    got = logfmt_round(x, 8)
    assert got[0, 0] == got[0, 4] == 0
    np.testing.assert_allclose(got[0, 1:3], x[0, 1:3], rtol=1e-6)


def test_logfmt_codes_of_the_ends():
    tiles = logfmt_encode(np.array([[1.0, -0.5, 0.0]], dtype=np.float32), 8)
    assert tiles.codes.tolist() == [[127, 128 + 1, 0]]
    assert logfmt_decode(tiles).tolist() == [[1.0, -0.5, 0.0]]


@pytest.mark.parametrize(
    "x", [np.zeros((2, 130)), np.full((2, 3), -7.0), np.full((1, 1), 3e38), np.full((1, 2), 1e-45)]
)
def test_logfmt_of_one_magnitude_is_exact(x):
    np.testing.assert_allclose(logfmt_round(x.astype(np.float32), 8), x.astype(np.float32), rtol=1e-6)


@pytest.mark.parametrize("x, bits, message", [
    (np.zeros(3), 8, "matrix"), (np.full((1, 2), np.nan), 8, "NaN or Inf"), (np.zeros((1, 2)), 2, "bits=2"),
])  # fmt: skip
def test_logfmt_refuses(x, bits, message):
    with pytest.raises(ValueError, match=message):
        logfmt_encode(x.astype(np.float32), bits)


def test_logfmt10_takes_the_nearest_of_its_levels():
    x = (RNG.uniform(0.01, 0.9, (4, 128)) * RNG.choice([-1, 1], (4, 128))).astype(BF16).astype(np.float32)
    got = logfmt10(x)
    for row, rounded in zip(x, got):
        low, high = math.log2(np.abs(row).min()), math.log2(np.abs(row).max())
        all_levels = np.exp2(low + (high - low) / 510 * np.arange(511))
        best = np.abs(np.abs(row)[:, None] - all_levels).min(axis=1)
        # the threshold is computed in float32: next to the mean of two levels either may come out
        assert (np.abs(np.abs(row) - np.abs(rounded)) <= best + 2e-5 * np.abs(row)).all()
        assert (np.sign(rounded) == np.sign(row)).all()


@pytest.mark.parametrize("x", [np.full((1, 128), 0.5), np.linspace(0.5, 1.5, 128)[None], np.zeros((1, 128))])
def test_logfmt10_leaves_tiles_in_bf16(x):
    x = x.astype(np.float32)
    np.testing.assert_array_equal(logfmt10(x), x.astype(BF16).astype(np.float32))


def test_compared_on_normal_numbers_as_measured_before():
    """Of N(0, 1) in BF16: LogFMT-8 1.41e-2, E4M3 2.57e-2, E5M2 5.13e-2, LogFMT-10 3.5e-3."""
    x = np.random.default_rng(1).standard_normal((500, 1280)).astype(BF16).astype(np.float32)
    errors = compared(x)
    for name, expected in {"E5M2": 5.13e-2, "E4M3": 2.57e-2, "LogFMT-8": 1.41e-2, "LogFMT-10": 3.5e-3}.items():
        assert abs(errors[name] / expected - 1) < 0.03, name
    assert errors["BF16"] == 0
