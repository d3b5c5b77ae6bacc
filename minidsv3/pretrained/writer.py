"""Write a model as a released-format directory: config.json and model.safetensors, or shards with an index.

The MTP modules share embedding and head with the model, but the released files repeat them under each module's name,
and so do we. In FP8 the projections of attention and FFN are E4M3 in 128x128 blocks with their scales beside them;
embedding, head, gates, norms and eh_proj stay BF16 and the gates' correction bias FP32, as released.

A directory appears whole or not at all: it is written beside its place and renamed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ModelConfig, write_json
from ..model.transformer import Transformer
from ..quant.blockwise import BLOCK, block_scales, quantize_blocks, scale_shape
from ..quant.formats import BF16, E4M3
from .reader import SCALE
from .tensors import Planned, write_tensors

QUANTIZED = (
    "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
STORED = ("fp32", "bf16", "fp8")


def save_pretrained(
    model: Transformer,
    path: str | Path,
    dtype: str = "fp32",
    max_shard_bytes: int = 5_000_000_000,
    *,
    scale: str = "fp32",
) -> None:
    """Write `model` to directory `path`; the same weights give the same bytes.

    Parameters
    ----------
    dtype : 'fp32', 'bf16' or 'fp8'
        Of the weights; buffers stay FP32.
    max_shard_bytes : int
        Files larger than this are cut, as released: ``model-00001-of-00163.safetensors`` with an index.
    scale : 'fp32' or 'ue8m0'
        Kind of the FP8 scales ('ue8m0': powers of two, as in V3.1; stored as FP32 either way).
    """
    with whole_directory(path) as folder:
        write_model(model, folder, dtype, max_shard_bytes, scale)


def write_model(
    model: Transformer,
    folder: Path,
    dtype: str = "fp32",
    max_shard_bytes: int = 5_000_000_000,
    scale: str = "fp32",
) -> None:
    """config.json and weight files into an existing folder."""
    planned = [t for name, array in released_tensors(model) for t in plan(name, array, dtype, scale)]
    write_config(model.config, folder, dtype, scale)
    write_shards(planned, folder, max_shard_bytes)


def released_tensors(model: Transformer) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors of a released checkpoint of this model, views where possible, in the order of the layers."""
    for name, parameter in model.named_parameters():
        yield name, parameter.data
    yield from model.named_buffers()
    for k in range(model.config.num_nextn_predict_layers):
        layer = f"model.layers.{model.config.num_hidden_layers + k}"
        yield f"{layer}.embed_tokens.weight", model.embed_tokens.weight.data
        yield f"{layer}.shared_head.head.weight", model.lm_head.weight.data


def plan(name: str, array: np.ndarray, dtype: str, scale: str = "fp32") -> list[Planned]:
    """How a tensor is stored under `dtype`: itself, or for FP8 projections its codes and scales."""
    if dtype not in STORED:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(map(repr, STORED))}")
    if scale not in ("fp32", "ue8m0"):
        raise ValueError(f"scale={scale!r} is not 'fp32' or 'ue8m0'")
    if name.endswith("e_score_correction_bias") or dtype == "fp32":
        return [Planned(name, np.dtype(np.float32), array.shape, lambda: array.astype(np.float32, copy=False))]
    if dtype == "bf16" or array.ndim != 2 or name.split(".")[-2:][0] not in QUANTIZED:
        return [Planned(name, BF16, array.shape, lambda: array.astype(BF16))]

    def matrix() -> np.ndarray:
        return np.asarray(array, dtype=np.float32)

    # Nothing is kept between the two: a shard's scales are all written before its codes.
    return [
        Planned(name, E4M3, array.shape, lambda: quantize_blocks(matrix(), scale).codes),
        Planned(name + SCALE, np.dtype(np.float32), scale_shape(array.shape), lambda: block_scales(matrix(), scale)),
    ]


def write_config(config: ModelConfig, folder: Path, dtype: str, scale: str = "fp32") -> None:
    """config.json with what the weights' dtype asks for."""
    values = config.to_dict()
    values.pop("quantization_config", None)
    values["torch_dtype"] = "float32" if dtype == "fp32" else "bfloat16"
    if dtype == "fp8":
        values["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        }
        if scale == "ue8m0":
            values["quantization_config"]["scale_fmt"] = "ue8m0"
    write_json(folder / "config.json", dict(sorted(values.items())))


def write_shards(planned: Iterable[Planned], folder: Path, max_shard_bytes: int, report: Any = None) -> None:
    """Tensors into one file or shards with an index; `report(nbytes)` is called after each tensor."""
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} is not positive")
    shards = cut_into_shards(planned, max_shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, tensors in zip(names, shards):
        write_tensors(tensors, folder / name, report)
    if len(shards) > 1:
        total = sum(t.nbytes for tensors in shards for t in tensors)
        weight_map = {t.name: name for name, tensors in zip(names, shards) for t in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def cut_into_shards(planned: Iterable[Planned], max_shard_bytes: int) -> list[list[Planned]]:
    """Tensors in order, a new list wherever the next would exceed the limit."""
    shards: list[list[Planned]] = [[]]
    used = 0
    for tensor in planned:
        if shards[-1] and used + tensor.nbytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.nbytes
    return shards


@contextmanager
def whole_directory(path: str | Path) -> Iterator[Path]:
    """Give a temporary directory beside `path`; when the block ends without error, it takes the place of `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{kind}") for kind in ("tmp", "old"))
    remove_tree(temporary)
    temporary.mkdir()
    try:
        yield temporary
        _flush_to_disk(temporary)
        remove_tree(old)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        remove_tree(old)
    finally:
        remove_tree(temporary)


def remove_tree(path: Path) -> None:
    """Delete a directory if it is there."""
    if path.exists():
        shutil.rmtree(path)


def _flush_to_disk(folder: Path) -> None:
    """A rename that reaches the disk before its files' contents would leave a complete-looking, empty checkpoint."""
    for file in folder.iterdir():
        with file.open("r+b") as stream:
            os.fsync(stream.fileno())
