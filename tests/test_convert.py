"""``convert``: every dtype into every other, tensor by tensor, in little memory, whole or not at all."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from small_runs import digests
from stored_files import (
    PROJECTIONS,
    as_fp8,
    assert_holds,
    config_of,
    numbers,
    random_arrays,
    values_of,
    write_directory,
)

from minidsv3 import load_pretrained
from minidsv3.commands import main
from minidsv3.pretrained.convert import convert
from minidsv3.pretrained.tensors import TensorFile

CONFIG = config_of()
DTYPES = ["bf16", "fp8", "fp32"]
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


def stored_as(dtype):
    arrays = random_arrays(CONFIG)
    if dtype == "fp8":
        return as_fp8(arrays)
    if dtype == "fp32":
        return arrays
    kept = {name: a for name, a in arrays.items() if name.endswith("_bias")}
    return {name: a.astype(ml_dtypes.bfloat16) for name, a in arrays.items()} | kept


def quantised(array):
    """By blocks, in loops: amax / 448 as the scale, nearest code; the value is code times scale."""
    values = np.empty_like(array)
    for a in range(0, array.shape[0], 128):
        for b in range(0, array.shape[1], 128):
            block = array[a : a + 128, b : b + 128]
            scale = np.abs(block).max() / np.float32(448)
            codes = (block / scale).astype(ml_dtypes.float8_e4m3fn)
            values[a : a + 128, b : b + 128] = codes.astype(np.float32) * scale
    return values


def expected_values(source, stored, target):
    """What the directory must hold afterwards."""
    values = values_of(stored)
    for name, array in values.items():
        if name.endswith("_bias") or target == "fp32":
            continue
        if target == "bf16" or not name.endswith(PROJECTIONS):
            values[name] = array.astype(ml_dtypes.bfloat16).astype(np.float32)
        elif source != "fp8":
            values[name] = quantised(array)
    return values


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_convert_gives_the_values_that_a_loop_gives(tmp_path, source, target):
    stored = stored_as(source)
    write_directory(tmp_path / "in", CONFIG, stored)
    convert(tmp_path / "in", tmp_path / "out", target)
    assert_holds(load_pretrained(tmp_path / "out"), expected_values(source, stored, target))


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_convert_stores_the_dtypes_of_a_released_directory(tmp_path, source, target):
    write_directory(tmp_path / "in", CONFIG, stored_as(source))
    convert(tmp_path / "in", tmp_path / "out", target)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="np") as file:
        for name in file.keys():  # noqa: SIM118
            quantised = target == "fp8" and name.endswith(PROJECTIONS)
            is_float32 = target == "fp32" or name.endswith(("_bias", "_scale_inv"))
            wanted = "F8_E4M3" if quantised else "F32" if is_float32 else "BF16"
            assert file.get_slice(name).get_dtype() == wanted, name


@pytest.mark.parametrize("scales", ["F32", "power of two", "F8_E8M0"])
def test_convert_fp8_to_fp8_copies_codes_and_scales(tmp_path, scales):
    stored = as_fp8(random_arrays(CONFIG), scales)
    write_directory(tmp_path / "in", CONFIG, stored)
    convert(tmp_path / "in", tmp_path / "out", "fp8")
    file = TensorFile(tmp_path / "out" / "model.safetensors")
    assert set(file.names) == set(stored)
    for name, array in stored.items():
        assert (file.dtype(name), file.array(name).tobytes()) == (array.dtype, array.tobytes()), name


def test_convert_keeps_saying_that_scales_are_powers_of_two(tmp_path):
    config = config_of(extra={"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0"}})
    write_directory(tmp_path / "in", config, as_fp8(random_arrays(config), "power of two"))
    convert(tmp_path / "in", tmp_path / "out", "fp8")
    raw = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert raw["quantization_config"]["scale_fmt"] == "ue8m0"


def test_convert_out_of_fp8_drops_the_quantisation_from_the_config(tmp_path):
    config = config_of(extra={"quantization_config": {"quant_method": "fp8"}})
    write_directory(tmp_path / "in", config, as_fp8(random_arrays(config)))
    convert(tmp_path / "in", tmp_path / "out", "bf16")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))


def test_convert_there_and_back_gives_the_same_values(tmp_path):
    """FP8 -> FP32 loses nothing but the form; quantised again, the blocks' largest values stand where they stood."""
    stored = as_fp8(random_arrays(CONFIG))
    for array in stored.values():  # every block must contain 448, as quantising leaves it
        if array.dtype == ml_dtypes.float8_e4m3fn:
            array.view(np.uint8)[::128, ::128] = 0x7E
    write_directory(tmp_path / "a", CONFIG, stored)
    convert(tmp_path / "a", tmp_path / "b", "fp32")
    convert(tmp_path / "b", tmp_path / "c", "fp8")
    there, back = (numbers(load_pretrained(tmp_path / x)) for x in "ac")
    for name in there:
        np.testing.assert_allclose(back[name], there[name], rtol=1e-6)  # a scale is divided and multiplied by 448


def test_convert_of_shards_into_shards(tmp_path):
    stored = stored_as("fp8")
    names = sorted(stored)
    write_directory(tmp_path / "in", CONFIG, *({name: stored[name] for name in names[i::3]} for i in range(3)))
    convert(tmp_path / "in", tmp_path / "out", "bf16", max_shard_bytes=60_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 5
    assert_holds(load_pretrained(tmp_path / "out"), expected_values("fp8", stored, "bf16"))


def test_convert_leaves_its_source_alone(tmp_path):
    write_directory(tmp_path / "in", CONFIG, stored_as("fp8"))
    before = digests(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", "fp32")
    assert digests(tmp_path / "in") == before


def test_convert_reports_every_tensor_up_to_all_bytes(tmp_path):
    write_directory(tmp_path / "in", CONFIG, stored_as("fp32"))
    seen = []
    convert(tmp_path / "in", tmp_path / "out", "bf16", report=lambda done, total: seen.append((done, total)))
    assert len({total for _, total in seen}) == 1 and seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen) and len(seen) == len(random_arrays(CONFIG))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9999])
