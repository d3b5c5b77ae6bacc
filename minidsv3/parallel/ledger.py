"""A ledger of what crosses each link, and the wrapper that keeps it.

`Ledgered` wraps any engine of `comm` and adds up ``nbytes`` of the arrays that pass through it, per (operation,
source, destination). Nothing in the package computes traffic from indices. The ledger is written as CSV, and
`simulate step` reads it.

Simplified against the real system: bytes have no time here; the clock of `hardware` reads the ledger afterwards.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..autograd import Array
from .comm import Collectives, Parts

LINKS = ("local", "NVLink", "InfiniBand")  # 'local' is a copy inside one GPU: it crosses no link


class LedgerRow(NamedTuple):
    """What went from one rank to another under one operation."""

    operation: str
    source: int  # global ranks
    destination: int
    link: str  # one of LINKS
    messages: int
    bytes: int
    seconds: float = 0.0  # virtual time that `source` came late; no traffic has any


class Ledger:
    """Messages and bytes per (operation, source, destination), and the virtual seconds that stragglers add.

    Attributes
    ----------
    link_of_pair : int8 [R, R]
        Index into LINKS.
    """

    def __init__(self, ranks: int, gpus_per_node: int) -> None:
        node = np.arange(ranks, dtype=np.int64) // gpus_per_node
        self.link_of_pair = np.where(node[:, None] == node, 1, 2).astype(np.int8)
        np.fill_diagonal(self.link_of_pair, 0)
        self._counts: dict[str, Array] = {}  # operation -> int64 [2, R, R]: messages, bytes
        self._late: dict[str, Array] = {}  # operation -> float64 [R]

    def add(self, operation: str, source: int, destination: Any, messages: Any, nbytes: Any) -> None:
        """Count what `source` sends to `destination` (both global; an int, or an array of distinct ones)."""
        R = len(self.link_of_pair)
        counts = self._counts.setdefault(operation, np.zeros((2, R, R), dtype=np.int64))
        counts[0, source, destination] += messages
        counts[1, source, destination] += nbytes

    def add_seconds(self, operation: str, rank: int, seconds: float) -> None:
        """Rank `rank` came `seconds` of virtual time late to `operation`."""
        self._late.setdefault(operation, np.zeros(len(self.link_of_pair), dtype=np.float64))[rank] += seconds

    @property
    def operations(self) -> list[str]:
        """Names of the operations seen, in order of their first use."""
        return list(self._counts)

    def bytes_of_pair(self, operation: str | None = None) -> Array:
        """Bytes from each rank to each: int64 [R, R]; of one operation, or of all."""
        return self._sum(operation, 1)

    def total_bytes(self, operation: str | None = None, link: str | None = None) -> int:
        """Bytes of one operation or all, over one class of links or all (a 'local' copy crosses none)."""
        return self._total(operation, link, 1)

    def total_messages(self, operation: str | None = None, link: str | None = None) -> int:
        """Messages, likewise."""
        return self._total(operation, link, 0)

    def rows(self) -> Iterator[LedgerRow]:
        """Every pair that has traffic, then every delay; sorted by operation, source, destination."""
        for operation in sorted(self._counts):
            messages, nbytes = self._counts[operation]
            for s, d in np.argwhere(messages).tolist():
                link = LINKS[self.link_of_pair[s, d]]
                yield LedgerRow(operation, s, d, link, int(messages[s, d]), int(nbytes[s, d]))
        for operation in sorted(self._late):
            for r in np.flatnonzero(self._late[operation]).tolist():
                yield LedgerRow(operation, r, r, "local", 0, 0, float(self._late[operation][r]))

    def write_csv(self, path: str | Path) -> None:
        """All `rows` under a line of column names, UTF-8."""
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(LedgerRow._fields)
            writer.writerows(self.rows())
        temporary.replace(path)

    def clear(self) -> None:
        """Forget everything."""
        self._counts.clear()
        self._late.clear()

    def _sum(self, operation: str | None, which: int) -> Array:
        chosen = self._counts.values() if operation is None else [self._counts[operation]]
        return sum((c[which] for c in chosen), np.zeros_like(self.link_of_pair, dtype=np.int64))

    def _total(self, operation: str | None, link: str | None, which: int) -> int:
        total = self._sum(operation, which)
        return int(total.sum() if link is None else total[self.link_of_pair == LINKS.index(link)].sum())


def read_ledger_csv(path: str | Path) -> list[LedgerRow]:
    """The rows that `Ledger.write_csv` wrote; ValueError naming the line for anything else."""
    rows = []
    with Path(path).open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        if next(reader, None) != list(LedgerRow._fields):
            raise ValueError(f"{path} does not begin with the columns {', '.join(LedgerRow._fields)}")
        for number, line in enumerate(reader, start=2):
            try:
                operation, source, destination, link, messages, nbytes, seconds = line
                numbers = int(source), int(destination), link, int(messages), int(nbytes), float(seconds)
            except ValueError:
                raise ValueError(f"{path} line {number} is no row of a ledger: {','.join(line)[:80]!r}") from None
            rows.append(LedgerRow(operation, *numbers))
    return rows


class Ledgered(Collectives):
    """A communicator that counts: wraps any engine, and keeps a `ledger` of what its local ranks send.

    Under MPI each process counts what its own ranks send; `mpi.MPICommunicator` brings the ledgers together.
    """

    def __init__(self, engine: Any, ledger: Ledger | None = None) -> None:
        self.engine = engine
        self.ledger = ledger or Ledger(engine.ranks, engine.gpus_per_node)
        self.ranks, self.gpus_per_node = engine.ranks, engine.gpus_per_node
        self.local_ranks, self.members = engine.local_ranks, engine.members
        self._members = np.array(list(engine.members), dtype=np.int64)

    def all_to_all_v(self, send: Mapping[int, Parts], operation: str, row_messages: bool = False) -> dict[int, Parts]:
        """See `Communicator`."""
        received = self.engine.all_to_all_v(send, operation, row_messages)  # refuses counts that do not fit
        for rank, (rows, counts) in send.items():
            bytes_per_row = rows.nbytes // len(rows) if len(rows) else 0
            messages = counts if row_messages else counts > 0
            self.ledger.add(operation, self.members[rank], self._members, messages, counts * bytes_per_row)
        return received

    def all_gather(self, values: Mapping[int, Array], operation: str) -> dict[int, list[Array]]:
        """See `Communicator`."""
        self._count_to_all(values, operation)
        return self.engine.all_gather(values, operation)

    def broadcast(self, values: Mapping[int, Array], root: int, operation: str) -> dict[int, Array]:
        """See `Communicator`."""
        if root in values:
            self._count_to_all({root: values[root]}, operation)
        return self.engine.broadcast(values, root, operation)

    def _count_to_all(self, values: Mapping[int, Array], operation: str) -> None:
        for rank, array in values.items():
            others = self._members[self._members != self.members[rank]]
            self.ledger.add(operation, self.members[rank], others, int(array.size > 0), array.nbytes)

    def gathered(self) -> Ledger:
        """The ledgers of all processes in one; a collective, itself not counted."""
        R, first = len(self.ledger.link_of_pair), self.local_ranks[0]
        whole = Ledger(R, self.gpus_per_node)
        for mine, all_of_it, shape in (
            (self.ledger._counts, whole._counts, np.zeros((2, R, R), dtype=np.int64)),
            (self.ledger._late, whole._late, np.zeros(R, dtype=np.float64)),
        ):
            names = np.frombuffer("\n".join(mine).encode("utf-8"), dtype=np.uint8)
            everybody = self.engine.all_gather(dict.fromkeys(self.local_ranks, names), "ledger")[first]
            for operation in sorted(
                {name for said in everybody for name in said.tobytes().decode("utf-8").split("\n")}
            ):
                if operation:
                    values = dict.fromkeys(self.local_ranks, np.zeros_like(shape))
                    values[first] = mine.get(operation, shape)
                    all_of_it[operation] = self.engine.all_reduce(values, "ledger")[first]
        return whole

    def barrier(self) -> None:
        """See `Communicator`."""
        self.engine.barrier()

    def split(self, colour_of_rank: Sequence[int]) -> list[Ledgered]:
        """See `Communicator`; groups write into the same ledger."""
        return [Ledgered(group, self.ledger) for group in self.engine.split(colour_of_rank)]

    def send(self, array: Array, source: int, destination: int, tag: int, operation: str) -> None:
        """See `Communicator`."""
        self.ledger.add(operation, self.members[source], self.members[destination], 1, array.nbytes)
        self.engine.send(array, source, destination, tag, operation)

    def receive(self, source: int, destination: int, tag: int, operation: str) -> Array | None:
        """See `Communicator`."""
        return self.engine.receive(source, destination, tag, operation)
