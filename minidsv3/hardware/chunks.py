"""How long a chunk takes: the layers of one pipeline stage, alone or overlapped with another chunk, on one GPU.

Computation has 112 of 132 SMs, the other 20 are set apart for communication all the time (V3 report, section 3.2.2).
While a forward chunk of one micro-batch runs over a backward chunk of another, communication is hidden behind
computation and runs slower than alone. The order of parts in a layer is the published profile's:

    computation    attn(F)     mlp(B)       mlp(W)  mlp(F)   attn(B)  attn(W)
    communication  combine(B)  dispatch(F)  dispatch(B)      combine(F)

An op starts when its stream is free and what it waits for has ended (`in_streams`), so what a pair hides is computed,
not assumed. A chunk alone waits for its communication, which then runs at its benchmark rate.

Simplified: layers are spread over stages by a rule (the real map is not published); the shared expert is not used to
hide messages of a chunk alone, nor the weight part on a second stream; embedding look-ups and gates are free.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from .kernels import (
    PARTS,
    Efficiencies,
    Gemm,
    ModelShape,
    Work,
    gemm_seconds,
    layer_work,
    seconds,
)
from .messages import LIMITED_TO_FOUR, Links, Traffic, normal_seconds, row_bytes
from .specs import CLUSTERS, INFINIBAND, Cluster

# Rate of a communication kernel beside computation over its benchmark rate: bytes at EP64, 4,096 tokens a rank, over
# kernel times of the published profile (dispatch 4.35, cached dispatch 3.41, combine 6.18 ms) and 43.66 GB/s.
OVERLAPPED = {"dispatch": 0.55, "cached dispatch": 0.70, "combine": 0.75}


@dataclass(frozen=True)
class Setup:
    """What is trained, on what, and how it is cut.

    Attributes
    ----------
    tokens : int
        Of a micro-batch on one GPU: one sequence.
    overlap : bool
        Whether a forward-backward pair shares the GPU; without, its two halves run one after the other.
    links : Links
        What is achieved between GPUs; hashing and lost planes make them slower.
    """

    model: ModelShape
    cluster: Cluster = CLUSTERS["h800"]
    gpus: int = 2048
    pipeline_ranks: int = 16
    expert_ranks: int = 64
    redundant_experts: int = 0
    tokens: int = 4096
    traffic: Traffic = LIMITED_TO_FOUR
    fp8: bool = True
    overlap: bool = True
    links: Links = field(default_factory=Links)
    efficiencies: Efficiencies = field(default_factory=Efficiencies)
    hop_latency_seconds: float = INFINIBAND.latency(3)

    def __post_init__(self) -> None:
        if self.gpus % (self.pipeline_ranks * self.expert_ranks):
            raise ValueError(
                f"gpus={self.gpus} is not a multiple of pipeline_ranks={self.pipeline_ranks} times "
                f"expert_ranks={self.expert_ranks}"
            )
        if (self.model.n_routed_experts + self.redundant_experts) % self.expert_ranks:
            raise ValueError(
                f"n_routed_experts={self.model.n_routed_experts} and {self.redundant_experts} redundant ones do not "
                f"divide among expert_ranks={self.expert_ranks}"
            )

    @property
    def experts_per_rank(self) -> int:
        """Routed experts on a GPU, redundant ones included."""
        return (self.model.n_routed_experts + self.redundant_experts) // self.expert_ranks

    @property
    def data_ranks(self) -> int:
        """GPUs on each pipeline rank."""
        return self.gpus // self.pipeline_ranks


class Op(NamedTuple):
    """A piece of work on one of two streams; `after` are names of others that must have ended."""

    name: str
    stream: str  # 'compute' or 'communication'
    seconds: float
    after: tuple[str, ...] = ()


class Placed(NamedTuple):
    """An op with its times."""

    op: Op
    start: float
    end: float


def in_streams(ops: Sequence[Op]) -> list[Placed]:
    """Run ops in their order on each stream: one starts when its stream is free and all it waits for has ended."""
    free: dict[str, float] = {}
    ended: dict[str, float] = {}
    placed = []
    for op in ops:
        start = max([free.get(op.stream, 0.0), *(ended[name] for name in op.after if name in ended)])
        free[op.stream] = ended[op.name] = start + op.seconds
        placed.append(Placed(op, start, start + op.seconds))
    return placed


class Stage(NamedTuple):
    """Layers of one pipeline stage: for each whether it has routed experts; heads (main and MTP) behind them."""

    layers: tuple[bool, ...]
    heads: int


def spread(m: ModelShape, stages: int, head: float) -> list[Stage]:
    """Consecutive layers on stages so that the slowest has as little work as can be; a head costs `head` layers.

    MTP modules and heads close the last stage. V3 on 16 stages: 15 stages of 4 layers, and the last layer, the MTP
    module and both heads on the 16th. Raises ValueError when there are more stages than layers to fill them.
    """
    closing = m.mtp + head * (1 + m.mtp)
    limits = sorted([*range(1, m.layers + 1), *(n + closing for n in range(m.layers + 1))])
    room = [(int(x + 1e-9), int(x - closing + 1e-9)) for x in limits if x >= closing - 1e-9]  # a stage's, the last's
    last = next(min(end, m.layers) for each, end in room if each * (stages - 1) + end >= m.layers)
    last = last if stages > 1 else m.layers
    before = m.layers - last
    if before < stages - 1:
        raise ValueError(f"{m.layers} layers do not fill {stages} stages")
    bounds = [before * s // max(stages - 1, 1) for s in range(stages)] + [m.layers]
    kinds = [i >= m.dense_layers for i in range(m.layers)]
    found = [Stage(tuple(kinds[a:b]), 0) for a, b in itertools.pairwise(bounds)]
    found[-1] = Stage(found[-1].layers + (True,) * m.mtp, 1 + m.mtp)
    return found


class Clock:
    """Times of chunks of one setup; `stages` pieces of the model (32 for DualPipeV on 16 ranks)."""

    def __init__(self, setup: Setup, stages: int | None = None) -> None:
        self.setup = setup
        self._pairs: dict[tuple[int, int], float] = {}  # (forward stage, backward stage) -> seconds
        self._sm_share = 1.0 - setup.efficiencies.communication_sms / setup.cluster.gpu.sms
        layer = sum(self.part(name, True) for name in PARTS)
        self.stages = spread(setup.model, stages or setup.pipeline_ranks, sum(map(self.head, "FBW")) / layer)

    def part(self, name: str, routed: bool) -> float:
        """Seconds of a part of a layer ('attention F', ...)."""
        s = self.setup
        work = layer_work(s.model, s.tokens, routed, s.experts_per_rank, s.traffic.busiest, s.fp8)[name]
        return seconds(work, s.cluster.gpu, s.efficiencies, self._sm_share, s.fp8)

    def message(self, kind: str, alone: bool) -> float:
        """Seconds of a 'dispatch', a 'cached dispatch' (of gradients) or a 'combine' of a micro-batch in a layer."""
        s = self.setup
        row = row_bytes(s.model.hidden_size, s.fp8 and kind != "combine")
        benchmark = normal_seconds(s.tokens, row, s.traffic, s.expert_ranks, s.links)
        return benchmark / (1.0 if alone else OVERLAPPED[kind])

    def head(self, kind: str) -> float:
        """Seconds of one of the three products (F, B, W) with the output head in BF16, and its share of the loss.

        Cross-entropy reads the logits forward, and reads them and writes their gradient backward.
        """
        s = self.setup
        gemm = Gemm(s.tokens, s.model.hidden_size, s.model.vocab_size)
        loss = Work((gemm,), 0.0, False, {"F": 2, "B": 4, "W": 0}[kind] * s.tokens * s.model.vocab_size)
        return seconds(loss, s.cluster.gpu, s.efficiencies, self._sm_share, fp8=False)

    def mtp_join(self) -> float:
        """Seconds of one product with eh_proj, [embedding; hidden state] to hidden state, of an MTP module."""
        s, D = self.setup, self.setup.model.hidden_size
        return gemm_seconds(Gemm(s.tokens, 2 * D, D), s.cluster.gpu, s.efficiencies, self._sm_share, s.fp8)

    def closing(self, stage: int, kind: str) -> list[Op]:
        """What the last stage has besides layers: heads and MTP joins, in F, B or W."""
        heads = self.stages[stage].heads
        found = [Op(f"head {kind}{i}", "compute", self.head(kind)) for i in range(heads)]
        return found + [Op(f"mtp join {kind}{i}", "compute", self.mtp_join()) for i in range(heads - 1)]

    def forward(self, stage: int) -> list[Op]:
        """A forward chunk alone, op after op."""
        return self._alone(stage, ("attention F", "dispatch", "mlp F", "combine"))

    def backward_input(self, stage: int) -> list[Op]:
        """A backward chunk for the input alone."""
        return self._alone(stage, ("cached dispatch", "mlp B", "combine", "attention B"))

    def backward_weight(self, stage: int) -> list[Op]:
        """The weight part of a chunk."""
        return self._alone(stage, ("mlp W", "attention W"))

    def _alone(self, stage: int, names: tuple[str, ...]) -> list[Op]:
        ops = self.closing(stage, next(name[-1] for name in names if name.startswith("mlp")))
        for routed in self.stages[stage].layers:
            for name in names:
                if name in OVERLAPPED:
                    if routed:
                        ops.append(Op(name, "communication", self.message(name, True)))
                else:
                    ops.append(Op(name, "compute", self.part(name, routed)))
        return ops

    def pair(self, forward: int, backward: int) -> list[Placed]:
        """A forward chunk of stage `forward` over a full backward chunk of stage `backward`, on two streams."""
        ahead, back = self.stages[forward], self.stages[backward]
        ops = self.closing(forward, "F") + self.closing(backward, "B") + self.closing(backward, "W")
        for i in range(max(len(ahead.layers), len(back.layers))):
            f = ahead.layers[i] if i < len(ahead.layers) else None
            b = back.layers[-1 - i] if i < len(back.layers) else None
            ops += self._layer_pair(i, f, b)
        return in_streams(ops)

    def _layer_pair(self, i: int, f: bool | None, b: bool | None) -> list[Op]:
        """Ops of the i-th layers of both chunks in the order of the profile; None where one has no layer left."""
        before = f"{i - 1}"
        part, ops = self.part, dict[str, Op]()

        def message(kind: str) -> float:
            return self.message(kind, alone=False)

        if f is not None:
            ops["attention F"] = Op(f"attention F{i}", "compute", part("attention F", f), (f"combine F{before}",))
            ops["mlp F"] = Op(f"mlp F{i}", "compute", part("mlp F", f), (f"dispatch F{i}",))
            if f:
                ops["dispatch F"] = Op(f"dispatch F{i}", "communication", message("dispatch"), (f"attention F{i}",))
                ops["combine F"] = Op(f"combine F{i}", "communication", message("combine"), (f"mlp F{i}",))
        if b is not None:
            ops["mlp B"] = Op(f"mlp B{i}", "compute", part("mlp B", b), (f"combine B{i}",))
            ops["mlp W"] = Op(f"mlp W{i}", "compute", part("mlp W", b))
            ops["attention B"] = Op(f"attention B{i}", "compute", part("attention B", b), (f"dispatch B{i}",))
            ops["attention W"] = Op(f"attention W{i}", "compute", part("attention W", b))
            if b:
                after = (f"attention B{before}",)
                ops["combine B"] = Op(f"combine B{i}", "communication", message("cached dispatch"), after)
                ops["dispatch B"] = Op(f"dispatch B{i}", "communication", message("combine"), (f"mlp B{i}",))
        order = ("combine B", "attention F", "mlp B", "dispatch F", "dispatch B", "mlp W", "mlp F",
                 "attention B", "attention W", "combine F")  # fmt: skip
        return [ops[name] for name in order if name in ops]

    @cached_property
    def chunks(self) -> dict[str, list[float]]:
        """Seconds of a lone F, Bi and W of every stage."""
        kinds = {"F": self.forward, "Bi": self.backward_input, "W": self.backward_weight}
        return {
            kind: [sum(op.seconds for op in ops(s)) for s in range(len(self.stages))] for kind, ops in kinds.items()
        }

    def duration(self, kind: str, stage: int, backward_stage: int | None = None) -> float:
        """Seconds of an instruction: F, B, Bi, W of `stage`, or FB of a forward and a backward stage."""
        if kind == "B":
            return self.chunks["Bi"][stage] + self.chunks["W"][stage]
        if kind != "FB":
            return self.chunks[kind][stage]
        assert backward_stage is not None
        if not self.setup.overlap:
            return self.duration("F", stage) + self.duration("B", backward_stage)
        key = (stage, backward_stage)
        if key not in self._pairs:
            self._pairs[key] = max(placed.end for placed in self.pair(*key))
        return self._pairs[key]

    @property
    def hop(self) -> float:
        """Seconds of one chunk's activations (BF16) between neighbouring stages."""
        s = self.setup
        return s.hop_latency_seconds + 2.0 * s.model.hidden_size * s.tokens / s.links.infiniband_bytes_per_second
