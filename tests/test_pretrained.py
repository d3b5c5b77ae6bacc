"""Released-format directories: out and in again to the bit, and every way in which a directory can be wrong."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_runs import batch, digests, model_config, new_model

from minidsv3.config import ModelConfig
from minidsv3.pretrained import load_pretrained, save_pretrained
from minidsv3.pretrained.tensors import planned, write_tensors
from minidsv3.pretrained.writer import whole_directory

V2 = dict(
    model_type="deepseek_v2", scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False,
    num_nextn_predict_layers=0,
)  # fmt: skip
KINDS = {
    "v3": {},
    "tied": dict(tie_word_embeddings=True),
    "two MTP modules": dict(num_nextn_predict_layers=2),
    "v2": V2,
    "v2-lite": {**V2, "q_lora_rank": None, "topk_method": "greedy"},
    "no shared expert": dict(n_shared_experts=0),
    "dense": dict(first_k_dense_replace=2, num_nextn_predict_layers=0),
}


@pytest.fixture(params=KINDS)
def config(request):
    return model_config(**KINDS[request.param])


@pytest.fixture
def model():
    return with_biases(new_model(seed=3))


@pytest.fixture
def folder(model, tmp_path):
    save_pretrained(model, tmp_path / "model")
    return tmp_path / "model"


def with_biases(model):
    for i, (_, buffer) in enumerate(model.named_buffers()):
        buffer[...] = np.linspace(-1, 1, buffer.size) / (i + 3)
    return model


def numbers(model):
    everything = [(n, p.data) for n, p in model.named_parameters()] + list(model.named_buffers())
    return {name: (array.shape, array.dtype.str, array.tobytes()) for name, array in everything}


def rewrite(folder, change):
    """Change the tensors of a model file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_pretrained_round_trip_is_exact(config, tmp_path):
    model = with_biases(new_model(config, seed=3))
    save_pretrained(model, tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    assert numbers(loaded) == numbers(model) and loaded.config == config


def test_pretrained_model_computes_the_same_bits(config, tmp_path):
    model = with_biases(new_model(config, seed=3))
    save_pretrained(model, tmp_path / "model")
    tokens, _ = batch(2, 5)
    loaded = load_pretrained(tmp_path / "model")
    assert loaded.logits(tokens).tobytes() == model.logits(tokens).tobytes()
    for a, b in zip(loaded.mtp_logits(tokens), model.mtp_logits(tokens)):
        assert a.tobytes() == b.tobytes()


def test_save_pretrained_same_weights_same_bytes(model, folder, tmp_path):
    save_pretrained(model, tmp_path / "again")
    assert digests(folder) == digests(tmp_path / "again")


def test_load_pretrained_save_pretrained_same_bytes(folder, tmp_path):
    save_pretrained(load_pretrained(folder), tmp_path / "again")
    assert digests(folder) == digests(tmp_path / "again")


def test_load_pretrained_in_float64_has_the_same_values(model, folder):
    loaded = load_pretrained(folder, np.float64)
    for (_, wide), (_, narrow) in zip(loaded.named_parameters(), model.named_parameters()):
        assert wide.data.dtype == np.float64
        np.testing.assert_array_equal(wide.data, narrow.data)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_load_pretrained_reads_every_float(model, folder, dtype):
    rewrite(folder, lambda tensors: tensors.update({name: t.astype(dtype) for name, t in tensors.items()}))
    loaded = dict(load_pretrained(folder).named_parameters())
    for name, p in model.named_parameters():
        np.testing.assert_array_equal(loaded[name].data, p.data.astype(dtype).astype(np.float32))


def test_load_pretrained_refuses_fp8_without_scales(folder):
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype(ml_dtypes.float8_e4m3fn)}))
    with pytest.raises(ValueError, match=r"model\.safetensors: FP8 tensor 'lm_head.weight' has no .*_scale_inv"):
        load_pretrained(folder)


def test_save_pretrained_stores_float32_under_released_names(model, folder):
    tensors = load_file(folder / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float32)}
    for name in (
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias", "model.layers.1.mlp.experts.7.down_proj.weight",
        "model.layers.1.mlp.shared_experts.up_proj.weight", "model.layers.2.eh_proj.weight",
        "model.layers.2.shared_head.norm.weight",
    ):  # fmt: skip
        assert name in tensors


def test_save_pretrained_stores_the_copies_of_mtp_modules(model, folder):
    tensors = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(tensors["model.layers.2.embed_tokens.weight"], model.embed_tokens.weight.data)
    np.testing.assert_array_equal(tensors["model.layers.2.shared_head.head.weight"], model.lm_head.weight.data)


@pytest.mark.parametrize("name", ["model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"])
def test_load_pretrained_does_without_the_copies_of_mtp_modules(model, folder, name):
    rewrite(folder, lambda tensors: tensors.pop(name))
    assert numbers(load_pretrained(folder)) == numbers(model)


