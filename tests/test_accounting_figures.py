"""Figures of the bill: the finding in the title comes from the numbers that are drawn."""

import csv

import numpy as np
import pytest

from minidsv3 import plots
from minidsv3.accounting import figures
from minidsv3.accounting.memory import STATES

CONTEXTS = np.array([100.0, 200.0, 400.0, 800.0])


@pytest.fixture
def ax():
    return plots.new_figure()[1][0]


def title(ax):
    return " ".join(ax.get_title(loc="left").split())


def stage(n, *values):
    return {"stage": n, **dict(zip(STATES, values)), "total": sum(values)}


STAGES = [stage(0, 1e9, 2e9, 3e9, 4e9, 5e9, 6e9), stage(1, 1e9, 2e9, 3e9, 4e9, 25e9, 6e9)]


def test_layouts_are_stacked_and_counted(ax):
    figures.memory_of_layouts(ax, {"small": STAGES[0], "large": STAGES[1]}, 30e9)
    assert title(ax) == "1 of 2 layouts fit; the largest takes 41 GB"
    ends = {round(p.get_x() + p.get_width(), 6) for p in ax.patches if round(p.get_y() + 0.36) == 1}
    assert ends == {1, 3, 6, 10, 35, 41}
    figures.memory_of_layouts(ax, {"mine": STAGES[0]}, 30e9)
    assert title(ax) == "21 GB: this layout fits"
    assert "mine 21.0 GB" in plots.description(ax)


def draw_all(ax):
    yield figures.parameters_by_part(
        ax, {"embedding": 2_000, "routed_experts": 6_000}, {"embedding": 2_000, "routed_experts": 750}
    )
    yield figures.memory_along_stages(ax, STAGES, 30e9)
    yield figures.caches_against_context(ax, {"small": 1_000, "large": 5_000}, CONTEXTS)
    yield figures.flops_against_context(ax, CONTEXTS, np.full(4, 2e9), CONTEXTS * 5e6, CONTEXTS * 1e7)


def test_titles_state_what_is_drawn(ax):
    findings = []
    for drawn in draw_all(ax):
        assert drawn is ax and ax.get_xlabel()
        findings.append(title(ax))
        assert findings[-1] in " ".join(ax.get_label().split())  # the alternative text says it too
    assert findings == [
        "75.0% of the parameters are routed experts",
        "The fullest GPU holds 41.0 GB, 25.0 GB of them activations",
        "At 800 tokens small keeps 0.0 GB, large 0.0 GB",
        "Attention costs as much as all matrices from 400 tokens on",
    ]


def test_memory_bars_stand_on_each_other(ax):
    figures.memory_along_stages(ax, STAGES)
    tops = {}
    for bar in ax.patches:
        tops[round(bar.get_x())] = max(tops.get(round(bar.get_x()), 0), bar.get_y() + bar.get_height())
    assert sorted(tops.values()) == [21, 41]
    assert [text.get_text() for text in ax.figure.axes[0].get_legend().get_texts()] == list(STATES)


def test_flops_say_when_attention_never_catches_up(ax):
    figures.flops_against_context(ax, CONTEXTS, np.full(4, 2e9), CONTEXTS, CONTEXTS * 1e7)
    assert title(ax) == "Up to 800 tokens the matrices cost more than attention"


def test_saved_memory_has_its_numbers_beside_it(tmp_path):
    figures.save_memory(tmp_path / "m.png", {"per_stage": STAGES}, 80e9)
    with (tmp_path / "m.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["stage", *STATES, "total"]
    assert [float(row[-1]) for row in rows] == [21e9, 41e9]
