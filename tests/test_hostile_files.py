"""Files made to harm: `load_pretrained` gives a model or a ValueError that names the file, and takes no more memory.

The headers are written by hand, because no writer would write them; then bytes of a good file are changed at random.
"""

import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stored_files import as_fp8, assemble, config_of, entries_of, random_arrays, write_directory

from minidsv3 import ModelConfig, load_pretrained
from minidsv3.pretrained.convert import convert

# The smallest model there is: its file is mostly header, which is what is attacked.
TINY = dict(
    vocab_size=3, hidden_size=2, intermediate_size=2, moe_intermediate_size=1, num_hidden_layers=1,
    num_attention_heads=1, q_lora_rank=None, kv_lora_rank=2, qk_nope_head_dim=1, qk_rope_head_dim=2, v_head_dim=1,
    n_routed_experts=1, n_shared_experts=0, num_experts_per_tok=1, first_k_dense_replace=1, n_group=1, topk_group=1,
    num_nextn_predict_layers=0,
)  # fmt: skip
CONFIG = config_of(**TINY)
ARRAYS = as_fp8(random_arrays(CONFIG))
ENTRIES, CONTENT = entries_of(ARRAYS)
NORM, HEAD = "model.norm.weight", "lm_head.weight"
GOOD = assemble(json.dumps(ENTRIES).encode(), CONTENT)
# What opening any file costs: Python's own objects for paths, messages and a header of some kilobytes.
SMALL = 1_000_000


def directory(tmp_path, content, config=CONFIG):
    folder = tmp_path / "m"
    folder.mkdir(exist_ok=True)
    config.to_json(folder / "config.json")
    (folder / "model.safetensors").write_bytes(content)
    return folder


def file_of(entries, content=CONTENT):
    return assemble(json.dumps(entries).encode(), content)


def with_entry(name, **changes):
    return {**ENTRIES, name: {**ENTRIES[name], **changes}}


def renamed_twice():
    """The header's text with a name that stands in it twice."""
    text = json.dumps(ENTRIES)
    return (text[:-1] + f', "{NORM}": {json.dumps(ENTRIES[NORM])}' + "}").encode()


A, B = ENTRIES[HEAD]["data_offsets"]
HOSTILE = {
    "nothing": b"",
    "seven bytes": b"\x10\0\0\0\0\0\0",
    "length only": (100).to_bytes(8, "little"),
    "length zero": assemble(b"", CONTENT),
    "length beyond the file": assemble(json.dumps(ENTRIES).encode(), CONTENT, len(GOOD)),
    "length of an exabyte": assemble(json.dumps(ENTRIES).encode(), CONTENT, 2**60),
    "length minus one": b"\xff" * 8 + GOOD[8:],
    "length with the sign bit": assemble(json.dumps(ENTRIES).encode(), CONTENT, 2**63),
    "length one too short": assemble(json.dumps(ENTRIES).encode(), CONTENT, len(json.dumps(ENTRIES)) - 1),
    "length one too long": assemble(json.dumps(ENTRIES).encode(), CONTENT, len(json.dumps(ENTRIES)) + 1),
    "garbage": assemble(b"{]" * 50, CONTENT),
    "a list": assemble(b"[1, 2, 3]", CONTENT),
    "a number": assemble(b"1e999", CONTENT),
    "deeply nested": assemble(b'{"a":' * 50_000, b""),
    "nested lists": assemble(b"[" * 100_000, b""),
    "not UTF-8": assemble(b'{"\xff\xfe": 1}', CONTENT),
    "latin-1 name": assemble(json.dumps(ENTRIES).replace("norm", "n\xf6rm").encode("latin-1"), CONTENT),
    "entry is a string": file_of({**ENTRIES, NORM: "F32"}),
    "entry is null": file_of({**ENTRIES, NORM: None}),
    "entry without dtype": file_of({**ENTRIES, NORM: {"shape": [2], "data_offsets": [0, 4]}}),
    "entry without offsets": file_of({**ENTRIES, NORM: {"dtype": "BF16", "shape": [2]}}),
    "unknown dtype": file_of(with_entry(NORM, dtype="F128")),
    "integers": file_of(with_entry(NORM, dtype="I16")),
    "dtype of another width": file_of(with_entry(NORM, dtype="F64")),
    "negative shape": file_of(with_entry(NORM, shape=[-2])),
    "fractional shape": file_of(with_entry(NORM, shape=[2.5])),
    "huge shape": file_of(with_entry(NORM, shape=[2**62])),
    "shape whose product overflows": file_of(with_entry(NORM, shape=[2**32, 2**32, 2**32])),
    "empty but huge": file_of(with_entry(HEAD, shape=[0, 2**62], data_offsets=[A, A])),
    "a thousand axes": file_of(with_entry(NORM, shape=[1] * 1000 + [2])),
    "offsets beyond the file": file_of(with_entry(HEAD, data_offsets=[len(CONTENT), len(CONTENT) + B - A])),
    "offsets of an exabyte": file_of(with_entry(HEAD, data_offsets=[2**60, 2**60 + B - A])),
    "offsets backwards": file_of(with_entry(HEAD, data_offsets=[B, A])),
    "negative offsets": file_of(with_entry(HEAD, data_offsets=[-5, B - A - 5])),
    "offsets too short": file_of(with_entry(HEAD, data_offsets=[A, B - 1])),
    "overlapping": file_of(with_entry(HEAD, data_offsets=[A - 1, B - 1])),
    "two tensors in one place": file_of({**ENTRIES, "again": ENTRIES[NORM]}),
    "name that stands twice": assemble(renamed_twice(), CONTENT),
    "a hole": file_of({name: entry for name, entry in ENTRIES.items() if name != NORM}),
    "bytes behind the end": GOOD + b"\0",
    "cut by a byte": GOOD[:-1],
    "only the header": GOOD[: -len(CONTENT)],
    "metadata that is none": file_of({"__metadata__": [1], **ENTRIES}),
}
# The library reads these as the good file: the last of equal entries counts.
MAY_LOAD = {"name that stands twice"}


