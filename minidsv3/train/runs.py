"""What a training run left in its folder, as arrays: the reading side of a run.

A run folder holds ``config.json`` (the model), ``train.json`` (preset, training settings, environment) and two files
that grow by one JSON object a step: ``metrics.jsonl`` (losses in nats, gradient norm, learning rate, speed, and the
validation bits per byte on evaluation steps) and ``experts.jsonl`` (tokens and routing bias of every expert of every
MoE layer, the MTP modules last). JSON lines are appended and flushed, so a killed run loses at most the line that it
was writing: a last line that is cut off is no step, and is passed over here.

Beside the reading stand the two small formulas that every reader of a run needs:

* `smoothed`, the exponential moving average with bias correction (as in Adam), over steps that may have gaps;
* `max_vio`, the maximal violation of balance, (max load - mean load) / mean load over the experts of a layer
  (Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", section 4.1).

Simplified: a run is read whole into memory, a few kilobytes a step.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ModelConfig, TrainConfig
from .balance import max_vio

__all__ = ["METRICS", "Run", "cut_after", "max_vio", "read_run", "smoothed"]

METRICS = (
    "step", "tokens", "loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "max_vio",
    "tokens_per_second", "mfu", "val_bits_per_byte",
)  # fmt: skip
_BYTE_VOCABULARY = 257  # 256 bytes and the document boundary


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder, read (`read_run`). Lm counts the MoE layers, the MTP modules last; E the routed experts."""

    path: Path
    config: ModelConfig
    train: TrainConfig
    preset: str | None
    environment: dict[str, Any]
    metrics: dict[str, np.ndarray]  # name -> float64 [steps], NaN where the step has no such value
    load: np.ndarray  # int64 [steps, Lm, E]: tokens that the layer's router sent to the expert
    bias: np.ndarray  # float64 [steps, Lm, E]: e_score_correction_bias

    @property
    def step(self) -> np.ndarray:
        """Numbers of the completed steps, int64 [steps], counted from 1."""
        return self.metrics["step"].astype(np.int64)

    @property
    def layer_names(self) -> list[str]:
        """A name for each of the Lm MoE layers: 'layer 1' is the one with ``model.layers.1`` in its weights' names."""
        first, L = self.config.first_k_dense_replace, self.config.num_hidden_layers
        return [f"layer {layer}" for layer in range(first, L)] + [
            f"MTP module {depth + 1}" for depth in range(self.config.num_nextn_predict_layers)
        ]

    @property
    def loss_unit(self) -> str:
        """Unit of the losses: a token is a byte in the byte vocabulary only."""
        return "nats per byte" if self.config.vocab_size == _BYTE_VOCABULARY else "nats per token"


def read_run(path: str | Path) -> Run:
    """Read a run folder, finished or not.

    A step counts when both ``metrics.jsonl`` and ``experts.jsonl`` have it: a run killed between the two writes has
    one step more in one of them.

    Parameters
    ----------
    path : str or Path
        The folder that `train` writes.

    Returns
    -------
    Run
        With no step at all if the run has not completed its first one.

    Raises
    ------
    ValueError
        A file is missing or contradicts another; the message names the file and what to do.
    """
    folder = Path(path)
    for name in ("config.json", "train.json", "metrics.jsonl", "experts.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not a run folder, {name} is missing: give the folder that `train` wrote")
    config = ModelConfig.from_json(folder / "config.json")
    preset, train, environment = _read_train(folder / "train.json")
    metrics = [_numbers(folder / "metrics.jsonl", record) for _, record in _steps(folder / "metrics.jsonl")]
    experts = [record for _, record in _steps(folder / "experts.jsonl")]
    steps = min(len(metrics), len(experts))
    for a, b in zip(metrics[:steps], experts[:steps]):
        if a["step"] != b["step"]:
            raise ValueError(
                f"{folder / 'experts.jsonl'} has step {b['step']} where metrics.jsonl has step {a['step']}: "
                "cut both after the last step that they share"
            )
    shape = (steps, config.num_moe_layers, config.n_routed_experts)
    load, bias = (_stack(folder / "experts.jsonl", experts[:steps], name, shape) for name in ("load", "bias"))
    return Run(folder, config, train, preset, environment, _columns(metrics[:steps]), load.astype(np.int64), bias)


