"""Twin runs: same bits for the same precision, and differences as defined."""

import json

import numpy as np
import pytest

from minidsv3.commands import fp8_experiments, main
from minidsv3.config import TrainConfig
from minidsv3.model.transformer import Transformer
from minidsv3.quant.recipe import recipe_for
from minidsv3.train.step import gates
from minidsv3.train.twins import DECAY, relative_difference, rounding_cost, tail_mean, twin

CFG = TrainConfig(data="synthetic", steps=4, batch_size=2, seq_len=16, warmup_steps=1, seed=3)


def losses(precision, **options):
    return twin(recipe_for(precision), CFG, preset="nano", **options).losses


def test_twin_is_deterministic_and_precision_shows():
    first, again, other = losses("fp8"), losses("fp8"), losses("bf16")
    assert first.tobytes() == again.tobytes() != other.tobytes()
    np.testing.assert_allclose(first, other, rtol=0.02)


def test_twin_an_ulp_away_begins_next_to_it():
    near, plain = losses("fp32", ulp=True), losses("fp32")
    assert near.tobytes() != plain.tobytes() and abs(near[0] / plain[0] - 1) < 1e-5


def test_twin_reports_each_step():
    seen = []
    result = losses("fp32", on_step=lambda step, model, loss: seen.append((step, loss)))
    assert seen == list(zip([1, 2, 3, 4], result.tolist()))


def test_rounding_cost_is_that_of_the_same_weights_in_another_arithmetic():
    """Against a model of the other recipe, trained for no step and given the weights one by one."""
    model = twin(recipe_for("bf16"), CFG, preset="nano").model
    tokens = np.random.default_rng(0).integers(0, 257, (3, 2, 18))
    batches = [(t[:, :-1], t[:, 1:]) for t in tokens]
    other = Transformer(model.config, recipe_for("fp8"))
    other.init_weights(np.random.default_rng(9))
    for (name, p), (same, q) in zip(other.named_parameters(), model.named_parameters()):
        assert name == same
        p.data[...] = q.data
    for mine, its in zip(gates(other), gates(model)):
        mine.e_score_correction_bias[...] = its.e_score_correction_bias
    fp8, bf16 = (sum(float(m.loss(*batch).main) for batch in batches) for m in (other, model))
    assert fp8 != bf16
    assert rounding_cost(model, recipe_for("fp8"), batches) == pytest.approx(fp8 / bf16 - 1, abs=1e-9)
    assert rounding_cost(model, recipe_for("bf16"), batches) == 0


def test_relative_difference_is_of_the_smoothed_losses():
    a, b = np.array([4.0, 2.0, 1.0]), np.array([2.0, 2.0, 2.0])
    smooth = [4.0, (4 * DECAY + 2) / (DECAY + 1), (4 * DECAY**2 + 2 * DECAY + 1) / (DECAY**2 + DECAY + 1)]
    np.testing.assert_allclose(relative_difference(a, b), np.array(smooth) / 2 - 1)


def test_tail_mean_takes_the_last_200_with_their_sign():
    assert tail_mean(np.r_[np.full(500, 9.0), np.full(200, -0.5)]) == -0.5


@pytest.mark.parametrize("name", ["twins", "sensitivity"])
def test_training_experiments_keep_their_runs(monkeypatch, tmp_path, capsys, name):
    monkeypatch.setattr(fp8_experiments, "SMALL", dict(data="synthetic", batch_size=2, seq_len=16))
    monkeypatch.setattr(fp8_experiments, "twin", lambda *a, **k: twin(*a, **k, preset="nano"))
    command = ["fp8", "experiment", name, "--out", str(tmp_path), "--steps", "3", "--seeds", "0", "1"]
    assert main(command) == 0 and "running fp8, seed 1, 3 steps" in capsys.readouterr().out
    kept = json.loads((tmp_path / "runs" / "fp8@fast@0@3.json").read_text(encoding="utf-8"))
    assert len(kept["losses"]) == 3
    assert main(command) == 0 and "running" not in capsys.readouterr().out
    assert (tmp_path / f"fp8_{name}.csv").is_file()
