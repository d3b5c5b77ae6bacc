"""Cache and GPUs for inference: the published bytes, the real cache, and the smallest number that is enough."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from minidsv3 import LatentCache, ModelConfig
from minidsv3.accounting.dense import load_config
from minidsv3.accounting.inference import (
    cache_bytes_per_token,
    cache_numbers_per_token,
    cache_report,
    gpus_needed,
    repeated_and_expert_bytes,
)
from minidsv3.accounting.params import count_checkpoint, count_parameters

V3 = ModelConfig.preset("deepseek-v3")


@pytest.mark.parametrize(
    ("name", "nbytes"), [("deepseek-v3", 70_272), ("qwen2.5-72b", 327_680), ("llama-3.1-405b", 516_096)]
)
def test_cache_is_the_published_one(name, nbytes):
    assert cache_bytes_per_token(load_config(name, None)) == nbytes


def test_cache_is_that_of_the_real_object():
    cache = LatentCache(V3, 1, ml_dtypes.bfloat16)
    for layer in cache.layers:
        layer.append(np.zeros((1, 1, 512), np.float32), np.zeros((1, 1, 64), np.float32))
    assert cache_bytes_per_token(V3) == cache.bytes_per_token


def test_other_kinds_of_cache_of_the_same_heads():
    v2 = ModelConfig.preset("deepseek-v2")
    unit = 60 * 128
    assert cache_numbers_per_token(v2, "mla") == 4.5 * unit  # DeepSeek-V2, Table 1
    assert cache_numbers_per_token(v2, "mha") == 2 * 128 * unit
    assert cache_numbers_per_token(v2, "gqa", 4) == 2 * 4 * unit
    assert cache_numbers_per_token(v2, "mqa") == 2 * unit


def test_report_multiplies_by_batch_and_context():
    report = cache_report(V3, 131_072, 3, "fp8")
    assert report["bytes_per_token"] == 35_136
    assert report["bytes_total"] == 35_136 * 131_072 * 3
    assert report["by_model"]["llama-3.1-405b"] == 258_048


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cache_report(V3, 0), "context of 0 tokens"),
        (lambda: cache_report(V3, 163_841), "context of 163841 tokens"),
        (lambda: cache_report(V3, 10, 0), "batch=0"),
        (lambda: cache_bytes_per_token(V3, "int4"), "precision='int4'"),
        (lambda: cache_numbers_per_token(V3, "gqa"), "number of groups"),
        (lambda: cache_numbers_per_token(V3, "gqa", 7), "groups=7 does not divide num_attention_heads=128"),
        (lambda: cache_numbers_per_token(V3, "window"), "kind='window'"),
        (lambda: cache_numbers_per_token(load_config("qwen2.5-72b", None), "mla"), "no latent"),
    ],
)
def test_impossible_cache_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_repeated_and_experts_together_are_the_main_model():
    repeated, expert = repeated_and_expert_bytes(V3, precision="bf16")
    assert repeated + 256 * expert == 2 * count_parameters(V3).total
    repeated, expert = repeated_and_expert_bytes(V3)
    alone = count_checkpoint(dataclasses.replace(V3, num_nextn_predict_layers=0), "fp8")
    assert repeated + 256 * expert == sum(alone.nbytes.values()) - 4 * 58 * 256  # the gates' bias


def enough(n, memory, batch, context, reserve, tp=1):
    repeated, expert = repeated_and_expert_bytes(V3, tp)
    groups = n // tp
    held = repeated + -(-256 // n) * expert + -(-batch // groups) * context * 70_272
    return held <= memory * (1 - reserve), held


@pytest.mark.parametrize(("batch", "context", "memory"), [(1, 4096, 80e9), (128, 4096, 80e9), (640, 16_384, 141e9)])
def test_gpus_are_the_fewest_that_hold_it(batch, context, memory):
    plan = gpus_needed(V3, memory, batch=batch, context=context, tp=1)
    fits, held = enough(plan["gpus"], memory, batch, context, 0.1)
    assert fits and held == plan["bytes_per_gpu"] == plan["weight_bytes"] + plan["cache_bytes"]
    assert not any(enough(n, memory, batch, context, 0.1)[0] for n in range(1, plan["gpus"]))
    assert plan["redundant_experts"] == plan["gpus"] * plan["experts_per_gpu"] - 256


def test_gpus_choose_the_split_that_needs_fewest():
    plans = [gpus_needed(V3, 80e9, batch=1, context=4096, tp=tp)["gpus"] for tp in (1, 2, 4, 8)]
    best = gpus_needed(V3, 80e9, batch=1, context=4096)
    assert best["gpus"] == min(plans)
    assert best["tp"] == (1, 2, 4, 8)[plans.index(min(plans))]


def test_more_memory_needs_fewer_gpus_and_more_context_more():
    counts = [gpus_needed(V3, m, batch=256, context=8192)["gpus"] for m in (80e9, 141e9, 186e9)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    counts = [gpus_needed(V3, 80e9, batch=256, context=s)["gpus"] for s in (1024, 8192, 65_536)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(memory=5e9), "no number of GPUs of 5 GB is enough"),
        (dict(context=0), "context of 0 tokens"),
        (dict(batch=0), "batch=0"),
        (dict(reserve=1.0), "reserve=1.0"),
        (dict(precision="int4"), "precision='int4'"),
        (dict(tp=3), "tp=3 does not divide num_attention_heads=128"),
    ],
)
def test_impossible_question_is_refused(changes, message):
    asked = {"memory": 80e9, "batch": 1, "context": 4096, **changes}
    with pytest.raises(ValueError, match=message):
        gpus_needed(V3, asked.pop("memory"), **asked)
