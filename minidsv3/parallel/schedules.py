"""Pipeline schedules as data: for each rank, the list of what it computes, in order.

A model cut into stages and a batch cut into chunks (micro-batches) leave one question: who computes what, when? A
schedule answers it with one list of instructions for each rank, and nothing else: `pipeline.run` executes the lists on
the tape, `pipeline.timeline` gives them times, and `validate` says whether they can be run at all.

    ("F", dir, chunk)                      forward
    ("B", dir, chunk)                      full backward
    ("Bi", dir, chunk)                     backward for the input only; the weight part waits in a queue
    ("W", dir, chunk)                      the weight part
    ("FB", dir_f, chunk_f, dir_b, chunk_b) a forward and a backward that overlap

Four schedules (V3 report, section 3.2.1 and Table 2; DualPipe's published instruction order):

* ``1f1b``       one forward, one backward; rank r holds stage r. Bubble (PP-1)(F+B).
* ``zb1p``       the same with the weight part apart, which fills the waiting (ZB-H1): (PP-1)(F+B-2W).
* ``dualpipe``   two streams of chunks that enter at both ends (dir 0 from rank 0, dir 1 from the last rank); rank r
                 holds stage r and stage PP-1-r, so the weights exist twice. A forward of one stream hides the
                 communication of a backward of the other. (PP/2-1)(FB+B-3W).
* ``dualpipev``  DualPipe folded: one stream goes down the ranks (dir 0) and back up (dir 1); rank r holds stages r and
                 2 PP-1-r, and no weights are held twice.

Simplified: no communication instructions. Who sends what to whom follows from the layout (`Schedule.next_stage`), and
a message is one chunk's activations or their gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

from .dualpipe import dualpipe, dualpipev

Instruction = tuple  # (kind, dir, chunk) or ("FB", dir_f, chunk_f, dir_b, chunk_b)
Part = tuple[str, int, int]  # (kind, dir, chunk) with kind F, B, Bi or W
Place = tuple[int, int]  # (rank, dir)
Node = tuple[int, int]  # (rank, position in its list)
BACKWARD = ("B", "Bi")


class Schedule(list):
    """One list of instructions for each rank, and the layout that they belong to.

    Parameters
    ----------
    name : str
        A key of `SCHEDULES`: it fixes which rank holds which stage.
    lists : iterable of list of tuple
        Instructions of rank 0, 1, ...
    """

    def __init__(self, name: str, lists: Iterable[Iterable[Instruction]]) -> None:
        if name not in SCHEDULES:
            raise ValueError(f"name={name!r} is not one of {', '.join(SCHEDULES)}")
        super().__init__([list(instructions) for instructions in lists])
        self.name = name

    @property
    def ranks(self) -> int:
        """Pipeline ranks."""
        return len(self)

    @property
    def stages(self) -> int:
        """Pieces into which the model is cut."""
        return 2 * self.ranks if self.name == "dualpipev" else self.ranks

    @property
    def directions(self) -> tuple[int, ...]:
        """Values of dir."""
        return (0,) if self.name in ("1f1b", "zb1p") else (0, 1)

    @property
    def chunks_per_direction(self) -> int:
        """Chunks that pass each (rank, dir)."""
        return 1 + max((chunk for row in self for op in row for _, _, chunk in parts(op)), default=-1)

    @property
    def chunks(self) -> int:
        """Micro-batches of the whole schedule: DualPipe's two streams together."""
        return self.chunks_per_direction * (2 if self.name == "dualpipe" else 1)

    def stage_of(self, rank: int, direction: int) -> int:
        """The stage that `rank` computes for chunks of `direction`."""
        return self.stages - 1 - rank if direction else rank

    def next_stage(self, rank: int, direction: int) -> Place | None:
        """(rank, dir) where a chunk goes next on its way forward; None behind the last stage."""
        if self.name == "dualpipev" and direction == 0 and rank == self.ranks - 1:
            return rank, 1
        ahead = rank - 1 if direction else rank + 1
        return (ahead, direction) if 0 <= ahead < self.ranks else None

    def previous_stage(self, rank: int, direction: int) -> Place | None:
        """(rank, dir) where a chunk came from; None at the first stage."""
        if self.name == "dualpipev" and direction == 1 and rank == self.ranks - 1:
            return rank, 0
        behind = rank + 1 if direction else rank - 1
        return (behind, direction) if 0 <= behind < self.ranks else None

    def microbatch_of(self, direction: int, chunk: int) -> int:
        """Index into the list of micro-batches: DualPipe's dir 1 has the second half."""
        return chunk + (self.chunks_per_direction if self.name == "dualpipe" and direction else 0)


