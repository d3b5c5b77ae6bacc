"""Schedules against the report's own numbers, and against what a reader would draw by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidsv3.config import TrainConfig
from minidsv3.train.schedule import (
    batch_size,
    bias_update_speed,
    learning_rate,
    mtp_weight,
    phase_factor,
    sequences_before,
)

REPORT = TrainConfig.preset("deepseek-v3")
T = 1e12


def step_at(tokens):
    """Step of the report's run at which `tokens` are seen, if progress is counted in tokens (section 4.2)."""
    return round(REPORT.steps * tokens / (14.8 * T))


# Section 4.2, read as a table: tokens seen -> learning rate. The cosine runs from 10T for 4.3T.
@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (5 * T, 2.2e-4),
        (9.99 * T, 2.2e-4),
        (10 * T + 4.3 * T / 2, (2.2e-4 + 2.2e-5) / 2),
        (10 * T + 4.3 * T / 3, 2.2e-5 + (2.2e-4 - 2.2e-5) * 0.75),  # cos(60 degrees) = 1/2
        (14.299 * T, 2.2e-5),
        (14.31 * T, 2.2e-5),
        (14.63 * T, 2.2e-5),
        (14.65 * T, 7.3e-6),
        (14.8 * T, 7.3e-6),
    ],
)
def test_learning_rate_is_the_reports(tokens, expected):
    # a step is 62 million tokens, the cosine moves by at most 6e-5 of its range in one
    assert learning_rate(REPORT, step_at(tokens)) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize(("step", "share"), [(1, 1 / 2000), (500, 0.25), (1000, 0.5), (2000, 1.0), (2001, 1.0)])
def test_learning_rate_of_the_report_warms_up_over_2000_steps(step, share):
    assert learning_rate(REPORT, step) == pytest.approx(2.2e-4 * share, rel=1e-12)


def test_learning_rate_cosine_is_half_a_cosine_after_the_warm_up():
    cfg = TrainConfig(steps=100, warmup_steps=20, learning_rate=1.0)
    for step in range(20, 101):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 20) / 80)) / 2
        assert learning_rate(cfg, step) == pytest.approx(expected, abs=1e-12)


def test_learning_rate_without_warm_up_begins_near_the_peak():
    cfg = TrainConfig(steps=1000, warmup_steps=0, learning_rate=2.0)
    assert 1.99 < learning_rate(cfg, 1) <= 2.0


def test_learning_rate_of_a_run_shorter_than_its_warm_up_only_rises():
    cfg = TrainConfig(steps=10, warmup_steps=40, learning_rate=1.0)
    assert [learning_rate(cfg, s) for s in range(1, 11)] == pytest.approx([s / 40 for s in range(1, 11)])


@pytest.mark.parametrize(("tokens", "gamma"), [(1 * T, 0.001), (14.29 * T, 0.001), (14.31 * T, 0.0), (14.8 * T, 0.0)])
def test_bias_update_speed_of_the_report_stops_for_the_last_500_billion(tokens, gamma):
    assert bias_update_speed(REPORT, step_at(tokens)) == gamma


@pytest.mark.parametrize(("tokens", "weight"), [(1 * T, 0.3), (9.99 * T, 0.3), (10.01 * T, 0.1), (14.8 * T, 0.1)])
def test_mtp_weight_of_the_report_falls_after_ten_trillion(tokens, weight):
    assert mtp_weight(REPORT, step_at(tokens)) == pytest.approx(weight, rel=1e-12)


def test_batch_size_of_the_report_ramps_from_3072_to_15360():
    ramp_steps = 0.469 / 14.8 * REPORT.steps
    assert batch_size(REPORT, 1) == 3072
    assert batch_size(REPORT, round(ramp_steps / 2)) == pytest.approx((3072 + 15360) / 2, abs=REPORT.shards)
    assert batch_size(REPORT, math.ceil(ramp_steps)) == batch_size(REPORT, REPORT.steps) == 15360


def test_phase_factor_linear_is_a_straight_line():
    phases = (("linear", 0.5, 0.2), ("linear", 1.0, 0.6))
    assert [phase_factor(phases, x) for x in (0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx([1.0, 0.6, 0.2, 0.4, 0.6])


def test_phase_factor_constant_holds_up_to_its_end():
    phases = (("constant", 0.5, 1.0), ("constant", 1.0, 0.25))
    assert [phase_factor(phases, x) for x in (0, 0.5, 0.5001, 1.0)] == [1.0, 1.0, 0.25, 0.25]


ramps = st.builds(
    lambda shards, units, steps, start, until: TrainConfig(
        shards=shards, batch_size=shards * units, steps=steps, batch_ramp=(start, until)
    ),
    st.integers(1, 5), st.integers(1, 9), st.integers(1, 40), st.floats(0.01, 1), st.floats(0.01, 1),
)  # fmt: skip


@given(ramps)
def test_batch_size_on_a_ramp_is_a_multiple_of_the_shards(cfg):
    sizes = [batch_size(cfg, step) for step in range(1, cfg.steps + 1)]
    assert all(size > 0 and size % cfg.shards == 0 for size in sizes)


@given(ramps)
def test_batch_size_on_a_ramp_never_falls_and_ends_at_batch_size(cfg):
    sizes = [batch_size(cfg, step) for step in range(1, cfg.steps + 1)]
    assert sizes == sorted(sizes) and sizes[-1] == cfg.batch_size


@given(ramps)
def test_sequences_before_is_the_sum_of_the_batches(cfg):
    position = 0
    for step in range(1, cfg.steps + 1):
        assert sequences_before(cfg, step) == position
        position += batch_size(cfg, step)


def test_sequences_before_without_ramp_is_the_sum_of_the_batches():
    cfg = TrainConfig(batch_size=6, shards=3)
    assert [sequences_before(cfg, step) for step in (1, 2, 5)] == [0, 6, 24]
