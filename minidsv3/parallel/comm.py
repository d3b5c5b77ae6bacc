"""Collectives between ranks, and an engine that hosts all ranks in this process.

A *rank* stands for one GPU; `gpus_per_node` of them in a row share a node. Inside a node a byte travels over NVLink,
between nodes over InfiniBand. A process hosts some of the ranks, ``comm.local_ranks``: all of them in
`SimCommunicator`, a block of them in `mpi.MPICommunicator`. So every collective takes and returns ``{rank: array}``
for the local ranks, and the same program runs under both.

There are four primitives (`all_to_all_v`, `all_gather`, `broadcast`, and `send`/`receive` between two ranks); sums
are made of them here, once for all engines, and always add in rank order: the bits of a result do not depend on the
engine, nor on the number of processes.

What passes through is counted by `ledger.Ledgered`, which wraps any engine.

Simplified against the real system: no bandwidth, no time, and an all-reduce is a reduce-scatter by pairwise messages
and an all-gather, whatever NCCL would choose.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..autograd import Array


class RankError(ConnectionError):
    """A rank died, hung or sent what can't be; the message names rank and operation."""


class Parts(NamedTuple):
    """Rows for (or from) every rank, behind each other in rank order."""

    rows: Array  # [N, ...]
    counts: Array  # int64 [R], how many of the N rows are each rank's


class Communicator(Protocol):
    """What a program on ranks may ask for. `operation` is the name under which the ledger keeps the traffic."""

    ranks: int
    gpus_per_node: int
    local_ranks: range  # of this process
    members: Sequence[int]  # global rank of each of ours; not 0, 1, 2, ... in a group made by `split`

    def all_to_all_v(self, send: Mapping[int, Parts], operation: str, row_messages: bool = False) -> dict[int, Parts]:
        """Part d of rank s becomes part s of rank d.

        Rows of all ranks have one dtype and one shape. With `row_messages` each row counts as a message of its own.
        Raises RankError, naming the rank, when counts do not fit the rows.
        """
        ...

    def all_gather(self, values: Mapping[int, Array], operation: str) -> dict[int, list[Array]]:
        """Everybody gets everybody's array (read-only), in rank order; first axes may differ."""
        ...

    def broadcast(self, values: Mapping[int, Array], root: int, operation: str) -> dict[int, Array]:
        """Everybody gets root's array (read-only); the others' entries give shape and dtype."""
        ...

    def reduce_scatter(self, values: Mapping[int, Array], operation: str) -> dict[int, Array]:
        """Rank r gets piece r (`piece_bounds`) of the sum of all flat arrays [N], added in rank order."""
        ...

    def all_reduce(self, values: Mapping[int, Array], operation: str) -> dict[int, Array]:
        """Everybody gets the sum of all arrays, added in rank order."""
        ...

    def barrier(self) -> None:
        """Wait until every process is here."""
        ...

    def split(self, colour_of_rank: Sequence[int]) -> Sequence[Communicator]:
        """A communicator for each colour that one of the local ranks has, in order of colours.

        In it, ranks count from 0 in the order of the global ones, which are its `members`.
        """
        ...

    def send(self, array: Array, source: int, destination: int, tag: int, operation: str) -> None:
        """Leave a copy of `array` in the mailbox of `destination`; does not wait."""
        ...

    def receive(self, source: int, destination: int, tag: int, operation: str) -> Array | None:
        """Take the oldest message of `source` with this tag, or None if none has arrived. Does not wait."""
        ...


