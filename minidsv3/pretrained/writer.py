"""Write a model as a released-format directory: config.json and model.safetensors, or shards with an index.

The MTP modules share embedding and head with the model, but the released files repeat them under each module's name,
and so do we. A directory appears whole or not at all: it is written beside its place and renamed.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ..config import write_json
from ..model.transformer import Transformer


def released_tensors(model: Transformer) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors of a released checkpoint of this model, views where possible, in the order of the layers."""
    for name, parameter in model.named_parameters():
        yield name, parameter.data
    yield from model.named_buffers()
    for k in range(model.config.num_nextn_predict_layers):
        layer = f"model.layers.{model.config.num_hidden_layers + k}"
        yield f"{layer}.embed_tokens.weight", model.embed_tokens.weight.data
        yield f"{layer}.shared_head.head.weight", model.lm_head.weight.data


def save_pretrained(model: Transformer, path: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write `model` to directory `path` in FP32; the same weights give the same bytes.

    Parameters
    ----------
    max_shard_bytes : int
        Files larger than this are cut, as released: ``model-00001-of-00163.safetensors`` with an index.
    """
    with whole_directory(path) as folder:
        write_model(model, folder, max_shard_bytes)


def write_model(model: Transformer, folder: Path, max_shard_bytes: int = 5_000_000_000) -> None:
    """config.json and weight files into an existing folder."""
    model.config.to_json(folder / "config.json")
    shards: list[dict[str, np.ndarray]] = [{}]
    used = 0
    for name, tensor in released_tensors(model):
        if shards[-1] and used + tensor.nbytes > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, tensors in zip(names, shards):
        arrays = {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in tensors.items()}
        write_tensors(arrays, folder / name, {"format": "pt"})  # what the released files say
    if len(shards) > 1:
        total = sum(tensor.size * 4 for tensors in shards for tensor in tensors.values())
        weight_map = {key: name for name, tensors in zip(names, shards) for key in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def write_tensors(arrays: dict[str, np.ndarray], file: Path, metadata: dict[str, str] | None = None) -> None:
    """`arrays`, contiguous, as a safetensors file; OSError, as for any other file, where it can't be written."""
    try:
        save_file(arrays, file, metadata=metadata)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(file)) from None
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read


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
