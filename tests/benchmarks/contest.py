"""How contestants are timed against each other on a machine that is noisy and shared.

One persistent process per contestant, each with its own environment (a BLAS reads its variables when it is loaded),
driven over a pipe so that one runs at a time: A B C D, then B C D A, ... A ratio is formed within each round and the
median over the rounds is quoted, with its quartiles; the peer runs twice (A/A), and how far its two runs differ is
what a ratio cannot resolve. Wall time is quoted at two threads, CPU time at one thread, where it barely feels other
processes. A machine is called quiet when the peer kept both cores busy, A/A lies within 5 % and the gemm probe of
every round reached 90 % of the best one. Contention flatters us (the peer's threads wait for each other), so a wall
ratio from a busy machine is marked.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class Contestant:
    """`build(**arguments)` runs in the contestant's own process and returns a function that does one piece of work."""

    name: str
    build: Callable[..., Callable[[], Any]]
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str | None] = field(default_factory=dict)  # None: unset
    repeat: int = 1  # pieces of work a round

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        with changed_environment(self.environment):
            self._process = context.Process(target=_serve, args=(self.build, self.arguments, theirs), daemon=True)
            self._process.start()
        self._receive()

    def work(self, repeat: int | None = None) -> tuple[float, float, Any]:
        """Wall and CPU seconds of one piece of work (the smallest of `repeat`), and what the last one returned."""
        self._pipe.send(repeat or self.repeat)
        return self._receive()

    def peak_bytes(self) -> int | None:
        """Largest resident memory since start-up above that after building; None where the system can't tell."""
        self._pipe.send("memory")
        return self._receive()

    def stop(self) -> None:
        self._pipe.send(None)
        self._process.join(10)

    def _receive(self) -> Any:
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise RuntimeError(f"{self.name}: {answer}") from answer
        return answer


def _serve(build: Callable[..., Callable[[], Any]], arguments: dict[str, Any], pipe: Any) -> None:
    """The loop of a contestant's process."""
    try:
        work = build(**arguments)
        reset_peak()
        before = memory("VmRSS")
        pipe.send(True)
        while (message := pipe.recv()) is not None:
            if message == "memory":
                pipe.send(None if before is None else memory("VmHWM") - before)
                continue
            best, result = (float("inf"), float("inf")), None
            for _ in range(message):
                wall, cpu = time.perf_counter(), time.process_time()
                result = work()
                best = min(best, (time.perf_counter() - wall, time.process_time() - cpu))
            pipe.send((*best, result))
    except Exception as error:
        pipe.send(error)


@contextmanager
def changed_environment(changes: dict[str, str | None]):
    """The environment with `changes`, for a process that is started in the block."""
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def threads(n: int) -> dict[str, str]:
    """Environment that gives BLAS and OpenMP n threads."""
    return dict.fromkeys(THREAD_VARIABLES, str(n))


def reset_peak() -> None:
    """Begin the process's peak memory anew (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory(field_name: str) -> int | None:
    """VmRSS or VmHWM of this process in bytes (Linux)."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field_name + ":"))
    except OSError:
        return None


@dataclass
class Outcome:
    """Seconds of every round; the first contestant is ours, the second the peer, the third the peer again."""

    names: list[str]
    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    gflops: list[float]  # gemm probe of each round

    def ratio(self, ours: str, peer: str, kind: str = "wall") -> dict[str, float]:
        """Median and quartiles of the per-round ratio, and the ratio of the minima."""
        a, b = getattr(self, kind)[ours], getattr(self, kind)[peer]
        ratios = [x / y for x, y in zip(a, b)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return {"median": statistics.median(ratios), "low": low, "high": high, "of_minima": min(a) / min(b)}

    def quiet(self, peer: str, again: str, cores: int) -> dict[str, Any]:
        """Whether a wall ratio of this run may be quoted, and why not."""
        busy = statistics.median(c / w for c, w in zip(self.cpu[peer], self.wall[peer]))
        same = self.ratio(again, peer)["median"]
        probe = min(self.gflops) / max(self.gflops)
        quiet = busy >= 0.95 * cores and abs(same - 1) <= 0.05 and probe >= 0.9
        return {"quiet": quiet, "peer_cores": busy, "peer_against_itself": same, "slowest_probe": probe}


def contest(contestants: list[Contestant], rounds: int, probe: Callable[[], float]) -> Outcome:
    """Run all of them round robin, starting each round with another one; the first round is not counted."""
    names = [c.name for c in contestants]
    outcome = Outcome(names, {n: [] for n in names}, {n: [] for n in names}, [])
    for r in range(-1, rounds):
        speed = probe()
        for i in range(len(contestants)):
            contestant = contestants[(i + r) % len(contestants)]
            if i == 0:
                contestant.work(1)  # the first of a round reads slow: it warms up
            wall, cpu, _ = contestant.work()
            if r >= 0:
                outcome.wall[contestant.name].append(wall)
                outcome.cpu[contestant.name].append(cpu)
        if r >= 0:
            outcome.gflops.append(speed)
    return outcome
