"""Memory of one training GPU under PP x EP x TP x DP, stage by stage, state by state.

    GPUs = PP x TP x DP. The EP group lies inside the TP x DP ranks of a stage (V3: PP 16, DP 128, EP 64: 2,048 GPUs).

* A stage holds its layers, the first one the embedding, the last one final norm, head and MTP modules. 61 layers on 16
  stages are uneven: the first stages get one more, since the last one has the head. Where MTP lies in another place
  than the embedding, it needs a copy of it; under DualPipe both are on one rank (V3 report, section 3.2.3).
* DualPipe gives rank r the stages r and PP-1-r: every parameter exists twice, and the two are replicas of each other.
* TP splits heads, FFN widths and the vocabulary; latent projections, norms, gates and eh_proj are repeated. Routed
  experts are not cut but dealt out, E / EP of them to a rank. Activations are split by TP along the sequence.
* ZeRO shards over all replicas of a number: DP ranks, for experts TP x DP / EP, twice as many under DualPipe. Level 1
  shards master weights and moments, 2 gradients too, 3 weights too.
* Activations: what one micro-batch keeps (`activations`), times those in flight, found by walking the schedule's own
  instruction list; and what recomputation brings back of one layer.
* Buffers: gate bias, messages between stages, rows that a MoE layer sends and receives (forward and backward, one
  micro-batch), one gathered layer under ZeRO-3.

Simplified: no fragmentation, no CUDA context, no gradient buckets; the EMA of the weights is on the CPU, as in V3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from ..config import ModelConfig
from ..parallel.schedules import SCHEDULES, Schedule, build, parts
from ..pretrained.writer import QUANTIZED
from ..quant.blockwise import scale_shape
from .activations import Kept, Shape, kept_arrays, total_bytes
from .dense import check_context
from .params import Weight, shapes

STATES = ("weights", "master", "gradients", "moments", "activations", "buffers")
_BYTES = {"fp32": 4, "bf16": 2, "none": 0}
# name -> each state; V3 trains with 'fp8': FP32 master weights and gradients, BF16 moments (section 3.3.3)
PRECISIONS = {
    "fp32": dict(weights="fp32", master="none", gradients="fp32", moments="fp32", activations="fp32"),
    "bf16": dict(weights="bf16", master="fp32", gradients="fp32", moments="bf16", activations="bf16"),
    "fp8": dict(weights="fp8", master="fp32", gradients="fp32", moments="bf16", activations="fp8"),
}
# axis of the weight that tensor parallelism splits; what is not named is repeated on every TP rank
_TP_AXIS = {
    "q_proj": 0, "q_b_proj": 0, "kv_b_proj": 0, "o_proj": 1, "gate_up": 0, "down_proj": 1, "embed_tokens": 0,
    "lm_head": 0,
}  # fmt: skip


def parse_precision(text: str) -> dict[str, str]:
    """'bf16', or with single states replaced: 'bf16,moments=fp32'.

    Raises ValueError naming what is not known.
    """
    name, *changes = text.split(",")
    if name not in PRECISIONS:
        raise ValueError(f"precision={name!r} is not one of {', '.join(map(repr, PRECISIONS))}")
    states = dict(PRECISIONS[name])
    for change in changes:
        state, _, value = change.partition("=")
        allowed = {"weights": ("fp32", "bf16", "fp8"), "activations": ("fp32", "bf16", "fp8")}.get(state, tuple(_BYTES))
        if state not in states or value not in allowed:
            raise ValueError(
                f"precision: {change!r} is not STATE=FORMAT with {'/'.join(states)} and {'/'.join(allowed)}"
            )
        states[state] = value
    return states


@dataclass(frozen=True)
class Layout:
    """How a model is trained on many GPUs. V3: pp 16, ep 64, dp 128, zero 1, dualpipe, report, fp8."""

    pp: int = 1
    ep: int = 1
    tp: int = 1
    dp: int = 1
    zero: int = 1
    schedule: str = "1f1b"
    micro_batch: int = 1  # sequences
    micro_batches: int = 120  # of one pipeline and step
    seq_len: int = 4096
    recompute: str = "none"
    precision: str = "bf16"  # see `parse_precision`

    def __post_init__(self) -> None:
        for name in ("pp", "ep", "tp", "dp", "micro_batch", "micro_batches", "seq_len"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not a whole number of at least 1")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"zero={self.zero!r} is not 0, 1, 2 or 3")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        parse_precision(self.precision)

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return self.pp * self.tp * self.dp

    @property
    def stages(self) -> int:
        """Pieces of the model: DualPipeV folds two onto a rank."""
        return 2 * self.pp if self.schedule == "dualpipev" else self.pp

    @property
    def states(self) -> dict[str, str]:
        """Format of each state."""
        return parse_precision(self.precision)

    @cached_property
    def plan(self) -> Schedule:
        """Instructions of every pipeline rank; ValueError where the schedule does not allow the sizes."""
        return build(self.schedule, self.pp, self.micro_batches)

    def check(self, cfg: ModelConfig) -> None:
        """ValueError, naming value and rule, unless `cfg` can be laid out so."""
        if self.stages > cfg.num_hidden_layers:
            raise ValueError(f"{self.stages} stages for num_hidden_layers={cfg.num_hidden_layers}: one has no layer")
        if cfg.num_moe_layers and cfg.n_routed_experts % self.ep:
            raise ValueError(f"ep={self.ep} does not divide n_routed_experts={cfg.n_routed_experts}")
        if self.tp * self.dp % self.ep:
            raise ValueError(f"ep={self.ep} does not divide tp * dp = {self.tp * self.dp}: EP groups lie inside them")
        shared = cfg.n_shared_experts * cfg.moe_intermediate_size
        split = {"num_attention_heads": cfg.num_attention_heads, "intermediate_size": cfg.intermediate_size,
                 "n_shared_experts * moe_intermediate_size": shared, "vocab_size": cfg.vocab_size,
                 "seq_len": self.seq_len}  # fmt: skip
        for name, size in split.items():
            if size % self.tp:
                raise ValueError(f"tp={self.tp} does not divide {name}={size}")
        check_context(cfg, self.seq_len)
        assert len(self.plan) == self.pp  # the schedule refuses sizes that it does not allow


class Share(NamedTuple):
    """What one GPU holds of one weight."""

    routed: bool
    elements: int
    fp8_bytes: int  # as the FP8 checkpoint has it: codes and scales, or BF16

    def nbytes(self, kind: str) -> int:
        """Bytes as 'fp8', 'bf16' or 'fp32'."""
        return self.fp8_bytes if kind == "fp8" else self.elements * _BYTES[kind]


def layers_of_stages(num_layers: int, stages: int) -> list[range]:
    """Consecutive layers of each stage, as even as can be; the first ones get what is over."""
    size, over = divmod(num_layers, stages)
    starts = [i * size + min(i, over) for i in range(stages + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def share_of(w: Weight, layout: Layout) -> Share:
    """One GPU's share of a weight under tensor and expert parallelism."""
    shape = list(w.shape)
    routed = w.part == "routed_experts"
    if routed:
        shape[0] //= layout.ep
    elif (axis := _TP_AXIS.get(w.name)) is not None:
        shape[axis] //= layout.tp
    elements = math.prod(shape)
    if w.stored_name.split(".")[0] not in QUANTIZED:
        return Share(routed, elements, 2 * elements)
    matrices = (shape[0] if routed else 1) * (2 if w.name == "gate_up" else 1)  # gate and up are scaled apart
    rows, columns = scale_shape((elements // matrices // shape[-1], shape[-1]))
    return Share(routed, elements, elements + 4 * matrices * rows * columns)


def stage_weights(cfg: ModelConfig, layout: Layout) -> list[list[Weight]]:
    """The weights of every stage."""
    stages = layers_of_stages(cfg.num_hidden_layers, layout.stages)
    found: list[list[Weight]] = [[] for _ in stages]
    of_layer = {layer: s for s, layers in enumerate(stages) for layer in layers}
    for w in shapes(cfg).weights:
        at_start = w.name == "embed_tokens"
        found[0 if at_start else of_layer.get(-1 if w.layer is None else w.layer, -1)].append(w)
    return found


def ranks(cfg: ModelConfig, layout: Layout) -> Iterator[tuple[list[int], list[Weight]]]:
    """For every pipeline rank its stages and weights, a copy of the embedding where the last stage needs one."""
    of_stage = stage_weights(cfg, layout)
    embedding = [w for w in of_stage[0] if w.name == "embed_tokens"]
    needed = cfg.num_nextn_predict_layers > 0 or cfg.tie_word_embeddings  # in the last stage
    for rank in range(layout.pp):
        stages = sorted({layout.plan.stage_of(rank, d) for d in layout.plan.directions})
        held = [w for s in stages for w in of_stage[s]]
        copy = needed and layout.stages - 1 in stages and 0 not in stages
        yield stages, held + (embedding if copy else [])


def state_bytes(held: list[Weight], layout: Layout) -> dict[str, int]:
    """Weights, master weights, gradients and moments of one GPU that holds `held`."""
    copies = 2 if layout.schedule == "dualpipe" else 1
    replicas = {False: layout.dp * copies, True: layout.tp * layout.dp // layout.ep * copies}
    total = dict.fromkeys(STATES[:4], 0)
    states = layout.states
    for routed, n in replicas.items():
        shares = [s for s in (share_of(w, layout) for w in held) if s.routed == routed]
        elements = sum(s.elements for s in shares)
        weight_bytes = sum(s.nbytes(states["weights"]) for s in shares)
        sharded = -(-elements // n)  # of a flat buffer, the last rank's padded
        total["weights"] += -(-weight_bytes // n) if layout.zero == 3 else weight_bytes
        total["master"] += _BYTES[states["master"]] * (sharded if layout.zero else elements)
        total["gradients"] += _BYTES[states["gradients"]] * (sharded if layout.zero > 1 else elements)
        total["moments"] += 2 * _BYTES[states["moments"]] * (sharded if layout.zero else elements)
    return total


class StageActivations(NamedTuple):
    """Bytes of one GPU, before the division by TP."""

    kept: int  # by one micro-batch
    brought_back: int  # when the largest layer is recomputed


def stage_activations(cfg: ModelConfig, layout: Layout) -> list[StageActivations]:
    """What one micro-batch keeps in every stage, and what recomputing one of its layers brings back."""
    shape = Shape(layout.micro_batch, layout.seq_len, layout.recompute)
    kind, found = layout.states["activations"], []
    stages = layers_of_stages(cfg.num_hidden_layers, layout.stages)
    for i, layers in enumerate(stages):
        last = i == len(stages) - 1
        held = range(layers.start, layers.stop + (cfg.num_nextn_predict_layers if last else 0))
        brought_back = 0
        if layout.recompute != "none":
            of_layer = [
                [_sum(cfg, s, kind, layer) for s in (shape._replace(recompute="none"), shape)] for layer in held
            ]
            brought_back = max(everything - kept for everything, kept in of_layer)
        found.append(StageActivations(total_bytes(kept_arrays(cfg, shape, held, last), kind), brought_back))
    return found


def _sum(cfg: ModelConfig, shape: Shape, kind: str, layer: int) -> int:
    return total_bytes(kept_arrays(cfg, shape, range(layer, layer + 1), False), kind)


def in_flight(plan: Schedule, rank: int, bytes_of_stage: list[int]) -> tuple[int, int]:
    """Peak bytes of kept activations on a rank, and the micro-batches at that moment, by walking its instructions.

    A micro-batch is held from its forward to the end of its backward, the weight part included.
    """
    held = count = peak = peak_count = 0
    for instruction in plan[rank]:
        for kind, direction, _ in parts(instruction):
            sign = {"F": 1, "B": -1, "Bi": 0, "W": -1}[kind]
            held += sign * bytes_of_stage[plan.stage_of(rank, direction)]
            count += sign
            peak, peak_count = max((peak, peak_count), (held, count))
    return peak, peak_count


def buffer_bytes(cfg: ModelConfig, layout: Layout, held: list[Weight], directions: int) -> int:
    """Gate bias, messages, dispatched and combined rows, and one gathered layer under ZeRO-3."""
    T, D = layout.micro_batch * layout.seq_len // layout.tp, cfg.hidden_size
    gates = sum(w.part == "gate" for w in held)
    total = 4 * cfg.n_routed_experts * gates if cfg.topk_method == "noaux_tc" else 0
    two_bytes = 4 if layout.states["activations"] == "fp32" else 2
    if layout.pp > 1:  # activation in and out, gradient in and out
        total += 4 * directions * T * D * two_bytes
    if layout.ep > 1 and gates:
        rows = Kept(0, "", "", T * cfg.num_experts_per_tok, D, "linear")  # dispatch; combine and gradients are wide
        total += rows.nbytes(layout.states["activations"]) + 3 * rows.rows * D * two_bytes
    if layout.zero == 3:
        of_layer: dict[int | None, int] = {}
        for w in held:
            share = share_of(w, layout)
            of_layer[w.layer] = of_layer.get(w.layer, 0) + share.nbytes(layout.states["weights"])
        total += max(of_layer.values())
    return total


def memory_report(cfg: ModelConfig, layout: Layout) -> dict[str, Any]:
    """Bytes of the fullest GPU of every pipeline rank: ``per_stage``, one dict a rank, and the layout.

    Raises
    ------
    ValueError
        The layout does not fit the model (`Layout.check`).
    """
    layout.check(cfg)
    activations, per_stage, totals = stage_activations(cfg, layout), [], []
    for rank, (stages, held) in enumerate(ranks(cfg, layout)):
        peak, count = in_flight(layout.plan, rank, [a.kept for a in activations])
        brought_back = max(activations[s].brought_back for s in stages)
        states = state_bytes(held, layout)
        states["activations"] = -(-(peak + brought_back) // layout.tp)
        states["buffers"] = buffer_bytes(cfg, layout, held, len(layout.plan.directions))
        layers = sorted({w.layer for w in held if w.layer is not None})
        totals.append(sum(states.values()))
        per_stage.append(
            {"stage": rank, "layers": layers, "micro_batches_in_flight": count, **states, "total": totals[-1]}
        )
    return {
        "layout": {**asdict(layout), "gpus": layout.gpus, "states": layout.states},
        "per_stage": per_stage,
        "activations_per_micro_batch": [-(-a.kept // layout.tp) for a in activations],  # of every stage of the model
        "largest": max(totals),
    }
