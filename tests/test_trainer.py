"""A run as files: what stands in the folder, and that interruptions leave no trace in the bits."""

import dataclasses
import gc
import json
import os
import signal
import sys
import threading

import numpy as np
import pytest
from small_runs import digests, lines, model_config, python, train_config, write_text

from minidsv3.config import ModelConfig, TrainConfig
from minidsv3.data import ByteTokenizer, Loader, load_corpus, split_documents
from minidsv3.generation.load import load_run
from minidsv3.pretrained import load_pretrained
from minidsv3.train import trainer as module
from minidsv3.train.checkpoint import checkpoints
from minidsv3.train.folder import FREE_TO_CHANGE
from minidsv3.train.runs import read_run
from minidsv3.train.trainer import Trainer

KEYS = {
    "step", "tokens", "loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "max_vio",
    "tokens_per_second", "mfu",
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(write_text(tmp_path_factory.mktemp("text") / "text.txt"))


@pytest.fixture(autouse=True)
def no_measurement(monkeypatch):
    """The speed of the machine is measured once a run; no bit depends on it."""
    monkeypatch.setattr(module, "sgemm_gflops", lambda workers: 100.0)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The uninterrupted run that others are compared with, its machine measured."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert trainer(out, text, eval_every=4).run()
    return out


def trainer(out, text, *, resume=False, model=None, said=None, on_evaluation=None, **changes):
    """A Trainer of the small run; what it reports goes into the list `said`."""
    said = [] if said is None else said
    train = train_config(data=text, **changes)
    return Trainer(
        model or model_config(), train, out, resume=resume, report=said.append, progress=False,
        on_evaluation=on_evaluation,
    )  # fmt: skip


def stop_at(step, send=lambda t: signal.raise_signal(signal.SIGINT)):
    """An evaluation hook that interrupts the run (as Ctrl-C does) at a step."""
    return lambda t, at, bits: send(t) if at == step else None


def interrupted(out, text, step, **changes):
    """A run that Ctrl-C stopped after `step`."""
    said = []
    done = trainer(out, text, eval_every=step, on_evaluation=stop_at(step), said=said, **changes).run()
    return done, said


def numbers(path):
    """Lines of a .jsonl without what the clock decides."""
    return [
        {k: v for k, v in line.items() if k not in ("tokens_per_second", "mfu", "val_bits_per_byte")}
        for line in lines(path)
    ]


def test_trainer_folder_holds_what_the_docs_say(whole):
    names = {path.name for path in whole.iterdir()}
    assert names == {"config.json", "train.json", "metrics.jsonl", "experts.jsonl", "checkpoints", "final"}


def test_trainer_config_json_is_the_model(whole):
    assert ModelConfig.from_json(whole / "config.json") == model_config()


def test_trainer_train_json_is_the_settings_and_the_machine(whole, text):
    run = read_run(whole)
    assert run.train == train_config(data=text, eval_every=4)
    assert {"python", "numpy", "blas", "platform", "cpu_count", "sgemm_gflops"} == set(run.environment)


def test_trainer_metrics_have_exactly_these_keys(whole):
    for line in lines(whole / "metrics.jsonl"):
        evaluated = {"val_bits_per_byte"} if line["step"] in (4, 6) else set()
        assert set(line) == KEYS | evaluated


def test_trainer_metrics_have_one_line_a_step(whole):
    assert [line["step"] for line in lines(whole / "metrics.jsonl")] == list(range(1, 7))
    assert [line["step"] for line in lines(whole / "experts.jsonl")] == list(range(1, 7))


def test_trainer_tokens_count_all_steps(whole):
    assert [line["tokens"] for line in lines(whole / "metrics.jsonl")] == [4 * 16 * step for step in range(1, 7)]


def test_trainer_experts_count_every_choice(whole):
    for line in lines(whole / "experts.jsonl"):
        assert [sum(load) for load in line["load"]] == [4 * 16 * 3, 4 * 15 * 3]  # the MTP module has S - 1 positions


def test_trainer_biases_follow_the_loads(whole):
    biases = np.zeros((2, 8))
    for line in lines(whole / "experts.jsonl"):
        load = np.array(line["load"])
        biases += 0.001 * np.sign(load.mean(axis=1, keepdims=True) - load)
        np.testing.assert_allclose(line["bias"], biases, atol=1e-8)  # float32 steps of 0.001


def test_trainer_max_vio_is_the_mean_over_layers(whole):
    for metrics, experts in zip(lines(whole / "metrics.jsonl"), lines(whole / "experts.jsonl")):
        per_layer = [(max(load) * len(load) / sum(load)) - 1 for load in experts["load"]]
        assert metrics["max_vio"] == pytest.approx(sum(per_layer) / len(per_layer), rel=1e-12)


def test_trainer_speed_and_mfu_are_positive(whole):
    assert all(line["tokens_per_second"] > 0 and 0 < line["mfu"] < 1 for line in lines(whole / "metrics.jsonl"))


def test_trainer_checkpoints_are_the_last_ones(whole):
    assert [path.name for path in checkpoints(whole / "checkpoints")] == ["step_00000004", "step_00000006"]


def test_trainer_checkpoint_keeps_the_data_position(whole):
    state = json.loads((whole / "checkpoints" / "step_00000004" / "trainer.json").read_text(encoding="utf-8"))
    assert state == {"step": 4, "tokens": 4 * 4 * 16, "position": 4 * 4, "seed": 0}


def test_trainer_final_is_the_last_checkpoints_model(whole):
    last = whole / "checkpoints" / "step_00000006"
    final = digests(whole / "final")
    assert set(final) == {"config.json", "model.safetensors"}
    assert final == {name: digest for name, digest in digests(last).items() if name in final}


def test_trainer_final_is_a_model_directory(whole):
    assert load_pretrained(whole / "final").config == model_config()


def test_trainer_validation_is_that_of_the_loaded_model(whole, text):
    t = trainer(whole, text, resume=True, eval_every=4)
    assert lines(whole / "metrics.jsonl")[-1]["val_bits_per_byte"] == t.evaluate()


def test_trainer_trains_on_the_loaders_batches(tmp_path, text, monkeypatch):
    seen = []
    step = module.train_step
    monkeypatch.setattr(module, "train_step", lambda *a: seen.append(a[3]) or step(*a))
    trainer(tmp_path / "run", text, steps=3).run()
    documents, _ = split_documents(load_corpus(text).documents)
    loader = Loader(documents, ByteTokenizer(), 16, 0)
    for number, shards in enumerate(seen):
        np.testing.assert_array_equal(np.concatenate([x for x, _ in shards]), loader.batch(4 * number, 4)[0])


@pytest.mark.parametrize("workers", [1, 2])
def test_trainer_same_seed_same_bytes_whatever_the_workers(whole, text, tmp_path, workers):
    trainer(tmp_path / "run", text, workers=workers, eval_every=4).run()
    assert digests(tmp_path / "run" / "final") == digests(whole / "final")
    assert numbers(tmp_path / "run" / "metrics.jsonl") == numbers(whole / "metrics.jsonl")


def test_trainer_checkpointing_and_evaluation_change_no_bit(whole, text, tmp_path):
    trainer(tmp_path / "run", text, checkpoint_every=5, eval_every=1, keep=1).run()
    assert digests(tmp_path / "run" / "final") == digests(whole / "final")


def test_trainer_another_seed_other_bytes(whole, text, tmp_path):
    trainer(tmp_path / "run", text, seed=1).run()
    assert digests(tmp_path / "run" / "final") != digests(whole / "final")


@pytest.mark.parametrize("step", [1, 3, 4])
def test_trainer_interrupted_and_resumed_has_the_same_bytes(whole, text, tmp_path, step):
    out = tmp_path / "run"
    interrupted(out, text, step)
    assert trainer(out, text, resume=True, eval_every=step).run()
    assert digests(out / "final") == digests(whole / "final")
    assert numbers(out / "metrics.jsonl") == numbers(whole / "metrics.jsonl")
    assert lines(out / "experts.jsonl") == lines(whole / "experts.jsonl")


@pytest.mark.parametrize("changes", [dict(moments_dtype="bfloat16"), dict(batch_ramp=[0.5, 0.8]), dict(recompute=True)])
def test_trainer_resumes_to_the_same_bytes_with(text, tmp_path, changes):
    trainer(tmp_path / "whole", text, **changes).run()
    interrupted(tmp_path / "run", text, 3, **changes)
    trainer(tmp_path / "run", text, resume=True, eval_every=3, **changes).run()
    assert digests(tmp_path / "run" / "final") == digests(tmp_path / "whole" / "final")


def test_trainer_interrupted_saves_the_step_and_says_how_to_go_on(text, tmp_path):
    done, said = interrupted(tmp_path / "run", text, 3)
    assert not done and said == ["stopped after step 3 and saved; the same command with --resume goes on"]
    assert checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step_00000003"


def test_trainer_interrupted_while_it_saves_keeps_its_word(text, tmp_path, monkeypatch):
    """Ctrl-C may come when the loop has decided already that no save is due."""
    t = trainer(tmp_path / "run", text, checkpoint_every=0)
    due = t._is_due

    def late(every):
        answer = due(every)
        if t.step == 3:
            t._stop = True
        return answer

    monkeypatch.setattr(t, "_is_due", late)
    assert not t.run() and t.step == 3
    assert [path.name for path in checkpoints(t.out / "checkpoints")] == ["step_00000003"]


def test_trainer_terminated_saves_too(text, tmp_path):
    if sys.platform == "win32":
        pytest.skip("no SIGTERM for Python here")
    hook = stop_at(3, lambda t: os.kill(os.getpid(), signal.SIGTERM))
    t = trainer(tmp_path / "run", text, eval_every=3, on_evaluation=hook)
    assert not t.run() and checkpoints(t.out / "checkpoints")[-1].name == "step_00000003"


def test_trainer_second_interrupt_stops_at_once(text, tmp_path):
    def twice(t):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "run", text, eval_every=3, on_evaluation=stop_at(3, twice)).run()


