"""Figures of schedules, clock and network: what is drawn, the finding in the title, the text beside it."""

import pytest

from minidsv3.hardware.chunks import Op, in_streams
from minidsv3.hardware.figures import (
    all_to_all_under_failures,
    bubble_against_ranks,
    cost_per_endpoint,
    gantt,
    overlapped_pair,
    step_by_what_if,
    where_the_seconds_go,
)
from minidsv3.parallel.schedules import build
from minidsv3.parallel.timeline import timeline
from minidsv3.plots import description, new_figure


@pytest.fixture
def ax():
    return new_figure()[1][0]


def title(ax):
    return " ".join(ax.get_title(loc="left").split())


def test_gantt_draws_every_instruction_in_its_place(ax):
    times = timeline(build("dualpipe", 4, 8), {"F": 1, "B": 2, "Bi": 1, "W": 1, "FB": 3})
    gantt(ax, times, "dualpipe")
    bars = {(round(p.get_y() + 0.42), p.get_x(), p.get_width()) for p in ax.patches}
    expected = {(r, a, b - a) for r in range(4) for a, b in zip(times.start[r], times.end[r])}
    assert bars == expected
    assert title(ax) == "dualpipe: ends at 26, ranks wait 8 % of the time"  # 8 chunks of 3, bubble 1 * (3 + 2 - 3)
    assert "at most 5 chunks" in description(ax)
    assert ax.get_xlabel() and ax.get_ylabel() == "rank"


def test_pair_says_how_much_communication_is_hidden(ax):
    ops = [
        Op("attention F0", "compute", 3e-3),
        Op("dispatch F0", "communication", 2e-3, ("attention F0",)),
        Op("mlp B0", "compute", 1e-3),
        Op("mlp F0", "compute", 1e-3, ("dispatch F0",)),
    ]
    overlapped_pair(ax, in_streams(ops))  # compute 0-3, 3-4, then waits until 5, ends at 6; one of two ms is hidden
    assert title(ax) == "50% of the communication is hidden behind computation"
    assert [(round(p.get_x(), 6), round(p.get_width(), 6)) for p in ax.patches] == [(0, 3), (3, 2), (3, 1), (5, 1)]
    assert "compute 5.0 ms, communication 2.0 ms, together in 6.0 ms" in description(ax)


def test_bubbles_name_best_and_worst(ax):
    bubble_against_ranks(ax, [2, 4], {"a": [1.0, 9.0], "b": [1.0, 3.0]}, "forward chunks")
    assert title(ax) == "At 4 ranks b waits 3.0 times less than a"
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1.0, 9.0], [1.0, 3.0]]
    assert "forward chunks" in ax.get_ylabel()


def test_seconds_are_stacked_in_order(ax):
    where_the_seconds_go(ax, {"predicted": {"1F": 2.0, "1B": 3.0}, "published": {"1F": 4.0, "1B": 6.0}})
    assert [(p.get_x(), p.get_width()) for p in ax.patches] == [(0, 2), (0, 4), (2, 3), (4, 6)]
    assert title(ax) == "Where 10.0 s go: predicted 5.0 s, -50 %"
    assert "1F 4.00, 1B 6.00" in description(ax)


def test_what_if_says_the_dearest(ax):
    step_by_what_if(ax, {"as is": 10.0, "slower": 15.0, "faster": 8.0})
    assert [p.get_width() for p in ax.patches] == [10.0, 15.0, 8.0]
    assert title(ax) == "The dearest change: slower, +50 %"


def test_costs_compare_planes_with_three_layers_of_their_size(ax):
    sizes = {"MPFT": [100, 1000], "FT3": [50, 900, 5000]}
    cost_per_endpoint(ax, sizes, {"MPFT": [4000.0, 4000.0], "FT3": [9000.0, 7500.0, 6000.0]})
    assert title(ax) == "Near 1,000 endpoints planes cost 4.0 k$ an endpoint, three layers 7.5 k$"
    assert [line.get_label() for line in ax.lines] == ["MPFT", "FT3"]


def test_failures_are_drawn_in_percent(ax):
    all_to_all_under_failures(ax, [0.0, 0.1], {"no planes lost": [1.0, 1.4], "1 plane lost": [1.1, 1.7]})
    assert ax.lines[1].get_xdata().tolist() == [0.0, 10.0]
    assert title(ax) == "10 % of the cables dead: an all-to-all takes 1.40 times as long"
    assert "1 plane lost 1.70" in description(ax)
