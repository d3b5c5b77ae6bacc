"""The pipeline over processes, one rank in each: the same bits as in the simulator."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import minidsv3

pytest.importorskip("mpi4py", reason="the extra `mpi` is not installed")
SCRIPT = Path(__file__).parent / "mpi_pipeline.py"
MPIEXEC = Path(sys.executable).parent / "mpiexec"


def run_script(folder, *prefix, engine):
    folder.mkdir()
    paths = os.pathsep.join([str(Path(minidsv3.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    libraries = os.pathsep.join([str(Path(sys.prefix) / "lib"), os.environ.get("LD_LIBRARY_PATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "LD_LIBRARY_PATH": libraries, "OPENBLAS_NUM_THREADS": "1"}
    command = [*map(str, prefix), sys.executable, str(SCRIPT), str(folder), engine]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return {int(path.stem): json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}


@pytest.mark.skipif(not MPIEXEC.exists(), reason="mpiexec of the extra `mpi` is not beside this python")
def test_one_rank_per_process_gives_the_bits_of_the_simulator(tmp_path):
    """DualPipe over four stages, two stages with experts on two ranks, and PP 4 x EP 4 with four ranks a process."""
    (alone,) = run_script(tmp_path / "sim", engine="sim").values()
    spread = run_script(tmp_path / "mpi", MPIEXEC, "-n", "4", engine="mpi")
    assert sorted(spread) == [0, 1, 2, 3]
    for layout, expected in enumerate(alone):
        held = {}
        for rank, results in spread.items():
            got = results[layout]
            assert got["losses"] == expected["losses"]
            hosted = len(expected["peak_live"]) // 4
            assert got["peak_live"] == expected["peak_live"][rank * hosted : (rank + 1) * hosted]
            for name, digest in got["gradients"].items():
                assert held.setdefault(name, digest) == digest, name
        assert held == expected["gradients"]
