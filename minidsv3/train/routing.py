"""Routing traces: which experts the router of a model in training chose, for `simulate` to replay.

A trace is one safetensors file, ``routing.safetensors`` in a run folder:

    topk_idx     int16   [steps, layers, T, K]   experts of each token, ascending; -1: this place has no token
    topk_weight  float32 [steps, layers, T, K]   their weights; 0 where there is no token
    step         int64   [steps]                 the step, from 1; traced with the weights before its update
    metadata: n_routed_experts, num_experts_per_tok

Layers are those with routed experts, the MTP modules last. A module of depth k sees k tokens less of each sequence:
the last k places of a sequence hold -1. Tokens stand as in the batch: sequence by sequence, shard by shard.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..autograd import Array, no_grad, observing
from ..model.moe import Gate
from ..model.transformer import Transformer


class RoutingTrace(NamedTuple):
    """What the file holds, and the sizes in its metadata."""

    topk_idx: Array  # int16 [steps, layers, T, K]
    topk_weight: Array  # float32 [steps, layers, T, K]
    step: Array  # int64 [steps]
    n_routed_experts: int


def route(model: Transformer, tokens_in: Array, targets: Array) -> tuple[Array, Array]:
    """topk_idx int16 and topk_weight float32 [layers, T, K] of one batch [B, S], by a forward pass without a tape."""
    found: list[tuple[Array, Array]] = []

    def look(event: Any) -> None:
        if event.phase == "module" and isinstance(event.op, Gate):
            _, topk_idx, topk_weight = (t.data for t in event.outputs)
            found.append((topk_idx, topk_weight))

    with no_grad(), observing(look):
        model.loss(tokens_in, targets)
    (B, S), K = tokens_in.shape, model.config.num_experts_per_tok
    idx = np.full((len(found), B, S, K), -1, dtype=np.int16)
    weight = np.zeros((len(found), B, S, K), dtype=np.float32)
    for layer, (topk_idx, topk_weight) in enumerate(found):
        seen = len(topk_idx) // B
        idx[layer, :, :seen] = topk_idx.reshape(B, seen, K)
        weight[layer, :, :seen] = topk_weight.reshape(B, seen, K)
    return idx.reshape(len(found), -1, K), weight.reshape(len(found), -1, K)


class RoutingRecorder:
    """Collects steps of a run and writes them."""

    def __init__(self, n_routed_experts: int) -> None:
        self._E = n_routed_experts
        self._steps: list[tuple[int, Array, Array]] = []

    def add(self, step: int, topk_idx: Array, topk_weight: Array) -> None:
        """One step, as `route` gives it."""
        self._steps.append((step, topk_idx, topk_weight))

    def resume(self, path: Path, last_step: int) -> None:
        """Begin with what the file at `path` holds up to `last_step`."""
        trace = read_routing_trace(path)
        self._steps = [
            (int(s), idx, weight)
            for s, idx, weight in zip(trace.step, trace.topk_idx, trace.topk_weight)
            if s <= last_step
        ]

    def write(self, path: Path) -> None:
        """All steps so far into one file, moved into place; steps with fewer tokens (a batch ramp) are filled up."""
        if not self._steps:
            return
        T = max(idx.shape[1] for _, idx, _ in self._steps)
        fill = [((0, 0), (0, T - idx.shape[1]), (0, 0)) for _, idx, _ in self._steps]
        tensors = {
            "topk_idx": np.stack([np.pad(idx, f, constant_values=-1) for f, (_, idx, _) in zip(fill, self._steps)]),
            "topk_weight": np.stack([np.pad(weight, f) for f, (_, _, weight) in zip(fill, self._steps)]),
            "step": np.array([step for step, _, _ in self._steps], dtype=np.int64),
        }
        K = tensors["topk_idx"].shape[-1]
        temporary = path.with_name(path.name + ".tmp")
        save_file(tensors, temporary, {"n_routed_experts": str(self._E), "num_experts_per_tok": str(K)})
        temporary.replace(path)


def read_routing_trace(path: str | Path) -> RoutingTrace:
    """Read a trace; ValueError, naming the file, for anything else."""
    try:
        with safe_open(path, framework="np") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
            if not {"topk_idx", "topk_weight", "step"} <= names:
                raise ValueError(f"has the tensors {sorted(names)}, not topk_idx, topk_weight and step")
            idx, weight, step = (file.get_tensor(name) for name in ("topk_idx", "topk_weight", "step"))
        E = int(metadata.get("n_routed_experts", int(idx.max(initial=-1)) + 1))
        if idx.ndim != 4 or idx.shape != weight.shape or len(step) != len(idx):
            raise ValueError(f"topk_idx {idx.shape} and topk_weight {weight.shape} are not [steps, layers, T, K]")
        if idx.size and not -1 <= idx.min() <= idx.max() < E:
            raise ValueError(f"topk_idx {idx.min()}..{idx.max()} exceeds {E} experts")
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is no routing trace: {error}") from None
    return RoutingTrace(idx, weight, step, E)
