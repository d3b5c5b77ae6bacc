"""One machine: bytes over bandwidth, what does not fit, and what a draft costs."""

import dataclasses

import pytest

from minidsv3 import ModelConfig
from minidsv3.accounting.dense import load_config
from minidsv3.accounting.local import Machine, local_report, local_row, weights_met
from minidsv3.accounting.params import count_parameters

V3, V2 = ModelConfig.preset("deepseek-v3"), ModelConfig.preset("deepseek-v2")
QWEN = load_config("qwen2.5-72b", None)


def test_a_token_meets_the_active_parameters_and_a_dense_model_all():
    met = weights_met(V3)
    assert met.always + met.met == 36_625_603_584
    assert weights_met(QWEN).met == QWEN.parameters - 152064 * 8192


def test_two_tokens_meet_the_experts_of_both():
    met = weights_met(V3)
    missed_by_both = (1 - 8 / 256) ** 2
    assert met.met_by_two == pytest.approx(met.spread * (1 - missed_by_both))


def test_ceiling_is_bandwidth_over_bytes():
    row = local_row(V2, "bf16", Machine(600e9, 500e9), 1000)
    nbytes = 2 * 20_851_512_320 + 1000 * 69_120
    assert row["bytes_read_per_token"] == nbytes
    assert row["tokens_per_second"] == pytest.approx(500e9 / nbytes)
    assert row["fits"] and row["longest_context"] == 163_840  # all that it has positions for
    tight = local_row(V2, "bf16", Machine(475e9, 500e9), 1000)
    assert tight["longest_context"] == (475_000_000_000 - 2 * 235_741_434_880) // 69_120


def test_published_personal_machine_is_within_reach():
    machine = Machine(128e9, 270e9)
    assert 20 < local_row(V2, "4-bit", machine, 4096)["tokens_per_second"] < 40  # "nearly 20, or even twice that"
    assert 1 < local_row(QWEN, "4-bit", machine, 4096)["tokens_per_second"] < 10  # "single digit"


def test_what_does_not_fit_runs_from_disk_only():
    assert local_row(V3, "fp8", Machine(128e9, 270e9), 4096)["tokens_per_second"] is None
    row = local_row(V3, "fp8", Machine(128e9, 270e9, 7e9), 4096)
    p, cache = count_parameters(V3), 4096 * 70_272
    experts = p.by_part["routed_experts"]
    share = (128e9 - cache - (p.total - experts)) / experts
    far = experts * 8 / 256 * (1 - share)
    near = 36_625_603_584 - far + cache
    assert row["share_in_memory"] == pytest.approx(share)
    assert row["tokens_per_second"] == pytest.approx(1 / (near / 270e9 + far / 7e9))


def test_what_must_be_in_memory_and_does_not_fit_cannot_run():
    assert local_row(V3, "bf16", Machine(16e9, 270e9, 7e9), 4096)["tokens_per_second"] is None


def test_mtp_gains_less_than_its_drafts_on_experts():
    row = local_row(V3, "fp8", Machine(800e9, 800e9), 4096, acceptance=0.8)
    gain = row["tokens_per_second_with_mtp"] / row["tokens_per_second"]
    assert 1 < gain < 1.8
    none = local_row(dataclasses.replace(V3, num_nextn_predict_layers=0), "fp8", Machine(800e9, 800e9), 4096)
    assert none["tokens_per_second_with_mtp"] is None


def test_report_covers_every_model_and_precision():
    report = local_report(Machine(128e9, 270e9), 4096)
    assert len(report["rows"]) == 5 * 3
    assert {row["kind"] for row in report["rows"]} == {"MoE, MLA", "dense, GQA"}


@pytest.mark.parametrize(
    ("machine", "context", "message"),
    [
        (Machine(0, 1e9), 10, "memory=0"),
        (Machine(1e9, -1.0), 10, "bandwidth=-1.0"),
        (Machine(1e9, 1e9, 0.0), 10, "disk=0.0"),
        (Machine(1e9, 1e9), 0, "context of 0 tokens"),
        (Machine(1e9, 1e9), 200_000, "context of 200000 tokens"),
    ],
)
def test_impossible_machine_is_refused(machine, context, message):
    with pytest.raises(ValueError, match=message):
        local_report(machine, context)
