"""``train``, ``eval`` and ``generate`` from the command line: results, exit statuses, one-line errors."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from small_runs import command_line, digests, environment, lines, python, write_text

from minidsv3.commands import main, train
from minidsv3.data import ByteTokenizer, load_corpus, split_documents, validation_windows
from minidsv3.generation.load import load_run
from minidsv3.generation.sampler import sample
from minidsv3.train.evaluate import bits_per_byte
from minidsv3.train.runs import read_run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A finished run, made by the command in a process of its own."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = python("-m", "minidsv3", *command_line(text, out, eval_every=3))
    assert done.returncode == 0, done.stderr
    (out / "stdout.txt").write_text(done.stdout, encoding="utf-8")
    return out


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(train, "run_figures", lambda run: None)


def error_of(capsys, arguments):
    """The one line on stderr of a command that fails with exit status 2."""
    assert main([str(a) for a in arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith("\n") and "Traceback" not in said
    return said.strip()


def test_train_exit_status_0_says_what_to_try_next(run):
    said = (run / "stdout.txt").read_text(encoding="utf-8").splitlines()
    assert said[-1] == f"done: {run}/final holds the model; try: python -m minidsv3 generate {run} --prompt 'ROMEO:'"


def test_train_prints_each_evaluation(run):
    said = (run / "stdout.txt").read_text(encoding="utf-8")
    for line in lines(run / "metrics.jsonl"):
        if "val_bits_per_byte" in line:
            assert f"step {line['step']:>6}: validation {line['val_bits_per_byte']:.3f} bits per byte" in said


def test_train_draws_figures(run):
    assert {"loss.png", "bits_per_byte.png", "expert_load.png", "max_vio.png", "bias.png"} <= {
        path.name for path in (run / "figures").iterdir()
    }


def test_train_flags_and_settings_arrive(run, text):
    stored = read_run(run)
    assert (stored.train.data, stored.train.steps, stored.train.batch_size) == (str(text), 6, 4)
    assert (stored.config.hidden_size, stored.preset) == (20, "nano")


def test_train_same_command_same_bytes(run, text, tmp_path, no_figures):
    assert main(command_line(text, tmp_path / "run", eval_every=3)) == 0
    assert digests(tmp_path / "run" / "final") == digests(run / "final")


def test_train_workers_flag_changes_no_byte(run, text, tmp_path, no_figures):
    assert main([*command_line(text, tmp_path / "run", eval_every=3), "--workers", "2"]) == 0
    assert digests(tmp_path / "run" / "final") == digests(run / "final")


def test_train_seed_flag_arrives(text, tmp_path, no_figures):
    assert main([*command_line(text, tmp_path / "run", steps=1), "--seed", "5"]) == 0
    assert read_run(tmp_path / "run").train.seed == 5


def test_train_plain_runs_the_textbook_ops(run, text, tmp_path, no_figures):
    assert main([*command_line(text, tmp_path / "run", eval_every=3), "--plain"]) == 0
    fast, plain = (lines(folder / "metrics.jsonl") for folder in (run, tmp_path / "run"))
    # float32 rounding, through six steps of Adam
    assert [line["loss"] for line in plain] == pytest.approx([line["loss"] for line in fast], rel=1e-4)
    assert [line["loss"] for line in plain] != [line["loss"] for line in fast]


def test_train_steps_is_the_total_with_resume(text, tmp_path, no_figures):
    out = tmp_path / "run"
    assert main(command_line(text, out, steps=2)) == 0
    assert main([*command_line(text, out, steps=4), "--resume"]) == 0
    assert [line["step"] for line in lines(out / "metrics.jsonl")] == [1, 2, 3, 4]


def test_train_resume_without_checkpoint_begins_at_0(run, text, tmp_path, no_figures):
    assert main([*command_line(text, tmp_path / "run", eval_every=3), "--resume"]) == 0
    assert digests(tmp_path / "run" / "final") == digests(run / "final")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("hiden_size=3", "unknown setting 'hiden_size': did you mean 'hidden_size'?"),
        ("learning_rat=3", "unknown setting 'learning_rat': did you mean 'learning_rate'?"),
        ("zzz=1", "unknown setting 'zzz'"),
        ("seed", "--set 'seed' is not KEY=VALUE"),
        ("batch_size=0", "batch_size=0 is not a positive number"),
        ("batch_size=5", "batch_size=5 is not a multiple of shards=2"),
        ("batch_size=four", "batch_size='four' is not int"),
        ("n_group=3", "n_routed_experts=8 is not a multiple of n_group=3"),
        ("vocab_size=100", "vocab_size=100 is below the 257 byte tokens"),
    ],
)
def test_train_bad_setting_is_a_one_line_error(text, tmp_path, capsys, pair, message):
    assert message in error_of(capsys, command_line(text, tmp_path / "run", pair))
    assert not (tmp_path / "run").exists()


def test_train_steps_0_is_an_error(text, tmp_path, capsys):
    assert "steps=0 is not a positive number" in error_of(capsys, command_line(text, tmp_path / "run", steps=0))


def test_train_into_a_finished_run_names_the_mend(run, text, capsys):
    assert "add --resume to go on with it, or choose another --out" in error_of(
        capsys, command_line(text, run, eval_every=3)
    )


def test_train_of_another_config_names_the_field(run, text, capsys):
    said = error_of(capsys, [*command_line(text, run, eval_every=3, learning_rate=0.5), "--resume"])
    assert "learning_rate=0.003, not 0.5: resume with the same settings, or choose another --out" in said


def test_train_out_that_is_a_file_is_an_error(text, capsys):
    assert str(text) in error_of(capsys, command_line(text, text))


def test_train_unknown_corpus_names_the_nearest(tmp_path, capsys):
    said = error_of(capsys, ["train", "--preset", "nano", "--data", "shakspeare", "--out", tmp_path / "run"])
    assert "did you mean shakespeare?" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["train"], ["train", "--out"], ["train", "--preset", "huge", "--out", "x"], []])
def test_train_bad_usage_is_exit_status_2(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_train_ctrl_c_is_130_and_resumes_to_the_same_bytes(run, text, tmp_path):
    out = tmp_path / "run"
    arguments = command_line(text, out, eval_every=3)
    # what Ctrl-C sends, while step 3 is evaluated: then the step of the interruption is known
    script = (
        "import os, signal, sys\n"
        "from minidsv3.commands import main, train\n"
        "train._say = lambda t, step, bits: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = python("-c", script, *arguments)
    assert (done.returncode, done.stderr) == (130, "")
    assert done.stdout == "stopped after step 3 and saved; the same command with --resume goes on\n"
    assert python("-m", "minidsv3", *arguments, "--resume").returncode == 0
    assert digests(out / "final") == digests(run / "final")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_train_ctrl_c_from_outside_is_130(text, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "minidsv3", *command_line(text, out, steps=100_000)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", env=environment()
    )
    try:
        while not (out / "checkpoints" / "step_00000004").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    last = lines(out / "metrics.jsonl")[-1]["step"]
    assert (process.returncode, errors) == (130, "")
    assert said == f"stopped after step {last} and saved; the same command with --resume goes on\n"
    assert (out / "checkpoints" / f"step_{last:08d}").is_dir()


def test_train_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(flag in said for flag in ("--preset", "--data", "--steps", "--seed", "--out", "--resume", "--set"))


def test_eval_is_the_runs_last_validation(run, capsys):
    assert main(["eval", str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    expected = lines(run / "metrics.jsonl")[-1]["val_bits_per_byte"]
    assert (said["step"], said["val_bits_per_byte"], said["bytes"]) == (6, expected, 500)


def test_eval_prints_one_line(run, capsys):
    assert main(["eval", str(run)]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "after step 6" in said and "bits per byte on 500 bytes" in said


def test_eval_of_another_text(run, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("ZYX " * 300, encoding="utf-8")
    assert main(["eval", str(run), "--data", str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 120


def test_eval_of_some_windows_is_the_mean_over_them(run, capsys):
    assert main(["eval", str(run), "--windows", "3", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    _, validation = split_documents(load_corpus(load_run(run).train.data).documents)
    tokens_in, targets, _ = validation_windows(validation, ByteTokenizer(), 16)
    chosen = np.linspace(0, len(targets) - 1, 3, dtype=np.int64)
    count = int((targets[chosen] != -100).sum())
    expected = bits_per_byte(load_run(run).model, tokens_in[chosen], targets[chosen], count)
    assert said["bytes"] == count < 500 and said["val_bits_per_byte"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("flag", ["--windows", "--seq-len"])
def test_eval_refuses_to_evaluate_nothing(run, capsys, flag):
    assert f"{flag} 0 is not positive" in error_of(capsys, ["eval", run, flag, "0"])


def test_eval_of_several_runs_draws_their_bits_against_position(run, tmp_path, capsys):
    figure = tmp_path / "positions.png"
    assert main(["eval", str(run), str(run), "--seq-len", "40", "--json", "--figure", str(figure)]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first == second and first["seq_len"] == 40
    header, *rows = figure.with_suffix(".csv").read_text(encoding="utf-8").splitlines()
    assert header == f"position,{run}" and len(rows) == 40 and figure.stat().st_size > 1000
    bits = np.array([float(row.split(",")[1]) for row in rows])
    assert abs(bits.mean() - first["val_bits_per_byte"]) < 0.1  # the last window is padded


def test_generate_is_what_sample_gives(run, capsys):
    assert main(["generate", str(run), "--prompt", "to be", "--max-new-tokens", "10", "--seed", "3", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    prompt = [256, *b"to be"]
    rng = np.random.default_rng(3)
    expected = sample(load_run(run).model, prompt, 10, temperature=0.8, top_p=0.95, rng=rng)  # within the context of 16
    assert said["tokens"] == expected.tolist() and said["prompt"] == "to be"


def test_generate_prints_prompt_and_text(run, capsys):
    arguments = ["generate", str(run), "--prompt", "tö be", "--max-new-tokens", "9"]
    main([*arguments, "--json"])
    expected = json.loads(capsys.readouterr().out)["text"]
    main(arguments)
    assert capsys.readouterr().out == f"tö be{expected}\n"


def test_generate_without_a_prompt_begins_a_document(run, capsys):
    assert main(["generate", str(run), "--max-new-tokens", "3", "--temperature", "0", "--json"]) == 0
    expected = sample(load_run(run).model, [256], 3)
    assert json.loads(capsys.readouterr().out)["tokens"] == expected.tolist()


def test_generate_onto_a_narrow_console(run):
    """An untrained model writes bytes that are no text: they are shown as '?', not as an error."""
    arguments = ("-m", "minidsv3", "generate", str(run), "--temperature", "5", "--top-p", "1")
    done = python(*arguments, env=environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0"))
    assert done.returncode == 0 and "Traceback" not in done.stderr and "?" in done.stdout


@pytest.mark.parametrize("command", ["eval", "generate"])
@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "run folder"), ("empty", "run folder"), ("begun", "no checkpoint yet")],
)
def test_eval_and_generate_name_what_a_folder_lacks(run, tmp_path, capsys, command, name, message):
    if name != "nowhere":
        (tmp_path / name).mkdir()
    if name == "begun":
        for file in ("config.json", "train.json"):
            (tmp_path / name / file).write_bytes((run / file).read_bytes())
    said = error_of(capsys, [command, tmp_path / name])
    assert message in said and str(tmp_path / name) in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", "-1"], "--max-new-tokens -1 is negative"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--top-p", "2"], "top_p=2.0"),
        (["--prompt", "bad \udc80\udcff"], "the prompt is not valid Unicode"),
    ],
)
def test_generate_names_the_wrong_argument(run, capsys, arguments, message):
    assert message in error_of(capsys, ["generate", run, *arguments])


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fp8_run(text, tmp_path_factory):
    """Six steps in FP8 without an interruption."""
    out = tmp_path_factory.mktemp("fp8") / "run"
    assert main([*command_line(text, out, steps=6, checkpoint_every=3), "--precision", "fp8"]) == 0
    return out


def test_train_in_fp8_notes_its_recipe(fp8_run):
    train_config = json.loads((fp8_run / "train.json").read_text(encoding="utf-8"))["train"]
    assert (train_config["precision"], train_config["accumulate"]) == ("fp8", "fast")
    assert train_config["moments_dtype"] == "bfloat16"  # the recipe's, since the command named none


def test_train_in_fp8_resumes_to_the_same_bits(fp8_run, text, tmp_path):
    """As after a kill behind the checkpoint of step 3: only that checkpoint and the lines are left."""
    out = tmp_path / "run"
    shutil.copytree(fp8_run, out)
    shutil.rmtree(out / "checkpoints" / "step_00000006")
    shutil.rmtree(out / "final")
    assert main([*command_line(text, out, steps=6, checkpoint_every=3), "--precision", "fp8", "--resume"]) == 0
    for part in ("final", "checkpoints/step_00000006"):
        assert digests(out / part) == digests(fp8_run / part) != {}


def test_resume_in_another_precision_is_refused(fp8_run, text, capsys):
    for changed in (["--precision", "bf16"], ["--precision", "fp8", "--accumulate", "exact"], []):
        arguments = [*command_line(text, fp8_run, steps=6, checkpoint_every=3), *changed, "--resume"]
        assert "was trained with" in error_of(capsys, arguments)


def test_eval_computes_in_the_precision_of_the_run(fp8_run, capsys):
    assert main(["eval", str(fp8_run), "--json"]) == 0
    bits = json.loads(capsys.readouterr().out)["val_bits_per_byte"]
    stored = [line["val_bits_per_byte"] for line in lines(fp8_run / "metrics.jsonl") if "val_bits_per_byte" in line]
    assert bits == stored[-1]


@pytest.mark.parametrize("flags, message", [
    (["--precision", "fp9"], "precision='fp9' is not one of"),
    (["--precision", "bf16", "--accumulate", "exact"], "does not use"),
    (["--precision", "fp8", "--plain"], "--plain has the textbook ops"),
])  # fmt: skip
def test_train_refuses_a_precision(text, tmp_path, capsys, flags, message):
    assert message in error_of(capsys, [*command_line(text, tmp_path / "run"), *flags])
