"""Where the time of a training step goes: every op, forward and backward, seen at the one place that runs ops.

`Profile` watches `Function.apply` and the backward walk (`autograd.observing`) for a few steps of a real run, on all
worker threads, and then says per op: calls, milliseconds, share, GFLOP/s, bytes kept for the backward pass. What is
left of the workers' time between the ops is Python, the optimizer and waiting, and is listed as such.

A FLOP count covers gemms, causal attention at half the square; the peak that a speed is compared with is the sgemm
that `machine.sgemm_gflops` measures. An observed step is slower than others by a few percent: two clock readings an
op, and a weight gradient that is copied once more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from ..autograd import OpEvent, observing


class Sample(NamedTuple):
    """One op that ran."""

    name: str  # 'Linear'
    phase: str  # 'forward' or 'backward'
    scope: str  # the module that made it
    thread: int  # worker, from 0
    start: float  # seconds since the profile began
    seconds: float
    flops: int
    saved_bytes: int  # in the forward pass


class Row(NamedTuple):
    """All calls of one op in one phase; numbers are per step, summed over workers."""

    name: str
    phase: str
    calls: float
    seconds: float
    share: float  # of the workers' time
    gflops: float  # GFLOP/s while it ran, on one worker
    saved_bytes: float


class Profile:
    """Watch `steps` steps after `skip` others; give it to `Trainer` as `on_step`.

    Parameters
    ----------
    workers : int
        Threads that compute shards.
    peak_gflops : float
        sgemm speed of all workers together, GFLOP/s.
    done : function of the Profile
        Called once, after the last watched step.
    """

    def __init__(
        self, workers: int, peak_gflops: float, done: Callable[[Profile], object], *, skip: int = 2, steps: int = 10
    ) -> None:
        self.workers, self.peak_gflops, self.samples = workers, peak_gflops, list[Sample]()
        self.steps, self.wall_seconds = 0, 0.0
        self._skip, self._wanted, self._done = skip, steps, done
        self._stack, self._threads = ExitStack(), dict[int, int]()

    def __call__(self, trainer: Any, step: int) -> None:
        """After a step: begin, count, or end."""
        now = time.perf_counter()
        if self._skip > 0:
            self._skip -= 1
            if self._skip == 0:
                self._stack.enter_context(observing(self._see))
                self._began = self._last = now
            return
        if self.steps == self._wanted:
            return
        self.steps += 1
        self.wall_seconds += now - self._last
        if self.steps == self._wanted:
            self.close()
        self._last = time.perf_counter()

    def close(self) -> None:
        """Stop watching; `done` is told if anything was seen (a run can end before all steps that were wanted)."""
        self._stack.close()
        done, self._done = self._done, lambda profile: None
        if self.steps:
            done(self)

    def _see(self, event: OpEvent) -> None:
        if event.phase == "module":
            return
        op, forward, end = event.op, event.phase == "forward", time.perf_counter()
        thread = self._threads.setdefault(threading.get_ident(), len(self._threads))
        name = type(op).__name__.removesuffix("Function")
        saved = sum(array.nbytes for array in op._saved or ()) if forward else 0
        flops = op.flops if forward else 2 * op.flops
        start = end - event.seconds - self._began
        self.samples.append(Sample(name, event.phase, op._scope, thread, start, event.seconds, flops, saved))

    def rows(self) -> list[Row]:
        """One row an op and phase, the most expensive first."""
        found: dict[tuple[str, str], list[Sample]] = {}
        for sample in self.samples:
            found.setdefault((sample.name, sample.phase), []).append(sample)
        total = self.wall_seconds * self.workers
        rows = []
        for (name, phase), samples in found.items():
            seconds = sum(s.seconds for s in samples)
            flops, saved = sum(s.flops for s in samples), sum(s.saved_bytes for s in samples)
            speed = flops / seconds / 1e9 if seconds else 0.0
            each = self.steps
            rows.append(Row(name, phase, len(samples) / each, seconds / each, seconds / total, speed, saved / each))
        return sorted(rows, key=lambda row: -row.seconds)

    @property
    def gflop_per_step(self) -> float:
        """Gemm GFLOP of one step, forward and backward."""
        return sum(s.flops for s in self.samples) / self.steps / 1e9

    @property
    def share_of_peak(self) -> float:
        """Fraction of the measured sgemm speed that whole steps reach."""
        return self.gflop_per_step / (self.wall_seconds / self.steps) / self.peak_gflops

    def table(self) -> str:
        """The rows as text, and a line on the whole step."""
        lines = [f"{'op':22} {'phase':9} {'calls':>7} {'ms':>9} {'share':>7} {'GFLOP/s':>8} {'saved MB':>9}"]
        for r in self.rows():
            lines.append(
                f"{r.name:22} {r.phase:9} {r.calls:7.0f} {1e3 * r.seconds:9.2f} {r.share:7.1%} "
                f"{r.gflops:8.1f} {r.saved_bytes / 1e6:9.2f}"
            )
        inside = sum(s.seconds for s in self.samples) / (self.wall_seconds * self.workers)
        rest = 1e3 * self.wall_seconds / self.steps * self.workers * (1 - inside)
        lines.append(f"{'outside of ops':22} {'':9} {'':7} {rest:9.2f} {1 - inside:7.1%}   Python, optimizer, waiting")
        lines.append(
            f"a step takes {1e3 * self.wall_seconds / self.steps:.1f} ms on {self.workers} worker(s): "
            f"{self.gflop_per_step:.2f} GFLOP, {self.share_of_peak:.0%} of the {self.peak_gflops:.0f} GFLOP/s that "
            f"sgemm reaches here (mean of {self.steps} steps; times and bytes are per step, summed over workers)"
        )
        return "\n".join(lines)
