"""``simulate``: every simulation prints tables and JSON, its flags change what they say, its files open."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from minidsv3.commands import main
from minidsv3.parallel.ledger import Ledger


def simulate(capsys, *words):
    assert main(["simulate", *map(str, words)]) == 0
    return capsys.readouterr().out


def as_json(capsys, *words):
    return json.loads(simulate(capsys, *words, "--json"))


def refused(capsys, *words):
    assert main(["simulate", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_step_stands_beside_table_4(capsys):
    text = simulate(capsys, "step", "--constants")
    assert text.startswith("Median error of what was not fitted: ")
    for word in ("19.93", "13.95", "tokens a day", "GPU hours", "million dollars", "Not fitted", "Fitted", "DeepEP"):
        assert word in text
    assert text.rstrip().splitlines()[-5].startswith("Simplified: ")


def test_step_as_json_adds_up(capsys):
    report = as_json(capsys, "step")
    assert report["step_seconds"] == pytest.approx(19.926, rel=0.10)
    assert report["step_seconds"] == pytest.approx(sum(report["parts_seconds"].values()))
    assert report["tokens_per_step"] == 62_914_560
    assert report["tokens_per_day"] == pytest.approx(62_914_560 * 86400 / report["step_seconds"])
    assert report["mfu_causal"] == pytest.approx(report["tflops_causal"] / 989)
    assert report["tflops_causal"] == pytest.approx(385.135 * 19.926 / report["step_seconds"], rel=1e-3)
    assert report["usd"] == 2 * report["gpu_hours"]
    assert report["published"]["parts_seconds"]["1F1B"] == 13.95
    assert report["peak_live_chunks"] == 17


@pytest.mark.parametrize("flags, slower", [
    (["--infiniband-speed", "0.5"], True), (["--network-speed", "inf"], False), (["--gemm-speed", "2"], False),
    (["--node-limit", "8"], True), (["--no-overlap"], True), (["--precision", "bf16"], True),
    (["--schedule", "1f1b"], True), (["--lost-planes", "1"], True), (["--hashed-flows", "64"], True),
    (["--hardware", "gb200-nvl72"], False),
], ids=lambda v: v[0] if isinstance(v, list) else "")  # fmt: skip
def test_step_under_a_change_stands_beside_the_unchanged_machine(capsys, flags, slower):
    report = as_json(capsys, "step", *flags)
    assert (report["step_seconds"] > report["unchanged"]["step_seconds"]) == slower
    assert "published" not in report


def test_step_on_hardware_from_a_file(capsys, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"nic": {"bytes_per_second": "25 GB/s"}}), encoding="utf-8")
    report = as_json(capsys, "step", "--hardware", path)
    assert report["parts_seconds"] == pytest.approx(as_json(capsys, "step", "--infiniband-speed", 0.5)["parts_seconds"])
    path.write_text(json.dumps({"nic": {"bytes_per_second": 25e9}}), encoding="utf-8")
    assert "bytes_per_second" in refused(capsys, "step", "--hardware", path)


def test_step_reads_a_routing_trace(capsys, tmp_path):
    """All tokens to the experts of one node: one node a token, eight ranks, and a busy rank."""
    topk_idx = np.tile(np.arange(0, 32, 4, dtype=np.int16), (2, 3, 50, 1))
    tensors = {"topk_idx": topk_idx, "topk_weight": np.ones(topk_idx.shape, np.float32), "step": np.array([1, 2])}
    save_file(tensors, tmp_path / "trace.safetensors", {"n_routed_experts": "256", "num_experts_per_tok": "8"})
    report = as_json(capsys, "step", "--routing", tmp_path / "trace.safetensors")
    assert (report["nodes_per_token"], report["ranks_per_token"], report["busiest_rank"]) == (1, 8, 8)
    save_file(tensors, tmp_path / "small.safetensors", {"n_routed_experts": "32", "num_experts_per_tok": "8"})
    report = as_json(capsys, "step", "--routing", tmp_path / "small.safetensors")  # 32 experts on 8 nodes: 4 a node
    assert (report["nodes_per_token"], report["ranks_per_token"], report["busiest_rank"]) == (8, 8, 4)
    save_file({"x": topk_idx}, tmp_path / "other.safetensors")
    assert "topk_idx" in refused(capsys, "step", "--routing", tmp_path / "other.safetensors")


def test_step_turns_a_ledger_into_seconds(capsys, tmp_path):
    ledger = Ledger(16, 8)
    ledger.add("dispatch", 0, 9, 1, 436_600_000)
    ledger.add_seconds("dispatch", 3, 0.25)
    ledger.add_seconds("combine", 3, 0.5)
    ledger.write_csv(tmp_path / "ledger.csv")
    report = as_json(capsys, "step", "--ledger", tmp_path / "ledger.csv")
    assert report["ledger_seconds"] == {"dispatch": pytest.approx(0.26), "combine": 0.5}
    assert report["step_seconds_with_stragglers"] == pytest.approx(report["step_seconds"] + 0.75)
    assert "Stragglers add 0.75 s" in simulate(capsys, "step", "--ledger", tmp_path / "ledger.csv")


def test_step_writes_trace_and_figures(capsys, tmp_path):
    simulate(
        capsys, "step", "--trace", tmp_path / "t.json", "--figure", tmp_path / "f.png", "--what-if", tmp_path / "w.svg"
    )
    events = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))["traceEvents"]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} >= {"rank 15", "one overlapped pair"}
    assert "published" in (tmp_path / "f.csv").read_text(encoding="utf-8")
    assert "no overlap" in (tmp_path / "w.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize("flags, named", [
    (["--gpus", "2000"], "gpus=2000"), (["--ep", "48"], "ranks=48"), (["--node-limit", "9"], "node-limit"),
    (["--infiniband-speed", "0"], "infiniband-speed"), (["--lost-planes", "8"], "lost-planes"),
    (["--hardware", "no.json"], "no.json"), (["--micro-batches", "30"], "2 \\* ranks"),
    (["--preset", "qwen2.5-72b"], "dense"),
])  # fmt: skip
def test_step_refuses_what_cannot_be(capsys, flags, named):
    assert re.search(named, refused(capsys, "step", *flags))


def test_pipeline_prints_all_schedules_and_json(capsys):
    text = simulate(capsys, "pipeline")
    assert [line.split()[0] for line in text.splitlines()[2:6]] == ["1f1b", "zb1p", "dualpipe", "dualpipev"]
    report = as_json(capsys, "pipeline", "--schedule", "dualpipev", "--ranks", 4, "--chunks", 10, "--instructions")
    (row,) = report["schedules"]
    assert (row["makespan"], row["idle"], row["peak_live"]) == (66, [6.0] * 4, [9] * 4)
    assert row["instructions"][0][0] == ["F", 0, 0]


def test_pipeline_says_which_schedule_a_size_refuses(capsys):
    assert "dualpipe" in as_json(capsys, "pipeline", "--ranks", 5)["refused"]
    assert "even" in refused(capsys, "pipeline", "--ranks", 5, "--schedule", "dualpipe")


def test_pipeline_writes_trace_and_figures(capsys, tmp_path):
    simulate(capsys, "pipeline", "--ranks", 4, "--chunks", 8, "--trace", tmp_path / "t.json", "--figure",
             tmp_path / "g.png", "--bubbles", tmp_path / "b.png")  # fmt: skip
    events = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))["traceEvents"]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} >= {"1f1b, rank 0", "dualpipev, rank 3"}
    assert (tmp_path / "b.csv").read_text(encoding="utf-8").startswith("ranks,1f1b,zb1p,dualpipe,dualpipev\n2,")


def test_network_prints_the_tables_and_experiments(capsys, tmp_path):
    text = simulate(capsys, "network", "--trials", 200, "--nodes", 64, "--figure", tmp_path / "n.png")
    for word in ("Table 3", "Table 5", "hashed", "all-to-all after a failure", "GPUs cut off", "calibrated"):
        assert word in text
    report = as_json(capsys, "network", "--trials", 200, "--nodes", 64)
    for row in report["table_3"]:
        assert {k: row[k] for k in ("endpoints", "switches", "links")} == {
            k: row["published"][k] for k in ("endpoints", "switches", "links")}  # fmt: skip
        assert row["cost_usd"] == pytest.approx(row["published"]["cost_usd"], rel=0.01)
    assert all(row["us"] == pytest.approx(row["published_us"]) for row in report["table_5"])
    assert all(row["counts_agree"] for row in report["graphs"])
    by_name = {row["failure"]: row for row in report["failures"]}
    assert by_name["one plane"]["slowdown_relay"] == pytest.approx(8 / 7)
    assert by_name["one plane"]["slowdown_no_relay"] is None


def test_network_of_other_sizes_has_no_published_column(capsys):
    report = as_json(capsys, "network", "--ports", 32, "--planes", 4, "--trials", 50, "--nodes", 32)
    assert report["table_3"][1]["endpoints"] == 4 * 32 * 32 // 2
    assert "published" not in report["table_3"][1]


def test_inference_gives_the_limits_exactly(capsys):
    report = as_json(capsys, "inference")
    first, second = report["limits"]
    assert first["communication_us"] == pytest.approx(120.96)
    assert first["token_ms"] == pytest.approx(14.75712)
    assert (round(first["tokens_per_second"], 1), round(second["tokens_per_second"])) == (67.8, 1220)
    assert report["decode"]["tokens_per_second"] == pytest.approx(1850, rel=0.15)
    assert "prefill EP 32" in simulate(capsys, "inference")


def test_calibrate_fits_a_file_and_prints_residuals(capsys, tmp_path):
    report = as_json(capsys, "calibrate")
    assert len(report["measurements"]) == 18
    assert max(abs(m["residual"]) for m in report["measurements"]) < 0.08
    rows = [
        {**m, "value": f"{2 * m['predicted']} B/s" if m["kernel"] == "normal" else f"{m['predicted'] / 2} s"}
        for m in report["measurements"]
    ]
    (tmp_path / "fast.json").write_text(json.dumps({"measurements": rows}), encoding="utf-8")
    fast = as_json(capsys, "calibrate", tmp_path / "fast.json")
    for name, factor in (
        ("infiniband_bytes_per_second", 2),
        ("nvlink_bytes_per_second", 2),
        ("low_latency_seconds", 0.5),
    ):
        assert fast["constants"][name] == pytest.approx(factor * report["constants"][name], rel=0.01)
    assert "largest residual" in simulate(capsys, "calibrate")
    (tmp_path / "bad.json").write_text("[]", encoding="utf-8")
    assert "measurements" in refused(capsys, "calibrate", tmp_path / "bad.json")
