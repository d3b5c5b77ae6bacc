"""FP8 directories with block scales, in and out, against values that the test works out block by block."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from stored_files import (
    PROJECTIONS,
    as_fp8,
    assert_holds,
    config_of,
    numbers,
    random_arrays,
    values_of,
    write_directory,
    write_file,
)

from minidsv3 import Transformer, load_pretrained, save_pretrained
from minidsv3.pretrained.tensors import TensorFile
from minidsv3.quant.blockwise import quantize_blocks

SCALES = ["F32", "power of two", "F8_E8M0"]
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"
WIDE = "model.layers.0.self_attn.q_b_proj.weight"


@pytest.fixture
def config():
    return config_of()


@pytest.fixture
def stored(config):
    return as_fp8(random_arrays(config))


def dtypes_of(file):
    with safe_open(file, framework="np") as opened:
        return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118


@pytest.mark.parametrize("scales", SCALES)
def test_load_pretrained_fp8_of_odd_sizes_is_code_times_scale(config, tmp_path, scales):
    stored = as_fp8(random_arrays(config), scales)
    assert stored[WIDE + "_scale_inv"].shape == (2, 2)
    assert_holds(load_pretrained(write_directory(tmp_path / "m", config, stored)), values_of(stored))


def test_load_pretrained_fp8_in_float64_has_the_same_values(config, stored, tmp_path):
    model = load_pretrained(write_directory(tmp_path / "m", config, stored), np.float64)
    assert {p.data.dtype for _, p in model.named_parameters()} == {np.dtype(np.float64)}
    assert_holds(model, values_of(stored))


def test_load_pretrained_fp8_from_shards(config, stored, tmp_path):
    """Codes and scales may lie in different files."""
    names = sorted(stored)
    files = [{name: stored[name] for name in names[i::3]} for i in range(3)]
    assert_holds(load_pretrained(write_directory(tmp_path / "m", config, *files)), values_of(stored))


def test_load_pretrained_fp8_computes(config, stored, tmp_path):
    model = load_pretrained(write_directory(tmp_path / "m", config, stored))
    assert np.isfinite(model.logits(np.array([[1, 2, 3]]))).all()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_load_pretrained_reads_every_float(config, tmp_path, dtype):
    arrays = {name: a.astype(dtype) for name, a in random_arrays(config).items()}
    assert_holds(load_pretrained(write_directory(tmp_path / "m", config, arrays)), values_of(arrays))


def test_load_pretrained_reads_mixed_dtypes(config, tmp_path):
    kinds = [ml_dtypes.bfloat16, np.float16, np.float32]
    arrays = {name: a.astype(kinds[i % 3]) for i, (name, a) in enumerate(random_arrays(config).items())}
    assert_holds(load_pretrained(write_directory(tmp_path / "m", config, arrays)), values_of(arrays))


def test_load_pretrained_copies_nothing_into_the_file(config, stored, tmp_path):
    folder = write_directory(tmp_path / "m", config, stored)
    before = (folder / "model.safetensors").read_bytes()
    model = load_pretrained(folder)
    for parameter in model.parameters():
        parameter.data[...] = 0
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int64, "S3"])
def test_load_pretrained_refuses_other_dtypes_of_the_model(config, stored, tmp_path, dtype):
    folder = write_directory(tmp_path / "m", config, stored)
    with pytest.raises(ValueError, match="is not float32 or float64"):
        load_pretrained(folder, dtype)


def test_load_pretrained_without_mtp_leaves_the_modules_out(config, stored, tmp_path):
    model = load_pretrained(write_directory(tmp_path / "m", config, stored), mtp=False)
    assert model.mtp == [] and model.config.num_nextn_predict_layers == 0
    assert_holds(model, values_of(stored))


def test_load_pretrained_without_any_mtp_tensor_says_so_in_its_config(config, stored, tmp_path):
    main = {name: a for name, a in stored.items() if not name.startswith("model.layers.2.")}
    model = load_pretrained(write_directory(tmp_path / "m", config, main))
    assert model.config.num_nextn_predict_layers == 0
    assert_holds(model, values_of(stored))


def test_load_pretrained_with_part_of_an_mtp_module_is_an_error(config, stored, tmp_path):
    del stored["model.layers.2.eh_proj.weight"]
    with pytest.raises(ValueError, match=r"missing, first 'model\.layers\.2\.eh_proj.weight'"):
        load_pretrained(write_directory(tmp_path / "m", config, stored))


def test_load_pretrained_with_more_mtp_modules_than_the_config_is_an_error(stored, tmp_path):
    folder = write_directory(tmp_path / "m", config_of(num_nextn_predict_layers=1), stored)
    stored["model.layers.3.eh_proj.weight"] = stored["model.layers.2.eh_proj.weight"]
    write_file(folder / "model.safetensors", stored)
    with pytest.raises(ValueError, match=r"unexpected tensor 'model\.layers\.3\.eh_proj"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(EXPERT + "_scale_inv"), "FP8 tensor '.*experts.3.down_proj.weight' has no '.*_scale_inv'"),
        (lambda s: s.pop(EXPERT), "scales '.*experts.3.down_proj.weight_scale_inv' belong to no tensor"),
        (
            lambda s: s.update({WIDE + "_scale_inv": np.ones((2, 1), dtype=np.float32)}),
            r"q_b_proj.weight_scale_inv' is \(2, 1\), blocks of 128 need \(2, 2\)",
        ),
        (
            lambda s: s.update({WIDE + "_scale_inv": np.ones((4,), dtype=np.float32)}),
            r"q_b_proj.weight_scale_inv' is \(4,\), blocks of 128 need \(2, 2\)",
        ),
        (
            lambda s: s.update({EXPERT: np.zeros((140, 13), dtype=np.float32)}),
            "scales a tensor that is float32",
        ),
        (
            lambda s: s.update({EXPERT: np.zeros((140, 13), dtype=ml_dtypes.float8_e5m2)}),
            "experts.3.down_proj.weight' is float8_e5m2",
        ),
        (
            lambda s: s.update({EXPERT: np.ones((140, 13), dtype=ml_dtypes.float8_e8m0fnu)}),
            "experts.3.down_proj.weight' is float8_e8m0fnu",
        ),
        (
            lambda s: s.update({"model.norm.weight": np.zeros(140, dtype=ml_dtypes.float8_e4m3fn)}),
            "FP8 tensor 'model.norm.weight' has no",
        ),
    ],
    ids=["no scales", "no codes", "few scales", "flat scales", "needless scales", "E5M2", "E8M0", "FP8 norm"],
)
def test_load_pretrained_names_the_wrong_fp8_tensor(config, stored, tmp_path, change, message):
    change(stored)
    with pytest.raises(ValueError, match=r"model\.safetensors: .*" + message):
        load_pretrained(write_directory(tmp_path / "m", config, stored))


def test_load_pretrained_refuses_an_fp8_vector_with_scales(config, stored, tmp_path):
    stored["model.norm.weight"] = np.zeros(140, dtype=ml_dtypes.float8_e4m3fn)
    stored["model.norm.weight_scale_inv"] = np.ones((2,), dtype=np.float32)
    with pytest.raises(ValueError, match=r"model\.norm\.weight_scale_inv' is \(2,\), blocks of 128 need"):
        load_pretrained(write_directory(tmp_path / "m", config, stored))


@pytest.mark.parametrize("dtype", [np.int32, ml_dtypes.float8_e4m3fn])
def test_load_pretrained_refuses_scales_that_are_no_scales(config, stored, tmp_path, dtype):
    stored[EXPERT + "_scale_inv"] = np.ones((2, 1), dtype=dtype)
    with pytest.raises(ValueError, match=r"model\.safetensors: .*experts.3.down_proj.weight_scale_inv' is "):
        load_pretrained(write_directory(tmp_path / "m", config, stored))


@pytest.mark.parametrize("position", ["first", "last"])
def test_load_pretrained_copies_nothing_before_all_is_checked(config, stored, tmp_path, monkeypatch, position):
    name = list(stored)[0 if position == "first" else -1]
    stored[name] = np.zeros((2, 3), dtype=np.float32)
    filled = []
    monkeypatch.setattr(Transformer, "allocate", lambda *a: filled.append(a))
    with pytest.raises(ValueError):
        load_pretrained(write_directory(tmp_path / "m", config, stored))
    assert filled == []


@pytest.fixture
def model(config):
    model = Transformer(config)
    model.init_weights(np.random.default_rng(2), std=0.3)
    for _, buffer in model.named_buffers():
        buffer[...] = np.linspace(-1, 1, buffer.size)
    return model


def test_save_pretrained_fp8_stores_projections_as_e4m3_and_nothing_else(model, tmp_path):
    """As released: attention and FFN projections; embedding, head, gates, norms and eh_proj stay BF16."""
    save_pretrained(model, tmp_path / "m", "fp8")
    for name, dtype in dtypes_of(tmp_path / "m" / "model.safetensors").items():
        if name.endswith("_scale_inv") or name.endswith("e_score_correction_bias"):
            assert dtype == "F32", name
        else:
            assert dtype == ("F8_E4M3" if name.endswith(PROJECTIONS) else "BF16"), name


@pytest.mark.parametrize("kind", ["fp32", "ue8m0"])
def test_save_pretrained_fp8_is_read_back_as_quantised(model, tmp_path, kind):
    save_pretrained(model, tmp_path / "m", "fp8", scale=kind)
    loaded = numbers(load_pretrained(tmp_path / "m"))
    for name, array in numbers(model).items():
        if name.endswith(PROJECTIONS):
            codes, scales = quantize_blocks(array, kind)
            expected = values_of({name: codes, name + "_scale_inv": scales})[name]
        else:
            expected = array if name.endswith("_bias") else array.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(loaded[name], expected, err_msg=name)


def test_save_pretrained_fp8_config_describes_the_blocks(model, tmp_path):
    save_pretrained(model, tmp_path / "m", "fp8")
    raw = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    assert raw["quantization_config"] == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }  # fmt: skip


def test_save_pretrained_ue8m0_config_names_its_scales(model, tmp_path):
    save_pretrained(model, tmp_path / "m", "fp8", scale="ue8m0")
    raw = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    assert raw["quantization_config"]["scale_fmt"] == "ue8m0"


@pytest.mark.parametrize(("dtype", "named"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_save_pretrained_config_of_wider_dtypes_is_not_quantised(model, tmp_path, dtype, named):
    save_pretrained(model, tmp_path / "m", dtype)
    raw = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    assert raw["torch_dtype"] == named and "quantization_config" not in raw


def test_save_pretrained_bf16_rounds_weights_and_keeps_buffers(model, tmp_path):
    save_pretrained(model, tmp_path / "m", "bf16")
    loaded = numbers(load_pretrained(tmp_path / "m"))
    for name, array in numbers(model).items():
        expected = array if name.endswith("_bias") else array.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(loaded[name], expected.astype(np.float32), err_msg=name)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_save_pretrained_in_shards_is_read_back(model, tmp_path, dtype):
    save_pretrained(model, tmp_path / "one", dtype)
    save_pretrained(model, tmp_path / "many", dtype, max_shard_bytes=100_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert_holds(load_pretrained(tmp_path / "many"), numbers(load_pretrained(tmp_path / "one")))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(dtype="int8"), "dtype='int8' is not one of 'fp32', 'bf16', 'fp8'"),
        (dict(dtype="fp8", scale="fp16"), "scale='fp16' is not 'fp32' or 'ue8m0'"),
        (dict(max_shard_bytes=0), "max_shard_bytes=0 is not positive"),
    ],
)
def test_save_pretrained_refuses(model, tmp_path, how, message):
    with pytest.raises(ValueError, match=message):
        save_pretrained(model, tmp_path / "m", **how)
    assert list(tmp_path.iterdir()) == []


def test_save_pretrained_fp8_refuses_nan_and_leaves_nothing(model, tmp_path):
    model.layers[0].mlp.down_proj.weight.data[3, 4] = np.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        save_pretrained(model, tmp_path / "m", "fp8")
    assert list(tmp_path.iterdir()) == []


def test_tensor_file_gives_views_of_the_file(config, stored, tmp_path):
    """Nothing is read before it is used: an array is a read-only view of the map."""
    file = TensorFile(write_file(tmp_path / "x.safetensors", stored))
    for name in file.names:
        array = file.array(name)
        assert not array.flags.owndata and not array.flags.writeable
        assert array.tobytes() == stored[name].tobytes()
