"""Read a released-format directory into a model: every tensor checked against the config before any is kept.

safetensors does the reading. What is refused, with the file and the tensor named: a missing, unexpected or wrongly
shaped tensor, a file that is cut or damaged, a dtype that is not a float.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..config import ModelConfig
from ..model.transformer import Transformer

FLOATS = ("F64", "F32", "F16", "BF16")  # FP8 has scales beside it: it has to be converted, not read


def load_pretrained(path: str | Path, dtype: Any = np.float32) -> Transformer:
    """The model stored in directory `path`.

    Parameters
    ----------
    path : directory with config.json and ``*.safetensors``
    dtype : float32 or float64

    Raises
    ------
    ValueError
        Naming file and tensor, if the files do not hold exactly the model that config.json describes.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is no model directory: it has no config.json")
    model = Transformer(ModelConfig.from_json(path / "config.json"))
    model.init_weights(np.random.default_rng(0), dtype)  # allocates; every number is overwritten below
    fill_from(path, model)
    return model


def fill_from(path: Path, model: Transformer) -> None:
    """Overwrite all parameters and buffers of `model` with the tensors stored in directory `path`."""
    wanted = {name: parameter.data for name, parameter in model.named_parameters()} | dict(model.named_buffers())
    copies = _shared_copies(model)
    missing = set(wanted)
    for file in _weight_files(path):
        for name, tensor in read_tensors(file):
            target = wanted.get(name, copies.get(name))
            if target is None:
                raise ValueError(f"{file}: unexpected tensor {name!r}: config.json describes a model without it")
            if tensor.shape != target.shape:
                raise ValueError(f"{file}: tensor {name!r} is {tensor.shape}, config.json needs {target.shape}")
            if name in wanted:
                target[...] = tensor
                missing.discard(name)
    if missing:
        raise ValueError(f"{path}: {len(missing)} tensors are missing, first {min(missing)!r}")


def read_tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of each tensor of a safetensors file, one at a time."""
    try:
        with safe_open(file, framework="np") as stored:
            for name in stored.keys():  # noqa: SIM118  (not a dict)
                dtype = stored.get_slice(name).get_dtype()
                if dtype not in FLOATS:
                    raise ValueError(f"{file}: tensor {name!r} is {dtype}, not one of {', '.join(FLOATS)}")
                yield name, stored.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short: {error}") from None
    except FileNotFoundError:
        raise ValueError(f"{file} is missing") from None


def _shared_copies(model: Transformer) -> dict[str, np.ndarray]:
    """Tensors that repeat a shared one: MTP modules' embedding and head, and a tied head."""
    copies = {"lm_head.weight": model.lm_head.weight.data} if model.config.tie_word_embeddings else {}
    for k in range(model.config.num_nextn_predict_layers):
        layer = f"model.layers.{model.config.num_hidden_layers + k}"
        copies[f"{layer}.embed_tokens.weight"] = model.embed_tokens.weight.data
        copies[f"{layer}.shared_head.head.weight"] = model.lm_head.weight.data
    return copies


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return [path / name for name in sorted(set(weight_map.values()))]
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is no index of tensors: {error!r}") from None
    if not (path / "model.safetensors").is_file():
        raise ValueError(f"{path} has neither model.safetensors nor model.safetensors.index.json")
    return [path / "model.safetensors"]
