"""GPU hours and dollars of a training run (lesson 12)."""

import numpy as np

from .numeric import Given, Question, numeric_exercise

GIVEN = dict(active_parameters=37.55e9, tokens=14.8e12, gpu_hours_per_trillion_tokens=180e3, context_hours=119e3,
             post_hours=5e3, dollars_per_gpu_hour=2.0, gpus=2048, bf16_tflops=989.0)  # fmt: skip


def _pre_hours(g: Given) -> float:
    return g["gpu_hours_per_trillion_tokens"] * g["tokens"] / 1e12


def _flops(g: Given) -> float:
    return 6 * g["active_parameters"] * g["tokens"]


def _dollars(g: Given) -> float:
    return (_pre_hours(g) + g["context_hours"] + g["post_hours"]) * g["dollars_per_gpu_hour"]


def _mfu(g: Given) -> float:
    return 100 * _flops(g) / (_pre_hours(g) * 3600 * g["bf16_tflops"] * 1e12)


def _draw(rng: np.random.Generator) -> Given:
    return dict(
        active_parameters=int(rng.integers(5, 30)) * 1e9, tokens=int(rng.integers(2, 13)) * 1e12,
        gpu_hours_per_trillion_tokens=int(rng.integers(50, 160)) * 1e3, context_hours=int(rng.integers(20, 90)) * 1e3,
        post_hours=int(rng.integers(6, 20)) * 1e3, dollars_per_gpu_hour=float(rng.choice([1.5, 2.5, 3.0])),
        gpus=int(rng.choice([512, 1024, 4096])), bf16_tflops=float(rng.choice([312.0, 1200.0])),
    )  # fmt: skip


EXERCISE = numeric_exercise(
    "GPU hours and dollars of a training run",
    lesson=12,
    minutes=20,
    given=GIVEN,
    draw=_draw,
    questions=(
        Question(
            "pretraining_hours",
            2,
            "GPU hours",
            "pre-training alone",
            _pre_hours,
            "hours per trillion tokens times trillions",
        ),
        Question(
            "dollars",
            2,
            "US dollars",
            "pre-training, context extension and post-training together",
            _dollars,
            "all GPU hours times the rent",
        ),
        Question(
            "days",
            2,
            "days",
            "of pre-training on `gpus` GPUs",
            lambda g: _pre_hours(g) / g["gpus"] / 24,
            "GPU hours divided by GPUs are hours",
        ),
        Question(
            "flops",
            2,
            "FLOPs",
            "of pre-training, 6 for each active parameter and token",
            _flops,
            "a multiply-add is two, the backward pass twice the forward",
        ),
        Question(
            "utilisation",
            2,
            "percent",
            "of the BF16 peak that these FLOPs need in these GPU hours",
            _mfu,
            "FLOPs / (GPU seconds x peak)",
            1e-3,
        ),
    ),
)
