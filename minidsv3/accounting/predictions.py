"""The clock's predictions beside every published time: rows of `paper`, and one list of residuals.

Fitted and unfitted are kept apart. *Fitted* are the 18 numbers of DeepEP's benchmark that fix the three constants of
`hardware.messages`. *Unfitted* is everything in ``data/published/clock.json``: the step and its parts, the service,
other clusters. The clock's compute efficiencies come from kernel times of the published profile, so its pair of chunks
(129.0 ms) is a composition of them, not an independent measurement.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np

from ..config import data_file
from ..hardware.clock import Clock, Setup, step
from ..hardware.kernels import shape_of
from ..hardware.messages import LIMITED_TO_FOUR, Links, Measurement, Traffic, read_measurements
from ..hardware.serving import decode, prefill
from ..hardware.specs import quantity
from ..parallel.schedules import build
from ..parallel.timeline import timeline
from .paper import Ours, evaluate, v3
from .paper_rows import Models, Values, table

# V3's gate on the four nodes of a prefill group: distinct nodes and ranks by Monte Carlo over 20,000 tokens.
PREFILL_TRAFFIC = Traffic(3.12, 6.85)
STEP = "hardware.clock.step"


class Residual(NamedTuple):
    """A published number and the clock's."""

    quantity: str
    published: float
    predicted: float
    unit: str
    fitted: bool
    source: str

    @property
    def relative(self) -> float:
        """Predicted over published, less one."""
        return self.predicted / self.published - 1


def deepep_measurements() -> list[Measurement]:
    """The 18 published numbers on which `hardware.messages.Links` was fitted."""
    content = json.loads(data_file("published/deepep_kernels.json").read_text(encoding="utf-8"))
    return read_measurements(content["measurements"], quantity)


def residuals() -> list[Residual]:
    """All of them, the fitted ones first."""
    found, links = [], Links()
    for m in deepep_measurements():
        unit, scale = ("us", 1e-6) if m.kernel == "low-latency" else ("GB/s", 1e9)
        name = f"{m.kernel} kernels EP {m.ranks}, {m.operation}"
        found.append(Residual(name, m.value / scale, m.predicted(links) / scale, unit, True, "DeepEP's benchmark"))
    for row in evaluate(["clock"]):
        assert row.published is not None and row.ours is not None
        found.append(Residual(row.row, row.published, row.ours, row.unit, False, row.reason))
    return found


def median_unfitted_error(found: list[Residual]) -> float:
    """Half of the unfitted predictions are closer than this (relative)."""
    return float(np.median([abs(r.relative) for r in found if not r.fitted]))


@table("clock")
def _training(m: Models, i: Values) -> dict[str, Ours]:
    setup = Setup(shape_of(v3(m)), gpus=i["gpus"], tokens=i["seq_len"])
    result = step(setup, build("dualpipe", setup.pipeline_ranks, i["micro_batches"]), timeline)
    rows = {f"step: {name}": Ours(value, STEP) for name, value in result.parts.items()}
    pair = Clock(setup).duration("FB", 1, 2) / len(Clock(setup).stages[1].layers) * i["profile_layers"]
    return rows | {
        "step": Ours(result.seconds, STEP),
        "forward-backward pair of 4 layers": Ours(1e3 * pair, "hardware.chunks.Clock.duration"),
    }


@table("clock")
def _messages(m: Models, i: Values) -> dict[str, Ours]:
    links, rows = Links(), {}
    for operation in ("dispatch", "combine"):
        normal = Measurement("normal", operation, 128, 0.0).predicted(links)
        rows[f"normal kernels EP 128, {operation}"] = _measured(normal / 1e9)
        for ranks in i["h100_ranks"]:
            seconds = Measurement("low-latency", operation, ranks, 0.0).predicted(links)
            rows[f"low-latency on H100, EP {ranks}, {operation}"] = _measured(seconds * 1e6)
    return rows


@table("clock")
def _service(m: Models, i: Values) -> dict[str, Ours]:
    shape = shape_of(v3(m))
    one = {"pipeline_ranks": 1, "redundant_experts": i["redundant_experts"], "tokens": i["seq_len"]}
    decoding = Setup(shape, gpus=i["decode_gpus"], expert_ranks=i["decode_gpus"], traffic=LIMITED_TO_FOUR, **one)
    filling = Setup(shape, gpus=i["prefill_gpus"], expert_ranks=i["prefill_gpus"], traffic=PREFILL_TRAFFIC, **one)
    served = decode(decoding, i["decode_requests"], i["decode_context"])
    filled = prefill(filling, i["prefill_sequences"])
    return {
        "decode EP 144, tokens per second and GPU": Ours(served.tokens_per_second, "hardware.serving.decode"),
        "prefill EP 32, tokens per second and GPU": Ours(filled.tokens_per_second, "hardware.serving.prefill"),
    }


@table("insights-clock")
def _predicted(m: Models, i: Values) -> dict[str, Ours]:
    setup = Setup(shape_of(v3(m)))
    result = step(setup, build("dualpipe", setup.pipeline_ranks, 120), timeline)
    rows = {
        "time per step, MPFT": Ours(result.seconds, STEP),
        "overlapped part 1F1B, MPFT": Ours(result.parts["1F1B"], STEP),
    }
    for ranks in (16, 32, 64, 128):
        bandwidth = Measurement("normal", "dispatch", ranks, 0.0).predicted(Links())
        rows[f"EP {ranks}, dispatch"] = _measured(bandwidth / 1e9)
    return rows


def _measured(value: Any) -> Ours:
    return Ours(float(value), "hardware.messages.Measurement.predicted")
