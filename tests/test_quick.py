import dataclasses

import numpy as np
import pytest

from minidsv3 import ModelConfig, TrainConfig
from minidsv3.train.quick import quick_run, validation_bits
from minidsv3.train.trainer import Trainer


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"line {i * i % 97} of the text\n" for i in range(400)), encoding="utf-8")
    cfg = dataclasses.replace(
        TrainConfig.preset("nano"), data=str(text), steps=3, batch_size=4, seq_len=16, warmup_steps=2, workers=1
    )
    return ModelConfig.preset("nano"), dataclasses.replace(cfg, eval_every=0, checkpoint_every=0)


def test_quick_run_takes_the_steps_of_the_trainer_to_the_bit(setting, tmp_path):
    config, cfg = setting
    seen = []
    quick = quick_run(config, cfg, on_step=lambda step, model, result: seen.append((step, result.main_loss)))
    trainer = Trainer(config, cfg, tmp_path / "run", progress=False, report=lambda text: None)
    assert trainer.run()
    for ours, theirs in zip(quick.model.parameters(), trainer.model.parameters()):
        np.testing.assert_array_equal(ours.data, theirs.data)
    assert seen == list(zip((1, 2, 3), quick.curve("main_loss")))


def test_quick_run_validation_is_the_trainers(setting, tmp_path):
    config, cfg = setting
    quick = quick_run(config, cfg)
    windows = len(quick.validation[0])
    trainer = Trainer(config, cfg, tmp_path / "run", progress=False, report=lambda text: None)
    trainer.run()
    assert quick.bits_per_byte(windows) == pytest.approx(trainer.evaluate(), rel=1e-6)
    first = validation_bits(quick.model, quick.validation, 5)
    assert first != quick.bits_per_byte(windows) and 0 < first < 10
