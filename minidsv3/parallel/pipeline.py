"""A schedule executed: every rank runs its own list of instructions over its own stage, on the tape.

A rank knows its list, its stages and its mailbox, nothing else. Before a forward it waits for the activations of the
stage before, before a backward for the gradient of the stage behind; what it makes it sends on. No order between ranks
is chosen in advance: it comes from who waits for whom, and when nobody can go on `Ranks` says who waits for what.

    F    receive x, y = stage(x), keep both, send y
    B    receive dy, the tape's backward from y, send x's gradient
    Bi   the same with the weight gradients put off (`autograd.deferred_weight_grads`)
    W    compute them

Gradients are those of plain training, micro-batch after micro-batch: to the bit where each weight meets the
micro-batches in the same order (1F1B, ZB1P, DualPipeV), and in DualPipe within rounding, since there the two copies of
a stage each add up half of them before the halves are added.

Simplified: the two halves of an overlapped pair run one after the other here; what the overlap saves is `timeline`'s
business. Activations travel in the precision of the arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..autograd import (
    Array,
    Function,
    GradientBuffer,
    Parameter,
    Tensor,
    backward,
    deferred_weight_grads,
)
from .comm import SimCommunicator
from .copies import SUM_TAG, add_gradient, sum_copies
from .dispatcher import AllToAllTokenDispatcher
from .ranks import Ranks
from .schedules import Instruction, Place, Schedule, as_schedule, parts
from .timeline import Timeline, timeline
from .wire import EXACT, Wire

__all__ = ["GroupedDispatcher", "PipelineResult", "Timeline", "run", "timeline"]

Stage = Callable[..., Any]  # Tensors in, a Tensor or several out; the last one gives the loss
Stages = Sequence[Stage] | Mapping[int, Stage]


class PipelineResult(NamedTuple):
    """What a run reports; the gradients are in the parameters.

    Attributes
    ----------
    losses : list of float
        Of each micro-batch, in the order in which they were given.
    peak_live : list of int
        For each local rank the largest number of chunks whose activations it held (counted, not derived).
    """

    losses: list[float]
    peak_live: list[int]


def run(
    schedule: Sequence[Sequence[Instruction]],
    stages: Stages,
    microbatches: Sequence[Any],
    ranks: Ranks | None = None,
    replicas: int = 1,
) -> PipelineResult:
    """Execute `schedule` and add the gradients of all micro-batches to ``parameter.grad``.

    Parameters
    ----------
    schedule : Schedule, or plain lists of instructions
    stages : sequence of callables (`schedule.stages` of them), or a mapping of those that this process hosts
        Stage s is called with what stage s-1 returned, Tensors or a tuple of them; the last one returns the loss, a
        Tensor of one element. Any callable over Tensors; across processes one with ``parameters()``.
    microbatches : sequence, `schedule.chunks` (times `replicas`) long
        An array, or a tuple: its first entry goes to the first stage, the others (targets) to the last one, behind
        what the stage before it returned.
    ranks : Ranks, optional
        Hosts ``schedule.ranks * replicas`` ranks; in this process if not given.
    replicas : int
        Ranks side by side on each stage, with micro-batches of their own (replica i has the i-th run of
        `schedule.chunks`): an expert-parallel group. Global rank = pipeline rank * replicas + replica.

    Raises
    ------
    ValueError
        Numbers of stages, micro-batches or ranks that do not fit the schedule; an instruction that its rank cannot
        carry out, or one that is missing.
    RankError
        A message that never comes.
    """
    plan = as_schedule(schedule)
    size = plan.ranks * replicas
    ranks = ranks or Ranks(SimCommunicator(size))
    if ranks.comm.ranks != size:
        raise ValueError(f"{plan.ranks} pipeline ranks times {replicas} replicas need {size}, got {ranks.comm.ranks}")
    if len(microbatches) != plan.chunks * replicas:
        raise ValueError(
            f"the schedule has {plan.chunks} chunks, times {replicas} replicas, got {len(microbatches)} micro-batches"
        )
    if not isinstance(stages, Mapping):
        if len(stages) != plan.stages:
            raise ValueError(f"{plan.name} over {plan.ranks} ranks has {plan.stages} stages, got {len(stages)}")
        stages = dict(enumerate(stages))
    hosted = ranks

    def program(rank: int) -> tuple[list[float], int, _Gradients]:
        own = microbatches[rank % replicas * plan.chunks : (rank % replicas + 1) * plan.chunks]
        worker = _Worker(plan, rank, replicas, stages, own, hosted)
        worker.work()
        losses = np.zeros(len(microbatches), dtype=np.float64)
        losses[rank % replicas * plan.chunks :][: plan.chunks] = worker.losses
        losses = hosted.meet(losses, lambda values: hosted.comm.all_reduce(values, "losses"), "losses")
        sum_copies(plan, rank, replicas, stages, hosted, worker.gradients)
        return losses.tolist(), worker.peak_live, worker.gradients

    results = ranks.run(program)
    ranks.comm.barrier()  # nobody leaves while a message of theirs is on its way
    done: set[Parameter] = set()
    for _, _, gradients in results:
        for parameter, gradient in gradients.items():
            if parameter not in done:  # copies hold the same sum
                add_gradient(parameter, gradient)
                done.add(parameter)
    return PipelineResult(results[0][0], [peak for _, peak, _ in results])


class _Gradients(GradientBuffer):
    """What one rank has added up: an array for each parameter that a gradient reached."""

    def __init__(self) -> None:
        super().__init__({})

    def fresh(self, parameter: Parameter) -> None:
        """No array to write into: a weight gradient may wait, and others may come before it."""

    def add(self, parameter: Parameter, dy: Array) -> None:
        if parameter in self:
            self[parameter] += dy
        else:
            self[parameter] = dy.copy()


class GradientFromNextStage(Function):
    """Zero, with the arrived gradients as derivatives: lets `backward` begin at the outputs of a stage."""

    def forward(self, *ys: Array, dys: tuple[Array, ...]) -> Array:
        self._dys = dys
        return np.zeros((), dtype=ys[0].dtype)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        return self._dys


class _Worker:
    """One rank at work."""

    def __init__(
        self, plan: Schedule, rank: int, replicas: int, stages: Mapping[int, Stage], data: Sequence[Any], ranks: Ranks
    ) -> None:
        self.plan, self.rank, self.replicas = plan, rank, replicas
        self.pipeline_rank, self.replica = divmod(rank, replicas)
        self.stages, self.data, self.ranks = stages, data, ranks
        self.losses = np.zeros(plan.chunks, dtype=np.float64)
        self.gradients = _Gradients()
        self.peak_live = 0
        self.live: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {}  # (dir, chunk) -> inputs, outputs
        self.waiting: dict[tuple[int, int], Any] = {}  # (dir, chunk) -> weight gradients put off
        self.own_mail: dict[tuple[str, int, int], list[Array]] = {}  # to itself, where DualPipeV turns

    def work(self) -> None:
        """The whole list."""
        do = {"F": self.forward, "B": self.backward, "Bi": self.backward_input, "W": self.weight}
        for op in self.plan[self.pipeline_rank]:
            for kind, direction, chunk in parts(op):
                before = self.waiting if kind == "W" else self.live
                if ((direction, chunk) in before) == (kind == "F"):
                    raise ValueError(
                        f"rank {self.rank}: {op} is out of place: what must come before it has not, or twice"
                    )
                do[kind](direction, chunk)
        for kind, left in (("backward", self.live), ("weight part", self.waiting)):
            if left:
                raise ValueError(f"rank {self.rank}: the list ends without the {kind} of (dir, chunk) {min(left)}")

    def forward(self, direction: int, chunk: int) -> None:
        place = (self.pipeline_rank, direction)
        before, after = self.plan.previous_stage(*place), self.plan.next_stage(*place)
        microbatch = self.data[self.plan.microbatch_of(direction, chunk)]
        data = microbatch if isinstance(microbatch, tuple) else (microbatch,)
        if before is None:
            arguments = [_as_input(data[0])]
        else:
            arguments = [Tensor(a, a.dtype.kind == "f") for a in self.receive("F", before, direction, chunk)]
        inputs = [a for a in arguments if isinstance(a, Tensor)]
        outputs = self.stages[self.plan.stage_of(*place)](*arguments, *(data[1:] if after is None else ()))
        outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
        self.live[direction, chunk] = inputs, outputs
        self.peak_live = max(self.peak_live, len(self.live) + len(self.waiting))
        if after is not None:
            self.send("F", after, chunk, [y.data for y in outputs])
        else:
            if len(outputs) != 1 or outputs[0].data.size != 1:
                raise ValueError(f"the last stage gave shapes {[y.shape for y in outputs]}: a loss is one number")
            self.losses[self.plan.microbatch_of(direction, chunk)] = float(outputs[0])

    def backward(self, direction: int, chunk: int) -> None:
        place = (self.pipeline_rank, direction)
        before, after = self.plan.previous_stage(*place), self.plan.next_stage(*place)
        inputs, outputs = self.live[direction, chunk]
        if after is None:
            backward(outputs[0], into=self.gradients)
        else:
            arrived = self.receive("B", after, direction, chunk)
            pairs = [(y, dy) for y, dy in zip(_floats(outputs), arrived, strict=True) if y.requires_grad]
            if pairs:
                ys, dys = zip(*pairs)
                backward(GradientFromNextStage.apply(*ys, dys=dys), into=self.gradients)
        del self.live[direction, chunk]
        if before is not None:
            dxs = [np.zeros_like(x.data) if x.grad is None else x.grad for x in _floats(inputs)]
            self.send("B", before, chunk, dxs)

    def backward_input(self, direction: int, chunk: int) -> None:
        with deferred_weight_grads() as waiting:
            self.backward(direction, chunk)
        self.waiting[direction, chunk] = waiting

    def weight(self, direction: int, chunk: int) -> None:
        self.waiting.pop((direction, chunk)).run()

    def send(self, kind: str, target: Place, chunk: int, arrays: list[Array]) -> None:
        """Arrays for (rank, dir): how many, then one after the other."""
        rank, direction = target
        if rank == self.pipeline_rank:
            self.own_mail[kind, direction, chunk] = arrays
            return
        tag, name = _tag(kind, direction, chunk), _OPERATION[kind]
        count = np.array([len(arrays)], dtype=np.int64)
        for array in (count, *arrays):
            self.ranks.send(np.asarray(array, order="C"), rank * self.replicas + self.replica, tag, name)

    def receive(self, kind: str, source: Place, direction: int, chunk: int) -> list[Array]:
        """What (rank, dir) sent to this rank for a chunk of `direction`."""
        rank = source[0]
        if rank == self.pipeline_rank:
            return self.own_mail.pop((kind, direction, chunk))
        tag, name, peer = _tag(kind, direction, chunk), _OPERATION[kind], rank * self.replicas + self.replica
        count = int(self.ranks.receive(peer, tag, name)[0])
        return [self.ranks.receive(peer, tag, name) for _ in range(count)]


_OPERATION = {"F": "pipeline activations", "B": "pipeline gradients"}


def _tag(kind: str, direction: int, chunk: int) -> int:
    return SUM_TAG + 1 + 4 * chunk + 2 * direction + (kind == "B")


def _floats(tensors: list[Tensor]) -> list[Tensor]:
    """Those that have gradients; whole numbers travel forward only."""
    return [t for t in tensors if t.data.dtype.kind == "f"]


def _as_input(x: Any) -> Any:
    """Floats as a Tensor; whole numbers (tokens) and Tensors as they are."""
    return Tensor(x) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x


class GroupedDispatcher:
    """Expert parallelism inside a pipeline: each pipeline rank's `replicas` ranks share the experts of their stage.

    Hands every call to the `AllToAllTokenDispatcher` of the group that the running rank belongs to.
    """

    def __init__(self, ranks: Ranks, n_routed_experts: int, replicas: int, wire: Wire = EXACT) -> None:
        self._ranks, self._of_rank = ranks, dict[int | None, AllToAllTokenDispatcher]()
        for group in ranks.comm.split([rank // replicas for rank in range(ranks.comm.ranks)]):
            dispatcher = AllToAllTokenDispatcher(ranks, n_routed_experts, wire, comm=group)
            self._of_rank |= {group.members[r]: dispatcher for r in group.local_ranks}

    def dispatch(self, x: Tensor, topk_idx: Array, topk_weight: Tensor) -> tuple[Tensor, Any]:
        """See `AllToAllTokenDispatcher`."""
        return self._of_rank[self._ranks.rank].dispatch(x, topk_idx, topk_weight)

    def combine(self, rows: Tensor, handle: Any) -> Tensor:
        """See `AllToAllTokenDispatcher`."""
        return self._of_rank[self._ranks.rank].combine(rows, handle)