def build(name: str, ranks: int, chunks: int) -> Schedule:
    """The instructions of every rank.

    Parameters
    ----------
    name : str
        ``1f1b``, ``zb1p``, ``dualpipe`` or ``dualpipev``.
    ranks : int
        Pipeline ranks, at least 1; even for dualpipe.
    chunks : int
        Micro-batches, at least 1. ``dualpipe``: both directions together, even, at least 2 `ranks`; ``dualpipev``: at
        least 2 `ranks`.

    Returns
    -------
    Schedule
        A list (one entry a rank) of lists of tuples.

    Raises
    ------
    ValueError
        An unknown name, or sizes that the schedule does not allow.
    """
    if name not in SCHEDULES:
        raise ValueError(f"name={name!r} is not one of {', '.join(SCHEDULES)}")
    for argument, value in (("ranks", ranks), ("chunks", chunks)):
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
            raise ValueError(f"{name}: {argument}={value!r} is not a whole number of at least 1")
    ranks, chunks = int(ranks), int(chunks)
    if name == "dualpipe" and (ranks % 2 or chunks % 2):
        raise ValueError(f"dualpipe: ranks={ranks} and chunks={chunks} must both be even: half of them go each way")
    if name in ("dualpipe", "dualpipev") and chunks < 2 * ranks:
        raise ValueError(f"{name}: chunks={chunks} is less than 2 * ranks = {2 * ranks}: the pipeline never fills")
    return Schedule(name, (SCHEDULES[name](rank, ranks, chunks) for rank in range(ranks)))


def _one_forward_one_backward(rank: int, ranks: int, chunks: int) -> list[Instruction]:
    ahead = min(ranks - 1 - rank, chunks)  # forwards before the first backward can arrive
    ops: list[Instruction] = [("F", 0, c) for c in range(ahead)]
    for c in range(chunks):
        if c + ahead < chunks:
            ops.append(("F", 0, c + ahead))
        ops.append(("B", 0, c))
    return ops


def _zero_bubble(rank: int, ranks: int, chunks: int) -> list[Instruction]:
    """1F1B's order; the weight part follows `rank` chunks behind the input part, so that every rank keeps PP chunks."""
    ahead = min(ranks - rank, chunks)
    ops: list[Instruction] = [("F", 0, c) for c in range(ahead)]
    for c in range(chunks):
        ops.append(("Bi", 0, c))
        if c >= rank:
            ops.append(("W", 0, c - rank))
        if c + ahead < chunks:
            ops.append(("F", 0, c + ahead))
    return ops + [("W", 0, c) for c in range(max(0, chunks - rank), chunks)]


SCHEDULES: dict[str, Callable[[int, int, int], list[Instruction]]] = {
    "1f1b": _one_forward_one_backward,
    "zb1p": _zero_bubble,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}


def parts(instruction: Instruction) -> tuple[Part, ...]:
    """The one or two (kind, dir, chunk) of an instruction; ``FB`` is an F and a full B."""
    if instruction[0] == "FB":
        _, dir_f, chunk_f, dir_b, chunk_b = instruction
        return ("F", dir_f, chunk_f), ("B", dir_b, chunk_b)
    return (instruction,)


