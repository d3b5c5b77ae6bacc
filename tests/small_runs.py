"""A model and a run small enough to train in a test, and what several tests ask of a run folder."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from minidsv3.config import ModelConfig, TrainConfig, replace_settings
from minidsv3.model.transformer import Transformer
from minidsv3.train.optim import AdamW, FlatParameters
from minidsv3.train.step import cut

SHAPE = dict(
    vocab_size=257, hidden_size=20, intermediate_size=24, moe_intermediate_size=12, num_hidden_layers=2,
    num_attention_heads=3, q_lora_rank=10, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=5,
    n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, first_k_dense_replace=1, n_group=4, topk_group=2,
    num_nextn_predict_layers=1,
)  # fmt: skip
TRAINING = dict(
    batch_size=4, seq_len=16, shards=2, workers=1, steps=6, warmup_steps=2, eval_every=0, checkpoint_every=2,
)  # fmt: skip


def model_config(**changes) -> ModelConfig:
    return ModelConfig(**{**SHAPE, **changes})


def train_config(**changes) -> TrainConfig:
    return TrainConfig(**{**TRAINING, **changes})


def new_model(config=None, seed=0, dtype=np.float32) -> Transformer:
    model = Transformer(config or model_config())
    model.init_weights(np.random.default_rng(seed), dtype)
    return model


def batch(size=4, seq_len=16, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 257, size=(size, seq_len + 1))
    return tokens[:, :-1], tokens[:, 1:]


class Stepping:
    """A model with all that `train_step` needs."""

    def __init__(self, cfg: TrainConfig, config=None, dtype=np.float32) -> None:
        self.cfg, self.model = cfg, new_model(config, dtype=dtype)
        self.flat = FlatParameters(self.model)
        self.optimizer = AdamW(self.flat, cfg)
        self.gradients = [self.flat.new_gradient() for _ in range(cfg.shards)]

    def arguments(self, step=1, seed=None):
        data = batch(self.cfg.batch_size, self.cfg.seq_len, seed=step if seed is None else seed)
        return self.model, self.optimizer, self.gradients, cut(*data, self.cfg.shards), self.cfg, step


def write_text(path: Path, size=5000) -> Path:
    """A text file with some structure, ASCII."""
    rng = np.random.default_rng(1)
    words = ["to", "be", "or", "not", "that", "is", "the", "question", "nobler", "mind"]
    text = ""
    while len(text) < size:
        text += " ".join(words[i] for i in rng.integers(len(words), size=7)) + ".\n"
    path.write_text(text[:size], encoding="utf-8", newline="\n")
    return path


def command_line(text: Path, out: Path, *more: str, **changes) -> list[str]:
    """Arguments of `minidsv3 train` for the small run (`changes` are further settings)."""
    nano, tiny = ModelConfig.preset("nano"), TrainConfig.preset("nano")
    wanted = {**SHAPE, **TRAINING, **changes}
    steps = wanted.pop("steps")
    replace_settings(nano, tiny, wanted)  # every name is a field
    pairs = [f"{name}={json.dumps(value)}" for name, value in wanted.items()]
    return [
        *("train", "--preset", "nano", "--data", str(text), "--out", str(out), "--steps", str(steps), "--quiet"),
        *("--set", *pairs, *more),
    ]


def environment(**changes: str) -> dict[str, str]:
    """Variables for a process of its own; matplotlib's font list is opened without an encoding, which is not ours."""
    return {**os.environ, "PYTHONWARNINGS": "ignore::EncodingWarning:matplotlib.font_manager", **changes}


def python(*arguments: str, **options) -> subprocess.CompletedProcess:
    """Run this interpreter; text in UTF-8, never raises."""
    options = {"capture_output": True, "encoding": "utf-8", "timeout": 120, "env": environment(), **options}
    return subprocess.run([sys.executable, *arguments], **options)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def replaced(config, **changes):
    return dataclasses.replace(config, **changes)
