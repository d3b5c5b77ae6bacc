"""Memory of a training GPU: sums over all GPUs, a published calculator, what each choice must change, and refusals."""

import dataclasses

import pytest
from small_runs import model_config

from minidsv3 import ModelConfig
from minidsv3.accounting import memory
from minidsv3.accounting.memory import STATES, Layout, memory_report
from minidsv3.accounting.params import count_checkpoint, count_parameters
from minidsv3.parallel.schedules import peak_live

V3 = ModelConfig.preset("deepseek-v3")
NO_MTP = dataclasses.replace(V3, num_nextn_predict_layers=0)
AS_REPORT = dict(pp=16, ep=64, dp=128, schedule="dualpipe", recompute="report", precision="fp8")


def stages(cfg, **layout):
    return memory_report(cfg, Layout(**layout))["per_stage"]


def of_all_gpus(cfg, state, **layout):
    """Sum of a state over all GPUs of one TP x DP group, replicas included."""
    return sum(stage[state] for stage in stages(cfg, **layout)) * layout.get("dp", 1) * layout.get("tp", 1)


def test_one_gpu_holds_every_state_of_every_parameter():
    total = count_parameters(NO_MTP).total
    (gpu,) = stages(NO_MTP, zero=0)
    assert [gpu[s] for s in STATES[:4]] == [2 * total, 4 * total, 4 * total, 4 * total]
    (gpu,) = stages(NO_MTP, zero=0, precision="fp32")
    assert [gpu[s] for s in STATES[:4]] == [4 * total, 0, 4 * total, 8 * total]


def test_fp8_weights_are_the_bytes_of_the_checkpoint():
    stored = count_checkpoint(NO_MTP, "fp8")
    bias = 4 * 58 * 256
    assert stages(NO_MTP, zero=0, precision="fp8")[0]["weights"] == sum(stored.nbytes.values()) - bias


@pytest.mark.parametrize("pp", [1, 4, 16, 61])
def test_stages_of_1f1b_are_the_whole_model(pp):
    assert sum(s["weights"] for s in stages(NO_MTP, pp=pp, micro_batches=122)) == 2 * count_parameters(NO_MTP).total


def test_dualpipe_holds_every_parameter_twice():
    plain, twice = (stages(NO_MTP, pp=16, schedule=name, zero=0) for name in ("1f1b", "dualpipe"))
    for state in STATES[:4]:
        assert sum(s[state] for s in twice) == 2 * sum(s[state] for s in plain)
        assert [s[state] for s in twice] == [s[state] for s in reversed(twice)]


def test_dualpipev_holds_every_parameter_once():
    folded = stages(NO_MTP, pp=8, schedule="dualpipev")
    assert sum(s["weights"] for s in folded) == 2 * count_parameters(NO_MTP).total
    assert folded[0]["layers"] == [0, 1, 2, 3, 58, 59, 60]


def test_mtp_needs_a_copy_of_the_embedding_unless_dualpipe_has_it_there():
    p = count_parameters(V3)
    alone = 2 * (p.total + sum(p.mtp.values()))
    assert sum(s["weights"] for s in stages(V3, pp=16)) == alone + 2 * p.by_part["embedding"]
    assert sum(s["weights"] for s in stages(V3, pp=16, schedule="dualpipe")) == 2 * alone


