"""Against what the transformers library computed for tiny models (tests/golden, made by tests/parity/make_goldens.py).

The weights are written as a released directory and read by `load_pretrained`, so the whole way from a file to logits
is what is compared. torch and transformers are not needed here.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from minidsv3.autograd import backward
from minidsv3.generation import generate
from minidsv3.pretrained import load_pretrained

FILES = sorted((Path(__file__).parent / "golden").glob("transformers_*.npz"))


def unpacked(golden, kind):
    """Name -> float32 array."""
    arrays, at = {}, 0
    for name, shape in json.loads(str(golden[f"{kind}_listed"])):
        size = int(np.prod(shape))
        arrays[name] = golden[kind][at : at + size].astype(np.float32).reshape(shape)
        at += size
    return arrays


@pytest.fixture(scope="module", params=FILES, ids=[f.stem for f in FILES])
def golden(request):
    with np.load(request.param) as file:
        return dict(file)


@pytest.fixture(scope="module")
def model(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    save_file(unpacked(golden, "weights"), folder / "model.safetensors")
    (folder / "config.json").write_text(str(golden["config"]), encoding="utf-8")
    return load_pretrained(folder)


def test_golden_files_cover_the_kinds_of_the_family():
    found = {f.stem.removeprefix("transformers_") for f in FILES}
    assert found == {
        *("v3", "v3_no_q_lora", "v3_yarn", "v3_half_split_rope", "v3_unnormalised", "v3_shared_experts", "v3_tied"),
        *("v3_one_expert", "v3_eps", "v2_greedy", "v2_group_limited", "v2_yarn"),
    }


def test_golden_files_are_small():
    assert max(file.stat().st_size for file in FILES) < 60_000


def test_golden_logits(golden, model):
    logits = model.logits(golden["tokens"][:, :-1].astype(np.int64))
    assert np.abs(golden["logits"]).max() > 1  # logits that say something
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)  # float32 in another order of sums


def test_golden_loss(golden, model):
    tokens = golden["tokens"].astype(np.int64)
    loss = model.loss(tokens[:, :-1], tokens[:, 1:], mtp_weight=0.0, balance_weight=0.0)
    assert float(loss.main) == pytest.approx(float(golden["loss"]), rel=0, abs=1e-5)


def test_golden_gradients(golden, model):
    tokens = golden["tokens"].astype(np.int64)
    for parameter in model.parameters():
        parameter.zero_grad()
    backward(model.loss(tokens[:, :-1], tokens[:, 1:], mtp_weight=0.0, balance_weight=0.0).main)
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, expected in unpacked(golden, "gradients").items():
        scale = np.abs(expected).max()  # relative to the tensor's largest: single numbers may cancel to near zero
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=1e-4 * scale, err_msg=name)


def test_golden_greedy_tokens(golden, model):
    prompt = golden["tokens"][0, :4].astype(np.int64)
    assert generate(model, [prompt], len(golden["greedy"])).tokens[0].tolist() == golden["greedy"].tolist()
