"""Figures of a run: what is drawn, what the title states, and what the alternative text says."""

import csv

import numpy as np
import pytest
from test_runs import LAYERS, STEPS, E, write_run

from minidsv3 import plots
from minidsv3.train import figures
from minidsv3.train.runs import read_run, smoothed

STEP = np.arange(1, 8, dtype=np.int64)
FALLING = np.array([5.5, 4.0, 3.0, 2.5, 2.2, 2.0, 1.9])


@pytest.fixture
def ax():
    return plots.new_figure()[1][0]


def title(ax):
    return " ".join(ax.get_title(loc="left").split())


def line(ax, label):
    return next(drawn for drawn in ax.get_lines() if drawn.get_label() == label)


def columns(path):
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    return {name: [row[n] for row in rows] for n, name in enumerate(header)}


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax: figures.loss_curves(ax, STEP, FALLING),
        lambda ax: figures.bits_per_byte(ax, STEP, FALLING),
        lambda ax: figures.expert_load_heatmap(ax, np.ones((7, 5)), "layer 1"),
        lambda ax: figures.max_vio_curves(ax, {"on": (STEP, FALLING)}),
        lambda ax: figures.bias_trajectories(ax, STEP, np.ones((7, 5))),
        lambda ax: figures.overlay(ax, [("A", STEP, FALLING)], quantity="loss", unit="nats"),
    ],
)
def test_figures_return_the_axes_with_text_and_labels(ax, draw):
    assert draw(ax) is ax
    assert plots.description(ax).endswith(".") and title(ax) and ax.get_xlabel() and ax.get_ylabel()


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax, none: figures.loss_curves(ax, none, none),
        lambda ax, none: figures.bits_per_byte(ax, STEP, np.full(7, np.nan)),
        lambda ax, none: figures.expert_load_heatmap(ax, np.ones((0, 5)), "layer 1"),
        lambda ax, none: figures.max_vio_curves(ax, {}),
        lambda ax, none: figures.max_vio_curves(ax, {"on": (none, none)}),
        lambda ax, none: figures.bias_trajectories(ax, none, np.ones((0, 5))),
        lambda ax, none: figures.overlay(ax, [("A", none, none)], quantity="loss", unit="nats"),
    ],
)
def test_figures_without_a_step_are_refused(ax, draw):
    with pytest.raises(ValueError, match="no value to draw"):
        draw(ax, np.zeros(0))


def test_loss_curves_title_states_first_and_smoothed_last(ax):
    figures.loss_curves(ax, STEP * 300, FALLING, smoothing=0.5)
    weights = [0.5 ** (6 - n) for n in range(7)]
    last = sum(w * x for w, x in zip(weights, FALLING)) / sum(weights)
    assert title(ax) == f"Loss falls from 5.50 to {last:.2f} nats per byte in 2,100 steps"


def test_loss_curves_title_does_not_claim_a_fall(ax):
    figures.loss_curves(ax, STEP, FALLING[::-1])
    assert title(ax).startswith("Loss does not fall: from 1.90 to ")


def test_loss_curves_title_names_the_step_of_divergence(ax):
    figures.loss_curves(ax, STEP, np.where(STEP == 4, np.nan, FALLING))
    assert title(ax) == "Loss is not a finite number from step 4 on"


def test_loss_curves_draws_the_moving_average(ax):
    figures.loss_curves(ax, STEP, FALLING, FALLING + 1, smoothing=0.6)
    drawn = line(ax, "MTP: one token farther").get_ydata()
    np.testing.assert_array_equal(drawn, smoothed(FALLING + 1, 0.6))


@pytest.mark.parametrize("mtp_loss", [None, np.full(7, np.nan)])
def test_loss_curves_leaves_out_an_absent_mtp_loss(ax, mtp_loss):
    figures.loss_curves(ax, STEP, FALLING, mtp_loss)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["main: the next token"]


def test_loss_curves_axis_has_the_unit(ax):
    assert figures.loss_curves(ax, STEP, FALLING, unit="nats per token").get_ylabel() == "loss (nats per token)"


