"""DualPipe's eight steps, and DualPipeV, which is the same folded (V3 report, section 3.2.1; Figure 5).

Two streams of chunks run against each other, so that the forward of one can hide the communication of a backward of
the other. A rank has an *own* stream, which reaches it first, and the *other* one. Seen from the rank `depth` places
from its end of a half of the pipeline:

    1  own forwards alone, until the other stream arrives        5  other backward; other forward over own backward
    2  both forward                                              6  backwards only, the later ones without weight parts
    3  other backward for the input, its weights at once,        7  weight parts fill the waiting
       other forward                                             8  what is left of them
    4  full: own forward over other backward, and the reverse

Steps 3 and 6 to 8 use the zero-bubble idea: the weight part of a backward has no one waiting for it.
"""

from __future__ import annotations

Instruction = tuple  # see `schedules`


def dualpipe(rank: int, ranks: int, chunks: int) -> list[Instruction]:
    """Instructions of a rank: `ranks` even, `chunks` micro-batches even and at least 2 `ranks`, half each way."""
    depth = min(rank, ranks - 1 - rank)
    own = 0 if rank < ranks // 2 else 1  # the stream that enters at this half's end
    return _two_streams(depth, ranks // 2, ranks, chunks // 2, own)


def dualpipev(rank: int, ranks: int, chunks: int) -> list[Instruction]:
    """The same folded: one stream goes down the ranks and back up; at least 2 `ranks` micro-batches."""
    return _two_streams(rank, ranks, 2 * ranks, chunks, 0)


def _two_streams(depth: int, half: int, stages: int, chunks: int, own: int) -> list[Instruction]:
    """The eight steps of DualPipe for the rank `depth` places from its end of `half` ranks.

    `own` is the dir of the stream that reaches this rank first, `chunks` the length of each stream.
    """
    rest = half - depth - 1  # 0 on the middle ranks, where the two streams turn
    plan = _Streams(own)
    for _ in range(2 * rest):  # 1. fill: the own stream alone
        plan.forward(0)
    for _ in range(depth + 1):  # 2. both streams forward
        plan.forward(0)
        plan.forward(1)
    for _ in range(rest):  # 3. the other stream's backward is back: its weight part at once, to keep the memory down
        plan.backward_input(1)
        plan.weight()
        plan.forward(1)
    for i in range(chunks - stages + depth + 1):  # 4. full: a forward of one stream over a backward of the other
        if i == 0 and rest == 0:  # the middle ranks begin a pair's length earlier without overlap
            plan.forward(0)
            plan.backward(1)
        else:
            plan.overlapped(0, 1)
        plan.overlapped(1, 0)
    for _ in range(rest):  # 5. the own stream has no forwards left
        plan.backward(1)
        plan.overlapped(1, 0)
    switch = 2 * ((depth + 1) // 2) + (0 if depth % 2 else 1)
    for i in range(2 * (depth + 1)):  # 6. only backwards; from the switch on without weight parts, to let go sooner
        (plan.backward if i < switch else plan.backward_input)(1 - i % 2)
    for _ in range(rest):  # 7. weight parts fill the waiting
        plan.weight()
        plan.backward_input(0)
    for _ in range(depth + 1):  # 8. and what is left of them
        plan.weight()
    return plan.ops


class _Streams:
    """Writes instructions of two streams, counting the chunks of each; stream 0 is the rank's own."""

    def __init__(self, own: int) -> None:
        self.ops: list[Instruction] = []
        self._own = own
        self._forwards, self._backwards = [0, 0], [0, 0]
        self._waiting: list[tuple[int, int]] = []  # (dir, chunk) of weight parts, oldest first

    def _next(self, stream: int, counts: list[int]) -> tuple[int, int]:
        counts[stream] += 1
        return stream ^ self._own, counts[stream] - 1

    def forward(self, stream: int) -> None:
        self.ops.append(("F", *self._next(stream, self._forwards)))

    def backward(self, stream: int) -> None:
        self.ops.append(("B", *self._next(stream, self._backwards)))

    def backward_input(self, stream: int) -> None:
        self._waiting.append(self._next(stream, self._backwards))
        self.ops.append(("Bi", *self._waiting[-1]))

    def weight(self) -> None:
        self.ops.append(("W", *self._waiting.pop(0)))

    def overlapped(self, forward: int, backward: int) -> None:
        self.ops.append(("FB", *self._next(forward, self._forwards), *self._next(backward, self._backwards)))
