"""Routing traces: what the gates chose, in a file that reads back, through a resume; other files are refused."""

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_runs import batch, lines, model_config, new_model, train_config, write_text

from minidsv3.model.record import record
from minidsv3.train import trainer as module
from minidsv3.train.routing import RoutingRecorder, read_routing_trace, route
from minidsv3.train.trainer import Trainer


def test_route_gives_what_every_gate_chose():
    model = new_model()
    tokens, targets = batch(3, 11)
    idx, weight = route(model, tokens, targets)
    with record() as r:
        model.loss(tokens, targets)
    gate = r["model.layers.1.mlp.gate"]
    assert idx.shape == (2, 33, 3) and idx.dtype == np.int16
    np.testing.assert_array_equal(idx[0], gate.outputs[1])
    np.testing.assert_array_equal(weight[0], gate.outputs[2])
    deeper = idx[1].reshape(3, 11, 3)  # the MTP module sees one token less of each sequence
    assert (deeper[:, -1] == -1).all() and (deeper[:, :-1] >= 0).all()
    np.testing.assert_array_equal(deeper[:, :-1].reshape(-1, 3), r["model.layers.2.mlp.gate"].outputs[1])
    assert (weight[1].reshape(3, 11, 3)[:, -1] == 0).all()


def test_written_trace_reads_back_and_short_steps_are_filled_up(tmp_path):
    recorder, rng = RoutingRecorder(8), np.random.default_rng(0)
    parts = [(rng.integers(0, 8, (2, T, 3)).astype(np.int16), rng.random((2, T, 3), dtype=np.float32)) for T in (4, 6)]
    for step, part in zip((1, 3), parts):
        recorder.add(step, *part)
    recorder.write(tmp_path / "r.safetensors")
    trace = read_routing_trace(tmp_path / "r.safetensors")
    assert trace.topk_idx.shape == (2, 2, 6, 3) and trace.step.tolist() == [1, 3] and trace.n_routed_experts == 8
    np.testing.assert_array_equal(trace.topk_idx[0, :, :4], parts[0][0])
    assert (trace.topk_idx[0, :, 4:] == -1).all() and (trace.topk_weight[0, :, 4:] == 0).all()
    np.testing.assert_array_equal(trace.topk_weight[1], parts[1][1])
    assert [p.name for p in tmp_path.iterdir()] == ["r.safetensors"]


def test_trace_of_a_resumed_run_is_the_trace_of_the_whole_run(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "sgemm_gflops", lambda workers: 100.0)
    text = str(write_text(tmp_path / "text.txt"))

    def run(out, stop_at=None, **options):
        cfg = train_config(data=text)
        t = Trainer(
            model_config(),
            cfg,
            tmp_path / out,
            report=lambda s: None,
            progress=False,
            trace_routing=2,
            on_step=lambda t, step: setattr(t, "_stop", step == stop_at),
            **options,
        )
        assert t.run() == (stop_at is None)

    run("whole"), run("parts", stop_at=4), run("parts", resume=True)
    whole, parts = (read_routing_trace(tmp_path / out / "routing.safetensors") for out in ("whole", "parts"))
    assert whole.step.tolist() == parts.step.tolist() == [1, 3, 5]
    np.testing.assert_array_equal(whole.topk_idx, parts.topk_idx)
    load = lines(tmp_path / "whole" / "experts.jsonl")[0]["load"][0]
    assert np.bincount(whole.topk_idx[0, 0].reshape(-1), minlength=8).tolist() == load  # step 1 chose these


GOOD = dict(topk_idx=np.zeros((1, 2, 3, 2), np.int16), topk_weight=np.zeros((1, 2, 3, 2), np.float32), step=np.ones(1))


@pytest.mark.parametrize("changes, said", [
    (dict(topk_idx=np.zeros((2, 3, 2), np.int16)), "are not"),
    (dict(topk_idx=np.full((1, 2, 3, 2), 9, np.int16)), "exceeds 8 experts"),
    (dict(topk_idx=np.full((1, 2, 3, 2), -2, np.int16)), "exceeds 8 experts"),
    (dict(step=np.ones(2)), "are not"),
])  # fmt: skip
def test_a_file_that_contradicts_itself_is_refused(tmp_path, changes, said):
    save_file({**GOOD, **changes}, tmp_path / "r.safetensors", {"n_routed_experts": "8"})
    with pytest.raises(ValueError, match=f"r.safetensors is no routing trace.*{said}"):
        read_routing_trace(tmp_path / "r.safetensors")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("no", encoding="utf-8")
    save_file({"a": np.ones(2)}, tmp_path / "other")
    for name in ("text", "other", "missing"):
        with pytest.raises(ValueError, match="is no routing trace"):
            read_routing_trace(tmp_path / name)
