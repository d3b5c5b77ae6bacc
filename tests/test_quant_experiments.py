"""Experiments of quant, and their figures: numbers by a second route, titles from the data."""

import numpy as np
import pytest

from minidsv3 import plots
from minidsv3.quant import figures
from minidsv3.quant.blockwise import dequantize, quantized
from minidsv3.quant.experiments import Price, accumulation_error, draw, interval_prices, tile_against_block
from minidsv3.quant.formats import E4M3
from minidsv3.quant.tensorcore import UNITS, tensorcore_matmul


def test_accumulation_error_by_the_slow_reading_of_the_table():
    """The same draw, the unit that is no fast path, and Python's own maximum."""
    rng = np.random.default_rng(5)
    a, b = draw("U(0,1)", (6, 320), rng), draw("U(0,1)", (6, 320), rng)
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    got = tensorcore_matmul(a, b, unit=UNITS["hopper-fp8"])
    largest = max(abs(float(x) - y) for x, y in zip(got.ravel(), exact.ravel()))
    assert accumulation_error("U(0,1)", 320, size=6, seed=5) == pytest.approx(largest / np.abs(exact).mean())


@pytest.mark.parametrize("seed", range(3))
def test_k_of_4096_loses_what_the_report_says(seed):
    """Nearly 2 % for N(0,1) (section 3.5.2), some 7 % for U(0,1), hardly anything with promotion; at 256 x 256."""
    assert 0.01 < accumulation_error("N(0,1)", 4096, size=256, seed=seed) < 0.028
    assert accumulation_error("N(0,1)", 4096, size=256, seed=seed, promote_every=128) < 0.0015


def test_sums_of_positive_numbers_lose_seven_percent():
    assert 0.06 < accumulation_error("U(0,1)", 4096, size=64) < 0.08


def test_draw_is_e4m3_in_its_range():
    x = draw("U(-1,1)", (1000,), np.random.default_rng(0))
    assert x.dtype == E4M3 and x.astype(np.float32).min() < -0.9 and x.astype(np.float32).max() <= 1
    with pytest.raises(ValueError, match=r"distribution='U' is not one of N\(0,1\)"):
        draw("U", (2,), np.random.default_rng(0))


def test_interval_prices_trade_error_for_cost():
    prices = interval_prices((32, 128, 1024), K=1024, size=48)
    assert [p.promotions for p in prices] == [1000 / 32, 1000 / 128, 1000 / 1024]
    for p in prices:  # a scale of 4 bytes for each 1 x N_C tile and each block
        assert p.scale_bytes == pytest.approx(4000 / p.interval + 4000 / p.interval**2)
    sums, quantising = ([getattr(p, n) for p in prices] for n in ("accumulation_error", "quantisation_error"))
    assert sums[0] < sums[2] and sums[1] < sums[2] and quantising == sorted(quantising)


def test_tile_against_block_is_the_error_of_dequantised_numbers():
    x = np.random.default_rng(1).standard_normal((130, 200)).astype(np.float32)
    x *= np.exp(np.random.default_rng(2).standard_normal((130, 1)) * 2).astype(np.float32)
    want = []
    for rows in (1, 128):
        y = dequantize(*quantized(x, rows, 128, "fp32"), rows, 128)
        want.append(np.linalg.norm((y - x).astype(np.float64)) / np.linalg.norm(x.astype(np.float64)))
    np.testing.assert_allclose(tile_against_block(x), want)
    assert want[0] < want[1]
    assert tile_against_block(np.zeros((3, 4), dtype=np.float32)) == (0.0, 0.0)


def drawn(function, *arguments):
    figure, (ax,) = plots.new_figure()
    with plots.style():
        assert function(ax, *arguments) is ax
    figure.draw_without_rendering()
    return ax, ax.get_title(loc="left").replace("\n", " ")


def test_figure_titles_say_what_the_data_say():
    K = np.array([512, 4096])
    errors = {"N, one chain": np.array([0.01, 0.02]), "N, every 128": np.array([0.001, 0.0008])}
    assert drawn(figures.accumulation_curves, K, errors, "every 128")[1].startswith("Sums of 4,096: up to 2.0% wrong")
    prices = [Price(32, 0.001, 0.03, 31.25, 125), Price(128, 0.002, 0.03, 7.8, 31), Price(4096, 0.05, 0.04, 0.2, 1)]
    assert "At 128 sums are 0.20% wrong for 8 promotions" in drawn(figures.price_of_precision, prices)[1]
    blocks = drawn(figures.gradient_blocks, ["a", "b"], np.array([0.02, 0.02]), np.array([0.03, 0.05]))
    assert blocks[1] == "Blocks lose 2.00 times what tiles do, 2.50 in b"
    formats = {"x": {"E4M3": 0.02, "LogFMT-8": 0.01, "LogFMT-10": 0.004, "BF16": 0.002}}
    assert "LogFMT-8 loses 0.50 times what E4M3 loses, LogFMT-10 2.0" in drawn(figures.format_errors, formats)[1]
    saved = {"fp32": {"a": 3000.0, "b": 1000.0}, "fp8": {"a": 1000.0, "b": 1000.0}}
    assert drawn(figures.saved_memory, saved)[1] == "fp8 keeps 50% of what fp32 keeps"


def test_loss_differences_average_the_last_fifth():
    rows = np.array([np.r_[np.full(8, 0.5), 0.001, 0.003], np.r_[np.full(8, 0.5), 0.002, 0.002]])
    ax, title = drawn(figures.loss_differences, np.arange(10), {"fp8": rows})
    assert title == "Over the last fifth: fp8 +0.20%" and len(ax.lines) == 2
    assert "0.25 %" in plots.description(ax)


@pytest.mark.parametrize("values, title", [
    ([0.01, 0.012, 0.011], "Beyond the floor: head"), ([0.01, -0.012, 0.0], "No row has a visible effect at this size"),
    ([0.0005, 0.0006, 0.0005], "No row has a visible effect at this size"),
])  # fmt: skip
def test_sensitivity_names_what_stands_out_of_floor_and_spread(values, title):
    floor = np.array([0.001, -0.002, 0.0])
    assert drawn(figures.sensitivity, {"head": np.array(values)}, floor)[1] == title
