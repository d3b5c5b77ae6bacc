"""Dense models: their published parameters and FLOPs, and which files are taken for one."""

import json

import pytest

from minidsv3 import ModelConfig
from minidsv3.accounting.dense import (
    MODELS,
    DenseConfig,
    dense_training_flops_per_token,
    load_config,
    shortcut_training_flops_per_token,
)

QWEN, LLAMA = load_config("qwen2.5-72b", None), load_config("llama-3.1-405b", None)
SMALL = dict(
    model_type="qwen2", vocab_size=97, hidden_size=24, intermediate_size=56, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


def test_parameters_are_the_published_sizes():
    assert round(QWEN.parameters / 1e9, 1) == 72.7
    assert round(LLAMA.parameters / 1e9, 1) == 405.9


@pytest.mark.filterwarnings("ignore::EncodingWarning")  # of transformers' own files
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"model_type": "llama"}])
def test_parameters_are_what_transformers_counts(changes):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    cfg = DenseConfig(**{**SMALL, **changes})
    kind = {"qwen2": "Qwen2", "llama": "Llama"}[cfg.model_type]
    settings = {name: value for name, value in {**SMALL, **changes}.items() if name != "model_type"}
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))
    assert sum(p.numel() for p in model.parameters()) == cfg.parameters


def test_flops_are_those_counted_by_hand():
    cfg, S = DenseConfig(**SMALL), 10
    layer = 24 * 24 + 2 * 24 * 8 + 24 * 24 + 3 * 24 * 56
    pairs = S / 2
    by_hand = 6 * (3 * layer + 97 * 24) + 3 * 3 * pairs * 2 * (24 + 24)
    assert dense_training_flops_per_token(cfg, S) == by_hand


def test_shortcut_gives_the_printed_numbers():
    assert [round(shortcut_training_flops_per_token(cfg) / 1e9) for cfg in (QWEN, LLAMA)] == [394, 2448]


def test_models_are_loaded_by_their_kind():
    kinds = [type(load_config(name, None)) for name in MODELS]
    assert kinds == [ModelConfig] * 3 + [DenseConfig] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**SMALL, "model_type": "mixtral"}, "model_type='mixtral' is not one of"),
        ({k: v for k, v in SMALL.items() if k != "vocab_size"}, "missing vocab_size"),
        ({**SMALL, "num_hidden_layers": 0}, "num_hidden_layers=0 is not a positive int"),
        ({**SMALL, "num_key_value_heads": 4}, "num_attention_heads=6 is not a multiple of num_key_value_heads=4"),
        ({**SMALL, "hidden_size": 25}, "hidden_size=25 is not a multiple of 6 heads"),
        ([1], "holds a list"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_config(None, path)


def test_a_file_without_key_value_heads_has_plain_attention(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in SMALL.items() if k != "num_key_value_heads"}), encoding="utf-8")
    assert load_config(None, path).num_key_value_heads == 6


@pytest.mark.parametrize("arguments", [(None, None), ("nano", "config.json")])
def test_one_source_is_needed(arguments):
    with pytest.raises(ValueError, match="either a preset or a config file"):
        load_config(*arguments)
