"""``minidsv3 compare``: measures, groups of seeds, and verdicts that the seeds allow."""

import csv
import json
import statistics

import numpy as np
import pytest
from test_runs import STEPS, write_run

from minidsv3.commands import compare, main
from minidsv3.train.runs import read_run


def runs_of(tmp_path, *settings):
    folders = [write_run(tmp_path / f"r{n}", **one) for n, one in enumerate(settings)]
    return [read_run(folder) for folder in folders]


def compared(tmp_path, *settings):
    return compare.compare(runs_of(tmp_path, *settings))


def called(capsys, *argv):
    status = main(["compare", *map(str, argv)])
    return status, capsys.readouterr()


def test_measure_validation_is_that_of_the_last_evaluation(tmp_path):
    (run,) = runs_of(tmp_path, {"val": 2.25})
    assert compare.measure(run, 0.98)["val_bits_per_byte"] == 2.25


def test_measure_smoothed_validation_forgets_by_the_step(tmp_path):
    (run,) = runs_of(tmp_path, {})  # evaluates at steps 3, 6 and 7
    weights, val = [0.9**4, 0.9, 1.0], [2.54, 2.51, 2.5]
    expected = sum(w * v for w, v in zip(weights, val)) / sum(weights)
    assert compare.measure(run, 0.9)["val_smoothed"] == pytest.approx(expected, rel=1e-12)


def test_measure_main_loss_is_smoothed_to_the_last_step(tmp_path):
    (run,) = runs_of(tmp_path, {"loss": 3.0})
    weights = [0.5 ** (STEPS - step) for step in range(1, STEPS + 1)]
    expected = sum(w * (3 - 0.1 * step) for step, w in enumerate(weights, start=1)) / sum(weights)
    assert compare.measure(run, 0.5)["main_loss"] == pytest.approx(expected, rel=1e-12)


def test_measure_speed_is_the_median(tmp_path):
    (run,) = runs_of(tmp_path, {})
    assert compare.measure(run, 0.98)["tokens_per_second"] == statistics.median(range(1001, 1001 + STEPS))


def slow_max_vio(counts):
    mean = sum(counts) / len(counts)
    return (max(counts) - mean) / mean


def test_measure_max_vio_sums_the_last_hundred_steps_first(tmp_path):
    (run,) = runs_of(tmp_path, {"steps": 130})
    run.load[:] = np.random.default_rng(6).integers(1, 60, size=run.load.shape)
    layers = [[sum(int(run.load[n, m, e]) for n in range(30, 130)) for e in range(5)] for m in range(3)]
    expected = sum(map(slow_max_vio, layers)) / 3
    assert compare.measure(run, 0.98)["max_vio"] == pytest.approx(expected, rel=1e-12)


def test_measure_max_vio_of_batches_averages_the_last_hundred(tmp_path):
    (run,) = runs_of(tmp_path, {"steps": 130})
    run.load[:] = np.random.default_rng(7).integers(1, 60, size=run.load.shape)
    each = [slow_max_vio(run.load[n, m].tolist()) for n in range(30, 130) for m in range(3)]
    assert compare.measure(run, 0.98)["max_vio_batch"] == pytest.approx(sum(each) / 300, rel=1e-12)


def test_measure_without_experts_is_nan(tmp_path):
    (run,) = runs_of(tmp_path, {"model": {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0}})
    assert np.isnan(compare.measure(run, 0.98)["max_vio"])


def test_differences_name_settings_of_model_and_training(tmp_path):
    runs = runs_of(tmp_path, {}, {"seed": 3, "model": {"kv_lora_rank": 24}})
    assert compare.differences(runs) == {"kv_lora_rank": [16, 24], "seed": [0, 3]}


def test_groups_join_runs_that_differ_in_the_seed_only(tmp_path):
    c = compared(tmp_path, {}, {"learning_rate": 0.01}, {"seed": 1}, {"learning_rate": 0.01, "seed": 2})
    assert [group.members for group in c.groups] == [[0, 2], [1, 3]] and c.letters == ["A", "B", "A", "B"]


def test_groups_say_what_is_special_about_them(tmp_path):
    c = compared(tmp_path, {}, {"learning_rate": 0.01}, {"seed": 1})
    assert [group.settings for group in c.groups] == ["learning_rate=0.003", "learning_rate=0.01"]


def test_groups_do_not_depend_on_the_name_of_the_preset(tmp_path):
    runs = runs_of(tmp_path, {}, {"seed": 1})
    object.__setattr__(runs[1], "preset", None)
    assert len(compare.compare(runs).groups) == 1


def test_group_mean_and_spread_are_over_seeds(tmp_path):
    (group,) = compared(tmp_path, *({"seed": n, "val": val} for n, val in enumerate((2.0, 2.5, 2.1)))).groups
    key = "val_bits_per_byte"
    found = (group.mean(key), group.spread(key), group.deviation(key))
    assert found == pytest.approx((2.2, 0.5, statistics.stdev([2.0, 2.5, 2.1])), rel=1e-12)


def test_group_runs_of_equal_seed_count_once(tmp_path):
    (group,) = compared(tmp_path, {"val": 2.0}, {"val": 2.5}, {"val": 3.0, "seed": 4}).groups
    assert group.values["val_bits_per_byte"] == [2.25, 3.0] and group.seeds == [0, 4]


def verdict(c):
    return next(sentence for sentence in c.verdicts if "validation" in sentence)


