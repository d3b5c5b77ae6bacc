"""``minidsv3 report``: the keys that others read, the text, the figures, and one line for every mistake."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from minidsv3 import ModelConfig
from minidsv3.accounting.memory import STATES
from minidsv3.commands import main

KEYS = {
    "params": "parameters parameters_with_gate_bias checkpoint_elements checkpoint_tensors checkpoint_bytes by_dtype "
    "active_with_head active_with_head_and_embedding",
    "flops --step-seconds 19.926": "forward_per_token training_per_token_causal training_per_token_full tflops mfu",
    "memory": "per_stage",
    "kv-cache": "bytes_per_token bytes_total by_model",
    "gpus": "gpus bytes_per_gpu",
    "local --memory 128GB --bandwidth 270GB/s": "rows published",
}


def called(capsys, words, *more):
    status = main(["report", *words.split(), *map(str, more)])
    return status, capsys.readouterr()


def report(capsys, words, *more):
    status, printed = called(capsys, words, *more, "--json")
    assert status == 0, printed.err
    return json.loads(printed.out)


@pytest.mark.parametrize(("words", "keys"), KEYS.items())
def test_json_has_the_keys_that_others_read(capsys, words, keys):
    assert set(keys.split()) <= set(report(capsys, words))


@pytest.mark.parametrize("words", KEYS)
def test_text_is_printed_without_json(capsys, words):
    status, printed = called(capsys, words)
    assert status == 0 and len(printed.out.splitlines()) >= 4 and printed.err == ""


def test_params_of_v3_in_a_fresh_process_are_quick_and_small():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the peak of a fresh process is read from /proc")
    code = """
        import sys, time
        from pathlib import Path
        from minidsv3.commands import main
        main(["report", "params", "--preset", "deepseek-v3", "--json"])
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        peak = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
        print(time.process_time(), peak, file=sys.stderr)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert json.loads(done.stdout)["checkpoint_bytes"] == 688_574_839_360
    seconds, kibibytes = map(float, done.stderr.split())
    assert kibibytes * 1024 < 200e6
    assert seconds < 2  # of the processor, imports included: other processes do not count; 0.6 s measured


def test_flops_of_the_printed_step_time(capsys):
    found = report(capsys, "flops --preset deepseek-v3 --context 4096 --step-seconds 19.926")
    assert (round(found["tflops"]), round(found["tflops_full"])) == (385, 432)
    assert (round(100 * found["mfu"], 2), round(100 * found["mfu_full"], 2)) == (38.94, 43.73)
    assert found["training_per_token_causal"] == 3 * found["forward_per_token"]
    assert "tflops" not in report(capsys, "flops")


def test_flops_of_another_step_scale_with_tokens_and_gpus(capsys):
    one, other = (
        report(capsys, f"flops --step-seconds 10 --tokens-per-step {tokens} --gpus {gpus}")
        for tokens, gpus in ((1e6, 8), (3e6, 16))
    )
    assert other["tflops"] == pytest.approx(1.5 * one["tflops"])


def test_memory_of_another_layout(capsys):
    found = report(
        capsys, "memory --preset deepseek-v3 --pp 8 --ep 32 --tp 2 --dp 16 --zero 2 --schedule zb1p --micro-batch 2 "
        "--recompute full --precision bf16",
    )  # fmt: skip
    assert len(found["per_stage"]) == 8 and found["layout"]["gpus"] == 256
    for stage in found["per_stage"]:
        assert stage["total"] == sum(stage[state] for state in STATES)
        assert all(isinstance(stage[state], int) for state in STATES)


def test_memory_of_a_small_preset_is_one_gpu_by_default(capsys):
    found = report(capsys, "memory --preset nano")
    assert found["layout"]["gpus"] == 1 and len(found["per_stage"]) == 1
    assert report(capsys, "memory --preset nano --ep 4")["layout"]["gpus"] == 4


def test_kv_cache_of_a_batch(capsys):
    found = report(capsys, "kv-cache --preset deepseek-v3 --context 131072 --batch 2")
    assert found["bytes_total"] == 70_272 * 131_072 * 2
    assert report(capsys, "kv-cache --preset llama-3.1-405b")["bytes_per_token"] == 516_096


def test_config_file_is_read_as_the_preset(capsys, tmp_path):
    ModelConfig.preset("deepseek-v2-lite").to_json(tmp_path / "config.json")
    found = report(capsys, "params --config", tmp_path / "config.json")
    assert found == report(capsys, "params --preset deepseek-v2-lite")


def test_gpus_of_a_named_memory(capsys):
    named, given = report(capsys, "gpus --gpu h800"), report(capsys, "gpus --gpu 80GB")
    assert named["gpus"] == given["gpus"] and named["bytes_per_gpu"] <= 80e9


def test_local_of_one_model_with_a_disk(capsys):
    found = report(capsys, "local --memory 128GB --bandwidth 270GB/s --disk 7GB/s --preset deepseek-v3")
    assert [row["precision"] for row in found["rows"]] == ["bf16", "fp8", "4-bit"]
    assert all(row["tokens_per_second"] for row in found["rows"])


@pytest.mark.parametrize("what", ["params", "flops", "memory", "kv-cache"])
def test_figure_is_written_with_its_data(capsys, tmp_path, what):
    status, _ = called(capsys, what, "--figure", tmp_path / "f.svg")
    assert status == 0
    assert {p.name for p in tmp_path.iterdir()} == {"f.svg", "f.csv", "f.txt"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("params --preset deepseek-v9", "preset='deepseek-v9' is not one of"),
        ("params --preset qwen2.5-72b", "model_type='qwen2' is another architecture"),
        ("params --preset nano --config x.json", "choose one"),
        ("params --config missing.json", "missing.json: No such file"),
        ("memory --ep 48 --dp 48", "ep=48 does not divide n_routed_experts=256"),
        ("memory --pp 62", "62 stages for num_hidden_layers=61"),
        ("kv-cache --context 0", "context of 0 tokens"),
        ("flops --context 200000", "context of 200000 tokens"),
        ("flops --step-seconds -1", "step_seconds=-1.0"),
        ("flops --step-seconds 1 --gpu tpu", "gpu='tpu' is not one of"),
        ("gpus --gpu 80", "'80' is not a positive number with unit"),
        ("gpus --gpu tpu", "gpu='tpu' is not one of"),
        ("local --memory 128 --bandwidth 270GB/s", "'128' is not a positive number with unit"),
        ("memory --gpu tpu", "gpu='tpu' is not one of"),
    ],
)  # fmt: skip
def test_mistake_is_one_line(capsys, words, message):
    status, printed = called(capsys, words)
    assert status == 2 and printed.out == ""
    assert message in printed.err and len(printed.err.splitlines()) == 1
