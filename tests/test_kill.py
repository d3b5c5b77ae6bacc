"""SIGKILL at any moment, then resume: the same bytes as a run that nobody disturbed."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import digests, environment, lines, model_config, python, train_config, write_text

from minidsv3.train import trainer as module
from minidsv3.train.checkpoint import checkpoints
from minidsv3.train.trainer import Trainer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
ENV = environment(PYTHONPATH=str(Path(__file__).parent))  # for small_runs
CHANGES = dict(steps=40, checkpoint_every=3, moments_dtype="bfloat16")

# Arguments: text, run folder, and where to die: a function's name and which call of it.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from small_runs import model_config, train_config
from minidsv3.pretrained import writer
from minidsv3.train import checkpoint, trainer

text, out, point, count = sys.argv[1:]
trainer.sgemm_gflops = lambda workers: 100.0
owner, name = {
    "replace": (Path, "replace"),  # config.json, train.json, metrics.jsonl and experts.jsonl are moved into place
    "rename": (Path, "rename"),  # so is a directory, and the one before it out of the way
    "optimizer": (checkpoint, "write_tensors"),
    "half a file": (checkpoint, "write_tensors"),
    "trainer.json": (checkpoint, "write_json"),
    "flush": (writer, "_flush_to_disk"),  # everything is written, nothing renamed
    "half deleted": (writer.shutil, "rmtree"),
    "nowhere": (os, "abort"),
}[point]
real, calls = getattr(owner, name), 0

def deadly(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(count):
        if point == "half a file":
            real(*args, **kwargs)
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        if point == "half deleted":
            next(Path(args[0]).glob("model*")).unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

setattr(owner, name, deadly)
train = train_config(data=text, **CHANGES)
t = trainer.Trainer(model_config(), train, out, resume=True, report=lambda said: None, progress=False)
sys.exit(0 if t.run() else 130)
""".replace("CHANGES", repr(CHANGES))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(write_text(tmp_path_factory.mktemp("text") / "text.txt"))


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """What an undisturbed run leaves: the bytes of final/, and the lines of experts.jsonl."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sgemm_gflops", lambda workers: 100.0)
        t = Trainer(model_config(), train_config(data=text, **CHANGES), out, report=lambda said: None, progress=False)
        assert t.run()
    return digests(out / "final"), lines(out / "experts.jsonl")


def arguments(text, out, point="nowhere", count=1):
    return "-c", SCRIPT, text, str(out), point, str(count)


def test_kill_at_random_moments_leaves_no_trace(text, whole, tmp_path):
    draw, out, died_at = random.Random(0), tmp_path / "run", []
    record = out / "metrics.jsonl"
    while len(died_at) < 6:
        enough = lines_of(record) + draw.randint(1, 6)
        process = subprocess.Popen([sys.executable, *arguments(text, out)], env=ENV)
        try:
            while lines_of(record) < enough and process.poll() is None:
                time.sleep(0.002)
            time.sleep(draw.random() * 0.03)  # two steps, or the middle of a save
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        died_at.append(lines_of(record))
    assert python(*arguments(text, out), env=ENV).returncode == 0
    assert (digests(out / "final"), lines(out / "experts.jsonl")) == whole, died_at


def test_kill_during_every_part_of_a_save_leaves_no_trace(text, whole, tmp_path):
    out = tmp_path / "run"
    points = [
        ("replace", 1), ("replace", 2), ("optimizer", 1), ("half a file", 2), ("flush", 2), ("rename", 1),
        ("trainer.json", 2), ("rename", 4), ("half deleted", 2), ("replace", 3), ("replace", 4), ("half a file", 1),
    ]  # fmt: skip
    for point, count in points:
        assert python(*arguments(text, out, point, count), env=ENV).returncode == -signal.SIGKILL, (point, count)
    assert python(*arguments(text, out), env=ENV).returncode == 0
    assert (digests(out / "final"), lines(out / "experts.jsonl")) == whole


@pytest.mark.parametrize("count", [1, 2])
def test_kill_while_the_final_directory_is_replaced_leaves_no_trace(text, whole, tmp_path, count):
    """Before, and between, the two renames: the old directory out of the way, the new one into place."""
    out = tmp_path / "run"
    assert python(*arguments(text, out), env=ENV).returncode == 0
    assert python(*arguments(text, out, "rename", count), env=ENV).returncode == -signal.SIGKILL
    assert (out / "final").exists() == (count == 1)
    assert python(*arguments(text, out), env=ENV).returncode == 0
    assert (digests(out / "final"), lines(out / "experts.jsonl")) == whole


def test_kill_leaves_no_rubbish_behind_the_next_save(text, tmp_path):
    out = tmp_path / "run"
    assert python(*arguments(text, out, "flush", 3), env=ENV).returncode == -signal.SIGKILL
    assert any(path.name.startswith(".") for path in (out / "checkpoints").iterdir())
    assert python(*arguments(text, out), env=ENV).returncode == 0
    assert sorted((out / "checkpoints").iterdir()) == checkpoints(out / "checkpoints")
    assert not [path.name for path in out.iterdir() if path.name.startswith(".") or path.name.endswith(".tmp")]


def lines_of(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0
