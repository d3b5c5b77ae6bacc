"""The machine under a run: what it is, how fast its gemm is, and how a run keeps its arithmetic reproducible.

BLAS runs on one thread per worker: results then do not depend on the number of cores, and two workers with a thread
each beat one worker with two. Memory that NumPy frees is kept by the process instead of going back to the system at
every step (Linux with glibc only; elsewhere nothing is done). Workers that take all cores stay each on its own: left
to itself, Linux moves a thread at nearly every hand-over of the interpreter's lock, away from what its core has cached
(a shard of `tiny`: 71 ms of CPU time, 61 on its own core, 59 alone).
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from ..autograd import engine_state, inherited
from .optim import Run


def environment() -> dict[str, Any]:
    """Versions, BLAS kernel and machine: what decides the bits of a run besides its config."""
    blas = [f"{i['internal_api']} {i.get('version')} {i.get('architecture')}" for i in _blas()]
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": ", ".join(blas) or "not recognised",
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
    }


def workers_for(requested: int | None, shards: int) -> int:
    """Threads to use: as asked, by default as many as there are cores and shards."""
    return min(requested or os.cpu_count() or 1, shards)


@contextmanager
def worker_pool(workers: int) -> Iterator[Run]:
    """A `map` over `workers` threads, each with one BLAS thread and the caller's replacements and observers."""
    with threadpool_limits(1, user_api="blas"):
        if workers == 1:
            yield map
            return
        with ThreadPoolExecutor(workers, initializer=_own_cores(workers)) as pool:

            def run(function: Any, items: Any) -> Any:
                state = engine_state()

                def under_state(item: Any) -> Any:
                    with inherited(state):
                        return function(item)

                return pool.map(under_state, items)

            yield run


def _own_cores(workers: int) -> Callable[[], None] | None:
    """What a worker does first: stay on one core (Linux, and only where the workers take every core they may use)."""
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    if workers != len(cores):
        return None
    free = iter(cores)

    def stay() -> None:
        with suppress(OSError):  # a sandbox may forbid it
            os.sched_setaffinity(0, {next(free)})  # of the calling thread alone

    return stay


def blas_is_controlled() -> bool:
    """Whether the BLAS under NumPy can be held to one thread per worker."""
    return bool(_blas())


def sgemm_gflops(workers: int, size: int = 512, seconds: float = 0.15) -> float:
    """Measured float32 matmul speed of `workers` threads together, GFLOP/s: the peak that MFU refers to."""
    a = np.full((size, size), 0.5, dtype=np.float32)

    def measure(_: int) -> float:
        out, best = np.empty_like(a), float("inf")
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop:
            start = time.perf_counter()
            np.matmul(a, a, out=out)
            best = min(best, time.perf_counter() - start)
        return 2 * size**3 / best / 1e9

    with worker_pool(workers) as run:
        return sum(run(measure, range(workers)))


def keep_freed_memory(trim: bool = True) -> bool:
    """Tell glibc to keep freed pages for the next step, up to 1 GiB if `trim`; True where it could be told."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
    settings = ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, 1 << 30 if trim else -1), (M_ARENA_MAX, 1))
    return all(mallopt(option, value) == 1 for option, value in settings)


def _blas() -> list[dict[str, Any]]:
    return [info for info in threadpool_info() if info.get("user_api") == "blas"]
