"""Ranks on real processes: the collectives, ten steps of training and the ledger equal the simulator's; a kill is told.

Needs the extra `mpi` (mpi4py and mpich).
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import digests, environment, python, write_text

from minidsv3.parallel.ledger import read_ledger_csv
from minidsv3.train.checkpoint import checkpoints

pytest.importorskip("mpi4py")
MPIEXEC = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
if MPIEXEC is None:
    pytest.skip("mpi4py is here, mpiexec is not", allow_module_level=True)
ENV = environment(OPENBLAS_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path]))


def mpiexec(processes, *arguments, flags=()):
    """Run this interpreter in some processes of MPI."""
    command = [MPIEXEC, *flags, "-n", str(processes), sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=100, env=ENV)


def training(text, out, *more):
    """Ten steps of `nano` on 16 ranks."""
    return [
        "-m", "minidsv3", "train", "--preset", "nano", "--data", text, "--out", out, "--steps", "10", "--quiet",
        "--ranks", "16", "--gpus-per-node", "4", *more,
        "--set", "seq_len=12", "batch_size=16", "warmup_steps=2", "eval_every=5", "checkpoint_every=5",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def simulated(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("simulated") / "run"
    done = python(*map(str, training(text, out)), env=ENV)
    assert done.returncode == 0, done.stderr
    return out


def results(run):
    """SHA-256 of all weights and of all moments, and the ledger."""
    files = digests(run / "checkpoints" / "step_00000010")
    weights = hashlib.sha256((run / "final" / "model.safetensors").read_bytes()).hexdigest()
    return weights, files["optimizer.safetensors"], read_ledger_csv(run / "ledger.csv")


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_weights_and_ledger_are_those_of_the_simulator(text, simulated, tmp_path, processes):
    done = mpiexec(processes, *training(text, tmp_path / "run", "--comm", "mpi", "--timeout", "60"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done:") == 1  # one process speaks
    assert results(tmp_path / "run") == results(simulated)
    assert sum(row.bytes for row in read_ledger_csv(tmp_path / "run" / "ledger.csv") if row.link == "InfiniBand") > 0


COLLECTIVES = """
import sys
import numpy as np
from minidsv3.parallel.comm import Parts, RankError, SimCommunicator
from minidsv3.parallel.mpi import MPICommunicator
from minidsv3.parallel.ranks import Ranks
from minidsv3.quant.formats import BF16, E4M3
from many_ranks import uneven_parts

R = 8
mpi, sim = MPICommunicator(R, 2, timeout=30), SimCommunicator(R, 2)
mine = mpi.local_ranks

def local(values):
    return {r: values[r] for r in mine}

def equal(got, expected):
    assert sorted(got) == list(mine)
    for r in mine:
        pairs = zip(got[r], expected[r]) if isinstance(got[r], (tuple, list)) else [(got[r], expected[r])]
        for a, b in pairs:
            assert a.dtype == b.dtype, (a.dtype, b.dtype)
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))

rng = np.random.default_rng(0)
for seed in range(3):
    send = uneven_parts(R, seed=seed)
    equal(mpi.all_to_all_v(local(send), "a"), sim.all_to_all_v(send, "a"))
for dtype in (BF16, E4M3, np.float64, np.uint8):
    counts = {r: rng.integers(0, 5, R) for r in range(R)}
    send = {r: Parts(rng.standard_normal((counts[r].sum(), 3, 2)).astype(dtype), counts[r]) for r in range(R)}
    equal(mpi.all_to_all_v(local(send), "b"), sim.all_to_all_v(send, "b"))
nothing = {r: Parts(np.zeros((0, 4), np.float32), np.zeros(R, np.int64)) for r in range(R)}
equal(mpi.all_to_all_v(local(nothing), "n"), sim.all_to_all_v(nothing, "n"))
values = {r: rng.standard_normal((r, 3)).astype(np.float32) for r in range(R)}
equal(mpi.all_gather(local(values), "c"), sim.all_gather(values, "c"))
values = {r: (rng.standard_normal((5, 3)) * 10.0 ** (r % 5)).astype(np.float32) for r in range(R)}
equal(mpi.all_reduce(local(values), "d"), sim.all_reduce(values, "d"))
equal(mpi.reduce_scatter(local(values), "e"), sim.reduce_scatter(values, "e"))
for root in (0, 5):
    equal(mpi.broadcast(local(values), root, "f"), sim.broadcast(values, root, "f"))