def settings_of(first, second):
    groups = [({}, first), ({"learning_rate": 0.01}, second)]
    return [{**train, "seed": seed, "val": val} for train, values in groups for seed, val in enumerate(values)]


def test_verdict_within_the_spread_is_no_difference(tmp_path):
    found = verdict(compared(tmp_path, *settings_of((2.0, 2.25), (2.05, 2.0))))
    assert found == "A and B, validation bits/byte: no difference beyond the seed spread of 0.25"


def test_verdict_beyond_the_spread_names_the_lower_group(tmp_path):
    found = verdict(compared(tmp_path, *settings_of((2.0, 2.25), (1.5, 1.625, 1.75))))
    expected = "A and B, validation bits/byte: B is lower by 0.5, beyond the seed spread of 0.25 (2 and 3 seeds)"
    assert found == expected


def test_verdict_of_single_seeds_says_that_the_spread_is_unknown(tmp_path):
    found = verdict(compared(tmp_path, *settings_of((2.0,), (1.5,))))
    assert "B is lower by 0.5, but the seed spread of A and B is unknown" in found


def test_verdict_against_a_single_seed_uses_the_known_spread(tmp_path):
    found = verdict(compared(tmp_path, *settings_of((2.0, 2.25), (2.0,))))
    assert found.endswith("no difference beyond the seed spread of 0.25")


def test_verdict_beyond_one_known_spread_stays_open(tmp_path):
    found = verdict(compared(tmp_path, *settings_of((2.0, 2.25), (1.0,))))
    assert "the seed spread of B is unknown" in found


def test_verdict_of_a_diverged_run_is_none(tmp_path):
    runs = runs_of(tmp_path, {}, {"learning_rate": 9.0})
    runs[1].metrics["main_loss"][4:] = np.nan
    sentence = next(one for one in compare.compare(runs).verdicts if "main loss" in one)
    assert sentence.endswith("no verdict, B has no finite value")


@pytest.mark.parametrize(
    "change, note",
    [
        ({"steps": 5}, "different numbers of steps"),
        ({"data": "python"}, "different data"),
        ({"model": {"vocab_size": 300}}, "different vocabularies"),
    ],
)
def test_notes_say_what_is_not_comparable(tmp_path, change, note):
    c = compared(tmp_path, {}, change)
    assert sum(note in sentence for sentence in c.verdicts) == 1


def test_command_prints_differences_first(tmp_path, capsys):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)]
    status, output = called(capsys, *folders)
    assert status == 0 and output.out.splitlines()[0] == "Settings that differ"


def test_command_takes_one_directory(tmp_path, capsys):
    status, output = called(capsys, write_run(tmp_path / "a"))
    assert status == 0 and "unknown" in output.out


def test_command_csv_has_one_row_for_each_run(tmp_path, capsys):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1, val=2.75)]
    called(capsys, *folders, "--csv", tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["seed"], row["val_bits_per_byte"]) for row in rows] == [
        ("a", "0", "2.5"),
        ("b", "1", "2.75"),
    ]


def test_command_json_is_strict_json(tmp_path, capsys):
    folder = write_run(tmp_path / "a", model={"first_k_dense_replace": 3, "num_nextn_predict_layers": 0})
    _, output = called(capsys, folder, "--json")

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(output.out, parse_constant=refuse)["runs"][0]["max_vio"] is None


def test_command_figure_has_data_and_text(tmp_path, capsys):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)]
    called(capsys, *folders, "--figure", tmp_path / "over.svg")
    assert {file.name for file in tmp_path.glob("over.*")} == {"over.svg", "over.csv", "over.txt"}


@pytest.mark.parametrize("batch_size, label", [(16, "training step"), (8, "training tokens")])
def test_command_figure_counts_tokens_where_steps_differ(tmp_path, capsys, monkeypatch, batch_size, label):
    from minidsv3.train import figures

    seen = []
    real = figures.overlay
    monkeypatch.setattr(figures, "overlay", lambda ax, curves, **k: seen.append(k["x_label"]) or real(ax, curves, **k))
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", batch_size=batch_size)]
    called(capsys, *folders, "--figure", tmp_path / "over.svg")
    assert seen == [label] * 3  # validation, loss, MaxVio


def test_command_refuses_csv_in_the_place_of_the_figure_data(tmp_path, capsys):
    folder = write_run(tmp_path / "a")
    status, output = called(capsys, folder, "--csv", tmp_path / "x.csv", "--figure", tmp_path / "x.png")
    assert status == 2 and "give one of them another name" in output.err and not list(tmp_path.glob("x.*"))


def test_command_refuses_a_folder_given_twice(tmp_path, capsys):
    folder = write_run(tmp_path / "a")
    status, output = called(capsys, folder, tmp_path / "." / "a")
    assert status == 2 and "given twice" in output.err


def test_command_refuses_a_run_without_steps(tmp_path, capsys):
    status, output = called(capsys, write_run(tmp_path / "a", steps=0))
    assert status == 2 and "no complete step yet" in output.err


def test_command_names_folders_of_equal_name_by_path(tmp_path, capsys):
    folders = [write_run(tmp_path / parent / "run", seed=n) for n, parent in enumerate("xy")]
    _, output = called(capsys, *folders, "--json")
    assert [run["run"] for run in json.loads(output.out)["runs"]] == [str(folder) for folder in folders]