def test_trainer_gives_the_signal_handlers_back(text, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer(tmp_path / "run", text, steps=1).run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_trainer_runs_outside_the_main_thread(whole, text, tmp_path):
    thread = threading.Thread(target=lambda: trainer(tmp_path / "run", text, eval_every=4).run())
    thread.start()
    thread.join()
    assert digests(tmp_path / "run" / "final") == digests(whole / "final")


def test_trainer_resume_cuts_the_lines_after_the_checkpoint(text, tmp_path):
    out = tmp_path / "run"
    interrupted(out, text, 3)
    for name in ("metrics.jsonl", "experts.jsonl"):
        with (out / name).open("a", encoding="utf-8") as file:
            file.write('{"step": 4, "lost": 1}\n{"step": 5, "lo')
    trainer(out, text, resume=True, eval_every=3)
    assert [line["step"] for line in lines(out / "metrics.jsonl")] == [1, 2, 3]
    assert [line["step"] for line in lines(out / "experts.jsonl")] == [1, 2, 3]


def test_trainer_resume_without_a_checkpoint_begins_at_0(whole, text, tmp_path):
    out = tmp_path / "run"
    trainer(out, text, eval_every=4)  # described, and not one step done
    (out / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    assert trainer(out, text, resume=True, eval_every=4).step == 0
    assert lines(out / "metrics.jsonl") == []


def test_trainer_resume_of_no_folder_begins_at_0(text, tmp_path):
    t = trainer(tmp_path / "new", text, resume=True)
    assert t.step == 0 and t.run()


def test_trainer_resume_of_a_finished_run_changes_nothing(whole, text):
    before = {name: d for name, d in digests(whole).items() if name != "train.json"}  # the gemm speed is measured anew
    assert trainer(whole, text, resume=True, eval_every=4).run()
    assert {name: d for name, d in digests(whole).items() if name != "train.json"} == before


def test_trainer_steps_is_the_total_on_resume(text, tmp_path):
    said = []
    trainer(tmp_path / "run", text, steps=2).run()
    t = trainer(tmp_path / "run", text, steps=5, resume=True, said=said)
    assert t.step == 2 and t.run() and t.step == 5
    assert said[0] == "the schedules now run to step 5 instead of 2"


def test_trainer_steps_below_the_checkpoint_are_refused(whole, text):
    before = (whole / "train.json").read_bytes()
    with pytest.raises(ValueError, match=r"step_00000006 is at step 6, beyond --steps 3 \(the total\)"):
        trainer(whole, text, steps=3, resume=True, eval_every=4)
    assert (whole / "train.json").read_bytes() == before


@pytest.mark.parametrize("changes", [dict(checkpoint_every=1), dict(keep=5), dict(workers=2)])
def test_trainer_resume_allows_another(text, tmp_path, changes):
    interrupted(tmp_path / "run", text, 1)
    assert trainer(tmp_path / "run", text, resume=True, **{"eval_every": 1, "steps": 2, **changes}).run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(seed=7), "seed=0, not 7"),
        (dict(learning_rate=0.5), r"learning_rate=0\.003, not 0\.5"),
        (dict(shards=4), "shards=2, not 4"),
        (dict(model=model_config(n_routed_experts=12)), "n_routed_experts=8, not 12"),
    ],
)
def test_trainer_resume_refuses_another_config(whole, text, changes, message):
    before = digests(whole)
    with pytest.raises(ValueError, match=message + ": resume with the same settings, or choose another --out"):
        trainer(whole, text, resume=True, **{"eval_every": 4, **changes})
    assert digests(whole) == before


