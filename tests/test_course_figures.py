"""The lessons' figures of scores and routing draw what they are given, and say what is true of it."""

import numpy as np
import pytest

from minidsv3 import plots
from minidsv3.generation.figures import acceptance_of_texts
from minidsv3.model.figures import experts_of_text, group_choice, scores_of_parts
from minidsv3.ops.routing import select_experts
from minidsv3.train.balance import specialisation
from minidsv3.train.figures import load_by_kind


@pytest.fixture
def rng():
    return np.random.default_rng(4)


def heading(ax):
    return ax.get_title(loc="left").replace("\n", " ")


@pytest.mark.parametrize("with_position", [True, False])
def test_scores_of_parts_shows_a_causal_softmax(rng, with_position):
    content, position = rng.standard_normal((2, 5, 5))
    content[4], position[4] = [0, 0, 0, 3, 0], [0, 5, 0, 0, 0]
    _, axes = plots.new_figure(1, 3)
    scores_of_parts(axes, content, position, list("abcde"), with_position=with_position)
    weights = np.asarray(axes[2].images[0].get_array().filled(np.nan))
    for i in range(5):
        row = (content + with_position * position)[i, : i + 1]
        np.testing.assert_allclose(weights[i, : i + 1], np.exp(row) / np.exp(row).sum(), rtol=1e-9)
        assert np.isnan(weights[i, i + 1 :]).all()
    assert heading(axes[2]).endswith("looks at 'b'" if with_position else "looks at 'd'")


def test_group_choice_counts_better_experts_in_other_groups():
    scores = np.array([0.9, 0.1, 0.2, 0.5, 0.6, 0.3, 0.4, 0.35, 0.55])  # groups of three: 1.1, 1.1, 0.95
    chosen = select_experts(scores[None], None, top_k=3, n_group=3, topk_group=2, method="noaux_tc")[0]
    _, (ax,) = plots.new_figure()
    group_choice(ax, scores, chosen, n_group=3, topk_group=2)
    assert chosen.tolist() == [0, 3, 4]
    assert heading(ax) == "Groups 0 and 1 are kept; better experts passed over: 1"
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in ax.patches}
    assert heights == dict(enumerate(scores.tolist()))


def test_experts_of_text_puts_each_weight_in_its_cell(rng):
    chosen = np.sort(np.stack([rng.permutation(8)[:3] for _ in range(6)]), axis=1)
    weight = rng.random((6, 3)) + 0.1
    _, (ax,) = plots.new_figure()
    experts_of_text(ax, chosen, weight, list("abcdef"), 8, 2)
    values = np.asarray(ax.images[0].get_array())
    for token in range(6):
        for k in range(3):
            assert values[chosen[token, k], token] == weight[token, k]
    assert np.count_nonzero(values) == 18
    busiest = np.bincount(chosen.ravel(), minlength=8)
    assert f"expert {busiest.argmax()} on {busiest.max()} of them" in heading(ax)


def test_load_by_kind_shows_load_in_units_of_the_mean():
    load = np.array([[6, 2, 0, 0], [100, 100, 100, 100], [1, 1, 1, 13]])
    _, (ax,) = plots.new_figure()
    load_by_kind(ax, load, ["sums", "plays", "code"], top_k=2, layer="layer 3")
    expected = [[3, 1, 0, 0], [1, 1, 1, 1], [0.25, 0.25, 0.25, 3.25]]
    np.testing.assert_allclose(ax.images[0].get_array(), expected, rtol=1e-12)
    assert ax.images[0].get_clim() == (0, 2)
    assert heading(ax) == "layer 3: expert 3 gets 3.2 times its share of code"


def test_specialisation_is_the_mutual_information():
    load = np.array([[4, 0, 3, 1], [2, 2, 2, 2], [0, 5, 5, 6]])
    p = load / load.sum(axis=1, keepdims=True) / 3
    slow = 0.0
    for kind in range(3):
        for expert in range(4):
            if p[kind, expert] > 0:
                slow += p[kind, expert] * np.log2(p[kind, expert] / (p[kind].sum() * p[:, expert].sum()))
    assert specialisation(load) == pytest.approx(slow, rel=1e-12)


def test_specialisation_has_its_limits():
    assert specialisation(np.full((3, 5), 7)) == pytest.approx(0, abs=1e-12)
    own = np.array([[9, 9, 0, 0], [0, 0, 9, 9]])
    np.testing.assert_allclose(specialisation(np.stack([own, 5 * own])), [1, 1], rtol=1e-12)
    with pytest.raises(ValueError, match="kind without tokens"):
        specialisation(np.array([[1, 2], [0, 0]]))


def test_acceptance_of_texts_names_the_extremes():
    _, (ax,) = plots.new_figure()
    acceptance_of_texts(ax, {"sums": 3, "plays": 30, "code": 9}, {"sums": 4, "plays": 60, "code": 10})
    assert [round(bar.get_width(), 6) for bar in ax.patches] == [0.75, 0.5, 0.9]
    assert heading(ax) == "The draft is right 50% (plays) to 90% (code) of the time"
    assert "90%: 1.90 tokens a pass" in [text.get_text() for text in ax.texts]
