"""Predictions beside published times: fitted and unfitted apart, and computed from what is handed in."""

import numpy as np
import pytest

from minidsv3.accounting.paper import Inputs, evaluate
from minidsv3.accounting.predictions import PREFILL_TRAFFIC, median_unfitted_error, residuals
from minidsv3.config import ModelConfig
from minidsv3.hardware.messages import traffic_of
from minidsv3.ops.routing import select_experts


def test_residuals_keep_fitted_and_unfitted_apart():
    found = residuals()
    assert sum(r.fitted for r in found) == 18
    assert {r.quantity for r in found if not r.fitted} >= {"step", "step: 1F1B", "forward-backward pair of 4 layers"}
    assert all(r.relative == r.predicted / r.published - 1 for r in found)


def test_median_error_of_the_unfitted_is_below_a_tenth():
    found = residuals()
    unfitted = sorted(abs(r.relative) for r in found if not r.fitted)
    assert median_unfitted_error(found) == pytest.approx(np.median(unfitted))
    assert 0.01 < median_unfitted_error(found) < 0.10


def test_paper_rows_of_the_clock_follow_their_inputs():
    before = {row.row: row.ours for row in evaluate(["clock"])}
    inputs = Inputs.published()
    inputs.change("clock.micro_batches", 60)
    inputs.change("deepseek-v3.hidden_size", 6144)
    after = {row.row: row.ours for row in evaluate(["clock"], inputs)}
    assert after["step"] < 0.6 * before["step"]
    assert after["forward-backward pair of 4 layers"] < before["forward-backward pair of 4 layers"]


def test_waiting_rows_of_the_clock_are_filled():
    rows = evaluate(["insights-clock"])
    assert {row.verdict for row in rows} <= {"exact", "within"}
    assert all(row.computed_by.startswith("hardware.") for row in rows)


def test_prefill_traffic_is_that_of_the_gate():
    rng = np.random.default_rng(6)
    scores = rng.random((4000, 256), dtype=np.float32)
    chosen = select_experts(scores, np.zeros(256, dtype=np.float32), top_k=8, n_group=8, topk_group=4,
                            method=ModelConfig.preset("deepseek-v3").topk_method)  # fmt: skip
    assert traffic_of(chosen, 256, 32, 8)[:2] == pytest.approx(PREFILL_TRAFFIC[:2], abs=0.03)
