"""``simulate dispatch``: published numbers of V3's gate, the files it writes, and what it refuses."""

import json

import numpy as np
import pytest

from minidsv3.commands import main
from minidsv3.parallel.ledger import read_ledger_csv
from minidsv3.train.routing import RoutingRecorder


def simulated(capsys, *arguments):
    assert main(["simulate", "dispatch", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    """V3 on 64 ranks, once."""
    from contextlib import redirect_stdout
    from io import StringIO

    folder = tmp_path_factory.mktemp("v3")
    with redirect_stdout(StringIO()) as said:
        files = ["--ledger", str(folder / "ledger.csv"), "--figure", str(folder / "figure.png")]
        assert main(["simulate", "dispatch", "--tokens", "128", "--json", *files]) == 0
    return json.loads(said.getvalue()), folder


def test_v3_gate_needs_3_96_nodes_and_7_48_ranks(v3):
    report, _ = v3
    assert report["nodes_per_token"] == pytest.approx(3.96, abs=0.02)
    assert report["ranks_per_token"] == pytest.approx(7.48, abs=0.03)
    assert report["uniform_nodes_per_token"] == pytest.approx(5.295, abs=5e-4)
    assert report["row_bytes"] == {"dispatch": 7392, "combine": 14336}


def test_bytes_are_rows_of_full_width(v3):
    report, _ = v3
    T = 64 * 128
    for operation, row in (("dispatch", 7392), ("combine", 14336)):
        remote = report["bytes"][operation]["InfiniBand"]
        assert remote % row == 0
        assert remote / row / T == pytest.approx(report["nodes_per_token"] * 7 / 8, rel=0.02)
        both_hops = sum(report["bytes"][operation].values()) / row / T
        assert both_hops == pytest.approx(report["nodes_per_token"] + report["ranks_per_token"], rel=1e-12)


def test_node_limit_bounds_the_nodes(v3):
    limits = v3[0]["node_limits"]
    assert [m["node_limit"] for m in limits] == list(range(1, 9))
    nodes = [m["nodes_per_token"] for m in limits]
    assert nodes[0] == 1 and nodes == sorted(nodes) and all(n <= m for m, n in enumerate(nodes, start=1))
    assert nodes[-1] == pytest.approx(5.295, rel=0.01)  # no limit at all


def test_files_are_written(v3):
    _, folder = v3
    assert {row.operation for row in read_ledger_csv(folder / "ledger.csv")} == {
        "dispatch routing",
        "dispatch",
        "combine",
    }
    assert (folder / "figure.png").stat().st_size > 10_000
    text = (folder / "figure.txt").read_text(encoding="utf-8")
    assert "14 of the 63 others" in text and "EPLB" in text


def test_text_says_what_is_simplified(capsys):
    assert main(["simulate", "dispatch", "--preset", "tiny", "--ranks", "4", "--tokens", "20"]) == 0
    said = capsys.readouterr().out
    assert "distinct nodes per token" in said and said.splitlines()[-1].startswith("simplified: ")


def test_popular_experts_are_evened_out_by_replicas(capsys):
    report = simulated(capsys, "--tokens", "200", "--ranks", "32", "--skew", "0.6", "--replicas", "288")
    load = report["load"]
    assert load["max_over_mean_after"] < 1.15 < 1.25 < load["max_over_mean_before"]
    assert sum(load["after_layer_0"]) == pytest.approx(sum(load["before_layer_0"])) == 200 * 32 * 8


def test_low_latency_counts_every_expert(capsys):
    report = simulated(capsys, "--tokens", "16", "--ranks", "16", "--wire", "low-latency")
    assert sum(report["bytes"]["combine"].values()) == 16 * 16 * 8 * 14336
    assert "dispatch routing" not in report["bytes"]


def test_a_trace_is_replayed(tmp_path, capsys):
    rng = np.random.default_rng(0)
    idx = np.sort(np.argsort(rng.random((2, 3, 50, 8)), axis=-1)[..., :2], axis=-1).astype(np.int16)
    idx[:, :, :, 0], idx[:, :, :, 1] = 0, 5  # everybody wants experts 0 and 5
    idx[:, 2, 40:] = -1
    recorder = RoutingRecorder(8)
    for step in range(2):
        recorder.add(step + 1, idx[step], np.ones(idx.shape[1:], dtype=np.float32))
    recorder.write(tmp_path / "r.safetensors")
    report = simulated(
        capsys, "--preset", "tiny", "--ranks", "4", "--gpus-per-node", "2", "--replicas", "12",
        "--routing", str(tmp_path / "r.safetensors"),
    )  # fmt: skip
    assert report["tokens_per_rank"] == 25 and report["nodes_per_token"] == 2 and report["ranks_per_token"] == 2
    assert report["load"]["layers"] == 3 and report["load"]["max_over_mean_before"] == 2
    assert report["load"]["max_over_mean_after"] < 1.5


@pytest.mark.parametrize("arguments, said", [
    (("--ranks", "24", "--gpus-per-node", "8"), "256 experts are not a multiple of --ranks 24"),
    (("--ranks", "64", "--gpus-per-node", "7"), "ranks=64 is not a multiple of gpus_per_node=7"),
    (("--tokens", "0"), "--tokens 0"), (("--routing", "nowhere"), "nowhere is no routing trace"),
    (("--tokens", "8", "--replicas", "257"), "num_replicas=257"),
])  # fmt: skip
def test_impossible_sizes_are_refused_in_one_line(capsys, arguments, said):
    assert main(["simulate", "dispatch", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