def piece_bounds(size: int, pieces: int) -> list[int]:
    """Where to cut `size` elements into `pieces`, as even as can be: pieces + 1 numbers."""
    return [size * i // pieces for i in range(pieces + 1)]


class Collectives:
    """Sums, made of the primitives of whoever inherits this."""

    ranks: int
    all_to_all_v: Any
    all_gather: Any

    def reduce_scatter(self, values: Mapping[int, Array], operation: str) -> dict[int, Array]:
        """See `Communicator`."""
        size = next(iter(values.values())).size
        counts = np.diff(np.array(piece_bounds(size, self.ranks), dtype=np.int64))
        received = self.all_to_all_v({r: Parts(v.reshape(-1), counts) for r, v in values.items()}, operation)
        sums = {}
        for rank, (rows, _) in received.items():
            pieces = rows.reshape(self.ranks, -1)  # one of each rank
            total = pieces[0].copy()
            for piece in pieces[1:]:
                total += piece
            sums[rank] = total
        return sums

    def all_reduce(self, values: Mapping[int, Array], operation: str) -> dict[int, Array]:
        """See `Communicator`."""
        pieces = self.all_gather(self.reduce_scatter(values, operation), operation)
        whole: dict[int, Array] = {}
        for rank, parts in pieces.items():
            whole[rank] = np.concatenate(parts).reshape(values[rank].shape)
        return whole


def checked_parts(rank: int, parts: Parts, ranks: int, operation: str) -> Parts:
    """`parts`, or RankError if the counts can't be those of the rows."""
    counts = np.asarray(parts.counts)
    if counts.shape != (ranks,) or counts.min(initial=0) < 0 or counts.sum() != len(parts.rows):
        said = counts.tolist() if counts.size <= 16 else f"{counts.shape} counts that add up to {counts.sum()}"
        raise RankError(f"rank {rank} sent sizes {said} for {len(parts.rows)} rows in {operation}: they do not fit")
    return Parts(parts.rows, counts)


class SimCommunicator(Collectives):
    """All ranks in this process. What it passes is copied (or read-only), so that no rank can see another's arrays.

    Parameters
    ----------
    ranks : int
    gpus_per_node : int, optional
        All ranks on one node if not given.
    members : sequence of int, optional
        Global ranks, for a group.

    Raises
    ------
    ValueError
        `ranks` is not a multiple of `gpus_per_node`.
    """

    def __init__(self, ranks: int, gpus_per_node: int | None = None, members: Sequence[int] | None = None) -> None:
        check_nodes(ranks, gpus_per_node or ranks, whole=members is None)
        self.ranks, self.gpus_per_node = ranks, gpus_per_node or ranks
        self.local_ranks, self.members = range(ranks), members or range(ranks)
        self._mail: dict[tuple[int, int, int], deque[Array]] = {}

    def all_to_all_v(self, send: Mapping[int, Parts], operation: str, row_messages: bool = False) -> dict[int, Parts]:
        """See `Communicator`."""
        parts = [checked_parts(self.members[r], send[r], self.ranks, operation) for r in self.local_ranks]
        counts = np.stack([p.counts for p in parts])  # [source, destination]
        stops = np.cumsum(counts, axis=1)
        received = {}
        for d in self.local_ranks:
            sources, b = np.flatnonzero(counts[:, d]).tolist(), stops[:, d].tolist()
            n = counts[:, d]
            pieces = [parts[s].rows[b[s] - n[s] : b[s]] for s in sources]
            rows = np.concatenate(pieces) if pieces else parts[d].rows[:0].copy()
            received[d] = Parts(rows, n.copy())
        return received

    def all_gather(self, values: Mapping[int, Array], operation: str) -> dict[int, list[Array]]:
        """See `Communicator`."""
        copies = [read_only(values[r]) for r in self.local_ranks]
        return {r: list(copies) for r in self.local_ranks}

    def broadcast(self, values: Mapping[int, Array], root: int, operation: str) -> dict[int, Array]:
        """See `Communicator`."""
        return dict.fromkeys(self.local_ranks, read_only(values[root]))

    def barrier(self) -> None:
        """See `Communicator`; here everybody is always there."""

    def split(self, colour_of_rank: Sequence[int]) -> list[SimCommunicator]:
        """See `Communicator`."""
        groups = [[r for r in self.local_ranks if colour_of_rank[r] == c] for c in sorted(set(colour_of_rank))]
        return [SimCommunicator(len(g), self.gpus_per_node, [self.members[r] for r in g]) for g in groups]

    def send(self, array: Array, source: int, destination: int, tag: int, operation: str) -> None:
        """See `Communicator`."""
        self._mail.setdefault((source, destination, tag), deque()).append(array.copy())

    def receive(self, source: int, destination: int, tag: int, operation: str) -> Array | None:
        """See `Communicator`."""
        box = self._mail.get((source, destination, tag))
        return box.popleft() if box else None


def check_nodes(ranks: int, gpus_per_node: int, whole: bool = True) -> None:
    """ValueError unless `ranks` fill whole nodes (a group need not)."""
    for name, value in (("ranks", ranks), ("gpus_per_node", gpus_per_node)):
        if value < 1:
            raise ValueError(f"{name}={value} is not positive")
    if whole and ranks % gpus_per_node:
        raise ValueError(f"ranks={ranks} is not a multiple of gpus_per_node={gpus_per_node}")


def read_only(array: Array) -> Array:
    """A copy that nobody can write into."""
    copy = array.copy()
    copy.flags.writeable = False
    return copy
