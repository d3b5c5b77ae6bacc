"""Figures of decoding say what the numbers say."""

import numpy as np
import pytest
from reference_model import odd_config

from minidsv3 import ModelConfig
from minidsv3.generation import figures
from minidsv3.generation.costs import absorbing_pays_up_to, attention_cost
from minidsv3.plots import description, new_figure

V3 = ModelConfig.preset("deepseek-v3")


@pytest.fixture
def ax():
    return new_figure()[1][0]


def lines_of(ax):
    return {line.get_label(): line.get_ydata() for line in ax.lines}


def test_bytes_against_context_are_those_of_the_costs(ax):
    contexts = np.array([100, 5000])
    shown = lines_of(figures.bytes_against_context(ax, V3, contexts))
    expected = [attention_cost(V3, "materialised", n).bytes_read / 1e6 for n in (100, 5000)]
    np.testing.assert_allclose(shown["keys and values cached"], expected)
    full, latent = (attention_cost(V3, path, 5000).bytes_read for path in ("materialised", "absorbed"))
    assert f"{full / latent:.0f} times fewer bytes" in ax.get_title(loc="left") + ax.get_title()
    assert ax.get_xlabel() and ax.get_ylabel()


def test_flops_against_new_tokens_names_the_crossing(ax):
    figures.flops_against_new_tokens(ax, V3, 4096, np.array([1, 16, 256]))
    assert f"{absorbing_pays_up_to(V3):.0f} new tokens" in description(ax)
    assert {"materialised", "recomputed", "absorbed"} <= set(lines_of(ax))


def test_seconds_against_context_show_the_rest(ax):
    figures.seconds_against_context(ax, "odd", [1, 64, 512], [100e-6, 120e-6, 220e-6], [10e-6, 28e-6, 125e-6])
    np.testing.assert_allclose(lines_of(ax)["the rest"], [90, 92, 95])
    assert "odd: attention goes from 10 to 125 us, the rest from 90 to 95 us" in description(ax)


def test_bits_against_position_are_means_of_groups(ax):
    bits = np.array([4.0, 2.0, 3.0, np.nan, 1.0, 2.0])
    figures.bits_against_position(ax, {"a": bits, "b": bits + 1}, bins=3)
    shown = lines_of(ax)
    np.testing.assert_allclose(shown["a"], [3.0, 3.0, 1.5])
    np.testing.assert_allclose(shown["b"], [4.0, 4.0, 2.5])
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [1.5, 3.5, 5.5])
    assert "a needs 1.50 bits" in description(ax) and "b 2.50" in description(ax)


def test_bits_against_position_of_few_positions(ax):
    figures.bits_against_position(ax, {"only": np.array([2.0, 1.0])})
    np.testing.assert_allclose(lines_of(ax)["only"], [2.0, 1.0])


def test_bytes_against_context_of_a_small_model(ax):
    figures.bytes_against_context(ax, odd_config(), np.array([10, 20]))
    assert len(ax.lines) == 2