def bubble(name: str, ranks: int, F: float, B: float, W: float, FB: float) -> float:
    """Idle time of a rank by the formulas of Table 2 (B is the full backward, W its weight part).

    They are the papers' estimates; `timeline` gives what happens. Exact, with FB = F + B or less and chunks >= 2 ranks:
    1F1B always; ZB1P where W <= F and W <= Bi; DualPipe and DualPipeV where F = Bi and W <= F, on the middle ranks
    (the last one of DualPipeV). Outside, DualPipe's formula is too low as often as too high.
    """
    if name == "1f1b":
        return (ranks - 1) * (F + B)
    if name == "zb1p":
        return (ranks - 1) * (F + B - 2 * W)
    if name not in SCHEDULES:
        raise ValueError(f"name={name!r} is not one of {', '.join(SCHEDULES)}")
    half = ranks / 2 if name == "dualpipe" else ranks
    return (half - 1) * (FB + B - 3 * W)


def peak_live(schedule: Sequence[Sequence[Instruction]]) -> list[int]:
    """For each rank the largest number of chunks whose activations it holds at once.

    A chunk is held from its forward to the end of its backward, the weight part included. In an overlapped pair the
    forward's activations come before the backward's go.
    """
    return [_peak(row) for row in schedule]


def _peak(row: Sequence[Instruction]) -> int:
    live = peak = 0
    for op in row:
        for kind, _, _ in parts(op):
            live += {"F": 1, "B": -1, "Bi": 0, "W": -1}[kind]
            peak = max(peak, live)
    return peak


class Need(NamedTuple):
    """What an instruction waits for: another one's end, or (a blocked send) only its start."""

    node: Node
    only_start: bool


def needs(schedule: Sequence[Sequence[Instruction]], blocking_sends: bool = False) -> dict[Node, list[Need]]:
    """For every (rank, position): the instructions before it in time, in a checked schedule.

    Program order; the forward of the stage before; the backward of the stage behind. With `blocking_sends` a rank
    goes on only when its message was taken over: a channel (sender, receiver, kind, dir) has room for one message, so
    a send waits until the receiver has begun the instruction that uses the message before.
    """
    plan = as_schedule(schedule)
    place_of: dict[tuple[str, int, int, int], Node] = {}  # (F or B, rank, dir, chunk) -> where it is computed
    for rank, row in enumerate(plan):
        for i, op in enumerate(row):
            for kind, direction, chunk in parts(op):
                place_of["B" if kind in BACKWARD else kind, rank, direction, chunk] = rank, i
    found: dict[Node, list[Need]] = {(r, i): [] for r, row in enumerate(plan) for i in range(len(row))}
    taken_of: dict[tuple[int, int, str, int], Node] = {}  # channel -> user of the last message sent on it
    for rank, row in enumerate(plan):
        for i, op in enumerate(row):
            here = found[rank, i]
            if i:
                here.append(Need((rank, i - 1), False))
            for kind, direction, chunk in parts(op):
                source, target, name = _ends(plan, kind, rank, direction)
                if source is not None:
                    node = place_of.get((name, *source, chunk))
                    if node is None:
                        raise ValueError(f"rank {rank}: {op} waits for {name} of {chunk} that rank {source[0]} lacks")
                    here.append(Need(node, False))
                if blocking_sends and target is not None and target[0] != rank:
                    channel = (rank, target[0], name, direction)
                    if channel in taken_of and i + 1 < len(row):
                        found[rank, i + 1].append(Need(taken_of[channel], True))
                    if (name, *target, chunk) not in place_of:
                        raise ValueError(f"rank {rank}: nobody on rank {target[0]} takes what {op} sends")
                    taken_of[channel] = place_of[name, *target, chunk]
    return found


