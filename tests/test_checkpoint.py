"""Checkpoints: everything that a run needs, whole or not at all."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_runs import Stepping, new_model, train_config

from minidsv3.pretrained import load_pretrained
from minidsv3.train.checkpoint import checkpoints, load_checkpoint, prune, save_checkpoint
from minidsv3.train.step import gates, train_step


def stepped(steps, **changes):
    s = Stepping(train_config(**changes))
    for step in range(1, steps + 1):
        train_step(*s.arguments(step))
    return s


def state_of(s):
    biases = [gate.e_score_correction_bias.tobytes() for gate in gates(s.model)]
    return s.flat.data.tobytes(), s.optimizer.exp_avg.tobytes(), s.optimizer.exp_avg_sq.tobytes(), biases


def save(folder, s, step=3):
    return save_checkpoint(folder, step, s.model, s.optimizer, {"position": 12})


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path, stepped(3))


@pytest.mark.parametrize("moments_dtype", ["float32", "bfloat16"])
def test_checkpoint_round_trip_is_exact(tmp_path, moments_dtype):
    s, fresh = stepped(3, moments_dtype=moments_dtype), Stepping(train_config(moments_dtype=moments_dtype))
    load_checkpoint(save(tmp_path, s), fresh.model, fresh.optimizer)
    assert state_of(fresh) == state_of(s)


@pytest.mark.parametrize("moments_dtype", ["float32", "bfloat16"])
def test_checkpoint_goes_on_to_the_same_bits(tmp_path, moments_dtype):
    s, fresh = stepped(3, moments_dtype=moments_dtype), Stepping(train_config(moments_dtype=moments_dtype))
    load_checkpoint(save(tmp_path, s), fresh.model, fresh.optimizer)
    for one in (s, fresh):
        train_step(*one.arguments(4))
    assert state_of(fresh) == state_of(s)


def test_checkpoint_loaded_weights_are_still_views_of_the_flat_buffer(saved):
    fresh = Stepping(train_config())
    load_checkpoint(saved, fresh.model, fresh.optimizer)
    assert all(np.shares_memory(p.data, fresh.flat.data) for p in fresh.model.parameters())


def test_checkpoint_holds_exactly_these_files(saved):
    names = {path.name for path in saved.iterdir()}
    assert names == {"config.json", "model.safetensors", "optimizer.safetensors", "trainer.json"}


def test_checkpoint_is_named_by_its_step(saved):
    assert saved.name == "step_00000003"


def test_checkpoint_returns_what_was_stored_beside_it(saved):
    fresh = Stepping(train_config())
    assert load_checkpoint(saved, fresh.model, fresh.optimizer) == {"step": 3, "position": 12}


def test_checkpoint_is_a_model_directory(saved):
    expected = {name: p.data.tobytes() for name, p in stepped(3).model.named_parameters()}
    assert {name: p.data.tobytes() for name, p in load_pretrained(saved).named_parameters()} == expected


def test_checkpoint_moments_have_the_names_of_the_weights(saved):
    moments = load_file(saved / "optimizer.safetensors")
    names = [name for name, _ in new_model().named_parameters()]
    assert set(moments) == {f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in names}


def test_checkpoint_of_the_same_step_is_replaced(tmp_path, saved):
    s = stepped(4)
    save(tmp_path, s, step=3)
    fresh = Stepping(train_config())
    load_checkpoint(saved, fresh.model, fresh.optimizer)
    assert state_of(fresh) == state_of(s) and [path.name for path in tmp_path.iterdir()] == [saved.name]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.json"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_load_checkpoint_names_a_file_that_is_cut(saved, name, share):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(share * len(content))])
    fresh = Stepping(train_config())
    with pytest.raises(ValueError, match=rf"{name}.*; delete .*step_00000003 to go on from the checkpoint before it"):
        load_checkpoint(saved, fresh.model, fresh.optimizer)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.json"])
def test_load_checkpoint_names_a_file_that_is_missing(saved, name):
    (saved / name).unlink()
    fresh = Stepping(train_config())
    with pytest.raises(ValueError, match=rf"{name}.*; delete .*step_00000003"):
        load_checkpoint(saved, fresh.model, fresh.optimizer)


@pytest.mark.parametrize("text", ["[]", "{}", '{"step": "3"}', "3"])
def test_load_checkpoint_names_a_trainer_json_without_step(saved, text):
    (saved / "trainer.json").write_text(text, encoding="utf-8")
    fresh = Stepping(train_config())
    with pytest.raises(ValueError, match=r"trainer\.json.*step"):
        load_checkpoint(saved, fresh.model, fresh.optimizer)


def test_load_checkpoint_refuses_moments_of_another_dtype(saved):
    fresh = Stepping(train_config(moments_dtype="bfloat16"))
    with pytest.raises(ValueError, match="does not belong to this run"):
        load_checkpoint(saved, fresh.model, fresh.optimizer)


def test_load_checkpoint_names_a_missing_moment(saved):
    moments = load_file(saved / "optimizer.safetensors")
    del moments["exp_avg_sq.model.norm.weight"]
    save_file(moments, saved / "optimizer.safetensors")
    fresh = Stepping(train_config())
    with pytest.raises(ValueError, match=r"'exp_avg_sq\.model\.norm\.weight' is missing"):
        load_checkpoint(saved, fresh.model, fresh.optimizer)


def make_folders(folder, *names):
    for name in names:
        (folder / name).mkdir()
        (folder / name / "trainer.json").write_text(json.dumps(name), encoding="utf-8")


def test_checkpoints_are_the_complete_ones_oldest_first(tmp_path):
    make_folders(tmp_path, "step_00000010", "step_00000002", ".step_00000012.tmp", ".step_00000010.old", "step_x")
    (tmp_path / "step_00000099").write_text("a file", encoding="utf-8")
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002", "step_00000010"]


def test_checkpoints_of_a_missing_folder_are_none(tmp_path):
    assert checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_prune_keeps_the_newest(tmp_path, keep):
    steps = [f"step_{n:08d}" for n in (2, 4, 100)]
    make_folders(tmp_path, *steps)
    prune(tmp_path, keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == steps[-keep:]


def test_prune_deletes_what_an_interrupted_save_left(tmp_path):
    make_folders(tmp_path, "step_00000002", ".step_00000004.tmp", ".step_00000002.old")
    prune(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
