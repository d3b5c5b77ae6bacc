"""Dense models with grouped key-value heads (LLaMA, Qwen2): only their shapes, for comparison.

The package has no class for them, so this is the one place where parameters come from formulas. They are checked
against transformers' own count. What is compared with DeepSeek's models: parameters, FLOPs per token, the cache.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..config import ModelConfig, data_file

MODELS = ("deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "qwen2.5-72b", "llama-3.1-405b")  # what is compared
_DENSE = ("llama", "qwen2")


@dataclass(frozen=True)
class DenseConfig:
    """Shapes of a dense model; names as in its ``config.json``."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    head_dim: int | None = None  # None: hidden_size / num_attention_heads

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("model_type", "tie_word_embeddings", "head_dim") and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r} is not a positive int")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )

    @property
    def head(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def matrices_of_layer(self) -> int:
        """Numbers in the matrices of one layer: q, k, v, o, and gate, up, down of the FFN."""
        D, H, G = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        return D * self.head * (2 * H + 2 * G) + 3 * D * self.intermediate_size

    @property
    def parameters(self) -> int:
        """All parameters; Qwen2 has biases on q, k and v."""
        D, H, G = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        biases = self.head * (H + 2 * G) if self.model_type == "qwen2" else 0
        tables = self.vocab_size * D * (1 if self.tie_word_embeddings else 2)
        return tables + self.num_hidden_layers * (self.matrices_of_layer + biases + 2 * D) + D


AnyConfig = ModelConfig | DenseConfig


def load_config(preset: str | None, path: str | Path | None) -> AnyConfig:
    """The config of a preset or of a ``config.json``: of DeepSeek's family, or a dense model's.

    Raises
    ------
    ValueError
        Neither or both are given, or the file describes another architecture.
    """
    if (preset is None) == (path is None):
        raise ValueError("give either a preset or a config file")
    if path is None and preset not in MODELS[3:]:
        return ModelConfig.preset(str(preset))
    file = data_file(f"configs/{preset}.json") if path is None else Path(path)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(raw, dict) or raw.get("model_type") not in _DENSE:
        return ModelConfig.from_json(file)  # says what is wrong with it
    names = DenseConfig.__dataclass_fields__
    raw.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
    missing = [name for name in list(names)[:8] if raw.get(name) is None]
    if missing:
        raise ValueError(f"{file}: missing {', '.join(missing)}")
    try:
        return DenseConfig(**{name: value for name, value in raw.items() if name in names})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def check_context(cfg: AnyConfig, context: int) -> None:
    """ValueError unless the model has positions for `context` tokens."""
    if not 1 <= context <= cfg.max_position_embeddings:
        limit = f"max_position_embeddings={cfg.max_position_embeddings}"
        raise ValueError(f"a context of {context} tokens is not between 1 and {limit}")


def dense_training_flops_per_token(cfg: DenseConfig, context: int) -> float:
    """By the convention of the MoE rows (`flops`): matrices and head, causal attention over S/2 keys."""
    gemms = cfg.num_hidden_layers * cfg.matrices_of_layer + cfg.vocab_size * cfg.hidden_size
    return 6 * gemms + 3 * cfg.num_hidden_layers * 2 * cfg.num_attention_heads * 2 * cfg.head * context / 2


def shortcut_training_flops_per_token(cfg: DenseConfig) -> float:
    """``6 (12 L d^2 + V d)``: the short form, which takes d_ff = 4 d with two matrices, and no attention."""
    D = cfg.hidden_size
    return 6.0 * (12 * cfg.num_hidden_layers * D**2 + cfg.vocab_size * D)