def measured(read):
    """Result or ValueError of `read()`, and the peak of allocated bytes."""
    tracemalloc.start()
    try:
        try:
            result = read()
        except ValueError as error:
            result = error
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_load_pretrained_reads_the_file_that_the_others_are_made_of(tmp_path):
    assert load_pretrained(directory(tmp_path, GOOD)).config == CONFIG


@pytest.mark.parametrize("kind", [k for k in HOSTILE if k not in MAY_LOAD])
def test_load_pretrained_refuses_a_hostile_file_by_name(tmp_path, kind):
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_pretrained(directory(tmp_path, HOSTILE[kind]))


@pytest.mark.parametrize("kind", HOSTILE)
def test_load_pretrained_of_a_hostile_file_takes_no_more_than_its_size(tmp_path, kind):
    folder = directory(tmp_path, HOSTILE[kind])
    _, peak = measured(lambda: load_pretrained(folder))
    assert peak < len(HOSTILE[kind]) + SMALL


@pytest.mark.parametrize("kind", [k for k in HOSTILE if k not in MAY_LOAD])
def test_convert_refuses_a_hostile_file_and_leaves_no_model(tmp_path, kind):
    """Files that are whole, but of another model, convert: `convert` knows tensors, not models."""
    folder = directory(tmp_path, HOSTILE[kind])
    try:
        convert(folder, tmp_path / "out", "fp32")
    except ValueError as error:
        assert "model.safetensors" in str(error)
        assert not (tmp_path / "out" / "config.json").exists()


def test_load_pretrained_of_a_huge_sparse_file_reads_its_header_only(tmp_path):
    """Ten gigabytes of nothing behind the end of the header."""
    folder = directory(tmp_path, GOOD)
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(10_000_000_000)
    error, peak = measured(lambda: load_pretrained(folder))
    assert isinstance(error, ValueError) and peak < SMALL


def index(tmp_path, weight_map, **more):
    folder = directory(tmp_path, GOOD)
    text = json.dumps({"weight_map": weight_map, **more})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/passwd", "sub/model.safetensors", "", "/", "a/../model.safetensors"]
)
def test_index_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(GOOD)
    with pytest.raises(ValueError, match=r"index\.json is no index of tensors: .* is not the name of a file beside it"):
        load_pretrained(index(tmp_path, dict.fromkeys(ENTRIES, name)))


@pytest.mark.parametrize("name", [".", "..", "nowhere.safetensors", "\0", "\ud800", "n" * 5000])
def test_index_that_names_no_file_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"is missing|is no index of tensors"):
        load_pretrained(index(tmp_path, dict.fromkeys(ENTRIES, name)))


def test_index_that_names_a_folder_is_refused(tmp_path):
    folder = index(tmp_path, {HEAD: "folder"})
    (folder / "folder").mkdir()
    with pytest.raises(ValueError, match="folder is missing"):
        load_pretrained(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_index_that_names_a_pipe_does_not_hang(tmp_path):
    folder = index(tmp_path, {HEAD: "pipe"})
    os.mkfifo(folder / "pipe")
    with pytest.raises(ValueError, match="pipe is missing"):
        load_pretrained(folder)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"weight_map":' * 50_000, b"\xff", b"1" * 10_000])
def test_index_of_garbage_is_refused_by_name(tmp_path, text):
    folder = directory(tmp_path, GOOD)
    (folder / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"index\.json is no index"):
        load_pretrained(folder)


def test_tensor_in_two_shards_is_refused(tmp_path):
    folder = write_directory(tmp_path / "m", CONFIG, ARRAYS, {NORM: ARRAYS[NORM]})
    with pytest.raises(ValueError, match=r"tensor 'model\.norm\.weight' is also in .*model-0000"):
        load_pretrained(folder)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"1" * 10_000, b"", b"[]"])