@pytest.mark.parametrize("max_shard_bytes", [60_000, 5_000_000_000])
def test_convert_interrupted_leaves_no_model(tmp_path, share, max_shard_bytes):
    write_directory(tmp_path / "in", CONFIG, stored_as("fp32"))

    def report(done, total):
        if done > share * total:
            raise Interrupted

    with pytest.raises(Interrupted):
        convert(tmp_path / "in", tmp_path / "out", "fp8", max_shard_bytes=max_shard_bytes, report=report)
    with pytest.raises(ValueError, match="is no model directory"):
        load_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))  # no half-written file either


def test_convert_interrupted_leaves_whole_shards_only(tmp_path):
    write_directory(tmp_path / "in", CONFIG, stored_as("fp32"))

    def report(done, total):
        if done > total / 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        convert(tmp_path / "in", tmp_path / "out", "bf16", max_shard_bytes=60_000, report=report)
    files = sorted((tmp_path / "out").iterdir())
    assert files and all(TensorFile(file).names for file in files)


def test_convert_refuses_a_folder_with_something_in_it(tmp_path):
    write_directory(tmp_path / "in", CONFIG, stored_as("fp32"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(ValueError, match="out is not empty"):
        convert(tmp_path / "in", tmp_path / "out", "bf16")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_convert_onto_itself_is_refused(tmp_path):
    write_directory(tmp_path / "in", CONFIG, stored_as("fp32"))
    with pytest.raises(ValueError, match="in is not empty"):
        convert(tmp_path / "in", tmp_path / "in", "bf16")


@pytest.mark.parametrize("to", ["int4", "FP8", ""])
def test_convert_refuses_an_unknown_dtype(tmp_path, to):
    write_directory(tmp_path / "in", CONFIG, stored_as("fp32"))
    with pytest.raises(ValueError, match="is not one of 'fp32', 'bf16', 'fp8'"):
        convert(tmp_path / "in", tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(EXPERT + "_scale_inv"), "has no '.*_scale_inv'"),
        (lambda s: s.update({EXPERT + "_scale_inv": np.ones((1, 1), dtype=np.float32)}), "blocks of 128 need"),
        (lambda s: s.update({EXPERT: np.zeros((140, 13), dtype=ml_dtypes.float8_e5m2)}), "is float8_e5m2"),
    ],
    ids=["no scales", "few scales", "E5M2"],
)
def test_convert_refuses_wrong_fp8_before_it_writes(tmp_path, change, message):
    stored = stored_as("fp8")
    change(stored)
    write_directory(tmp_path / "in", CONFIG, stored)
    with pytest.raises(ValueError, match=r"model\.safetensors: .*" + message):
        convert(tmp_path / "in", tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()


def test_convert_takes_tensors_that_no_model_has(tmp_path):
    """A name without a dot, a vector under a projection's name: they are tensors all the same."""
    strange = {"extra": np.ones(3, dtype=np.float32), "x.down_proj.weight": np.ones(5, dtype=np.float32)}
    write_directory(tmp_path / "in", CONFIG, {**stored_as("fp32"), **strange})
    convert(tmp_path / "in", tmp_path / "out", "fp8")
    file = TensorFile(tmp_path / "out" / "model.safetensors")
    assert {file.dtype(name) for name in strange} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_convert_needs_the_memory_of_a_few_tensors(tmp_path, source, target):
    """Eighty matrices of half a megabyte; a map of a file is no allocation."""
    arrays = {
        f"layers.{i}.down_proj.weight": np.full((300, 450), i + 0.5, dtype=np.float32) for i in range(80)
    }  # fmt: skip
    stored = as_fp8(arrays) if source == "fp8" else arrays
    if source == "bf16":
        stored = {name: a.astype(ml_dtypes.bfloat16) for name, a in arrays.items()}
    write_directory(tmp_path / "in", CONFIG, stored)
    tracemalloc.start()
    try:
        convert(tmp_path / "in", tmp_path / "out", target)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A matrix in float32, its scales spread over it, the quotient, the clipped quotient, the codes; the plan.
    assert peak < 5 * arrays["layers.0.down_proj.weight"].nbytes


def test_convert_command(tmp_path, capsys):
    stored = stored_as("fp8")
    source, target = write_directory(tmp_path / "in", CONFIG, stored), tmp_path / "out"
    assert main(["convert", str(source), str(target), "--to", "bf16", "--max-shard-bytes", "100000"]) == 0
    assert capsys.readouterr().out == f"{target} holds the model in bf16\n"
    assert_holds(load_pretrained(target), expected_values("fp8", stored, "bf16"))


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ("nowhere", ["--to", "bf16"], "is no model directory"),
        ("in", ["--to", "bf16", "--max-shard-bytes", "0"], "max_shard_bytes=0 is not positive"),
    ],
)
def test_convert_command_says_what_is_wrong_in_a_line(tmp_path, capsys, source, more, message):
    write_directory(tmp_path / "in", CONFIG, stored_as("fp32"))
    assert main(["convert", str(tmp_path / source), str(tmp_path / "out"), *more]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("more", [[], ["--to", "int4"]])
def test_convert_command_needs_a_known_dtype(tmp_path, more):
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), *more])
    assert stopped.value.code == 2