def test_bits_per_byte_draws_the_evaluations_only(ax):
    figures.bits_per_byte(ax, STEP, np.where(STEP % 3 == 0, FALLING, np.nan))
    assert ax.get_lines()[0].get_xdata().tolist() == [3, 6]


def test_bits_per_byte_title_states_best_and_last(ax):
    figures.bits_per_byte(ax, STEP, np.array([3.0, np.nan, 2.0, np.nan, 1.5, 1.75, np.nan]))
    assert title(ax) == "Validation reaches 1.500 bits per byte at step 5 and ends at 1.750"


def test_expert_load_heatmap_is_relative_to_the_mean(ax):
    load = np.random.default_rng(3).integers(1, 30, size=(7, 5))
    figures.expert_load_heatmap(ax, load, "layer 1")
    drawn = ax.images[0].get_array()
    for step in range(7):
        for expert in range(5):
            assert drawn[expert, step] == pytest.approx(load[step, expert] * 5 / load[step].sum(), rel=1e-12)


def test_expert_load_heatmap_long_run_sums_steps(ax):
    load = np.random.default_rng(4).integers(1, 30, size=(450, 5))  # 3 steps a column
    figures.expert_load_heatmap(ax, load, "layer 1")
    drawn = ax.images[0].get_array()
    assert drawn.shape == (5, 150)
    for column in range(150):
        part = load[3 * column : 3 * column + 3].sum(axis=0)
        np.testing.assert_allclose(drawn[:, column], part * 5 / part.sum(), rtol=1e-12)


def test_expert_load_heatmap_colours_are_centred_at_one(ax):
    figures.expert_load_heatmap(ax, np.ones((7, 5)), "layer 1")
    assert ax.images[0].norm(1.0) == 0.5


def test_expert_load_heatmap_text_names_the_outermost_experts(ax):
    load = np.tile([10, 30, 20, 25, 15], (7, 1))
    figures.expert_load_heatmap(ax, load, "layer 4")
    assert title(ax) == "layer 4: 0.50 to 1.50 times mean load"
    assert "the idlest expert, 0, has 0.50" in plots.description(ax) and "busiest, 1, has 1.50" in plots.description(ax)


def test_expert_load_heatmap_colour_bar_has_a_unit(ax):
    figures.expert_load_heatmap(ax, np.ones((7, 5)), "layer 1")
    assert ax.figure.axes[-1].get_ylabel() == "load (times the mean)"


def test_expert_load_grid_hides_axes_left_over():
    _, axes = plots.new_figure(2, 2)
    figures.expert_load_grid(axes, np.ones((7, 3, 5)), ["a", "b", "c"])
    assert [ax.get_visible() for ax in axes] == [True, True, True, False]


def test_expert_load_grid_draws_each_layer_in_its_panel():
    load = np.random.default_rng(5).integers(1, 30, size=(7, 2, 5))
    _, axes = plots.new_figure(1, 2)
    figures.expert_load_grid(axes, load, ["a", "b"])
    np.testing.assert_allclose(axes[1].images[0].get_array()[:, 6], load[6, 1] * 5 / load[6, 1].sum(), rtol=1e-12)


@pytest.mark.parametrize("layers, panels", [(["a"], 2), (["a", "b"], 1)])
def test_expert_load_grid_refuses_wrong_numbers(layers, panels):
    _, axes = plots.new_figure(1, panels)
    with pytest.raises(ValueError, match="load has 2 layers"):
        figures.expert_load_grid(axes, np.ones((7, 2, 5)), layers)


def test_max_vio_curves_title_states_each_mean(ax):
    figures.max_vio_curves(ax, {"with": (STEP, np.full(7, 0.25)), "without": (STEP, np.full(7, 1.5))})
    assert title(ax) == "MaxVio of a batch, last 7 steps: 0.25 (with), 1.5 (without)"


def test_max_vio_curves_title_means_the_tail_only(ax):
    step = np.arange(1, 151)
    figures.max_vio_curves(ax, {"on": (step, np.where(step <= 50, 9.0, 0.5))})
    assert title(ax) == "MaxVio of a batch, last 100 steps: 0.5 (on)"


