"""The model of a run folder: its final directory, or its newest checkpoint while it is still training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from ..config import TrainConfig
from ..model.transformer import Transformer
from ..pretrained.reader import load_pretrained


class LoadedRun(NamedTuple):
    """A trained model and how it was trained."""

    model: Transformer
    train: TrainConfig
    step: int


def load_run(folder: Path) -> LoadedRun:
    """Read a run folder's model.

    Raises ValueError if `folder` is no run folder or has no checkpoint yet.
    """
    if not (folder / "train.json").is_file():
        raise ValueError(f"{folder} is no run folder: it has no train.json")
    try:
        train = TrainConfig(**json.loads((folder / "train.json").read_text(encoding="utf-8"))["train"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'train.json'} is damaged: {error}") from None
    found = sorted((folder / "checkpoints").glob("step_*"))
    # A finished run that goes on to a larger total keeps its old final directory until it is done again.
    is_done = not found or int(found[-1].name[5:]) == train.steps
    if is_done and (folder / "final" / "config.json").is_file():
        return LoadedRun(load_pretrained(folder / "final"), train, train.steps)
    if not found:
        raise ValueError(f"{folder} has no checkpoint yet: train it first")
    return LoadedRun(load_pretrained(found[-1]), train, int(found[-1].name[5:]))
