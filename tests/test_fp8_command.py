"""``fp8``: explain, check, recipe and the experiments at a size that takes no time."""

import numpy as np
import pytest

from minidsv3.commands import fp8_experiments, main
from minidsv3.config import TrainConfig
from minidsv3.pretrained.tensors import planned, write_tensors
from minidsv3.quant.blockwise import quantize_blocks, quantize_tiles
from minidsv3.quant.formats import E4M3
from minidsv3.quant.recipe import RECIPES, ROWS
from minidsv3.quant.tensorcore import deepgemm, tensorcore_matmul

RNG = np.random.default_rng(0)
CODES, OUTPUT = np.zeros((2, 3), dtype=np.float32).astype(E4M3), np.zeros((2, 2), dtype=np.float32)


def test_explain_shows_bits_value_and_neighbours(capsys):
    assert main(["fp8", "explain", "0.3", "--format", "e4m3"]) == 0
    said = capsys.readouterr().out
    assert "0 0101 010" in said and "0.3125" in said and "(1 + 2/8) * 2^-2" in said and "0.28125 and 0.34375" in said


def test_recipe_shows_every_row(capsys):
    assert main(["fp8", "recipe", "fp8:lm_head=fp8"]) == 0
    table = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert table == {**{row: RECIPES["fp8"][row] for row in ROWS}, "lm_head": "fp8"}


def dump(path, **tensors):
    write_tensors(planned({name: np.ascontiguousarray(t) for name, t in tensors.items()}), path)
    return str(path)


def test_check_of_the_right_bits_is_0(tmp_path, capsys):
    a, b = quantize_tiles(RNG.standard_normal((5, 300))), quantize_blocks(RNG.standard_normal((150, 300)))
    d = deepgemm(a.codes, a.scales, b.codes, b.scales)
    path = dump(
        tmp_path / "d.safetensors", a=a.codes, b=b.codes, a_scale=a.scales,
        b_scale=b.scales, d=d,
    )  # fmt: skip
    assert main(["fp8", "check", path]) == 0
    assert capsys.readouterr().out.startswith("0 of 750 outputs differ")


def test_check_says_what_explains_other_bits(tmp_path, capsys):
    a, b = (np.exp(RNG.standard_normal((n, 600))).astype(np.float32).astype(E4M3) for n in (6, 4))
    d = tensorcore_matmul(a, b, promote_every=128)
    path = dump(tmp_path / "d.safetensors", a=a, b=b, d=d)
    assert main(["fp8", "check", path]) == 1
    said = capsys.readouterr().out
    assert "first: output (" in said and "explained by: Hopper, promotion every 128" in said


@pytest.mark.parametrize("tensors, message", [
    (dict(a=CODES), "lacks b, d"), (dict(a=CODES, b=CODES, d=OUTPUT, e=OUTPUT), "unknown tensors e"),
    (dict(a=CODES, b=CODES, d=np.zeros(4, dtype=np.float32)), "matrix"),
    (dict(a=CODES.astype(np.float32), b=CODES, d=OUTPUT), "a is float32"),
])  # fmt: skip
def test_check_refuses(tmp_path, capsys, tensors, message):
    assert main(["fp8", "check", dump(tmp_path / "d.safetensors", **tensors)]) == 2
    assert message in capsys.readouterr().err


def test_check_of_a_missing_file_is_one_line(tmp_path, capsys):
    assert main(["fp8", "check", str(tmp_path / "none.safetensors")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def small(monkeypatch):
    """Experiments in seconds: a few steps of nano, short sums."""
    monkeypatch.setattr(fp8_experiments, "LENGTHS", (64, 128))
    monkeypatch.setattr(fp8_experiments, "INTERVALS", (32, 128, 256))
    slow = fp8_experiments.accumulation_error
    monkeypatch.setattr(fp8_experiments, "accumulation_error", lambda *a, **k: slow(*a, **k, size=16))
    prices = fp8_experiments.interval_prices
    monkeypatch.setattr(fp8_experiments, "interval_prices", lambda intervals: prices(intervals, K=256, size=16))
    twin = fp8_experiments.twin
    monkeypatch.setattr(fp8_experiments, "twin", lambda *a, **k: twin(*a, **k, preset="nano"))
    monkeypatch.setattr(fp8_experiments, "SMALL", dict(data="synthetic", batch_size=2, seq_len=16))


@pytest.mark.parametrize("name", ["accumulation", "interval", "memory", "rounding"])
def test_experiment_writes_figure_data_and_text(small, tmp_path, name):
    assert main(["fp8", "experiment", name, "--out", str(tmp_path), "--steps", "4"]) == 0
    assert {p.suffix for p in tmp_path.glob(f"fp8_{name}.*")} == {".png", ".csv", ".txt"}


def test_twins_of_another_batch_or_learning_rate_are_other_runs(small, tmp_path, monkeypatch):
    asked, twin = [], fp8_experiments.twin

    def asking(recipe, cfg, **options):
        asked.append((cfg.batch_size, cfg.seq_len, cfg.learning_rate))
        return twin(recipe, cfg, **options)

    monkeypatch.setattr(fp8_experiments, "twin", asking)
    command = [
        "fp8",
        "experiment",
        "twins",
        "--out",
        str(tmp_path),
        "--steps",
        "2",
        "--seeds",
        "3",
        "--variants",
        "fp8",
    ]
    usual = TrainConfig().learning_rate
    for flags in ([], ["--batch", "4", "8"], ["--lr", "0.0005"], ["--batch", "4", "8"]):
        assert main([*command, *flags]) == 0
    assert (
        asked == [(2, 16, usual)] * 2 + [(4, 8, usual)] * 2 + [(2, 16, 5e-4)] * 2
    )  # the fourth found its runs finished
    found = {p.name for p in (tmp_path / "runs").glob("fp8*")}
    assert found == {"fp8@fast@3@2.json", "fp8@fast@3@2@4x8.json", "fp8@fast@3@2@lr0.0005.json"}
    assert (tmp_path / "fp8_ends.csv").is_file()


def test_fp8_keeps_a_quarter_of_the_inputs_of_linear_layers():
    """FP8: 1 byte and 4 for each 128 (or fewer) numbers; gate and head keep float32, SwiGLU's output is not kept."""
    fp32, bf16, fp8 = (fp8_experiments.saved_bytes(p, (2, 64)) for p in ("fp32", "bf16", "fp8"))
    assert fp8["inputs of SwiGLU"] < 0.27 * fp32["inputs of SwiGLU"]
    assert fp8["inputs of linear layers"] < 0.6 * fp32["inputs of linear layers"]
    assert fp32["low-precision weights"] == 0 < fp8["low-precision weights"] < 0.53 * bf16["low-precision weights"]
    assert fp8["attention"] == fp32["attention"]
    as_it_runs = fp8_experiments.saved_bytes("fp32", (2, 64), again=True)  # nothing of attention's and SwiGLU's own
    assert {k for k in fp32 if as_it_runs[k] < fp32[k]} == {"inputs of linear layers"}