def test_config_of_garbage_is_refused_by_name(tmp_path, text):
    folder = directory(tmp_path, GOOD)
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_hidden_layers=10**9), dict(num_nextn_predict_layers=10**9), dict(vocab_size=10**15),
        dict(n_routed_experts=10**12, first_k_dense_replace=0), dict(hidden_size=10**12), dict(kv_lora_rank=10**9),
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_config_of_a_huge_model_takes_no_memory(tmp_path, changes):
    """The files hold three tokens' worth of model, whatever config.json says."""
    folder = directory(tmp_path, GOOD, ModelConfig(**{**TINY, **changes}))
    if "num_nextn_predict_layers" in changes:  # else the modules would be left out
        arrays = {**ARRAYS, "model.layers.1.enorm.weight": np.zeros(2, dtype=np.float32)}
        write_directory(folder, ModelConfig(**{**TINY, **changes}), arrays)
    error, peak = measured(lambda: load_pretrained(folder))
    assert isinstance(error, ValueError) and str(folder) in str(error) and peak < SMALL


FUZZ = settings(
    max_examples=150, deadline=2000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
HEADER = len(GOOD) - len(CONTENT)


def loads_or_names_the_file(tmp_path, content):
    folder = directory(tmp_path, content)
    result, peak = measured(lambda: load_pretrained(folder))
    assert peak < len(content) + SMALL
    if isinstance(result, ValueError):
        assert "model.safetensors" in str(result) or str(folder) in str(result)
    else:
        assert result.config == CONFIG


@FUZZ
@given(st.lists(st.tuples(st.integers(0, HEADER - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_fuzz_changed_bytes_of_the_header(tmp_path, changes):
    content = bytearray(GOOD)
    for position, byte in changes:
        content[position] = byte
    loads_or_names_the_file(tmp_path, bytes(content))


DIGITS = [i for i in range(8, HEADER) if GOOD[i : i + 1].isdigit()]


@FUZZ
@given(st.lists(st.tuples(st.sampled_from(DIGITS), st.integers(0, 9)), min_size=1, max_size=4))
def test_fuzz_changed_digits_of_the_header(tmp_path, changes):
    """Shapes and offsets: still JSON, so that the later checks are reached."""
    content = bytearray(GOOD)
    for position, digit in changes:
        content[position] = ord(str(digit))
    loads_or_names_the_file(tmp_path, bytes(content))


@FUZZ
@given(st.integers(0, HEADER), st.integers(0, HEADER), st.binary(max_size=20))
def test_fuzz_replaced_pieces_of_the_header(tmp_path, a, b, piece):
    a, b = min(a, b), max(a, b)
    loads_or_names_the_file(tmp_path, GOOD[:a] + piece + GOOD[b:])


@FUZZ
@given(st.sampled_from(sorted(ENTRIES)), st.sampled_from(sorted(ENTRIES)))
def test_fuzz_exchanged_entries(tmp_path, a, b):
    """Whole entries under each other's names: valid files of a wrong model, or of the right one."""
    loads_or_names_the_file(tmp_path, file_of({**ENTRIES, a: ENTRIES[b], b: ENTRIES[a]}))


@FUZZ
@given(st.sampled_from(sorted(ENTRIES)), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4
    ), max_leaves=8,
))  # fmt: skip
def test_fuzz_any_json_as_an_entry(tmp_path, name, value):
    loads_or_names_the_file(tmp_path, assemble(json.dumps({**ENTRIES, name: value}).encode(), CONTENT))


def test_fp8_numbers_that_are_nan_are_read_as_they_are(tmp_path):
    """Numbers are data, not structure: a NaN in a file is a NaN in the model."""
    codes = np.full(ARRAYS["model.layers.0.mlp.down_proj.weight"].shape, 0x7F, dtype=np.uint8)
    arrays = {**ARRAYS, "model.layers.0.mlp.down_proj.weight": codes.view(ml_dtypes.float8_e4m3fn)}
    model = load_pretrained(write_directory(tmp_path / "m", CONFIG, arrays))
    assert np.isnan(model.layers[0].mlp.down_proj.weight.data).all()
