"""Arithmetic of serving and training, each against a count by hand or another way to the same number."""

import pytest

from minidsv3.accounting import service
from minidsv3.parallel.schedules import build, parts


def test_hours_dollars_and_days_agree():
    hours = service.gpu_hours(14.8e12, 15360 * 4096, 19.926, 2048)
    assert service.days(hours, 2048) * 86400 == pytest.approx(14.8e12 / (15360 * 4096) * 19.926)
    assert service.dollars(hours, 2) == 2 * hours
    assert service.hours_per_trillion(hours, 14.8e12) == pytest.approx(hours / 14.8)


def test_service_of_a_day():
    cost = service.daily_cost(226.75, 8, 2)
    earned = service.revenue(342e9, 266e9, 168e9, (0.14, 0.55, 2.19))
    assert cost == 87_072
    assert earned == pytest.approx(342e3 * 0.14 + 266e3 * 0.55 + 168e3 * 2.19)
    assert service.margin_percent(2 * cost, cost) == 100


def test_bubble_from_parts_counts_the_chunks_of_the_schedule():
    """With equal chunk times on all ranks the parts give these times back."""
    F, Bi, W, FB, ranks, chunks = 2.0, 3.0, 1.5, 4.5, 4, 12
    spent = {"F": 0.0, "B": 0.0, "W": 0.0, "FB": 0.0}
    for row in build("dualpipe", ranks, chunks):
        for op in row:
            if op[0] == "FB":
                spent["FB"] += FB
            else:
                ((kind, _, _),) = parts(op)
                spent["F"] += F * (kind == "F")
                spent["B"] += Bi * (kind in ("B", "Bi"))
                spent["W"] += W * (kind in ("B", "W"))
    seconds = [spent["F"] / ranks, 0, spent["B"] / ranks, spent["W"] / ranks, spent["FB"] / ranks, 0]
    assert service.bubble_from_parts(seconds, ranks, chunks) == pytest.approx((ranks / 2 - 1) * (FB + Bi + W - 3 * W))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (service.experts_per_gpu(256, 32, 144), 2),
        (service.nodes_spanned(64, 8), 8),
        (service.experts_at_same_cost(4, 3.2), 12.8),
        (service.tokens_per_pass(0.85), 1.85),
        (service.times_lower(3, 4), -25),
        (service.share_percent(3, 4), 75),
        (service.bandwidth_ratio(200e9, 50e9), 4),
        (service.step_tokens(480, 131072), 62_914_560),
        (service.low_latency_gigabytes_per_second(2, 3, 5e3, 10), 3.0),
    ],
)
def test_ratios(value, expected):
    assert value == pytest.approx(expected)
