"""The profile of a training run: its sums against the trace of one step, and what it leaves behind."""

import json

import pytest
from reference_model import odd_model, odd_tokens

from minidsv3.autograd import backward, trace
from minidsv3.commands import main
from minidsv3.plots import description, new_figure
from minidsv3.train.profile import Profile, Row
from minidsv3.train.profile_figures import time_per_op


def profiled(steps, workers=1, peak=10.0, work=lambda: None):
    """A finished profile of `steps` steps after one that was skipped."""
    done = []
    profile = Profile(workers, peak, done.append, skip=1, steps=steps)
    for step in range(steps + 2):
        work()
        profile(None, step)
    assert done == [profile]
    return profile


@pytest.fixture(scope="module")
def step():
    model = odd_model()
    tokens = odd_tokens(2, 6)

    def one():
        backward(model.loss(tokens[:, :-1], tokens[:, 1:]).total)

    return one


def test_profile_sums_are_those_of_a_trace(step):
    with trace() as records:
        step()
    profile = profiled(3, work=step)
    rows = {(row.name, row.phase): row for row in profile.rows()}
    for name, phase in {(r.name, r.phase) for r in records}:
        mine = [r for r in records if (r.name, r.phase) == (name, phase)]
        row = rows.pop((name.removesuffix("Function"), phase))
        assert row.calls == len(mine)
        assert row.saved_bytes == sum(r.saved_bytes for r in mine)
        assert row.gflops * row.seconds == pytest.approx(sum(r.flops for r in mine) / 1e9)
    assert not rows
    assert profile.gflop_per_step == pytest.approx(sum(r.flops for r in records) / 1e9)


def test_profile_shares_fit_into_the_workers_time(step):
    profile = profiled(2, workers=3, work=step)
    total = sum(row.share for row in profile.rows())
    assert 0 < total <= 1 / 3  # one thread did the work of three
    assert profile.share_of_peak == pytest.approx(profile.gflop_per_step / (profile.wall_seconds / 2) / 10.0)


def test_profile_watches_only_the_steps_that_were_asked_for(step):
    profile = Profile(1, 10.0, lambda profile: None, skip=2, steps=1)
    seen = []
    for at in range(5):
        step()
        profile(None, at)
        seen.append(len(profile.samples))
    assert seen[:2] == [0, 0] and seen[2] > 0 and seen[2:] == [seen[2]] * 3


def test_profile_that_ends_early_reports_once(step):
    done = []
    profile = Profile(1, 10.0, done.append, skip=1, steps=9)
    for at in range(3):
        step()
        profile(None, at)
    profile.close()
    profile.close()
    assert done == [profile] and profile.steps == 2


def test_figure_of_a_profile_names_the_longest_op():
    rows = [Row("Linear", "backward", 3, 0.5, 0.5, 80.0, 0), Row("RMSNorm", "forward", 2, 0.1, 0.1, 0.0, 9)]
    _, (ax,) = new_figure()
    time_per_op(ax, rows, 100.0, 0.41)
    assert "41%" in ax.get_title(loc="left").replace("\n", " ")
    assert "Linear backward with 500.0 ms" in description(ax)
    assert [t.get_text() for t in ax.texts] == ["80% of peak", ""]


def test_train_profile_prints_a_table_and_leaves_figure_and_trace(tmp_path, capsys):
    out = tmp_path / "run"
    settings = ["batch_size=4", "seq_len=16", "eval_every=0", "checkpoint_every=0"]
    argv = ["train", "--preset", "nano", "--data", "synthetic", "--steps", "4", "--out", str(out), "--profile"]
    assert main([*argv, "--quiet", "--set", *settings]) == 0
    text = capsys.readouterr().out
    assert "GroupedLinear          backward" in text and "outside of ops" in text and "(mean of 2 steps" in text
    assert (out / "figures" / "profile.png").exists() and (out / "figures" / "profile.csv").exists()
    events = json.loads((out / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert {e["args"]["module"] for e in events if e["ph"] == "X"} >= {"model.layers.1.mlp.gate", "lm_head"}
