"""Parameters: the published integers, sums by hand, and files that were really written."""

import dataclasses

import numpy as np
import pytest
from small_runs import model_config, new_model

from minidsv3 import ModelConfig, Transformer, save_pretrained
from minidsv3.accounting.params import (
    count_checkpoint,
    count_parameters,
    parameter_report,
    parameters_by_place,
    stored_as,
)
from minidsv3.pretrained.tensors import TensorFile

V3, V2, LITE = (ModelConfig.preset(f"deepseek-{name}") for name in ("v3", "v2", "v2-lite"))
# Kimi-K2's shapes: the same architecture with other numbers
K2 = dataclasses.replace(
    V3, vocab_size=163840, num_attention_heads=64, n_routed_experts=384, first_k_dense_replace=1, n_group=1,
    topk_group=1, num_nextn_predict_layers=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def v3_report():
    return parameter_report(V3)


def test_v3_totals_are_the_published_integers(v3_report):
    assert v3_report["parameters"] == 671_026_404_352
    assert v3_report["parameters_with_gate_bias"] == 671_026_419_200
    assert v3_report["active_with_head"] == 36_625_603_584
    assert v3_report["active_with_head_and_embedding"] == 37_552_282_624


def test_v3_checkpoint_is_that_of_the_released_files(v3_report):
    assert v3_report["by_dtype"] == {"BF16": 3_918_786_560, "F8_E4M3": 680_571_043_840, "F32": 41_555_600}
    assert v3_report["tensors_by_dtype"] == {"BF16": 316, "F8_E4M3": 45_808, "F32": 45_867}
    assert v3_report["checkpoint_elements"] == 684_531_386_000
    assert v3_report["checkpoint_tensors"] == 91_991
    assert v3_report["checkpoint_bytes"] == 688_574_839_360


def test_v3_mtp_is_counted_with_and_without_its_copies(v3_report):
    assert v3_report["mtp_parameters"] + 256 == 11_610_068_224  # with the bias of its gate
    assert v3_report["mtp_parameters_without_eh_proj"] == 11_507_307_776 - 256
    assert v3_report["mtp_parameters_as_stored"] == 13_463_426_304


@pytest.mark.parametrize(
    ("cfg", "total", "active"),
    [(V2, 235_741_434_880, 21_375_800_320), (LITE, 15_706_484_224, 2_661_150_208), (K2, 1_026_408_209_408, None)],
    ids=["v2", "v2-lite", "k2"],
)
def test_totals_of_other_models_of_the_family(cfg, total, active):
    counted = count_parameters(cfg)
    assert counted.total == total
    assert active in (None, counted.active_with_head_and_embedding)


def test_v3_parts_are_those_counted_by_hand():
    D, H, E, F = 7168, 128, 256, 2048
    mla = D * 1536 + 1536 * H * 192 + D * 576 + 512 * H * 256 + H * 128 * D + 1536 + 512
    assert count_parameters(V3).by_part == {
        "embedding": 129280 * D,
        "attention": 61 * mla,
        "dense_ffn": 3 * 3 * D * 18432,
        "routed_experts": 58 * E * 3 * D * F,
        "shared_experts": 58 * 3 * D * F,
        "gate": 58 * E * D,
        "norms": (2 * 61 + 1) * D,
        "lm_head": 129280 * D,
    }


@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": None}, {"num_nextn_predict_layers": 2}, {"n_shared_experts": 0, "num_nextn_predict_layers": 0},
     {"first_k_dense_replace": 2, "num_nextn_predict_layers": 0}, {"tie_word_embeddings": True}],
)  # fmt: skip
def test_weights_are_all_parameters_of_the_model_once(changes):
    model = Transformer(model_config(**changes))
    counted = [id(parameter) for *_, parameter in parameters_by_place(model)]
    assert len(set(counted)) == len(counted)
    assert set(counted) == {id(parameter) for parameter in model.parameters()}


def test_tied_head_is_counted_once_and_is_active():
    untied, tied = (count_parameters(model_config(tie_word_embeddings=tie)) for tie in (False, True))
    table = 257 * 20
    assert untied.total - tied.total == table
    assert tied.active_with_head == tied.active_with_head_and_embedding == untied.active_with_head


def test_active_is_what_remains_when_idle_experts_are_taken_away():
    cfg = model_config(num_nextn_predict_layers=0)  # 8 experts, 3 a token
    few = count_parameters(dataclasses.replace(cfg, n_routed_experts=3, n_group=1, topk_group=1)).total
    gate_rows = 5 * 20  # of the experts that are gone
    assert count_parameters(cfg).active_with_head_and_embedding == few + gate_rows


@pytest.mark.parametrize("dtype", ["fp8", "bf16", "fp32"])
def test_checkpoint_is_what_is_really_written(tmp_path, dtype):
    cfg = model_config()
    save_pretrained(new_model(cfg), tmp_path / "m", dtype)
    file = TensorFile(tmp_path / "m" / "model.safetensors")
    names = {"float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}
    elements, tensors, nbytes = {}, {}, {}
    for name in file.names:
        kind, size = names[file.dtype(name).name], int(np.prod(file.shape(name)))
        elements[kind] = elements.get(kind, 0) + size
        tensors[kind] = tensors.get(kind, 0) + 1
        nbytes[kind] = nbytes.get(kind, 0) + file.array(name).nbytes
    counted = count_checkpoint(cfg, dtype)
    assert (counted.elements, counted.tensors, counted.nbytes) == (elements, tensors, nbytes)


@pytest.mark.parametrize(
    ("extra", "kind", "stored"),
    [
        ({}, "deepseek_v3", "fp8"),
        ({}, "deepseek_v2", "bf16"),
        ({"torch_dtype": "bfloat16"}, "deepseek_v3", "bf16"),
        ({"dtype": "float32"}, "deepseek_v3", "fp32"),
        ({"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}, "deepseek_v3", "fp8"),
    ],
)
def test_stored_dtype_is_what_the_config_says(extra, kind, stored):
    assert stored_as(model_config(extra=extra, model_type=kind)) == stored


@pytest.mark.parametrize("extra", [{"quantization_config": {"quant_method": "awq"}}, {"torch_dtype": "float16"}])
def test_unknown_storage_is_refused(extra):
    with pytest.raises(ValueError, match=r"awq|float16"):
        stored_as(model_config(extra=extra))


@pytest.mark.filterwarnings("ignore::EncodingWarning")  # of transformers' own files
def test_transformers_counts_the_same_main_model():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config())
    assert sum(p.numel() for p in theirs.parameters()) == count_parameters(V3).total
