"""Reading run folders, cutting them for a resume, and the two formulas on them."""

import dataclasses
import json
import math

import numpy as np
import pytest

from minidsv3.config import ModelConfig, TrainConfig, write_json
from minidsv3.train.runs import cut_after, max_vio, read_run, smoothed

E, LAYERS, STEPS = 5, 3, 7  # two MoE layers of the stack and one MTP module


def write_run(folder, *, steps=STEPS, seed=0, model=None, loss=4.0, val=2.5, skew=0, **train):
    """A small run folder; `skew` moves that many tokens from the last expert to the first."""
    shape = {"num_hidden_layers": 3, "n_routed_experts": E, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config = dataclasses.replace(ModelConfig.preset("nano"), **{**shape, **(model or {})})
    settings = dataclasses.replace(TrainConfig.preset("nano"), seed=seed, **train)
    folder.mkdir(parents=True, exist_ok=True)
    config.to_json(folder / "config.json")
    environment = {"python": "3.12.1", "numpy": "2.4.0"}
    record = {"preset": "nano", "train": dataclasses.asdict(settings), "environment": environment}
    write_json(folder / "train.json", record)
    rng = np.random.default_rng(seed)
    metrics, experts = [], []
    for step in range(1, steps + 1):
        metrics.append({"step": step, "tokens": 1024 * step, "main_loss": loss - 0.1 * step, "mtp_loss": loss + 0.5,
                        "tokens_per_second": 1000.0 + step})  # fmt: skip
        if step % 3 == 0 or step == steps:
            metrics[-1]["val_bits_per_byte"] = val + 0.01 * (steps - step)
        load = np.full((config.num_moe_layers, config.n_routed_experts), 40) + rng.integers(0, 3)
        load[:, 0] += skew
        load[:, -1] -= skew
        bias = np.linspace(-0.01, 0.02, load.shape[1]) * step + np.zeros(load.shape)
        experts.append({"step": step, "load": load.tolist(), "bias": bias.tolist()})
    for name, records in (("metrics", metrics), ("experts", experts)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


def test_read_run_configs_are_those_written(folder):
    run = read_run(folder)
    assert (run.config.n_routed_experts, run.train.seq_len, run.preset) == (E, 64, "nano")


def test_read_run_environment_is_kept(folder):
    assert read_run(str(folder)).environment["numpy"] == "2.4.0"


def test_read_run_metrics_are_those_of_each_line(folder):
    metrics = read_run(folder).metrics
    for name in ("main_loss", "tokens"):
        assert metrics[name].tolist() == [float(record[name]) for record in records(folder / "metrics.jsonl")]


def test_read_run_absent_metrics_are_nan(folder):
    val = read_run(folder).metrics["val_bits_per_byte"]
    assert np.isnan(val).tolist() == [True, True, False, True, True, False, False]


def test_read_run_metrics_that_no_line_has_are_nan_columns(folder):
    mfu = read_run(folder).metrics["mfu"]
    assert mfu.shape == (STEPS,) and np.isnan(mfu).all()


def test_read_run_null_is_nan(folder):
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 8, "main_loss": null}\n')
    with (folder / "experts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(records(folder / "experts.jsonl")[-1] | {"step": 8}) + "\n")
    assert math.isnan(read_run(folder).metrics["main_loss"][7])


def test_read_run_experts_have_shapes_and_dtypes(folder):
    run = read_run(folder)
    assert run.load.shape == run.bias.shape == (STEPS, LAYERS, E)
    assert (run.load.dtype, run.bias.dtype) == (np.int64, np.float64)


def test_read_run_experts_are_those_of_each_line(folder):
    run = read_run(folder)
    for n, record in enumerate(records(folder / "experts.jsonl")):
        assert run.load[n].tolist() == record["load"] and run.bias[n].tolist() == record["bias"]


@pytest.mark.parametrize("tail", ['{"step": 8, "loss": 1.', '{"ste', "\0\0\0", '{"step": 8, "text": "\xc3'])
def test_read_run_ignores_a_torn_last_line(folder, tail):
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(tail.encode("latin-1"))
    assert len(read_run(folder).step) == STEPS


def test_read_run_counts_steps_that_both_files_have(folder):
    cut_after(folder / "experts.jsonl", STEPS - 1)
    run = read_run(folder)
    assert len(run.step) == len(run.load) == len(run.metrics["loss"]) == STEPS - 1


def test_read_run_without_steps_keeps_the_shapes(folder):
    cut_after(folder / "metrics.jsonl", 0)
    run = read_run(folder)
    assert run.step.shape == (0,) and run.load.shape == (0, LAYERS, E)


def test_read_run_without_moe_layers_has_no_layer(tmp_path):
    folder = write_run(tmp_path / "dense", model={"first_k_dense_replace": 3, "num_nextn_predict_layers": 0})
    assert read_run(folder).load.shape == (STEPS, 0, E) and read_run(folder).layer_names == []


def test_layer_names_follow_the_weights(folder):
    assert read_run(folder).layer_names == ["layer 1", "layer 2", "MTP module 1"]


@pytest.mark.parametrize("vocab_size, unit", [(257, "nats per byte"), (300, "nats per token")])
def test_loss_unit_is_per_byte_for_bytes_only(tmp_path, vocab_size, unit):
    assert read_run(write_run(tmp_path / "run", model={"vocab_size": vocab_size})).loss_unit == unit


@pytest.mark.parametrize("name", ["config.json", "train.json", "metrics.jsonl", "experts.jsonl"])
def test_read_run_names_the_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        read_run(folder)


def test_read_run_names_the_broken_line(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines[3] = lines[3][:10]
    (folder / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 4 "):
        read_run(folder)


def test_read_run_refuses_steps_that_go_back(folder):
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"step": 4}\n{"step": 5}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 8: step 4 after step 7"):
        read_run(folder)


def test_read_run_refuses_files_of_different_steps(folder):
    path = folder / "experts.jsonl"
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"experts\.jsonl has step 2 where metrics\.jsonl has step 1"):
        read_run(folder)


def test_read_run_refuses_experts_of_another_model(folder):
    ModelConfig.preset("nano").to_json(folder / "config.json")
    with pytest.raises(ValueError, match=r"'load' has shape \(7, 3, 5\), config\.json says \(7, 4, 16\)"):
        read_run(folder)


def test_read_run_refuses_a_ragged_load(folder):
    lines = records(folder / "experts.jsonl")
    lines[2]["load"][1].append(4)
    (folder / "experts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"experts\.jsonl: 'load' is not \[layers\]\[experts\]"):
        read_run(folder)


def test_read_run_refuses_a_metric_that_is_no_number(folder):
    path = folder / "metrics.jsonl"
    path.write_text('{"step": 1, "lr": "high"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: lr='high' of step 1"):
        read_run(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"train": 3}'])
def test_read_run_names_a_broken_train_file(folder, text):
    (folder / "train.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.json is not a JSON object with the key 'train'"):
        read_run(folder)


def test_read_run_names_settings_of_another_version(folder):
    write_json(folder / "train.json", {"train": {"steps": 3, "warp": 9}})
    with pytest.raises(ValueError, match=r"train\.json has unknown settings warp"):
        read_run(folder)


def test_read_run_names_the_file_of_a_bad_setting(folder):
    write_json(folder / "train.json", {"train": {"steps": -3}})
    with pytest.raises(ValueError, match=r"train\.json: steps=-3"):
        read_run(folder)


@pytest.mark.parametrize("step", [0, 4, 7, 9])
def test_cut_after_keeps_the_lines_up_to_step(folder, step):
    before = records(folder / "metrics.jsonl")
    cut_after(folder / "metrics.jsonl", step)
    assert records(folder / "metrics.jsonl") == [record for record in before if record["step"] <= step]


def test_cut_after_keeps_lines_to_the_byte(folder):
    before = (folder / "experts.jsonl").read_bytes().splitlines(keepends=True)
    cut_after(folder / "experts.jsonl", 3)
    assert (folder / "experts.jsonl").read_bytes() == b"".join(before[:3])


def test_cut_after_removes_a_torn_tail(folder):
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(whole + b'{"step": 8, "lo')
    cut_after(folder / "metrics.jsonl", 99)
    assert (folder / "metrics.jsonl").read_bytes() == whole


def test_cut_after_ends_an_unended_line(folder):
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(whole.rstrip())
    cut_after(folder / "metrics.jsonl", STEPS)
    assert (folder / "metrics.jsonl").read_bytes() == whole


def test_cut_after_leaves_no_other_file(folder):
    before = sorted(folder.iterdir())
    cut_after(folder / "metrics.jsonl", 2)
    assert sorted(folder.iterdir()) == before


def test_smoothed_equals_the_recursion_with_bias_correction():
    values, decay, m = np.random.default_rng(1).normal(size=11), 0.9, 0.0
    averages = smoothed(values, decay)
    for n, x in enumerate(values, start=1):
        m = decay * m + (1 - decay) * x
        assert averages[n - 1] == pytest.approx(m / (1 - decay**n), rel=1e-12)


def test_smoothed_weighs_by_the_distance_of_steps():
    values, step, decay = np.array([3.0, 1.0, 4.0, 1.5]), np.array([2, 5, 6, 13]), 0.7
    for n in range(4):
        weights = [decay ** (step[n] - step[i]) for i in range(n + 1)]
        expected = sum(w * x for w, x in zip(weights, values)) / sum(weights)
        assert smoothed(values, decay, step)[n] == pytest.approx(expected, rel=1e-12)


def test_smoothed_without_decay_changes_nothing():
    values = np.array([3.0, -1.0, 2.0], dtype=np.float32)
    assert smoothed(values, 0.0).tolist() == values.tolist()


def test_smoothed_nan_stays_visible():
    assert np.isnan(smoothed(np.array([1.0, np.nan, 2.0]), 0.5)).tolist() == [False, True, True]


def test_smoothed_of_nothing_is_nothing():
    assert smoothed(np.zeros(0), 0.98).shape == smoothed(np.zeros(0), 0.98, np.zeros(0, dtype=np.int64)).shape == (0,)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_smoothed_refuses_a_decay_outside_its_range(decay):
    with pytest.raises(ValueError, match=r"is not in \[0, 1\)"):
        smoothed(np.ones(3), decay)


def test_smoothed_refuses_steps_of_another_length():
    with pytest.raises(ValueError, match=r"shape \(2,\), values have shape \(3,\)"):
        smoothed(np.ones(3), 0.5, np.array([1, 2]))


def test_max_vio_equals_its_definition():
    load = np.random.default_rng(2).integers(1, 50, size=(4, 3, 5))
    result = max_vio(load)
    for n in range(4):
        for layer in range(3):
            counts = load[n, layer].tolist()
            mean = sum(counts) / 5
            assert result[n, layer] == pytest.approx((max(counts) - mean) / mean, rel=1e-12)


def test_max_vio_of_balance_is_zero():
    assert max_vio(np.full((2, 6), 7)).tolist() == [0.0, 0.0]


def test_max_vio_refuses_a_layer_without_tokens():
    with pytest.raises(ValueError, match="layer without tokens"):
        max_vio(np.array([[1, 2], [0, 0]]))
