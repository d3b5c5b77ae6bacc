"""What a cache keeps of a token, and where absorbing pays (lesson 03)."""

import dataclasses

import numpy as np

from ..config import ModelConfig
from ..generation.costs import absorbing_pays_up_to
from .numeric import Given, Question, numeric_exercise

V3 = ModelConfig.preset("deepseek-v3")
GIVEN = dict(num_hidden_layers=61, num_attention_heads=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
             v_head_dim=128, bytes_per_number=2, context=131_072)  # fmt: skip


def _latent(g: Given) -> float:
    return g["num_hidden_layers"] * (g["kv_lora_rank"] + g["qk_rope_head_dim"]) * g["bytes_per_number"]


def _materialised(g: Given) -> float:
    numbers = g["num_attention_heads"] * (g["qk_nope_head_dim"] + g["qk_rope_head_dim"] + g["v_head_dim"])
    return g["num_hidden_layers"] * numbers * g["bytes_per_number"]


def _cross_over(g: Given) -> float:
    fields = {name: g[name] for name in GIVEN if hasattr(V3, name)}
    return absorbing_pays_up_to(dataclasses.replace(V3, **fields))


def _draw(rng: np.random.Generator) -> Given:
    return dict(
        num_hidden_layers=int(rng.integers(20, 60)), num_attention_heads=8 * int(rng.integers(2, 12)),
        kv_lora_rank=64 * int(rng.integers(4, 10)), qk_nope_head_dim=32 * int(rng.integers(2, 4)),
        qk_rope_head_dim=int(rng.choice([16, 32, 48])), v_head_dim=32 * int(rng.integers(2, 4)),
        bytes_per_number=int(rng.choice([1, 4])), context=1024 * int(rng.integers(20, 120)),
    )  # fmt: skip


EXERCISE = numeric_exercise(
    "what a cache keeps of a token",
    lesson=3,
    minutes=25,
    given=GIVEN,
    draw=_draw,
    questions=(
        Question(
            "bytes_per_token",
            3,
            "bytes",
            "what the latent cache keeps of one token, all layers",
            _latent,
            "the latent and the one rotated key part, once for all heads",
        ),
        Question(
            "gib_at_context",
            2,
            "GiB",
            "the cache of one sequence of `context` tokens",
            lambda g: _latent(g) * g["context"] / 2**30,
            "GiB = 2**30 bytes",
        ),
        Question(
            "times_smaller",
            2,
            "ratio",
            "how many times smaller it is than keys [nope | rope] and values of all heads",
            lambda g: _materialised(g) / _latent(g),
            "every head's key has both parts; bytes and layers cancel",
        ),
        Question(
            "absorb_up_to",
            3,
            "new tokens",
            "up to how many new tokens absorbing needs fewer FLOPs, for a very long context",
            _cross_over,
            "per cached token: S H (2 r + d_r) against S H (d_n + d_v + d_r) + H r (d_n + d_v)",
            1e-3,
        ),
    ),
)
