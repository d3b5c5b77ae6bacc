"""The communicator over real processes: `mpiexec -n 4 python -m minidsv3 train --ranks 16 --comm mpi ...`

Each of P processes hosts R / P ranks in a row. What ranks of two processes have to say to each other in one
collective travels as one message of bytes (BF16 and FP8 are no MPI types), sent without blocking; ranks of one
process are served in place. Sums, and their order, are those of `comm.Collectives`: same bits as in the simulator.

A process that dies or hangs sends nothing: whoever waits longer than `timeout` seconds raises a RankError that names
the missing ranks and the operation. A message that is no message of this operation, or whose size does not fit its
counts, does the same. The extra `mpi` brings mpi4py and mpich; no MPI of the system is needed.

Simplified against the real system: waiting is a loop of tests with short sleeps (processes may outnumber cores), and
nothing is sent from a GPU's memory.
"""

from __future__ import annotations

import json
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from ..autograd import Array
from .comm import Collectives, Parts, RankError, check_nodes, checked_parts, read_only

NAME_BYTES = 48  # every message begins with its operation's name
POLL_SECONDS = 2e-5
FIRST_MAIL_TAG = 1 << 20  # smaller tags number the collectives


class MPICommunicator(Collectives):
    """Ranks in blocks over the processes of an MPI communicator.

    Parameters
    ----------
    ranks : int
    gpus_per_node : int, optional
        All ranks on one node if not given.
    timeout : float
        Seconds to wait for another process in a collective.

    Raises
    ------
    ValueError
        `ranks` is not a multiple of the processes, or of `gpus_per_node`.
    """

    def __init__(self, ranks: int, gpus_per_node: int | None = None, timeout: float = 300.0) -> None:
        check_nodes(ranks, gpus_per_node or ranks)
        P = MPI.COMM_WORLD.Get_size()
        if ranks % P:
            raise ValueError(f"ranks={ranks} is not a multiple of the {P} processes of mpiexec")
        blocks = [range(p * ranks // P, (p + 1) * ranks // P) for p in range(P)]
        if hasattr(
            signal, "SIGUSR1"
        ):  # mpiexec sends it to those who outlive another process: they shall not die of it
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        self._set(MPI.COMM_WORLD, range(ranks), gpus_per_node or ranks, blocks, timeout)

    def _set(self, mpi: Any, members: Sequence[int], gpus_per_node: int, blocks: list[range], timeout: float) -> None:
        self.ranks, self.members, self.gpus_per_node = len(members), members, gpus_per_node
        self.timeout, self._mpi, self._blocks, self._process = timeout, mpi, blocks, mpi.Get_rank()
        self.local_ranks = blocks[self._process]
        self._turn = 0
        self._mail: dict[tuple[int, int, int], deque[Array]] = {}
        self._outgoing: list[tuple[Any, Array]] = []

    def all_to_all_v(self, send: Mapping[int, Parts], operation: str, row_messages: bool = False) -> dict[int, Parts]:
        """See `Communicator`."""
        local = self.local_ranks
        parts = {r: checked_parts(self.members[r], send[r], self.ranks, operation) for r in local}
        stops = {r: np.concatenate([[0], np.cumsum(p.counts)]) for r, p in parts.items()}
        messages = []
        for block in self._blocks:
            counts = np.array([parts[r].counts[block.start : block.stop] for r in local], dtype=np.int64)
            rows = [parts[r].rows[stops[r][block.start] : stops[r][block.stop]] for r in local]
            messages.append(np.concatenate([_bytes(counts), *map(_bytes, rows)]))
        like = parts[local[0]].rows
        pieces: dict[int, list[Array]] = {r: [] for r in local}
        counts_in = {r: np.zeros(self.ranks, dtype=np.int64) for r in local}
        for block, message in zip(self._blocks, self._exchange(messages, operation)):
            sizes, arrived = self._opened(message, block, len(block) * len(local), like, operation)
            start = 0
            for s, row in zip(block, sizes.reshape(len(block), -1).tolist()):
                for r, n in zip(local, row):
                    pieces[r].append(arrived[start : start + n])
                    counts_in[r][s] = n
                    start += n
        return {r: Parts(np.concatenate(pieces[r]), counts_in[r]) for r in local}

    def all_gather(self, values: Mapping[int, Array], operation: str) -> dict[int, list[Array]]:
        """See `Communicator`."""
        local = self.local_ranks
        sizes = np.array([len(values[r]) for r in local], dtype=np.int64)
        message = np.concatenate([_bytes(sizes), *(_bytes(values[r]) for r in local)])
        gathered: list[Array] = []
        received = self._exchange([message] * len(self._blocks), operation)
        for block, message in zip(self._blocks, received):
            sizes, rows = self._opened(message, block, len(block), values[local[0]], operation)
            gathered += [read_only(part) for part in np.split(rows, np.cumsum(sizes)[:-1])]
        return {r: list(gathered) for r in local}

    def broadcast(self, values: Mapping[int, Array], root: int, operation: str) -> dict[int, Array]:
        """See `Communicator`."""
        message = _bytes(values[root]) if root in self.local_ranks else np.empty(0, dtype=np.uint8)
        received = self._exchange([message] * len(self._blocks), operation)
        like = values[self.local_ranks[0]]
        rows = next(m for block, m in zip(self._blocks, received) if root in block)
        if len(rows) != like.nbytes:
            raise RankError(f"rank {self.members[root]} sent {len(rows)} bytes in {operation}, not {like.nbytes}")
        return dict.fromkeys(self.local_ranks, read_only(rows.view(like.dtype).reshape(like.shape)))

    def barrier(self) -> None:
        """See `Communicator`."""
        self._exchange([np.empty(0, dtype=np.uint8)] * len(self._blocks), "barrier")

    def split(self, colour_of_rank: Sequence[int]) -> list[MPICommunicator]:
        """See `Communicator`."""
        groups = []
        for colour in sorted({colour_of_rank[r] for r in range(self.ranks)}):
            chosen = [r for r in range(self.ranks) if colour_of_rank[r] == colour]
            if not any(r in self.local_ranks for r in chosen):
                continue
            processes = [p for p, block in enumerate(self._blocks) if any(r in block for r in chosen)]
            blocks, start = [], 0
            for p in processes:
                n = sum(r in self._blocks[p] for r in chosen)
                blocks.append(range(start, start + n))
                start += n
            group = MPICommunicator.__new__(MPICommunicator)
            mpi = self._mpi.Create_group(self._mpi.Get_group().Incl(processes), tag=colour)
            group._set(mpi, [self.members[r] for r in chosen], self.gpus_per_node, blocks, self.timeout)
            groups.append(group)
        return groups

    def send(self, array: Array, source: int, destination: int, tag: int, operation: str) -> None:
        """See `Communicator`."""
        if destination in self.local_ranks:
            self._mail.setdefault((source, destination, tag), deque()).append(array.copy())
            return
        header = json.dumps([array.dtype.name, array.shape]).encode("ascii").ljust(128)
        message = np.concatenate([np.frombuffer(header, dtype=np.uint8), _bytes(array)])
        request = self._mpi.Isend(
            [message, MPI.BYTE], self._process_of(destination), self._mail_tag(source, destination, tag)
        )
        self._outgoing = [(r, m) for r, m in self._outgoing if not r.Test()]
        self._outgoing.append((request, message))  # the buffer must live as long as the request

    def receive(self, source: int, destination: int, tag: int, operation: str) -> Array | None:
        """See `Communicator`."""
        if source in self.local_ranks:
            box = self._mail.get((source, destination, tag))
            return box.popleft() if box else None
        status = MPI.Status()
        found = self._mpi.Improbe(self._process_of(source), self._mail_tag(source, destination, tag), status)
        if found is None:
            return None
        message = np.empty(status.Get_count(MPI.BYTE), dtype=np.uint8)
        found.Recv([message, MPI.BYTE])
        dtype, shape = json.loads(message[:128].tobytes().decode("ascii"))
        return message[128:].view(np.dtype(dtype)).reshape(shape)

    def _exchange(self, messages: list[Array], operation: str) -> list[Array]:
        """One message to every process, and theirs to us."""
        self._turn = (self._turn + 1) % FIRST_MAIL_TAG
        name = np.frombuffer(operation.encode("utf-8")[:NAME_BYTES].ljust(NAME_BYTES), dtype=np.uint8)
        others = [p for p in range(len(self._blocks)) if p != self._process]
        buffers = [np.concatenate([name, messages[p]]) for p in others]
        requests = [self._mpi.Isend([b, MPI.BYTE], p, self._turn) for p, b in zip(others, buffers)]
        received = {self._process: messages[self._process]}
        stop = time.monotonic() + self.timeout
        while len(received) <= len(others) or not MPI.Request.Testall(requests):
            found = [p for p in others if p not in received and self._take(p, operation, name, received)]
            if not found:
                if time.monotonic() > stop:
                    late = next((p for p in others if p not in received), others[0])
                    raise RankError(
                        f"{self._name(self._blocks[late])} sent nothing in {operation} for {self.timeout} s"
                    )
                time.sleep(POLL_SECONDS)
        return [received[p] for p in range(len(self._blocks))]

    def _take(self, process: int, operation: str, name: Array, received: dict[int, Array]) -> bool:
        """Receive the message of a process if it is there."""
        status = MPI.Status()
        found = self._mpi.Improbe(process, self._turn, status)
        if found is None:
            return False
        message = np.empty(status.Get_count(MPI.BYTE), dtype=np.uint8)
        found.Recv([message, MPI.BYTE])
        if not np.array_equal(message[:NAME_BYTES], name):
            theirs = message[:NAME_BYTES].tobytes().decode("utf-8", errors="replace").strip()
            raise RankError(f"{self._name(self._blocks[process])} came with {theirs!r} to {operation}")
        received[process] = message[NAME_BYTES:].copy()  # aligned
        return True

    def _opened(self, message: Array, block: range, n: int, like: Array, operation: str) -> tuple[Array, Array]:
        """The n sizes that a message begins with, and its rows (of dtype and shape of `like`'s)."""
        width = int(np.prod(like.shape[1:], dtype=np.int64)) * like.dtype.itemsize
        sizes, data = message[: 8 * n].view(np.int64) if len(message) >= 8 * n else np.array([-1]), message[8 * n :]
        if sizes.min() < 0 or int(sizes.sum()) * width != len(data):
            raise RankError(f"{self._name(block)} sent sizes that do not fit {len(message)} bytes in {operation}")
        if not len(data):
            return sizes, np.empty((int(sizes.sum()), *like.shape[1:]), dtype=like.dtype)
        return sizes, np.ascontiguousarray(data).view(like.dtype).reshape(-1, *like.shape[1:])

    def _process_of(self, rank: int) -> int:
        return next(p for p, block in enumerate(self._blocks) if rank in block)

    def _mail_tag(self, source: int, destination: int, tag: int) -> int:
        return FIRST_MAIL_TAG + (source * self.ranks + destination) * 1024 + tag % 1024

    def _name(self, block: range) -> str:
        members = [self.members[r] for r in block]
        return f"rank {members[0]}" if len(members) == 1 else f"ranks {members[0]} to {members[-1]}"


def abort(status: int = 2) -> None:
    """End every process at once: for an error that the others can't know of."""
    MPI.COMM_WORLD.Abort(status)


def _bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
