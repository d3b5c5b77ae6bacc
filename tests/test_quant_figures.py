import numpy as np
import pytest

from minidsv3 import plots
from minidsv3.quant import figures
from minidsv3.quant.formats import explain


@pytest.fixture
def ax():
    return plots.new_figure()[1][0]


@pytest.mark.parametrize(("name", "bits"), [("e4m3", "00111110"), ("ue8m0", "01111111"), ("bf16", "0011111111100000")])
def test_number_bits_draws_every_bit_once(ax, name, bits):
    x = 1.75 if name != "ue8m0" else 1.0
    figures.number_bits(ax, explain(x, name))
    drawn = "".join(t.get_text() for t in ax.texts if t.get_text() in "01")
    assert drawn == bits and len(ax.patches) == len(bits)
    assert "1.75" in ax.get_title(loc="left") or name == "ue8m0"


def test_error_against_magnitude_is_half_a_step(ax):
    figures.error_against_magnitude(ax, ("e4m3", "bf16"))
    lines = dict(zip(("e4m3", "bf16"), ax.get_lines()))
    x, y = lines["e4m3"].get_data()
    inside = (x >= 2.0**-6) & (x < 256)
    np.testing.assert_allclose(y[inside], 1 / 17, rtol=0.01)  # half of 1/8 at 1 + 1/16
    assert y[-1] == pytest.approx(1 - 448 / 2.0**18, rel=0.01)  # cut at 448
    assert y[0] == 1  # 2^-18 becomes zero
    np.testing.assert_allclose(lines["bf16"].get_ydata(), 1 / 257, rtol=0.05)
    assert "5.9%" in ax.get_title(loc="left")
