"""Read a released-format directory into a model: every tensor checked against the config before any is kept.

What is read: BF16, FP16, FP32 and the released FP8 format, in which an E4M3 matrix has scales beside it under the name
``..._scale_inv``, one for each 128x128 block. In spite of the name the scale *multiplies*. Scales may be FP32 or UE8M0,
and the blocks at the edges may be smaller.

What is refused, with file and tensor named: a missing, unexpected or wrongly shaped tensor, scales that do not fit, a
file that is cut or damaged. Everything is checked before the first number is copied, so there is never half a model.
Tensors are read one at a time from mapped files: the peak is one tensor above the model.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ModelConfig
from ..model.layers import Recipe
from ..model.transformer import Transformer
from ..quant.blockwise import BLOCK, dequantize, scale_shape
from ..quant.formats import E4M3, UE8M0
from .tensors import TensorFile

SCALE = "_scale_inv"


def load_pretrained(
    path: str | Path, dtype: Any = np.float32, mtp: bool = True, recipe: Recipe | None = None
) -> Transformer:
    """The model stored in directory `path`.

    Parameters
    ----------
    path : directory with config.json and ``*.safetensors``
    dtype : float32 or float64
    mtp : bool
        False leaves the MTP modules out. They are also left out, and `model.config` says so, where the files have no
        tensor of theirs at all (transformers stores none).
    recipe : `model.layers.Recipe`, optional
        Precision in which the model computes.

    Raises
    ------
    ValueError
        Naming file and tensor, if the files do not hold exactly the model that config.json describes.
    """
    if np.dtype(dtype) not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise ValueError(f"dtype={np.dtype(dtype)} is not float32 or float64")
    stored = StoredModel(path)
    config = stored.config
    if not mtp or not any(stored.is_mtp(name) for name in stored.names):
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    stored.check_size(config)
    model = Transformer(config, recipe)
    stored.check(model)
    model.allocate(dtype)
    stored.fill(model)
    return model


class StoredModel:
    """A released-format directory, opened: its config, and its tensors by name.

    Raises ValueError, naming the file, if it can't be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise ValueError(f"{self.path} is no model directory: it has no config.json")
        self.config = ModelConfig.from_json(self.path / "config.json")
        self._file: dict[str, TensorFile] = {}  # name -> file
        for weights in _weight_files(self.path):
            file = TensorFile(weights)
            for name in file.names:
                if name in self._file:
                    raise ValueError(f"{file.path}: tensor {name!r} is also in {self._file[name].path}")
                self._file[name] = file

    @property
    def names(self) -> list[str]:
        """All tensors but scales."""
        return [name for name in self._file if not name.endswith(SCALE)]

    def is_mtp(self, name: str) -> bool:
        """Whether a tensor belongs to a layer behind the last."""
        match = re.match(r"model\.layers\.(\d{1,9})\.", name)
        return match is not None and int(match[1]) >= self.config.num_hidden_layers

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._file[name].shape(name)

    def stored(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """A tensor as it is stored, and its scales if it is FP8 (mapped, not read)."""
        file = self._file[name]
        if file.dtype(name) != E4M3:
            return file.array(name), None
        return file.array(name), self._file[name + SCALE].array(name + SCALE)

    def values(self, name: str) -> np.ndarray:
        """A tensor's values: as stored, or dequantised to float32 if it is FP8."""
        array, scales = self.stored(name)
        return array if scales is None else dequantize(array, scales)

    def check_size(self, config: ModelConfig) -> None:
        """ValueError if a config needs more tensors than there are: found before a huge model is built to compare."""
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        needed = layers + 3 * config.n_routed_experts * config.num_moe_layers
        if needed > len(self._file):
            message = f"config.json describes a model of more than {needed} tensors, the files hold {len(self._file)}"
            raise ValueError(f"{self.path}: tensors are missing: {message}")

    def check(self, model: Transformer) -> None:
        """ValueError unless the files hold what `model` needs, and nothing else."""
        wanted = {name: p.shape for name, p in model.named_parameters()}
        wanted |= {name: buffer.shape for name, buffer in model.named_buffers()}
        copies = _shared_copies(model)
        for name, file in self._file.items():
            if name.endswith(SCALE):
                if name.removesuffix(SCALE) not in self._file:
                    raise ValueError(f"{file.path}: scales {name!r} belong to no tensor")
                continue
            shape = wanted.get(name, copies.get(name))
            skipped = name.endswith("rotary_emb.inv_freq")  # derived from the config
            if shape is None and not skipped and not (self.is_mtp(name) and not model.mtp):
                raise ValueError(f"{file.path}: unexpected tensor {name!r}: config.json describes a model without it")
            if shape is not None and file.shape(name) != shape:
                raise ValueError(f"{file.path}: tensor {name!r} is {file.shape(name)}, config.json needs {shape}")
            self.check_scales(name)
        missing = wanted.keys() - self._file.keys()
        if missing:
            raise ValueError(f"{self.path}: {len(missing)} tensors are missing, first {min(missing)!r}")

    def fill(self, model: Transformer) -> None:
        """Copy every tensor into the model, one at a time."""
        for name, parameter in model.named_parameters():
            array, scales = self.stored(name)
            if scales is None:
                parameter.data[...] = array
                continue
            for a in range(0, len(array), BLOCK):  # strip by strip: no second matrix is made
                parameter.data[a : a + BLOCK] = dequantize(array[a : a + BLOCK], scales[a // BLOCK : a // BLOCK + 1])
        for name, buffer in model.named_buffers():
            buffer[...] = self.values(name)

    def check_scales(self, name: str) -> None:
        """ValueError unless a tensor has the scales that its dtype asks for."""
        file = self._file[name]
        if file.dtype(name) == UE8M0 or (file.dtype(name).itemsize == 1 and file.dtype(name) != E4M3):
            raise ValueError(f"{file.path}: tensor {name!r} is {file.dtype(name)}: only E4M3 weights have scales")
        scales = self._file.get(name + SCALE)
        if file.dtype(name) != E4M3:
            if scales is not None:
                raise ValueError(f"{scales.path}: {name + SCALE!r} scales a tensor that is {file.dtype(name)}")
            return
        if scales is None:
            raise ValueError(f"{file.path}: FP8 tensor {name!r} has no {name + SCALE!r}")
        kind = scales.dtype(name + SCALE)
        if kind.itemsize == 1 and kind != UE8M0:
            raise ValueError(f"{scales.path}: {name + SCALE!r} is {kind}, not a kind of scale")
        needed = scale_shape(file.shape(name)) if len(file.shape(name)) == 2 else None
        if scales.shape(name + SCALE) != needed:
            got = scales.shape(name + SCALE)
            raise ValueError(f"{scales.path}: {name + SCALE!r} is {got}, blocks of {BLOCK} need {needed}")


def read_tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of each tensor of a safetensors file."""
    stored = TensorFile(file)
    for name in stored.names:
        yield name, stored.array(name)


def _shared_copies(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Tensors that may repeat a shared one: MTP modules' embedding and head, and a tied head."""
    shape = model.lm_head.weight.shape
    copies = {"lm_head.weight": shape} if model.config.tie_word_embeddings else {}
    for k in range(model.config.num_nextn_predict_layers):
        layer = f"model.layers.{model.config.num_hidden_layers + k}"
        copies |= {f"{layer}.embed_tokens.weight": shape, f"{layer}.shared_head.head.weight": shape}
    return copies


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{index} is no index of tensors: {error!r}") from None
        for name in names:
            if not isinstance(name, str) or not name or Path(name).name != name:
                raise ValueError(f"{index} is no index of tensors: {name!r} is not the name of a file beside it")
        return [path / name for name in names]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    files = sorted(file for file in path.glob("*.safetensors") if file.name != "optimizer.safetensors")
    if not files:
        raise ValueError(f"{path} has neither model.safetensors nor model.safetensors.index.json")
    return files
