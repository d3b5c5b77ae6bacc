"""RoPE and YaRN: constants by hand, rotations by complex numbers and by matrices, and the two channel layouts."""

import math

import numpy as np
import pytest

from minidsv3.autograd import Tensor
from minidsv3.config import ModelConfig
from minidsv3.ops.rope import (
    correction_range,
    rope,
    rope_frequencies,
    rotation_magnitude,
    rotation_table,
    softmax_scale,
    yarn_mscale,
)

V3 = ModelConfig.preset("deepseek-v3")
LITE = ModelConfig.preset("deepseek-v2-lite")
RNG = np.random.default_rng(23)


def scaling(**changes):
    return {**V3.rope_scaling, **changes}


def turned(x, positions, theta=100.0, interleave=True, yarn=None, d_r=6):
    table = rotation_table(positions, d_r, theta, yarn, x.dtype)
    return rope(Tensor(x), table, interleave).data


# ---------------------------------------------------------------------------------------------- YaRN's constants


def test_v3_correction_range_is_10_to_23():
    """Pair j makes 4096 / (2 pi 10000^(2j/64)) turns in 4096 tokens: 32 at j = 10.47, 1 at j = 22.51."""

    def turns(j):
        return 4096 / (2 * math.pi * 10000 ** (2 * j / 64))

    assert turns(10.472) == pytest.approx(32, rel=1e-3) and turns(22.513) == pytest.approx(1, rel=1e-3)
    assert correction_range(64, 10000.0, V3.rope_scaling) == (10, 23)


def test_v3_mscale_is_the_reports():
    """Section 4.3: sqrt(t) = 0.1 ln 40 + 1."""
    assert yarn_mscale(40, 1.0) == pytest.approx(1.3688879454, abs=1e-10)


def test_v2_mscale_is_its_papers():
    """DeepSeek-V2: sqrt(t) = 0.0707 ln 40 + 1 = 1.2608038."""
    assert yarn_mscale(40, 0.707) == pytest.approx(1.2608038, abs=1e-7)


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_mscale_is_one_without_stretching(factor):
    assert yarn_mscale(factor, 1.0) == 1.0


def test_v3_softmax_factor_has_mscale_squared():
    """Pitfall 15: 192^-1/2 times 1.3688879454^2; forgetting it is invisible at position 0, where there is one key."""
    assert softmax_scale(192, V3.rope_scaling) == pytest.approx(0.1352338, abs=1e-7)


def test_v2_lite_softmax_factor_has_its_own_mscale():
    expected = 192**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2
    assert softmax_scale(192, LITE.rope_scaling) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("yarn", [None, {k: v for k, v in V3.rope_scaling.items() if not k.startswith("mscale")}])
def test_softmax_factor_is_plain_without_mscale_all_dim(yarn):
    assert softmax_scale(192, yarn) == 192**-0.5


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(mscale=1.0, mscale_all_dim=1.0), 1.0),  # V3: all of it stands in the softmax factor
        (dict(mscale=0.707, mscale_all_dim=0.707), 1.0),  # V2
        (dict(mscale=1.0, mscale_all_dim=0.707), 1.3688879454 / 1.2608037772),
        (dict(mscale=None, mscale_all_dim=None), 1.3688879454),  # YaRN as published: the rotation carries it
    ],
)
def test_mscale_is_applied_once(changes, expected):
    """Pitfall 15: applied in the rotation or in the softmax factor, never twice."""
    assert rotation_magnitude(scaling(**changes)) == pytest.approx(expected, rel=1e-9)


def test_no_yarn_leaves_rotations_of_length_one():
    assert rotation_magnitude(None) == 1.0


def test_fast_pairs_keep_their_frequency_under_yarn():
    plain, stretched = rope_frequencies(64, 1e4), rope_frequencies(64, 1e4, V3.rope_scaling)
    np.testing.assert_array_equal(stretched[:11], plain[:11])


def test_slow_pairs_are_stretched_by_the_factor_under_yarn():
    plain, stretched = rope_frequencies(64, 1e4), rope_frequencies(64, 1e4, V3.rope_scaling)
    np.testing.assert_allclose(stretched[23:], plain[23:] / 40, rtol=1e-15)


def test_pairs_between_are_blended_linearly_under_yarn():
    plain, stretched = rope_frequencies(64, 1e4), rope_frequencies(64, 1e4, V3.rope_scaling)
    for j in range(11, 23):
        share = (j - 10) / 13
        assert stretched[j] == pytest.approx(plain[j] * (1 - share) + plain[j] / 40 * share, rel=1e-14)


def test_frequencies_fall_from_one_by_powers_of_theta():
    expected = [1.0] + [1 / 10000 ** (2 * j / 8) for j in range(1, 4)]
    np.testing.assert_allclose(rope_frequencies(8, 1e4), expected, rtol=1e-15)


