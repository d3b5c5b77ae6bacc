"""A short run is the Trainer's run without its files, with every step's load and bias."""

import dataclasses

import numpy as np
import pytest

from minidsv3 import ModelConfig, TrainConfig, Transformer
from minidsv3.config import replace_settings
from minidsv3.train.runs import read_run
from minidsv3.train.short import short_run
from minidsv3.train.trainer import Trainer

SETTINGS = {"steps": 3, "batch_size": 4, "seq_len": 24, "warmup_steps": 2, "seed": 5}


@pytest.fixture
def text(tmp_path):
    """A corpus small enough that the Trainer's evaluation takes no time."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i}+{i * 7 % 30}={i + i * 7 % 30}\n" for i in range(400)), encoding="utf-8")
    return str(path)


def test_short_run_has_the_numbers_of_the_trainer(text, tmp_path):
    short = short_run("nano", data=text, **SETTINGS)
    config, train = replace_settings(ModelConfig.preset("nano"), TrainConfig.preset("nano"), {"data": text} | SETTINGS)
    trainer = Trainer(config, dataclasses.replace(train, workers=1), tmp_path / "run", progress=False)
    trainer.run()
    run = read_run(tmp_path / "run")
    np.testing.assert_array_equal(short.main_loss, run.metrics["main_loss"])
    np.testing.assert_array_equal(short.load, run.load)
    np.testing.assert_allclose(short.bias, run.bias, atol=1e-7)
    for mine, its in zip(short.model.parameters(), trainer.model.parameters()):
        np.testing.assert_array_equal(mine.data, its.data)
    assert short.step.tolist() == [1, 2, 3] and short.bias.shape == (3, 4, 16)


def test_short_run_builds_the_model_that_it_is_given(text):
    class Mine(Transformer):
        pass

    assert type(short_run("nano", make=Mine, data=text, **SETTINGS | {"steps": 1}).model) is Mine


def test_short_run_of_a_v2_gate_has_no_bias(text):
    run = short_run("nano", data=text, topk_method="group_limited_greedy", **SETTINGS)
    assert run.bias.shape == (3, 4, 16) and not run.bias.any() and run.load.sum(axis=2).min() > 0


def test_short_run_names_what_is_wrong(text):
    with pytest.raises(ValueError, match="batch_sizes"):
        short_run("nano", data=text, batch_sizes=3)
    with pytest.raises(ValueError, match="vocab_size=200"):
        short_run("nano", data=text, vocab_size=200)
