"""The model of a run folder, or of a released-format directory, with what is needed to talk to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..config import TrainConfig
from ..data import ByteTokenizer, Tokenizer, load_tokenizer
from ..model.layers import Recipe
from ..model.transformer import Transformer
from ..pretrained.reader import load_pretrained


class LoadedRun(NamedTuple):
    """A trained model and how it was trained."""

    model: Transformer
    train: TrainConfig
    step: int


class Speaker(NamedTuple):
    """A model, its tokenizer, and the longest context it was trained for."""

    model: Transformer
    tokenizer: Tokenizer
    context: int


def load_run(folder: Path, recipe_of: Callable[[TrainConfig], Recipe | None] = lambda train: None) -> LoadedRun:
    """Read a run folder's model: its final directory, or its newest checkpoint while it is still training.

    The model computes in float32 unless `recipe_of` the run's settings says otherwise.

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
        return LoadedRun(load_pretrained(folder / "final", recipe=recipe_of(train)), train, train.steps)
    if not found:
        raise ValueError(f"{folder} has no checkpoint yet: train it first")
    return LoadedRun(load_pretrained(found[-1], recipe=recipe_of(train)), train, int(found[-1].name[5:]))


def load_speaker(folder: Path) -> Speaker:
    """A run folder (byte tokenizer, context of its training) or a released directory (its tokenizer.json).

    Raises ValueError if `folder` is neither, or a released directory has no tokenizer that fits.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is neither a run folder nor a model directory: it has no config.json")
    if (folder / "train.json").is_file():
        run = load_run(folder)
        return Speaker(run.model, ByteTokenizer(), run.train.seq_len)
    model, tokenizer = load_pretrained(folder), ByteTokenizer()
    if (folder / "tokenizer.json").is_file():
        return Speaker(model, load_tokenizer(folder / "tokenizer.json"), model.config.max_position_embeddings)
    if model.config.vocab_size != tokenizer.vocab_size:
        raise ValueError(f"{folder} has no tokenizer.json, and its {model.config.vocab_size} tokens are not bytes")
    return Speaker(model, tokenizer, model.config.max_position_embeddings)