def test_correction_range_stays_inside_the_head():
    short = scaling(original_max_position_embeddings=16)
    low, high = correction_range(8, 100.0, short)
    assert low == 0 and 0 <= high <= 7


def test_narrow_correction_range_divides_by_no_zero():
    assert np.isfinite(rope_frequencies(2, 1e4, scaling(original_max_position_embeddings=4))).all()


# ------------------------------------------------------------------------------------------------ the rotation


@pytest.mark.parametrize("interleave", [True, False])
def test_rotation_equals_two_by_two_matrices(interleave):
    x, positions, d_n = RNG.standard_normal((2, 5, 3, 10)), np.arange(4, 9), 4
    y = turned(x, positions, interleave=interleave)
    for s, m in enumerate(positions):
        matrix = np.eye(10)
        for j in range(3):
            a, b = (d_n + 2 * j, d_n + 2 * j + 1) if interleave else (d_n + j, d_n + j + 3)
            angle = m * 100.0 ** (-2 * j / 6)
            matrix[a, a] = matrix[b, b] = math.cos(angle)
            matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
        np.testing.assert_allclose(y[:, s], x[:, s] @ matrix.T, rtol=1e-14, atol=1e-14)


def test_neighbours_equal_halves_under_the_channel_permutation():
    """Pitfall 14: the two layouts differ by a permutation of channels, and by nothing else."""
    x, positions = RNG.standard_normal((2, 5, 3, 6)), np.arange(5)
    to_halves = [0, 2, 4, 1, 3, 5]
    halves = turned(x[..., to_halves], positions, interleave=False)
    np.testing.assert_allclose(halves, turned(x, positions)[..., to_halves], rtol=1e-15, atol=1e-15)


def test_mixing_the_layouts_changes_the_scores():
    """Pitfall 14: it does not crash; it gives other numbers from position 1 on."""
    x, positions = RNG.standard_normal((1, 5, 1, 6)), np.arange(5)
    mixed = turned(x, positions)[0, :, 0] @ turned(x, positions, interleave=False)[0, :, 0].T
    right = turned(x, positions)[0, :, 0] @ turned(x, positions)[0, :, 0].T
    assert mixed[0, 0] == pytest.approx(right[0, 0]) and abs(mixed - right)[1:].max() > 0.1


@pytest.mark.parametrize("d", [10, 9])  # 9: odd content width, where pairs do not line up with complex numbers
def test_content_channels_are_left_alone(d):
    x = RNG.standard_normal((2, 5, 3, d))
    np.testing.assert_array_equal(turned(x, np.arange(5))[..., : d - 6], x[..., : d - 6])


@pytest.mark.parametrize("interleave", [True, False])
def test_position_zero_is_left_alone(interleave):
    x = RNG.standard_normal((2, 1, 3, 10))
    np.testing.assert_array_equal(turned(x, [0], interleave=interleave), x)


@pytest.mark.parametrize("yarn", [None, V3.rope_scaling])
def test_rotation_preserves_norms(yarn):
    x = RNG.standard_normal((2, 5, 3, 6))
    y = turned(x, [0, 3, 77, 4095, 100_000], theta=1e4, yarn=yarn)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-14)


@pytest.mark.parametrize("yarn", [None, V3.rope_scaling])
@pytest.mark.parametrize("interleave", [True, False])
def test_scores_depend_on_the_distance_only(interleave, yarn):
    q, k = RNG.standard_normal((2, 1, 1, 1, 6))

    def score(i, j):
        q_i, k_j = (turned(x, [m], 1e4, interleave, yarn) for x, m in ((q, i), (k, j)))
        return float(q_i.ravel() @ k_j.ravel())

    assert score(9, 5) == pytest.approx(score(1004, 1000), rel=1e-10)  # angles of 1000 lose three digits
    assert abs(score(9, 5) - score(9, 6)) > 1e-3


def test_float32_table_is_the_rounded_float64_table():
    """Angles are computed in float64: at position 100,000 a float32 angle would be off by 0.004."""
    positions = [0, 1, 99_999]
    exact, single = (rotation_table(positions, 6, 1e4, None, dtype) for dtype in (np.float64, np.float32))
    assert (exact.dtype, single.dtype) == (np.complex128, np.complex64)
    np.testing.assert_array_equal(single, exact.astype(np.complex64))


def test_published_magnitude_stretches_the_rotation():
    """Without mscale_all_dim the rotation itself carries YaRN's factor, on both query and key."""
    table = rotation_table([0, 7], 6, 1e4, scaling(mscale=None, mscale_all_dim=None), np.float64)
    np.testing.assert_allclose(abs(table), 1.3688879454, rtol=1e-10)
