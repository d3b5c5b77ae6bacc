"""Published beside ours: what must be exact, the known misprints, and verdicts that move with their inputs."""

import sys
from decimal import Decimal

import pytest

from minidsv3.accounting import paper
from minidsv3.accounting.paper import DOES_NOT_FOLLOW, EXACT, NOT_BUILT, STATED, WITHIN, Inputs, evaluate, judge

EXACT_TABLES = ("checkpoint-v2", "insights-2.3.2", "insights-5", "report-1", "report-2", "v2-1", "eplb-readme")
MISPRINTS = {
    "LLaMA-3.1 405B, multiple of DeepSeek-V3",
    "Qwen-72B dense, counted as the MoE rows",
    "LLaMa-405B dense, counted as the MoE rows",
    "bubble, MPFT",
    "standard deviation of the initial weights",
    "activated parameters, with head and embedding (first README)",
}


@pytest.fixture(scope="module")
def rows():
    return {(row.table, row.row): row for row in evaluate()}


def name_of(path):
    """Of a module of the package, or of a library."""
    return ".".join(path if path[0] in ("numpy", "builtins") else ["minidsv3", *path])


def ours(table, name, **changes):
    """One row, with changed inputs."""
    inputs = Inputs.published()
    for key, value in changes.items():
        inputs.change(key.replace("__", "."), value)
    return next(row for row in evaluate([table], inputs) if row.row == name)


def test_the_known_misprints_are_the_only_ones(rows):
    wrong = [row for row in rows.values() if row.verdict == DOES_NOT_FOLLOW]
    assert {row.row for row in wrong if "clock" not in row.table} == MISPRINTS  # the clock predicts, and may miss
    assert all(row.reason for row in wrong)


def test_what_can_be_exact_is(rows):
    inexact = [row for row in rows.values() if row.table in EXACT_TABLES and row.verdict != EXACT]
    assert [row.row for row in inexact if "ISCA" not in row.row] == []
    table_4 = [row for row in rows.values() if row.row.startswith(("MFU", "TFLOPS"))]
    assert len(table_4) == 8 and {row.verdict for row in table_4} == {EXACT}


def test_every_computed_row_names_a_function_that_is_there(rows):
    for row in rows.values():
        if row.computed_by is not None:
            path = row.computed_by.split(".")
            module = next(n for n in range(len(path), 0, -1) if name_of(path[:n]) in sys.modules)
            found = sys.modules[name_of(path[:module])]
            for name in path[module:]:
                found = getattr(found, name, None) or found.__dataclass_fields__[name]


def test_stated_and_missing_rows_are_listed_and_not_judged(rows):
    for row in rows.values():
        assert (row.ours is None) <= (row.verdict in (STATED, NOT_BUILT))
        assert (row.verdict == NOT_BUILT) <= row.reason.startswith("needs ")
    assert rows["insights-hardware", "memory demand grows a year by more than"].verdict == STATED


def test_a_missing_capability_leaves_its_rows_open(monkeypatch):
    monkeypatch.setitem(sys.modules, "minidsv3.hardware.topology", None)
    monkeypatch.delattr("minidsv3.hardware.topology", raising=False)
    found = evaluate(["insights-3", "insights-1"])
    missing = {row.verdict for row in found if row.table == "insights-3"}
    assert missing == {NOT_BUILT}
    assert {row.reason for row in found if row.table == "insights-3"} == {"needs minidsv3.hardware.topology"}
    assert found[-1].table == "insights-1" and found[-1].ours is not None


@pytest.mark.parametrize(
    ("table", "name", "key", "value", "expected"),
    [
        ("insights-1", "DeepSeek-V3 (MLA)", "deepseek-v3__kv_lora_rank", 256, 2 * (256 + 64) * 61 / 1e3),
        ("insights-4", "tokens per day, MPFT", "insights-4__step_seconds_mpft", 39.852, 136.40),
        ("insights-3", "FT2 endpoints", "insights-3__ports", 32, 512),
        ("insights-5", "InfiniBand, cross leaf", None, None, 3.7),
        ("report-1", "pre-training, dollars", "report-1__usd_per_gpu_hour", 3, 7.992),
        ("checkpoint-v2", "parameters", "deepseek-v2__vocab_size", 102401, 235741434880 + 2 * 5120),
        ("report-3.2", "GPUs", "report-3.2__dp", 64, 1024),
        ("service", "decode EP144, routed experts per GPU", "service__redundant", 176, 3),
    ],
)  # fmt: skip
def test_ours_and_the_verdict_move_with_an_input(table, name, key, value, expected):
    before = ours(table, name)
    assert before.verdict == EXACT
    after = ours(table, name, **({key: value} if key else {}))
    assert after.ours == pytest.approx(expected, rel=1e-4)
    assert (after.verdict == DOES_NOT_FOLLOW) is (key is not None)
    assert after.published == before.published


def test_a_small_change_of_the_step_time_is_seen_in_the_mfu():
    row = ours("insights-4", "MFU causal, MPFT", **{"insights-4__step_seconds_mpft": 20.0})
    assert row.verdict == DOES_NOT_FOLLOW and "more than 0.005" in row.reason
    assert row.ours == pytest.approx(38.9419 * 19.926 / 20.0, rel=1e-4)


@pytest.mark.parametrize(
    ("value", "entry", "verdict"),
    [
        (43.7279, {"published": Decimal("43.73")}, EXACT),
        (43.7351, {"published": Decimal("43.73")}, DOES_NOT_FOLLOW),
        (67.76, {"published": 67, "rounding": "truncated"}, EXACT),
        (67.76, {"published": 67}, DOES_NOT_FOLLOW),
        (1219.75, {"published": 1200, "quantum": 100}, EXACT),
        (272.527, {"published": Decimal("272.52"), "tolerance": Decimal("0.03")}, WITHIN),
        (272.56, {"published": Decimal("272.52"), "tolerance": Decimal("0.03")}, DOES_NOT_FOLLOW),
        (float("nan"), {"published": 1, "tolerance": 5}, DOES_NOT_FOLLOW),
    ],
)
def test_judge_looks_at_printed_digits_then_at_the_tolerance(value, entry, verdict):
    assert judge(value, entry)[0] == verdict


@pytest.mark.parametrize("name", ["deepseek-v3.kv_rank", "insights-4.seconds", "insights-9.ports", "ports"])
def test_unknown_input_is_named(name):
    with pytest.raises(ValueError, match=f"{name.rpartition('.')[2]}"):
        Inputs.published().change(name, 1)


def test_unknown_table_is_named():
    with pytest.raises(ValueError, match="table 'insights-99' is not one of"):
        evaluate(["insights-99"])


def test_summary_counts_all(rows):
    assert sum(paper.summary(list(rows.values())).values()) == len(rows)


def test_stored_runs_show_the_direction(rows):
    """Loss-free balancing against the auxiliary loss: six real runs of nano, published bounds of the toy run."""
    free, controlled = (rows["balancing-2", f"1B: MaxVio loss-{name}"].ours for name in ("free", "controlled"))
    assert free < 0.1 and controlled > 0.3
    assert rows["balancing-2", "1B: loss-free is not worse than loss-controlled"].verdict == EXACT