def test_trainer_every_field_but_four_is_held_on_resume(whole, text):
    assert set(FREE_TO_CHANGE) == {"steps", "checkpoint_every", "keep", "workers"}
    assert set(FREE_TO_CHANGE) <= {f.name for f in dataclasses.fields(TrainConfig)}


def test_trainer_without_resume_refuses_a_folder_with_a_run(whole, text):
    before = digests(whole)
    with pytest.raises(ValueError, match="already holds a run: add --resume"):
        trainer(whole, text, eval_every=4)
    assert digests(whole) == before


def test_trainer_refuses_checkpoints_that_no_run_described(whole, text, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step_00000003").mkdir(parents=True)
    with pytest.raises(ValueError, match="is no run folder of ours"):
        trainer(tmp_path / "run", text, resume=True)


def test_trainer_says_which_version_changed(text, tmp_path, monkeypatch):
    trainer(tmp_path / "run", text)
    said, real = [], module.environment
    monkeypatch.setattr(module, "environment", lambda: real() | {"numpy": "0.0.1"})
    trainer(tmp_path / "run", text, resume=True, said=said)
    assert said == [f"numpy changed from '{np.__version__}' to '0.0.1': bits may differ from an uninterrupted run"]


def test_trainer_damaged_train_json_is_named(text, tmp_path):
    trainer(tmp_path / "run", text)
    (tmp_path / "run" / "train.json").write_text('{"preset": nu', encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.json is damaged"):
        trainer(tmp_path / "run", text, resume=True)


def test_load_run_of_a_finished_run_is_its_final_model(whole):
    loaded = load_run(whole)
    assert loaded.step == 6
    assert loaded.model.lm_head.weight.data.tobytes() == load_pretrained(whole / "final").lm_head.weight.data.tobytes()


def test_load_run_of_a_run_that_goes_on_is_its_newest_checkpoint(text, tmp_path):
    out = tmp_path / "run"
    trainer(out, text, steps=2, eval_every=5).run()
    trainer(out, text, steps=8, resume=True, eval_every=5, on_evaluation=stop_at(5)).run()
    loaded, newest = load_run(out), load_pretrained(out / "checkpoints" / "step_00000005")
    assert loaded.step == 5
    assert loaded.model.lm_head.weight.data.tobytes() == newest.lm_head.weight.data.tobytes()


def test_trainer_grows_nothing_over_1000_steps(text, tmp_path):
    """One layer with experts and the MTP module behind it, checkpoints and evaluations on the way."""
    config = model_config(
        num_hidden_layers=1, first_k_dense_replace=0, hidden_size=8, moe_intermediate_size=4, n_routed_experts=4,
        n_group=2, topk_group=1, num_experts_per_tok=2,
    )  # fmt: skip
    settings = dict(steps=1000, shards=1, batch_size=2, seq_len=32, checkpoint_every=100, eval_every=100)
    t = trainer(tmp_path / "run", text, model=config, **settings)
    blocks = {}
    t._on_evaluation = lambda t, step, bits: blocks.update({step: (gc.collect(), sys.getallocatedblocks())[1]})
    t.run()
    steps = [step for step in blocks if 200 <= step < 1000]  # not the first, which fill caches
    per_step = np.polyfit(steps, [blocks[step] for step in steps], 1)[0]
    assert per_step < 0.2  # every array, number and dict of a step is a block: one that stays would make it 1


PEAK = """
import resource, sys
from pathlib import Path
from minidsv3.config import ModelConfig, TrainConfig, replace_settings
from minidsv3.train.trainer import Trainer
settings = dict(data=sys.argv[1], steps=4, eval_every=0, checkpoint_every=2)
model, train = replace_settings(ModelConfig.preset("tiny"), TrainConfig.preset("tiny"), settings)
Trainer(model, train, sys.argv[2], progress=False).run()
if sys.platform == "linux":  # a child's ru_maxrss begins at its parent's; VmHWM does not
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("peak MB", peak / (1e6 if sys.platform == "darwin" else 1e3 / 1.024))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_trainer_tiny_peaks_below_400_mb(text, tmp_path):
    """Whole process: interpreter, NumPy, model, optimizer, two shards at once, evaluation and two checkpoints."""
    done = python("-c", PEAK, text, str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 400


def test_trainer_init_from_takes_over_the_weights(whole, text, tmp_path):
    longer = trainer(tmp_path / "second", text, init_from=str(whole))
    stored = dict(load_pretrained(whole / "final").named_parameters())
    for name, parameter in longer.model.named_parameters():
        np.testing.assert_array_equal(parameter.data, stored[name].data)


def test_trainer_init_from_another_shape_is_refused(whole, text, tmp_path):
    other = model_config(moe_intermediate_size=6)
    with pytest.raises(ValueError, match=r"experts.*config\.json needs"):
        trainer(tmp_path / "second", text, model=other, init_from=str(whole))
