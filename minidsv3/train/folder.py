"""Who may write into a run folder, and what is written there once: config.json and train.json.

A folder belongs to one run. `train` refuses one that holds another, and goes on with its own only under the settings
that it was begun with: all but `FREE_TO_CHANGE` decide its numbers. What changed of the machine is told, since it may
change bits.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..config import ModelConfig, TrainConfig, write_json

FREE_TO_CHANGE = ("steps", "checkpoint_every", "keep", "workers")  # on resume; all else would be another run


class Description(NamedTuple):
    """What is trained, how, and where."""

    config: ModelConfig
    train: TrainConfig
    environment: dict[str, Any]  # of `machine.environment`
    ranks: dict[str, Any] | None  # of `spread`; None on one rank
    preset: str | None = None

    def write(self, folder: Path) -> None:
        """config.json and train.json, each the old one or the new one whatever happens."""
        folder.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {"preset": self.preset, "train": dataclasses.asdict(self.train)}
        record["environment"] = self.environment
        if self.ranks:
            record["ranks"] = self.ranks
        for name, value in (("config.json", self.config.to_dict()), ("train.json", record)):
            temporary = folder / f"{name}.tmp"
            write_json(temporary, value)
            temporary.replace(folder / name)


def check_folder(folder: Path, run: Description, resume: bool, report: Callable[[str], object]) -> None:
    """Refuse a folder that holds another run, or none of ours; report what is different and yet allowed.

    Raises
    ------
    ValueError
        It holds a run and `resume` is false, or a run with other settings, or checkpoints of nobody.
    """
    described = folder / "train.json"
    if described.exists() and not resume:
        raise ValueError(f"{folder} already holds a run: add --resume to go on with it, or choose another --out")
    if described.exists():
        _check_same_run(folder, _stored(described), run, report)
    elif folder.exists() and any(folder.glob("checkpoints/step_*")):
        raise ValueError(f"{folder} has checkpoints but no train.json: it is no run folder of ours")


def _stored(described: Path) -> dict[str, Any]:
    try:
        stored = json.loads(described.read_text(encoding="utf-8"))
        stored["train"]["steps"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{described} is damaged ({error}): choose another --out") from None
    return stored


def _check_same_run(folder: Path, stored: dict[str, Any], run: Description, report: Callable[[str], object]) -> None:
    ours = json.loads(json.dumps({**dataclasses.asdict(run.train), **run.config.to_dict()}))
    free = set(FREE_TO_CHANGE)
    if run.ranks or "ranks" in stored:  # one shard a rank: another number of ranks is another cut
        free.add("shards")
        if ours["shards"] != stored["train"]["shards"]:
            report(f"shards={ours['shards']} instead of {stored['train']['shards']}: equal but for rounding")
    added = {name: getattr(TrainConfig(), name) for name in ("precision", "accumulate")}  # to runs of older versions
    before = added | stored["train"] | ModelConfig.from_json(folder / "config.json").to_dict()
    for name, value in ours.items():
        if name not in free and before.get(name) != json.loads(json.dumps(value)):
            raise ValueError(
                f"{folder} was trained with {name}={before.get(name)!r}, not {value!r}: "
                "resume with the same settings, or choose another --out"
            )
    if stored["train"]["steps"] != run.train.steps:
        report(f"the schedules now run to step {run.train.steps} instead of {stored['train']['steps']}")
    for name in ("python", "numpy", "blas", "platform"):
        old, new = stored.get("environment", {}).get(name), run.environment[name]
        if old != new:
            report(f"{name} changed from {old!r} to {new!r}: bits may differ from an uninterrupted run")