def test_save_pretrained_stores_a_tied_head_once(tmp_path):
    save_pretrained(new_model(model_config(tie_word_embeddings=True)), tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


def test_load_pretrained_tied_head_is_the_embedding(tmp_path):
    save_pretrained(new_model(model_config(tie_word_embeddings=True)), tmp_path / "model")
    rewrite(tmp_path / "model", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    loaded = load_pretrained(tmp_path / "model")
    assert loaded.lm_head.weight is loaded.embed_tokens.weight


def test_save_pretrained_config_is_read_back(model, folder):
    assert ModelConfig.from_json(folder / "config.json") == model.config


def test_save_pretrained_cuts_large_models_into_files_with_an_index(model, tmp_path):
    save_pretrained(model, tmp_path / "cut", max_shard_bytes=30_000)
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 2 and files == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    stored = {name: file for file in files for name in load_file(tmp_path / "cut" / file)}
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for file in files for t in load_file(tmp_path / "cut" / file).values()
    )
    assert all((tmp_path / "cut" / file).stat().st_size < 40_000 for file in files)  # 30,000 and a header


def test_load_pretrained_reads_files_with_an_index(model, tmp_path):
    save_pretrained(model, tmp_path / "cut", max_shard_bytes=30_000)
    assert numbers(load_pretrained(tmp_path / "cut")) == numbers(model)


def test_save_pretrained_replaces_a_directory_and_leaves_nothing_beside(model, folder):
    other = new_model(seed=9)
    (folder / "stale.txt").write_text("old", encoding="utf-8")
    save_pretrained(other, folder)
    assert numbers(load_pretrained(folder)) == numbers(other)
    assert [path.name for path in folder.parent.iterdir()] == ["model"] and not (folder / "stale.txt").exists()


def test_whole_directory_keeps_the_old_one_on_an_error(folder):
    before = digests(folder.parent)
    with pytest.raises(RuntimeError), whole_directory(folder) as temporary:
        (temporary / "half").write_text("x", encoding="utf-8")
        raise RuntimeError
    assert digests(folder.parent) == before


def test_whole_directory_is_not_there_before_it_is_complete(tmp_path):
    with whole_directory(tmp_path / "new") as temporary:
        (temporary / "file").write_text("x", encoding="utf-8")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "file").read_text(encoding="utf-8") == "x"


def test_write_tensors_can_be_read_by_whoever_reads_the_config(folder):
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_write_tensors_names_the_file_that_it_cannot_write(tmp_path):
    file = tmp_path / "nowhere" / "x.safetensors"
    with pytest.raises(OSError, match="nowhere"):
        write_tensors(planned({"a": np.zeros(2, dtype=np.float32)}), file)


GATE = "model.layers.1.mlp.gate.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(GATE), f"1 tensors are missing, first '{GATE}'"),
        (lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias"), "missing, first '.*correction_bias'"),
        (lambda t: t.pop("lm_head.weight"), "missing, first 'lm_head.weight'"),
        (lambda t: t.update(extra=np.zeros(3, dtype=np.float32)), "unexpected tensor 'extra'"),
        (
            lambda t: t.update({GATE: t[GATE].T.copy()}),
            rf"'{GATE}' is \(20, 8\), config.json needs \(8, 20\)",
        ),
        (lambda t: t.update({GATE: t[GATE].astype(np.int32)}), f"'{GATE}' is I32, not one of F64"),
        (
            lambda t: t.update({"model.layers.2.embed_tokens.weight": np.zeros((2, 3), dtype=np.float32)}),
            "'model.layers.2.embed_tokens.weight' is .2, 3.",
        ),
    ],
    ids=["missing weight", "missing buffer", "missing head", "unexpected", "shape", "dtype", "shape of a copy"],
)
def test_load_pretrained_names_the_wrong_tensor(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.9999])
def test_load_pretrained_names_a_file_that_is_cut(folder, share):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut short"):
        load_pretrained(folder)


def test_load_pretrained_names_a_file_of_noise(folder):
    (folder / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(1000))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_pretrained(folder)


def test_load_pretrained_names_a_missing_file_of_the_index(model, tmp_path):
    save_pretrained(model, tmp_path / "cut", max_shard_bytes=30_000)
    next((tmp_path / "cut").glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-.* is missing"):
        load_pretrained(tmp_path / "cut")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 5}}', '{"weight'])
def test_load_pretrained_names_a_damaged_index(folder, text):
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is no index"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [("config.json", "is no model directory"), ("model.safetensors", "neither model.safetensors nor")],
)
def test_load_pretrained_names_what_a_directory_lacks(folder, name, message):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)


def test_load_pretrained_names_another_config(folder):
    model_config(n_routed_experts=12).to_json(folder / "config.json")
    with pytest.raises(ValueError, match=r"gate.*config.json needs \(12,"):
        load_pretrained(folder)
