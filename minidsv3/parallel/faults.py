"""Things that go wrong on purpose: a rank that dies, hangs, sends sizes that do not fit, or comes late.

`Faulty` wraps a communicator; each `Fault` strikes at one collective, the `call`-th of its operation (or of all). A
rank that dies or hangs stays away from then on. Whoever is in the collective raises one `RankError` that names rank
and operation: the same error that real processes meet under MPI, where a silence is noticed by the time-out.
A straggler changes no number: its virtual seconds go into the ledger, and the clock turns them into step time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..autograd import Array
from .comm import Collectives, Parts, RankError

KINDS = ("dies", "hangs", "corrupts", "straggles")


class Fault(NamedTuple):
    """What happens, to which rank, and when."""

    kind: str  # one of KINDS
    rank: int
    call: int = 1  # strikes at this call, counted from 1
    operation: str | None = None  # of this operation; None: calls of any
    seconds: float = 0.0  # how late a straggler comes, virtual

    @classmethod
    def parse(cls, text: str) -> Fault:
        """The fault that ``KIND:RANK:CALL[:OPERATION[:SECONDS]]`` describes; ValueError otherwise."""
        kind, _, rest = text.partition(":")
        rank, call, operation, seconds = [*rest.split(":"), "", "", ""][:4]
        try:
            return cls(kind, int(rank), int(call), operation or None, float(seconds or 0)).checked()
        except ValueError as error:
            raise ValueError(f"fault {text!r} is not KIND:RANK:CALL[:OPERATION[:SECONDS]]: {error}") from None

    def checked(self) -> Fault:
        """Itself; ValueError unless it can happen."""
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is not one of {', '.join(KINDS)}")
        if self.rank < 0 or self.call < 1 or self.seconds < 0:
            raise ValueError(
                f"rank={self.rank} and seconds={self.seconds} must be 0 or more, call={self.call} positive"
            )
        return self


class Faulty(Collectives):
    """A communicator on which faults happen.

    Parameters
    ----------
    engine : Communicator
        Usually a `Ledgered` one: stragglers write into its ledger.
    faults : sequence of Fault
    timeout : float
        What the error about a hanging rank says that the others waited, in seconds; nobody really waits.
    """

    def __init__(self, engine: Any, faults: Sequence[Fault], timeout: float = 30.0) -> None:
        self.engine, self.faults, self.timeout = engine, [fault.checked() for fault in faults], timeout
        self.ranks, self.gpus_per_node = engine.ranks, engine.gpus_per_node
        self.local_ranks, self.members = engine.local_ranks, engine.members
        self._calls: Counter[str | None] = Counter()
        self._away: dict[int, str] = {}  # rank -> what happened to it

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def all_to_all_v(self, send: Mapping[int, Parts], operation: str, row_messages: bool = False) -> dict[int, Parts]:
        """See `Communicator`."""
        send = dict(send)
        for fault in self._strike(operation):
            rows, counts = send[fault.rank]
            counts = counts.copy()
            counts[(fault.rank + 1) % self.ranks] += 1
            send[fault.rank] = Parts(rows, counts)  # the engine finds out
        return self.engine.all_to_all_v(send, operation, row_messages)

    def all_gather(self, values: Mapping[int, Array], operation: str) -> dict[int, list[Array]]:
        """See `Communicator`."""
        self._refuse(self._strike(operation), operation)
        return self.engine.all_gather(values, operation)

    def broadcast(self, values: Mapping[int, Array], root: int, operation: str) -> dict[int, Array]:
        """See `Communicator`."""
        self._refuse(self._strike(operation), operation)
        return self.engine.broadcast(values, root, operation)

    def barrier(self) -> None:
        """See `Communicator`."""
        self._refuse(self._strike("barrier"), "barrier")
        self.engine.barrier()

    def send(self, array: Array, source: int, destination: int, tag: int, operation: str) -> None:
        """See `Communicator`."""
        self._refuse(self._strike(operation), operation)
        self.engine.send(array, source, destination, tag, operation)

    def _strike(self, operation: str) -> list[Fault]:
        """Count this call; let faults happen. Returns those that corrupt it."""
        self._calls[operation] += 1
        self._calls[None] += 1
        corrupting = []
        for fault in self.faults:
            if fault.operation not in (None, operation) or self._calls[fault.operation] != fault.call:
                continue
            if fault.kind == "dies":
                self._away[fault.rank] = f"rank {fault.rank} died in {operation}"
            elif fault.kind == "hangs":
                self._away[fault.rank] = f"rank {fault.rank} did not come to {operation} within {self.timeout:g} s"
            elif fault.kind == "corrupts":
                corrupting.append(fault)
            else:
                self.engine.ledger.add_seconds(operation, self.members[fault.rank], fault.seconds)
        for reason in self._away.values():
            raise RankError(reason)
        return corrupting

    def _refuse(self, corrupting: list[Fault], operation: str) -> None:
        """A message without counts of its own carries its length, which the receiver compares."""
        for fault in corrupting:
            raise RankError(f"rank {fault.rank} sent a message whose length is not the one it names in {operation}")
