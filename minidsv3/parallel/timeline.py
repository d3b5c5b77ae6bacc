"""A schedule and durations give start and end of every instruction; waiting is what is left over.

An instruction starts when its rank is free and its inputs are there (`schedules.needs`); a rank never reorders its
list. The bubble of a schedule is therefore computed, not assumed: the formulas of `schedules.bubble` hold in some
regimes only.

Simplified: a message takes the same time `hop` between any two ranks and never competes with another one; how the
two halves of an overlapped pair share a GPU is inside the duration that is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .schedules import Instruction, Schedule, as_schedule, in_order, needs, peak_live

Durations = Mapping[str, float] | Callable[[int, Instruction], float]


@dataclass(frozen=True)
class Timeline:
    """When everything happens; times in the unit of the durations, from 0.

    Attributes
    ----------
    start, end : list of list of float
        For each rank and each of its instructions.
    makespan : float
        End of the last instruction.
    busy, idle : list of float
        For each rank; together they are the makespan, so idle counts the waiting at the start and at the end too.
    peak_live : list of int
        For each rank the largest number of chunks whose activations it holds (`schedules.peak_live`).
    """

    schedule: Schedule
    start: list[list[float]]
    end: list[list[float]]
    makespan: float
    busy: list[float]
    idle: list[float]
    peak_live: list[int]


def timeline(
    schedule: Sequence[Sequence[Instruction]],
    durations: Durations,
    hop: float = 0.0,
    blocking_sends: bool = False,
) -> Timeline:
    """Time a schedule.

    Parameters
    ----------
    schedule : Schedule, or plain lists of instructions
    durations : mapping, or function
        Time of each kind of instruction (``F``, ``B``, ``Bi``, ``W``, ``FB``; only those that occur are needed), or a
        function of (rank, instruction) for stages that differ.
    hop : float
        Time of a message between two ranks.
    blocking_sends : bool
        Whether a rank waits until its message was taken over (`schedules.needs`).

    Raises
    ------
    ValueError
        A kind without duration, a negative or infinite one, or instructions that wait for each other.
    """
    plan = as_schedule(schedule)
    length = durations if callable(durations) else _by_kind(durations)
    needed = needs(plan, blocking_sends)
    start = [[0.0] * len(row) for row in plan]
    end = [[0.0] * len(row) for row in plan]
    for rank, i in in_order(needed):
        begin = 0.0
        for (other, j), only_start in needed[rank, i]:
            ready = start[other][j] if only_start else end[other][j] + (hop if other != rank else 0.0)
            begin = max(begin, ready)
        seconds = float(length(rank, plan[rank][i]))
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"duration {seconds} of {plan[rank][i]} on rank {rank} is not a time of at least 0")
        start[rank][i], end[rank][i] = begin, begin + seconds
    makespan = max((times[-1] for times in end if times), default=0.0)
    busy = [sum(b - a for a, b in zip(*times)) for times in zip(start, end)]
    return Timeline(plan, start, end, makespan, busy, [makespan - b for b in busy], peak_live(plan))


def _by_kind(durations: Mapping[str, float]) -> Callable[[int, Instruction], float]:
    def length(rank: int, instruction: Instruction) -> float:
        if instruction[0] not in durations:
            raise ValueError(
                f"durations have no {instruction[0]!r}, which rank {rank} computes; got {sorted(durations)}"
            )
        return durations[instruction[0]]

    return length