mpi.barrier()

colours = [r // 2 % 2 for r in range(R)]
for group, expected in zip(mpi.split(colours), [g for c, g in enumerate(sim.split(colours))
                                               if any(colours[r] == c for r in mine)]):
    assert list(group.members) == list(expected.members)
    inside = {i: values[m] for i, m in enumerate(group.members)}
    got = group.all_reduce({i: inside[i] for i in group.local_ranks}, "g")
    total = expected.all_reduce(inside, "g")
    for i in group.local_ranks:
        np.testing.assert_array_equal(got[i], total[i])

ranks = Ranks(mpi, timeout=30)
def ring(rank):
    ranks.send(np.full((2, 3), rank, dtype=np.float32).astype(BF16), (rank + 3) % R, tag=rank)
    return ranks.receive((rank - 3) % R, tag=(rank - 3) % R)
for r, got in zip(mine, ranks.run(ring)):
    assert got.dtype == BF16 and got.shape == (2, 3) and (got.astype(np.float32) == (r - 3) % R).all()

try:  # a corrupted size is found before it is sent
    bad = local(uneven_parts(R))
    bad[mine[0]] = Parts(bad[mine[0]].rows, bad[mine[0]].counts + 1)
    mpi.all_to_all_v(bad, "dispatch")
except RankError as error:
    assert f"rank {mine[0]} sent sizes" in str(error) and "dispatch" in str(error)
else:
    raise AssertionError("no error")
print("all equal")
"""


@pytest.mark.parametrize("processes", [2, 4])
def test_every_collective_gives_what_the_simulator_gives(processes):
    done = mpiexec(processes, "-c", COLLECTIVES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all equal") == processes


LATE = """
import numpy as np
from minidsv3.parallel.comm import RankError
from minidsv3.parallel.mpi import MPI, MPICommunicator
import os, sys
comm = MPICommunicator(4, timeout=1.5)
values = {r: np.ones(3) for r in comm.local_ranks}
comm.all_gather(values, "first")
try:
    if MPI.COMM_WORLD.Get_rank() == 1:
        comm.all_gather(values, "another" if sys.argv[1] == "lost" else "second") if sys.argv[1] == "lost" else None
    else:
        comm.all_gather(values, "second")
except RankError as error:
    print(error, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("how, said", [
    ("absent", "ranks 2 to 3 sent nothing in second for 1.5 s"), ("lost", "ranks 2 to 3 came with 'another' to second"),
])  # fmt: skip
def test_a_process_that_is_not_there_is_named(how, said):
    done = mpiexec(2, "-c", LATE, how, flags=("-disable-auto-cleanup",))
    assert said in done.stdout, done.stdout + done.stderr


KILLED = """
import os, signal, sys
from minidsv3.commands import main
from minidsv3.parallel.mpi import MPI
from minidsv3.train import trainer

process = MPI.COMM_WORLD.Get_rank()
sys.stderr = open(f"{sys.argv[1]}/{process}.txt", "w", encoding="utf-8")
real = trainer.train_step
def deadly(*arguments):
    if arguments[5] == 6 and process == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
trainer.train_step = deadly
sys.exit(main(sys.argv[2:]))
"""
# mpiexec ends all processes when it sees one die. So that the others can be heard, each has a parent that outlives it
# and holds its connection to mpiexec.
PARENT = "import subprocess, sys, time; subprocess.run(sys.argv[1:], close_fds=False); time.sleep(4)"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_survivors_of_a_killed_process_say_so_and_the_run_resumes_on_fewer_ranks(text, tmp_path):
    arguments = training(text, tmp_path / "run", "--comm", "mpi", "--timeout", "2")[2:]
    mpiexec(4, "-c", PARENT, sys.executable, "-c", KILLED, tmp_path, *arguments)
    for process in (0, 2, 3):
        said = (tmp_path / f"{process}.txt").read_text(encoding="utf-8")
        assert "ranks 4 to 7 sent nothing in dispatch routing for 2.0 s" in said and said.count("\n") == 1, said
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000005"]
    fewer = [*map(str, training(text, tmp_path / "run", "--resume"))]
    fewer[fewer.index("16")] = "8"
    done = python(*fewer, env=ENV)
    assert done.returncode == 0 and "resuming after step 5 of 10" in done.stdout, done.stderr