def cut_after(path: str | Path, step: int) -> None:
    """Rewrite a ``.jsonl`` file of a run without the lines after `step`, and without a torn last line.

    A run that resumes from the checkpoint of `step` would otherwise write the steps after it a second time. The file
    is written under another name first: a crash leaves the old one or the new one.

    Raises
    ------
    ValueError
        A line before the last is not a step.
    """
    path = Path(path)
    kept = [line + b"\n" for line, record in _steps(path) if record["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(b"".join(kept))
    temporary.replace(path)


def smoothed(values: np.ndarray, decay: float, step: np.ndarray | None = None) -> np.ndarray:
    """Exponential moving average with bias correction.

    At position n it is the mean of the values up to n with weights ``decay ** (step[n] - step[i])``. For consecutive
    steps that is the usual recursion ``m = decay * m + (1 - decay) * x`` divided by ``1 - decay ** n``; for values
    that come every few hundred steps, such as evaluations, it forgets per step and not per value.

    Parameters
    ----------
    values : ndarray [N]
        A NaN makes every later average NaN: a run that diverged is not mended here.
    decay : float
        In [0, 1); 0.98 averages over some 50 steps, 0 changes nothing.
    step : ndarray [N] of int, optional
        Ascending; consecutive if not given.

    Returns
    -------
    ndarray [N], float64

    Raises
    ------
    ValueError
        `decay` outside [0, 1), or `step` of another length.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"smoothing decay={decay} is not in [0, 1)")
    values = np.asarray(values, dtype=np.float64)
    gaps = np.ones(len(values), dtype=np.int64) if step is None else np.diff(step, prepend=step[:1])
    if gaps.shape != values.shape:
        raise ValueError(f"step has shape {gaps.shape}, values have shape {values.shape}: they must be equal")
    total, weight = 0.0, 0.0
    averages = np.empty(len(values), dtype=np.float64)
    for n, value in enumerate(values.tolist()):
        fade = decay ** int(gaps[n])
        total, weight = fade * total + value, fade * weight + 1
        averages[n] = total / weight
    return averages


def _read_train(path: Path) -> tuple[str | None, TrainConfig, dict[str, Any]]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        settings = dict(raw["train"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is not a JSON object with the key 'train': copy it again from its run") from None
    unknown = sorted(set(settings) - {f.name for f in dataclasses.fields(TrainConfig)})
    if unknown:
        raise ValueError(f"{path} has unknown settings {', '.join(unknown)}: read it with the version that wrote it")
    try:
        return raw.get("preset"), TrainConfig(**settings), raw.get("environment") or {}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _steps(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each complete line of the file with the object it holds, in ascending order of step."""
    lines = path.read_bytes().splitlines()
    pairs: list[tuple[bytes, dict[str, Any]]] = []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None:
            if number == len(lines):
                break  # the run was killed while it wrote this line
            raise ValueError(f"{path} line {number} is no JSON object with a step: delete this line")
        if pairs and record["step"] <= pairs[-1][1]["step"]:
            order = f"step {record['step']} after step {pairs[-1][1]['step']}"
            raise ValueError(f"{path} line {number}: {order}: delete the lines of one of the two runs")
        pairs.append((line, record))
    return pairs


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:  # of JSON or of UTF-8
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None


def _numbers(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record, checked: each of our metrics is a number or null; what others added and is no number is left out."""
    numbers = {name: value for name, value in record.items() if value is None or isinstance(value, int | float)}
    wrong = sorted(set(METRICS) & (set(record) - set(numbers)))
    if wrong:
        value = record[wrong[0]]
        raise ValueError(f"{path}: {wrong[0]}={value!r} of step {record['step']} is no number: delete this line")
    return numbers


def _columns(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """float64 [steps] for each metric; null and absent are NaN."""
    names = dict.fromkeys([*METRICS, *(name for record in records for name in record)])
    columns = {name: [record.get(name) for record in records] for name in names}
    return {
        name: np.array([np.nan if value is None else value for value in values], dtype=np.float64)
        for name, values in columns.items()
    }


def _stack(path: Path, records: list[dict[str, Any]], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """`name` of all records as one float64 array of `shape` [steps, Lm, E]."""
    try:
        values = np.array([record[name] for record in records], dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: {name!r} is not [layers][experts] in every line: delete those that differ") from None
    if values.size == 0 and 0 in shape:
        return np.zeros(shape, dtype=np.float64)  # no step yet, or no MoE layer
    if values.shape != shape:
        raise ValueError(f"{path}: {name!r} has shape {values.shape}, config.json says {shape}: they are of two runs")
    return values
