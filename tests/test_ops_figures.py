"""The figure of RoPE's pairs shows the frequencies that the ops use."""

import numpy as np

from minidsv3 import ModelConfig, plots
from minidsv3.ops.figures import turns_of_pairs


def test_turns_of_pairs_shows_trained_and_stretched_turns():
    cfg = ModelConfig.preset("deepseek-v3")
    _, (ax,) = plots.new_figure()
    turns_of_pairs(ax, cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling)
    trained, stretched = (np.asarray(line.get_ydata()) for line in ax.lines[:2])
    np.testing.assert_allclose(trained, [4096 / (2 * np.pi) / 10000 ** (j / 32) for j in range(32)], rtol=1e-12)
    np.testing.assert_allclose(stretched[:11], trained[:11], rtol=1e-12)
    np.testing.assert_allclose(stretched[23:], trained[23:] / 40, rtol=1e-12)
    assert np.all((stretched[11:23] < trained[11:23]) & (stretched[11:23] > trained[11:23] / 40))
    assert "up to 10 alone" in ax.get_title(loc="left").replace("\n", " ")
    assert "by 40" in plots.description(ax)
