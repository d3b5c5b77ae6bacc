"""Ranks as threads: the same program runs once for every rank that this process hosts, and meets at collectives.

A rank's program is ordinary code: it computes, and where it needs the others it calls `Ranks.meet`. The thread then
waits until all local ranks of its group have come; the last one hands the values of all to a communicator, and
everybody goes on with what is theirs. Each thread has its own tape (the engine's state is per thread), so the model
code knows nothing of this, and since every rank runs the same program, collectives meet in backward passes too.

At most `workers` threads run at any moment; the others wait for a turn, which is given in the order in which they
became ready. One worker runs the ranks one after another, from collective to collective, in an order that never
changes. Since every wait is known here, a deadlock is no silence: when nobody can go on, everybody raises a RankError
that says who waits in which operation for whom.

Simplified against the real system: no rank computes while it communicates.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..autograd import Array, engine_state, inherited
from .comm import Communicator, RankError

Together = Callable[[dict[int, Any]], Mapping[int, Any]]
POLL_SECONDS = 5e-5  # between two looks for a message from another process


class _Meeting:
    """Values left by the ranks that have come, results for those that wait."""

    def __init__(self) -> None:
        self.operation = ""
        self.values: dict[int, Any] = {}
        self.results: dict[int, Any] = {}


class Ranks:
    """The local ranks of a communicator.

    Parameters
    ----------
    comm : Communicator
    workers : int
        Threads that may run at once; never changes a result.
    timeout : float
        Seconds to wait for a message from another process.
    """

    def __init__(self, comm: Communicator, workers: int = 1, timeout: float = 300.0) -> None:
        self.comm, self.workers, self.timeout = comm, workers, timeout
        self._here = threading.local()
        self._lock, self._collective = threading.Lock(), threading.Lock()

    @property
    def rank(self) -> int | None:
        """The rank whose program this thread runs; None outside of `run`."""
        return getattr(self._here, "rank", None)

    def run(self, program: Callable[[int], Any]) -> list[Any]:
        """``program(rank)`` for every local rank; results in rank order.

        If one raises, the others are stopped at their next collective, and the first error is raised here.
        """
        local = list(self.comm.local_ranks)
        self._turns = {rank: threading.Semaphore(0) for rank in local}
        self._ready = deque(local)
        self._running = 0
        self._waits: dict[int, Callable[[], str]] = {}  # rank -> what it waits for, in words
        self._for_mail: set[int] = set()  # those that wait for a message
        self._meetings: dict[tuple[int, ...], _Meeting] = {}
        self._errors: dict[int, BaseException] = {}
        self._stopped: RankError | None = None
        self._mail_since: float | None = None
        results: dict[int, Any] = {}
        state = engine_state()

        def thread(rank: int) -> None:
            self._turns[rank].acquire()
            self._here.rank = rank
            try:
                with inherited(state):
                    results[rank] = program(rank)
            except BaseException as error:
                self._errors[rank] = error
                echo = error if isinstance(error, RankError) else RankError(f"rank {rank} ended: {_in_words(error)}")
                with self._lock:
                    self._stop(echo)
            with self._lock:
                self._running -= 1
                self._give_turns()

        threads = [threading.Thread(target=thread, args=(rank,), name=f"rank {rank}", daemon=True) for rank in local]
        for t in threads:
            t.start()
        with self._lock:
            self._give_turns()
        for t in threads:
            t.join()
        if self._errors:
            raise self._first_error()
        return [results[rank] for rank in local]

    def meet(self, value: Any, together: Together, operation: str, group: Sequence[int] | None = None) -> Any:
        """Wait for the local ranks of `group` (all of them if None), and take part in a collective.

        Parameters
        ----------
        value : anything
            What this rank brings.
        together : function
            ``{rank: value} -> {rank: result}``, called once, by the last to come; the same on every rank.
        operation : str
            For error messages; a rank that comes with another one has lost its place in the program.

        Returns
        -------
        The result of this rank.
        """
        rank = self._here.rank
        key = tuple(self.comm.local_ranks if group is None else group)
        with self._lock:
            self._raise_if_stopped()
            meeting = self._meetings.setdefault(key, _Meeting())
            if not meeting.values:
                meeting.operation = operation
            elif meeting.operation != operation:
                first = min(meeting.values)
                self._stop(RankError(f"rank {first} is in {meeting.operation}, rank {rank} in {operation}"))
                self._raise_if_stopped()
            meeting.values[rank] = value
            if len(meeting.values) < len(key):
                self._wait(rank, lambda: f"{operation} for rank {next(r for r in key if r not in meeting.values)}")
                return meeting.results.pop(rank)
            del self._meetings[key]  # complete: the next collective of this group is another meeting
        with self._collective:  # groups that are ready at once take turns
            meeting.results = dict(together({r: meeting.values[r] for r in sorted(meeting.values)}))
        with self._lock:
            self._raise_if_stopped()
            for other in sorted(meeting.values):
                if other != rank:
                    self._wake(other)
            self._give_turns()
        return meeting.results.pop(rank)

    def send(self, array: Array, destination: int, tag: int = 0, operation: str = "send") -> None:
        """Leave `array` for another rank; does not wait."""
        with self._lock:
            self.comm.send(array, self._here.rank, destination, tag, operation)
            if destination in self._for_mail:
                self._wake(destination)
                self._give_turns()

    def receive(self, source: int, tag: int = 0, operation: str = "receive") -> Array:
        """Wait for the next message of `source` with this tag.

        Raises RankError when nobody is left who could send it, or when none came within `timeout` seconds.
        """
        rank = self._here.rank
        with self._lock:  # so that a message can't come between looking and waiting
            while (array := self.comm.receive(source, rank, tag, operation)) is None:
                self._raise_if_stopped()
                self._for_mail.add(rank)
                self._wait(rank, lambda: f"a message of rank {source} with tag {tag} in {operation}")
            self._mail_since = None
        return array

    def _wait(self, rank: int, what: Callable[[], str]) -> None:
        """Give the turn away until somebody wakes this rank. The caller holds the lock."""
        self._waits[rank] = what
        self._running -= 1
        self._give_turns()
        self._lock.release()
        try:
            self._turns[rank].acquire()
        finally:
            self._lock.acquire()
        self._raise_if_stopped()

    def _wake(self, rank: int) -> None:
        del self._waits[rank]
        self._for_mail.discard(rank)
        self._ready.append(rank)

    def _give_turns(self) -> None:
        """Let those that are ready run, up to the number of workers; notice when nobody can. Under the lock."""
        if not self._ready and not self._running and self._waits:
            self._nobody_can_go_on()
        while self._ready and self._running < self.workers:
            self._running += 1
            self._turns[self._ready.popleft()].release()

    def _nobody_can_go_on(self) -> None:
        if (
            self._for_mail and len(self.comm.local_ranks) < self.comm.ranks
        ):  # it may come from another process: look again
            now = time.monotonic()
            self._mail_since = self._mail_since or now
            if now - self._mail_since < self.timeout:
                time.sleep(POLL_SECONDS)
                for rank in sorted(self._for_mail):
                    self._wake(rank)
                return
        waiting = "; ".join(f"rank {rank} waits for {what()}" for rank, what in sorted(self._waits.items())[:4])
        more = f" (and {len(self._waits) - 4} more)" if len(self._waits) > 4 else ""
        self._stop(RankError(f"nobody can go on: {waiting}{more}"))

    def _stop(self, error: RankError) -> None:
        """Everybody that waits, or comes to a collective, raises `error`."""
        self._stopped = self._stopped or error
        for rank in sorted(self._waits):
            self._wake(rank)
        self._give_turns()

    def _raise_if_stopped(self) -> None:
        if self._stopped is not None:
            raise RankError(str(self._stopped))

    def _first_error(self) -> BaseException:
        """The error that began it: one that is no echo of another rank's, if there is one."""
        stopped = str(self._stopped)
        own = [error for _, error in sorted(self._errors.items()) if not isinstance(error, RankError)]
        own += [error for _, error in sorted(self._errors.items()) if str(error) != stopped]
        return own[0] if own else self._errors[min(self._errors)]


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