def test_experts_are_dealt_out_and_the_rest_is_repeated():
    p = count_parameters(NO_MTP)
    experts = p.by_part["routed_experts"]
    (gpu,) = stages(NO_MTP, ep=32, dp=32)
    assert gpu["weights"] == 2 * (p.total - experts + experts // 32)


@pytest.mark.parametrize(("zero", "sharded"), [(0, ()), (1, (1, 3)), (2, (1, 2, 3)), (3, (0, 1, 2, 3))])
def test_zero_shards_what_its_level_says(zero, sharded):
    whole = stages(NO_MTP, ep=8, dp=16, zero=0)[0]
    level = stages(NO_MTP, ep=8, dp=16, zero=zero)[0]
    experts = count_parameters(NO_MTP).by_part["routed_experts"] // 8
    dense = count_parameters(NO_MTP).total - 8 * experts
    for n, state in enumerate(STATES[:4]):
        each = whole[state] // (dense + experts)  # bytes of one number
        expected = each * (dense / 16 + experts / 2) if n in sharded else whole[state]
        assert level[state] == pytest.approx(expected, abs=2 * each)


def test_sharded_states_of_all_gpus_are_one_copy():
    total = count_parameters(NO_MTP).total
    for schedule in ("1f1b", "dualpipe"):
        held = of_all_gpus(NO_MTP, "master", pp=16, ep=64, dp=128, schedule=schedule)
        assert 4 * total <= held <= 4 * total * 1.0001  # the last shard is padded


def test_weights_gradients_and_optimizer_are_those_of_a_published_calculator():
    """SimuMax for PP 16, EP 64, 2,048 GPUs, no MTP: 18.48 GiB in the first stage, 13.16 GiB in a middle one."""
    layout = dict(pp=16, ep=64, dp=128, precision="bf16,moments=fp32")
    held = [sum(s[state] for state in STATES[:4]) / 2**30 for s in stages(NO_MTP, **layout)]
    assert (round(held[0], 2), round(held[5], 2)) == (18.48, 13.16)


def test_tensor_parallelism_splits_heads_and_widths_only():
    cfg = model_config(num_attention_heads=4, vocab_size=256, num_nextn_predict_layers=0)
    D, r_q, r_kv, d_r = 20, 10, 6, 2
    repeated = 2 * (r_q * D + (r_kv + d_r) * D + r_q + r_kv) + 5 * D + 8 * D  # latents, their norms, norms, gate
    experts = 8 * 3 * D * 12
    split = count_parameters(cfg).total - repeated - experts
    (gpu,) = stages(cfg, tp=2, seq_len=32)
    assert gpu["weights"] == 2 * (repeated + experts + split // 2)


def test_tensor_parallelism_divides_activations():
    one, two = (stages(NO_MTP, tp=tp)[0]["activations"] for tp in (1, 2))
    assert two == -(-one // 2)


def test_activations_in_flight_follow_the_schedule():
    for name, expected in (("1f1b", [16, 15, 14]), ("zb1p", [16, 16, 16]), ("dualpipe", [17, 17, 17])):
        report = memory_report(NO_MTP, Layout(pp=16, schedule=name))
        assert [s["micro_batches_in_flight"] for s in report["per_stage"]][:3] == expected
        assert [s["micro_batches_in_flight"] for s in report["per_stage"]] == peak_live(
            Layout(pp=16, schedule=name).plan
        )


def test_activations_of_dualpipe_are_those_of_its_two_stages():
    report = memory_report(NO_MTP, Layout(pp=16, schedule="dualpipe"))
    kept = report["activations_per_micro_batch"]
    for rank in (0, 5, 15):
        expected = (16 - rank) * kept[rank] + (rank + 1) * kept[15 - rank]
        assert report["per_stage"][rank]["activations"] == expected


def test_activations_grow_with_the_micro_batch():
    one, three = (stages(V3, **AS_REPORT, micro_batch=n)[4]["activations"] for n in (1, 3))
    assert three == 3 * one


def test_recomputation_brings_one_layer_back():
    report = memory_report(NO_MTP, Layout(pp=61, micro_batches=122, recompute="full"))
    plain = memory_report(NO_MTP, Layout(pp=61, micro_batches=122))
    full, none = report["activations_per_micro_batch"][30], plain["activations_per_micro_batch"][30]
    assert report["per_stage"][30]["activations"] == 31 * full + (none - full)


def test_the_layout_of_the_report_fits_its_gpus():
    with_it, without, bf16 = (
        memory_report(V3, Layout(**{**AS_REPORT, **changes}))["largest"]
        for changes in ({}, {"recompute": "none"}, {"precision": "bf16"})
    )
    assert with_it < 80e9 < bf16 < without


def test_uneven_stages_give_the_first_ones_more():
    layers = [len(r) for r in memory.layers_of_stages(61, 16)]
    assert layers == [4] * 13 + [3] * 3
    assert [layer for r in memory.layers_of_stages(7, 3) for layer in r] == list(range(7))


def test_buffers_are_messages_rows_and_the_gate_bias():
    T, D, K = 4096, 7168, 8
    bias, messages = 4 * 256 * 4, 4 * T * D * 2
    rows = T * K * D * 2 * 4
    assert stages(NO_MTP, pp=16, ep=64, dp=64)[3]["buffers"] == bias + messages + rows
    assert stages(NO_MTP, pp=16)[3]["buffers"] == bias + messages
    assert stages(NO_MTP, pp=16, schedule="dualpipe")[3]["buffers"] == 2 * (bias + messages)


def test_totals_add_up():
    for stage in stages(V3, **AS_REPORT):
        assert stage["total"] == sum(stage[state] for state in STATES)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (dict(ep=48, dp=48), "ep=48 does not divide n_routed_experts=256"),
        (dict(ep=64, dp=32), r"ep=64 does not divide tp \* dp = 32"),
        (dict(pp=62), "62 stages for num_hidden_layers=61"),
        (dict(pp=32, schedule="dualpipev", micro_batches=64), "64 stages for num_hidden_layers=61"),
        (dict(pp=15, schedule="dualpipe"), "ranks=15 and chunks=120 must both be even"),
        (dict(pp=16, schedule="dualpipe", micro_batches=30), "chunks=30 is less than"),
        (dict(tp=3), "tp=3 does not divide num_attention_heads=128"),
        (dict(tp=2, seq_len=4095), "tp=2 does not divide seq_len=4095"),
        (dict(zero=4), "zero=4 is not 0, 1, 2 or 3"),
        (dict(pp=0), "pp=0 is not a whole number of at least 1"),
        (dict(schedule="gpipe"), "schedule='gpipe' is not one of 1f1b"),
        (dict(recompute="some"), "recompute='some'"),
        (dict(precision="int8"), "precision='int8' is not one of 'fp32'"),
        (dict(precision="bf16,moments=int8"), "'moments=int8' is not STATE=FORMAT"),
        (dict(seq_len=200_000), "context of 200000 tokens is not between 1 and max_position_embeddings=163840"),
    ],
)
def test_layout_that_does_not_fit_is_refused(layout, message):
    with pytest.raises(ValueError, match=message):
        memory_report(NO_MTP, Layout(**layout))