def _ends(plan: Schedule, kind: str, rank: int, direction: int) -> tuple[Place | None, Place | None, str]:
    """(where the input of this part comes from, where its output goes, F or B); a weight part has neither."""
    if kind == "W":
        return None, None, "W"
    ahead, behind = plan.next_stage(rank, direction), plan.previous_stage(rank, direction)
    return (behind, ahead, "F") if kind == "F" else (ahead, behind, "B")


def in_order(needed: dict[Node, list[Need]]) -> list[Node]:
    """All (rank, position), each after what it needs. Raises ValueError where they wait for each other."""
    try:
        return list(TopologicalSorter({node: [n.node for n in ns] for node, ns in needed.items()}).static_order())
    except CycleError as error:
        ring = " <- ".join(f"rank {rank} instruction {i}" for rank, i in error.args[1])
        raise ValueError(f"deadlock, these wait for each other: {ring}") from None


def validate(schedule: Sequence[Sequence[Instruction]]) -> None:
    """Check that a schedule can be run: ValueError names the rank, the instruction and the rule that is broken.

    * every rank computes each chunk of each of its directions once: one F, and one B, or one Bi and one W;
    * F before B or Bi, Bi before W on each rank;
    * nobody waits for ever, even when sends block (see `needs`).
    """
    plan = as_schedule(schedule)
    chunks = plan.chunks_per_direction
    if chunks < 1:
        raise ValueError("the schedule has no instruction")
    for rank, row in enumerate(plan):
        done: dict[str, set[tuple[int, int]]] = {"F": set(), "B": set(), "Bi": set(), "W": set()}
        for op in row:
            for kind, direction, chunk in parts(op):
                _check_part(f"rank {rank}, {op}", done, kind, (direction, chunk))
        for direction in plan.directions:
            for chunk in range(chunks):
                for kind, finished in (("F", done["F"]), ("backward", done["B"] | done["W"])):
                    if (direction, chunk) not in finished:
                        raise ValueError(f"rank {rank} lacks the {kind} of dir {direction}, chunk {chunk}")
    in_order(needs(plan, blocking_sends=True))


def _check_part(where: str, done: dict[str, set[tuple[int, int]]], kind: str, chunk: tuple[int, int]) -> None:
    """Add one part to what a rank has done, if the rules allow it there."""
    if chunk in done[kind] or (kind in BACKWARD and chunk in done["B"] | done["Bi"]):
        raise ValueError(f"{where}: computed twice")
    before = {"F": None, "B": "F", "Bi": "F", "W": "Bi"}[kind]
    if before is not None and chunk not in done[before]:
        raise ValueError(f"{where}: {kind} stands before its {before}")
    done[kind].add(chunk)


def as_schedule(lists: Sequence[Sequence[Instruction]]) -> Schedule:
    """`lists` with their layout; plain lists show it: one direction, two that enter at both ends, or a fold.

    Raises ValueError for an instruction that is none.
    """
    for rank, row in enumerate(lists):
        for op in row:
            size = {"F": 3, "B": 3, "Bi": 3, "W": 3, "FB": 5}.get(op[0] if op else "")
            if size != len(op) or not all(isinstance(n, int) and n >= 0 for n in op[1:]):
                raise ValueError(f"rank {rank}: {op!r} is not (F|B|Bi|W, dir, chunk) or (FB, dir, chunk, dir, chunk)")
    if isinstance(lists, Schedule):
        plan = lists
    else:
        rows = [[tuple(op) for op in row] for row in lists]
        two = any(direction == 1 for row in rows for op in row for _, direction, _ in parts(op))
        from_the_end = two and bool(rows[-1]) and parts(rows[-1][0])[0][1] == 1
        plan = Schedule("dualpipe" if from_the_end else "dualpipev" if two else "1f1b", rows)
    for rank, row in enumerate(plan):
        for op in row:
            for _, direction, _ in parts(op):
                if direction not in plan.directions:
                    raise ValueError(f"rank {rank}: {op} has dir {direction}; {plan.name} knows {plan.directions}")
    return plan
