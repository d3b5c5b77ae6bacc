"""The parameters of a model, part by part (lesson 00)."""

from typing import Any

import numpy as np

from ..accounting.params import count_parameters
from ..config import ModelConfig
from .numeric import Given, Question, numeric_exercise

V3 = ModelConfig.preset("deepseek-v3")
NAMES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "first_k_dense_replace", "num_attention_heads", "q_lora_rank"),
    *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size"),
    *("moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"),
)


def _config(given: Given) -> ModelConfig:
    return ModelConfig(**given, n_group=1, topk_group=1, num_nextn_predict_layers=0)


def _attention(given: Given) -> float:
    return count_parameters(_config(given)).by_part["attention"] / given["num_hidden_layers"]


def _dense(given: Given) -> float:
    return 3 * given["hidden_size"] * given["intermediate_size"]


def _moe(given: Given) -> float:
    parts, layers = (
        count_parameters(_config(given)).by_part,
        given["num_hidden_layers"] - given["first_k_dense_replace"],
    )
    return (parts["routed_experts"] + parts["shared_experts"] + parts["gate"]) / layers


def _total(given: Given) -> float:
    return count_parameters(_config(given)).total


def _active(given: Given) -> float:
    return count_parameters(_config(given)).active_with_head


def _draw(rng: np.random.Generator) -> Given:
    dense, experts = int(rng.integers(1, 4)), 32 * int(rng.integers(2, 9))
    values: dict[str, Any] = dict(
        vocab_size=1000 * int(rng.integers(32, 200)), hidden_size=256 * int(rng.integers(8, 32)),
        num_hidden_layers=dense + int(rng.integers(20, 60)), first_k_dense_replace=dense,
        num_attention_heads=16 * int(rng.integers(1, 8)), q_lora_rank=128 * int(rng.integers(4, 13)),
        kv_lora_rank=64 * int(rng.integers(4, 10)), qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        intermediate_size=1024 * int(rng.integers(8, 20)), moe_intermediate_size=256 * int(rng.integers(3, 9)),
        n_routed_experts=experts, n_shared_experts=int(rng.integers(1, 3)), num_experts_per_tok=int(rng.integers(4, 9)),
    )  # fmt: skip
    return values


EXERCISE = numeric_exercise(
    "the parameters of a model, part by part",
    lesson=0,
    minutes=40,
    given={name: getattr(V3, name) for name in NAMES},
    draw=_draw,
    questions=(
        Question(
            "mla_per_layer",
            2,
            "parameters",
            "weights of one MLA, its two latent norms left out or not",
            _attention,
            "q_a, q_b, kv_a (latent and rope), kv_b, o_proj; no biases",
            1e-4,
        ),
        Question("dense_ffn", 1, "parameters", "the FFN of one dense layer", _dense, "SwiGLU has three matrices"),
        Question(
            "moe_ffn",
            2,
            "parameters",
            "the experts and the gate of one layer with experts, bias left out",
            _moe,
            "routed and shared experts, three matrices each, and one gate row an expert",
        ),
        Question(
            "total",
            3,
            "parameters",
            "the whole model without MTP, norms within 1e-6",
            _total,
            "embedding and head are two matrices: tie_word_embeddings is false",
            2e-6,
        ),
        Question(
            "active",
            2,
            "parameters",
            "what one token uses, with the head and without the embedding",
            _active,
            "of the routed experts only num_experts_per_tok; shared expert and gate whole",
            1e-5,
        ),
    ),
)
