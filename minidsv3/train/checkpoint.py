"""Checkpoints: everything a run needs to go on to the same bits, in one directory that is there whole or not at all.

``step_00000010/`` is a released-format model directory (weights and balance biases, FP32) with two files more:
``optimizer.safetensors`` holds both moments of each tensor under its released name, ``trainer.json`` the step, the
tokens seen and the data position. Nothing else has state: schedules and the data order are functions of the step and
the seed, so there is no random generator to store.

The directory is written under a temporary name, flushed and renamed; a kill at any moment leaves either the old
checkpoints or the old ones and the new one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import write_json
from ..model.transformer import Transformer
from ..pretrained.reader import StoredModel, read_tensors
from ..pretrained.tensors import planned, write_tensors
from ..pretrained.writer import remove_tree, whole_directory, write_model
from .optim import AdamW


def save_checkpoint(folder: Path, step: int, model: Transformer, optimizer: AdamW, state: dict[str, Any]) -> Path:
    """Write ``folder/step_XXXXXXXX``; `state` goes into trainer.json."""
    path = folder / f"step_{step:08d}"
    with whole_directory(path) as temporary:
        write_model(model, temporary)
        write_tensors(planned(dict(optimizer.named_moments(model))), temporary / "optimizer.safetensors")
        write_json(temporary / "trainer.json", {"step": step, **state})
    return path


def load_checkpoint(path: Path, model: Transformer, optimizer: AdamW) -> dict[str, Any]:
    """Fill model and optimizer from a checkpoint; returns the contents of trainer.json.

    Raises ValueError, naming the file and the way out, if anything is missing, cut short or of another shape.
    """
    try:
        state = _read_state(path / "trainer.json")
        stored = StoredModel(path)
        stored.check(model)
        stored.fill(model)
        missing = dict(optimizer.named_moments(model))
        for name, tensor in read_tensors(path / "optimizer.safetensors"):
            target = missing.pop(name, None)
            if target is None or (tensor.shape, tensor.dtype) != (target.shape, target.dtype):
                raise ValueError(f"{path / 'optimizer.safetensors'}: tensor {name!r} does not belong to this run")
            target[...] = tensor
        if missing:
            raise ValueError(f"{path / 'optimizer.safetensors'}: {min(missing)!r} is missing")
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; delete {path} to go on from the checkpoint before it") from None
    return state


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{file} is damaged or cut short: {error}") from None
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise ValueError(f"{file} names no step")
    return state


def checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir() and path.name[5:].isdigit())


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what an interrupted save left behind."""
    for path in checkpoints(folder)[:-keep]:
        path.rename(path.with_name(f".{path.name}.old"))  # a kill while it is deleted leaves no half checkpoint
    for path in folder.glob(".step_*"):
        remove_tree(path)
