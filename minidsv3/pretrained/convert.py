"""Convert a released-format directory from one dtype to another, tensor by tensor.

The model is never built: a 671B checkpoint converts on a laptop in the memory of its largest tensor. What is already
in the wanted form is copied as it is, FP8 codes and scales included. Every shard appears whole or not at all; the
index and config.json come last, so an interrupted conversion is not mistaken for a model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..quant.formats import E4M3
from .reader import SCALE, StoredModel
from .tensors import Planned
from .writer import plan, write_config, write_shards


def convert(
    source: str | Path,
    target: str | Path,
    dtype: str,
    *,
    max_shard_bytes: int = 5_000_000_000,
    report: Callable[[int, int], object] | None = None,
) -> None:
    """Write directory `source` as `target` in 'bf16', 'fp8' or 'fp32'.

    Parameters
    ----------
    report : function (bytes done, bytes in all), optional
        Called after each tensor.

    Raises
    ------
    ValueError
        `target` holds files already, or `source` is damaged; nothing of `target` is left half written.
    """
    stored, target = StoredModel(source), Path(target)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty: choose another folder")
    scale = _kind_of_scales(stored, dtype)
    planned = [t for name in stored.names for t in _planned(stored, name, dtype, scale)]
    total, done = sum(t.nbytes for t in planned), 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if report:
            report(done, total)

    target.mkdir(parents=True, exist_ok=True)
    write_shards(planned, target, max_shard_bytes, count)
    write_config(stored.config, target, dtype, scale)


def _kind_of_scales(stored: StoredModel, dtype: str) -> str:
    """'ue8m0' where FP8 stays FP8 and config.json says so (V3.1), else 'fp32'."""
    settings = stored.config.extra.get("quantization_config")
    powers = dtype == "fp8" and isinstance(settings, dict) and settings.get("scale_fmt") == "ue8m0"
    return "ue8m0" if powers else "fp32"


def _planned(stored: StoredModel, name: str, dtype: str, scale: str) -> list[Planned]:
    """One tensor in its new form; read only when it is written."""
    stored.check_scales(name)
    codes, scales = stored.stored(name)
    if scales is None:
        return plan(name, codes, dtype, scale)
    if dtype == "fp8":
        as_stored = Planned(name + SCALE, scales.dtype, scales.shape, lambda: scales)
        return [Planned(name, E4M3, codes.shape, lambda: codes), as_stored]
    wanted = plan(name, np.broadcast_to(np.float32(0), codes.shape), dtype)  # dtype and shape; the numbers come below
    return [Planned(t.name, t.dtype, t.shape, lambda t=t: stored.values(name).astype(t.dtype)) for t in wanted]  # type: ignore[misc]
