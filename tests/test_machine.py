"""What a run says about its machine, and the pool of workers."""

import os
import sys
import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from minidsv3.autograd import Tensor, observing, replacing
from minidsv3.ops.norm import RMSNormFunction, rms_norm
from minidsv3.ops.plain import PlainRMSNorm
from minidsv3.train.machine import (
    blas_is_controlled,
    environment,
    keep_freed_memory,
    sgemm_gflops,
    worker_pool,
    workers_for,
)


def test_environment_names_what_decides_bits():
    found = environment()
    assert found["numpy"] == np.__version__ and found["python"].startswith(f"{sys.version_info[0]}.")
    assert set(found) == {"python", "numpy", "blas", "platform", "cpu_count"}


def test_environment_is_stable():
    assert environment() == environment()


@pytest.mark.parametrize(("requested", "shards", "expected"), [(1, 4, 1), (3, 2, 2), (2, 5, 2)])
def test_workers_for_is_at_most_the_shards(requested, shards, expected):
    assert workers_for(requested, shards) == expected


def test_workers_for_defaults_to_the_cores():
    assert workers_for(None, 10_000) == os.cpu_count()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_worker_pool_keeps_the_order(workers):
    with worker_pool(workers) as run:
        assert list(run(lambda i: i * i, range(7))) == [i * i for i in range(7)]


def test_worker_pool_uses_that_many_threads():
    meet = threading.Barrier(3, timeout=10)
    with worker_pool(3) as run:
        assert sorted(run(lambda _: meet.wait(), range(3))) == [0, 1, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="threads are bound to cores on Linux only")
def test_workers_that_take_all_cores_have_one_each():
    cores = os.sched_getaffinity(0)

    def places(workers):
        meet = threading.Barrier(workers, timeout=10)
        with worker_pool(workers) as run:
            return list(run(lambda _: (meet.wait(), os.sched_getaffinity(0))[1], range(workers)))

    if len(cores) > 1:
        assert sorted(places(len(cores)), key=min) == [{core} for core in sorted(cores)]
    assert places(len(cores) + 1) == [cores] * (len(cores) + 1)
    assert os.sched_getaffinity(0) == cores  # the caller itself is free


@pytest.mark.skipif(not blas_is_controlled(), reason="this BLAS can't be controlled")
@pytest.mark.parametrize("workers", [1, 2])
def test_worker_pool_holds_blas_to_one_thread(workers):
    def threads(_):
        return [info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"]

    with worker_pool(workers) as run:
        assert {n for found in run(threads, range(workers)) for n in found} == {1}


def test_worker_pool_hands_replacements_to_the_workers():
    x, w = np.ones((2, 3)), np.ones(3)
    ran = []
    with worker_pool(2) as run, replacing(RMSNormFunction, PlainRMSNorm), observing(lambda e: ran.append(type(e.op))):
        list(run(lambda _: rms_norm(Tensor(x), Tensor(w), 1e-6), range(4)))
    assert ran == [PlainRMSNorm] * 4


def test_worker_pool_raises_what_a_worker_raised():
    with worker_pool(2) as run, pytest.raises(ZeroDivisionError):
        list(run(lambda i: 1 // i, range(2)))


def test_sgemm_gflops_is_a_plausible_speed():
    assert 0.1 < sgemm_gflops(1, size=128, seconds=0.01) < 1e5


def test_keep_freed_memory_says_whether_it_could():
    assert keep_freed_memory() in ((True, False) if sys.platform.startswith("linux") else (False,))
