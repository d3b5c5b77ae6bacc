"""Bad input and bad luck: a clear error, exit status 2, and nothing lost."""

import errno
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from small_runs import command_line, digests, lines, write_text

from minidsv3.autograd import GradientBuffer
from minidsv3.commands import main, train
from minidsv3.pretrained import writer
from minidsv3.train import trainer as module
from minidsv3.train.checkpoint import checkpoints
from minidsv3.train.runs import read_run

IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No figures and no measurement of the machine: the errors are the subject."""
    monkeypatch.setattr(train, "run_figures", lambda run: None)
    monkeypatch.setattr(module, "sgemm_gflops", lambda workers: 100.0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """final/ of a run without faults."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "run_figures", lambda run: None)
        assert main(command_line(text, out)) == 0
    return digests(out / "final")


@pytest.fixture
def half(text, tmp_path, monkeypatch):
    """A run that was stopped after step 4 of 6: checkpoints of steps 2 and 4."""
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert main(command_line(text, tmp_path / "run")) == 130
    return tmp_path / "run"


def stop_after(patch, step):
    save = module.Trainer._save

    def save_and_stop(self):
        save(self)
        self._stop = self.step == step

    patch.setattr(module.Trainer, "_save", save_and_stop)


def failed(capsys, arguments):
    """The one line that a failing command prints to stderr."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    return said.strip()


def steps(out):
    return [int(path.name[5:]) for path in checkpoints(out / "checkpoints")]


def resumed(text, out, **changes):
    assert main([*command_line(text, out, **changes), "--resume"]) == 0
    return digests(out / "final")


def poison(patch, step, change):
    """Let `change(model)` happen just before a step."""
    real = module.train_step

    def poisoned(model, optimizer, gradients, shards, cfg, at, *more):
        if at == step:
            change(model)
        return real(model, optimizer, gradients, shards, cfg, at, *more)

    patch.setattr(module, "train_step", poisoned)


def set_nan(name, value=np.nan):
    return lambda model: dict(model.named_parameters())[name].data.fill(value)


@pytest.mark.parametrize(
    ("weight", "value", "where"),
    [
        ("model.embed_tokens.weight", np.nan, "EmbeddingFunction of model.embed_tokens"),
        ("model.layers.1.self_attn.o_proj.weight", np.nan, "LinearFunction of model.layers.1.self_attn.o_proj"),
        ("model.layers.0.mlp.down_proj.weight", np.inf, "LinearFunction of model.layers.0.mlp.down_proj"),
        ("model.layers.2.enorm.weight", np.nan, "RMSNormFunction of model.layers.2.enorm"),
        ("model.layers.1.mlp.experts.3.up_proj.weight", np.nan, "GroupedLinearFunction of model.layers.1.mlp.experts"),
        ("lm_head.weight", np.inf, "LinearFunction of lm_head"),
    ],
)
def test_nan_in_a_weight_names_step_and_op(text, tmp_path, capsys, monkeypatch, weight, value, where):
    poison(monkeypatch, 3, set_nan(weight, value))
    said = failed(capsys, command_line(text, tmp_path / "run"))
    assert said.startswith("minidsv3 train: error: step 3: loss")
    assert f"first not finite: {where};" in said


def test_nan_keeps_the_last_checkpoint_and_says_where(text, tmp_path, capsys, monkeypatch):
    poison(monkeypatch, 4, set_nan("model.norm.weight"))
    said = failed(capsys, command_line(text, tmp_path / "run"))
    out = tmp_path / "run"
    assert f"nothing was updated, the last good checkpoint is {out / 'checkpoints' / 'step_00000002'};" in said
    assert steps(out) == [2] and [line["step"] for line in lines(out / "metrics.jsonl")] == [1, 2, 3]


def test_nan_before_the_first_checkpoint_says_so(text, tmp_path, capsys, monkeypatch):
    poison(monkeypatch, 1, set_nan("model.norm.weight"))
    assert "step 1: loss nan" in (said := failed(capsys, command_line(text, tmp_path / "run")))
    assert "there is no checkpoint yet" in said


def test_nan_then_resume_has_the_same_bytes(text, whole, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, 4, set_nan("model.norm.weight"))
        failed(capsys, command_line(text, tmp_path / "run"))
    assert resumed(text, tmp_path / "run") == whole


@pytest.mark.parametrize(
    ("weight", "name"),
    [
        (lambda model: model.norm.weight, "model.norm.weight"),
        (lambda model: model.layers[1].mlp.experts.down, "model.layers.1.mlp.experts.down"),
    ],
    ids=["vector", "experts"],
)
def test_infinite_gradient_names_the_parameter(text, tmp_path, capsys, monkeypatch, weight, name):
    """Where the losses are finite, the gradient is looked through."""
    model = []
    real_step, real_finish = module.train_step, GradientBuffer.finish
    monkeypatch.setattr(module, "train_step", lambda *a: model.append(a[0]) or real_step(*a))

    def finish(self):
        real_finish(self)
        self[weight(model[0])][0] = np.inf

    monkeypatch.setattr(GradientBuffer, "finish", finish)
    said = failed(capsys, command_line(text, tmp_path / "run"))
    assert "gradient norm inf" in said and f"first not finite: the gradient of {name};" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n", "no validation text|one sequence needs|the text has"),
        (b"short", "one sequence needs seq_len [+] 1 = 17"),
        (b"\xff\xfe" * 200, "is not UTF-8 text"),
    ],
)
def test_bad_text_is_an_error_and_leaves_no_folder(tmp_path, capsys, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    said = failed(capsys, command_line(tmp_path / "bad.txt", tmp_path / "run"))
    assert re.search(message, said) and not (tmp_path / "run").exists()


def test_folder_of_another_config_is_an_error_and_untouched(half, text, capsys):
    before = digests(half)
    said = failed(capsys, [*command_line(text, half, hidden_size=30), "--resume"])
    assert "hidden_size=20, not 30" in said and digests(half) == before


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.json"])
def test_truncated_checkpoint_is_named_and_the_one_before_resumes(half, text, whole, capsys, name):
    file = half / "checkpoints" / "step_00000004" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = digests(half)
    said = failed(capsys, [*command_line(text, half), "--resume"])
    assert str(file) in said and f"delete {file.parent} to go on from the checkpoint before it" in said
    assert digests(half) == before
    writer.remove_tree(file.parent)
    assert resumed(text, half) == whole


def test_truncated_final_is_an_error_of_generate(half, text, capsys):
    resumed(text, half)
    file = half / "final" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    said = failed(capsys, ["generate", half])
    assert f"{file} is damaged or cut short" in said


def out_of_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [
        (writer, "write_tensors", out_of_space),
        (writer.os, "fsync", out_of_space),
        (module, "_append", out_of_space),
    ],
    ids=["weights", "flush", "metrics"],
)
def test_full_disk_keeps_the_checkpoints_and_resumes(half, text, whole, capsys, monkeypatch, owner, name, fault):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fault)
        said = failed(capsys, [*command_line(text, half), "--resume"])
    assert "No space left on device" in said and "step_00000004; mend this, then --resume goes on" in said
    assert steps(half) == [2, 4] and not list((half / "checkpoints").glob(".*"))
    assert resumed(text, half) == whole


@pytest.fixture
def disk(tmp_path):
    """A file system of our own, 1 MB; `disk(options)` mounts it again with others."""
    if not (sys.platform == "linux" and IS_ROOT):
        pytest.skip("mounting takes root on Linux")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True).returncode == 0

    if not mount("size=1m"):
        pytest.skip("mounting is not allowed here")
    mount.folder = folder
    yield mount
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_of_a_small_tmpfs_loses_nothing(disk, text, whole, capsys):
    out = disk.folder / "run"
    arguments = command_line(text, out, checkpoint_every=1, keep=9)
    said = failed(capsys, arguments)
    kept = steps(out)
    assert "No space left on device" in said and f"step_{kept[-1]:08d}; mend this" in said
    assert kept == list(range(1, len(kept) + 1)) and 1 <= len(kept) < 6
    assert "No space" in failed(capsys, [*arguments, "--resume"])  # still full
    assert steps(out) == kept and read_run(out).train.keep == 9
    assert disk("remount,size=16m")
    assert resumed(text, out, checkpoint_every=1, keep=9) == whole


def test_full_disk_without_a_single_free_byte_keeps_the_run_folder(disk, text, whole, capsys, monkeypatch):
    out = disk.folder / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert main(command_line(text, out)) == 130
    with (disk.folder / "ballast").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"x" * 4096)
    before = digests(out)
    assert "No space" in failed(capsys, [*command_line(text, out), "--resume"])
    assert {name: d for name, d in digests(out).items() if not name.endswith(".tmp")} == before
    (disk.folder / "ballast").unlink()
    assert disk("remount,size=16m")
    assert resumed(text, out) == whole


def test_read_only_disk_is_an_error_and_loses_nothing(disk, text, whole, capsys, monkeypatch):
    out = disk.folder / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert main(command_line(text, out)) == 130
    before = digests(out)
    assert disk("remount,ro")
    assert "Read-only file system" in failed(capsys, [*command_line(text, out), "--resume"])
    assert "Read-only file system" in failed(capsys, command_line(text, disk.folder / "new"))
    assert digests(out) == before
    assert disk("remount,rw,size=16m")
    assert resumed(text, out) == whole


@pytest.mark.skipif(IS_ROOT or sys.platform == "win32", reason="root may write everywhere, Windows has no such mode")
def test_read_only_folder_is_an_error(text, tmp_path, capsys):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    said = failed(capsys, command_line(text, folder / "run"))
    assert "Permission denied" in said and str(folder) in said


def test_read_only_run_can_be_read(half, text, capsys):
    for path in (half, *half.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert main(["eval", str(half)]) == 0
    finally:
        for path in (half, *half.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.parametrize("prompt", ["\udcff", "fine \ud800 until here"])
def test_prompt_of_invalid_characters_is_an_error(half, capsys, prompt):
    assert "the prompt is not valid Unicode" in failed(capsys, ["generate", half, "--prompt", prompt])


@pytest.mark.parametrize("prompt", ["\x00\x01", "日本語 🙂", "\u0301", "x" * 500])
def test_prompt_of_any_text_is_fine(half, capsys, prompt):
    assert main(["generate", str(half), "--prompt", prompt, "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith(prompt)