@pytest.mark.parametrize("ratio, scale", [(5, "linear"), (50, "log")])
def test_max_vio_curves_scale_fits_the_range(ax, ratio, scale):
    figures.max_vio_curves(ax, {"with": (STEP, np.full(7, 0.1)), "without": (STEP, np.full(7, 0.1 * ratio))})
    assert ax.get_yscale() == scale


def test_bias_trajectories_name_highest_and_lowest_expert(ax):
    figures.bias_trajectories(ax, STEP, np.outer(STEP, [0.01, -0.02, 0.03, 0.0, -0.01]))
    assert [text.get_text() for text in ax.texts] == ["expert 2", "expert 1"]


def test_bias_trajectories_title_states_the_range(ax):
    figures.bias_trajectories(ax, STEP, np.outer(STEP, [0.01, -0.02, 0.03]), layer="layer 2")
    assert title(ax) == "layer 2: biases from -0.140 to +0.210"


def test_bias_trajectories_without_balancing_say_so(ax):
    figures.bias_trajectories(ax, STEP, np.zeros((7, 3)))
    assert title(ax) == "All biases stay at 0"


def test_overlay_gives_a_group_one_colour_and_one_legend_entry(ax):
    curves = [("A", STEP, FALLING), ("B", STEP, FALLING + 1), ("A", STEP, FALLING + 2)]
    figures.overlay(ax, curves, quantity="loss", unit="nats")
    colours = [drawn.get_color() for drawn in ax.get_lines()]
    assert colours[0] == colours[2] != colours[1] and len(ax.get_legend().get_texts()) == 2


def test_overlay_title_states_the_mean_of_each_group(ax):
    curves = [("A", STEP, FALLING), ("B", STEP, FALLING + 3), ("A", STEP, FALLING + 2)]
    figures.overlay(ax, curves, quantity="loss", unit="nats")
    assert title(ax) == "Loss at the end: 2.9 (A), 4.9 (B)"


def test_overlay_of_many_groups_states_the_outermost(ax):
    curves = [(name, STEP, FALLING + n) for n, name in enumerate("BACD")]
    figures.overlay(ax, curves, quantity="loss", unit="nats")
    assert title(ax) == "Loss at the end: from 1.9 (B) to 4.9 (D)"


def test_run_figures_writes_figure_data_and_text_of_each(tmp_path):
    files = figures.run_figures(read_run(write_run(tmp_path / "run")))
    stems = ("loss", "bits_per_byte", "expert_load", "max_vio", "bias")
    expected = {f"{stem}.{suffix}" for stem in stems for suffix in ("png", "csv", "txt")}
    assert {file.name for file in files} == {file.name for file in (tmp_path / "run" / "figures").iterdir()} == expected


def test_run_figures_data_is_that_of_the_run(tmp_path):
    run = read_run(write_run(tmp_path / "run", skew=7))
    figures.run_figures(run, suffix=".svg")
    data = columns(tmp_path / "run" / "figures" / "expert_load.csv")
    assert len(data) == 1 + LAYERS * E and len(data["step"]) == STEPS
    assert data["MTP module 1 expert 4"] == [str(tokens) for tokens in run.load[:, 2, 4]]


def test_run_figures_text_has_one_sentence_for_each_layer(tmp_path):
    figures.run_figures(read_run(write_run(tmp_path / "run")), suffix=".svg")
    text = (tmp_path / "run" / "figures" / "expert_load.txt").read_text(encoding="utf-8")
    assert text.count("Expert load of ") == LAYERS and "colorbar" not in text


def test_run_figures_leaves_out_what_the_run_lacks(tmp_path):
    dense = {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0}
    run = read_run(write_run(tmp_path / "run", model=dense))
    run.metrics["val_bits_per_byte"][:] = np.nan
    assert {file.stem for file in figures.run_figures(run, suffix=".svg")} == {"loss"}


def test_run_figures_of_a_single_step_are_drawn(tmp_path):
    files = figures.run_figures(read_run(write_run(tmp_path / "run", steps=1)))
    assert len(files) == 15


def test_run_figures_without_a_step_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no complete step yet"):
        figures.run_figures(read_run(write_run(tmp_path / "run", steps=0)))
