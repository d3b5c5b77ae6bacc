"""Released-format directories written by the tests themselves: a safetensors writer and FP8 in a few lines.

A second route beside the package's own: what `load_pretrained` gives is compared with what these lines put down.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from minidsv3 import ModelConfig, Transformer

# No size is a multiple of 128, and several exceed it, so that there are blocks at both edges.
SHAPE = dict(
    vocab_size=31, hidden_size=140, intermediate_size=150, moe_intermediate_size=13, num_hidden_layers=2,
    num_attention_heads=3, q_lora_rank=131, kv_lora_rank=9, qk_nope_head_dim=50, qk_rope_head_dim=6, v_head_dim=45,
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1, n_group=2, topk_group=1,
    num_nextn_predict_layers=1,
)  # fmt: skip
NAMES = {
    np.dtype(np.float64): "F64", np.dtype(np.float32): "F32", np.dtype(np.float16): "F16",
    np.dtype(np.int32): "I32", np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2", np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
}  # fmt: skip
PROJECTIONS = (
    *("q_a_proj.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight", "o_proj.weight"),
    *("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
)


def config_of(**changes) -> ModelConfig:
    return ModelConfig(**{**SHAPE, **changes})


def entries_of(arrays):
    """Header entries and bytes of arrays one behind the other."""
    entries, content = {}, b""
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        offsets = [len(content), len(content) + len(raw)]
        entries[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        content += raw
    return entries, content


def assemble(header: bytes, content: bytes, length=None) -> bytes:
    """A file from its parts; `length` is what it says of its header."""
    length = len(header) if length is None else length
    return length.to_bytes(8, "little") + header + content


def write_file(path: Path, arrays) -> Path:
    entries, content = entries_of(arrays)
    path.write_bytes(assemble(json.dumps(entries).encode(), content))
    return path


def random_arrays(config: ModelConfig, seed=0):
    """Name -> float32 array of every tensor that a released checkpoint of `config` has."""
    rng, model = np.random.default_rng(seed), Transformer(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    shapes |= {name: b.shape for name, b in model.named_buffers()}
    for k in range(config.num_nextn_predict_layers):
        layer = f"model.layers.{config.num_hidden_layers + k}"
        shapes[f"{layer}.embed_tokens.weight"] = shapes["model.embed_tokens.weight"]
        shapes[f"{layer}.shared_head.head.weight"] = shapes["lm_head.weight"]
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def as_fp8(arrays, scales="F32", seed=1):
    """Projections as random E4M3 codes with random scales, all else BF16 (biases F32), as released."""
    rng, stored = np.random.default_rng(seed), {}
    for name, array in arrays.items():
        if name.endswith("correction_bias"):
            stored[name] = array
        elif not name.endswith(PROJECTIONS):
            stored[name] = array.astype(ml_dtypes.bfloat16)
        else:
            codes = rng.integers(0, 256, array.shape, dtype=np.uint8)
            codes[(codes & 0x7F) == 0x7F] = 0  # no NaN
            shape = tuple(-(-n // 128) for n in array.shape)
            scale = rng.uniform(0.001, 0.1, shape) if scales == "F32" else 2.0 ** rng.integers(-12, 3, shape)
            stored[name] = codes.view(ml_dtypes.float8_e4m3fn)
            dtype = ml_dtypes.float8_e8m0fnu if scales == "F8_E8M0" else np.float32
            stored[name + "_scale_inv"] = scale.astype(dtype)
    return stored


def values_of(stored):
    """Name -> float32 values: code times its block's scale, block by block; the scale multiplies."""
    values = {}
    for name, array in stored.items():
        if name.endswith("_scale_inv"):
            continue
        values[name] = array.astype(np.float32)
        if name + "_scale_inv" in stored:
            scales = stored[name + "_scale_inv"].astype(np.float32)
            for i in range(scales.shape[0]):
                for j in range(scales.shape[1]):
                    values[name][128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scales[i, j]
    return values


def write_directory(folder: Path, config: ModelConfig, *files) -> Path:
    """config.json and one file of arrays, or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    config.to_json(folder / "config.json")
    if len(files) == 1:
        write_file(folder / "model.safetensors", files[0])
        return folder
    weight_map = {}
    for i, arrays in enumerate(files, start=1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        write_file(folder / name, arrays)
        weight_map |= dict.fromkeys(arrays, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return folder


def numbers(model) -> dict[str, np.ndarray]:
    """Everything that a model holds, by name."""
    return {name: p.data for name, p in model.named_parameters()} | dict(model.named_buffers())


def assert_holds(model, values) -> None:
    """The model's numbers are exactly `values`; copies of embedding and head are not looked at."""
    for name, array in numbers(model).items():
        np.testing.assert_array_equal(array, values[name], err_msg=name)
