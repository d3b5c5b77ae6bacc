"""Against the transformers library itself, where it and torch are installed (extra `parity`); else skipped.

The same kinds of models as in tests/golden, and more that a small file could not hold: every gradient, models that we
saved and transformers loads, MTP modules, and the parameter count at the real shapes.
"""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from parity.make_goldens import (  # noqa: E402
    CASES,
    V2,
    YARN,
    gradients,
    greedy,
    logits_and_loss,
    tokens_of,
    torch_config,
    torch_model,
)
from parity.random_cases import random_case  # noqa: E402

from minidsv3 import ModelConfig, Transformer, load_pretrained, save_pretrained  # noqa: E402
from minidsv3.autograd import backward  # noqa: E402
from minidsv3.generation import generate  # noqa: E402

# Warnings of torch and transformers about themselves are not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")
WIDER = dict(
    hidden_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=12,
    n_group=3, moe_intermediate_size=20, intermediate_size=44, vocab_size=97,
)  # fmt: skip
RANDOM_SEEDS = range(6)
ALL = {
    **CASES,
    **{f"random {seed}": random_case(seed) for seed in RANDOM_SEEDS},
    "wider": WIDER,
    "wider, YaRN, halves": {**WIDER, "rope_parameters": {**YARN, "mscale_all_dim": 1.0}, "rope_interleave": False},
    "wider, no dense layer": {**WIDER, "first_k_dense_replace": 0},
    "wider V2": {**WIDER, **V2, "topk_method": "group_limited_greedy", "n_shared_experts": 2},
}


@pytest.fixture(scope="module", params=ALL)
def theirs(request):
    return torch_model(torch_config(**ALL[request.param]))


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    theirs.save_pretrained(folder)
    return load_pretrained(folder)


@pytest.fixture(scope="module")
def computed(theirs):
    tokens = tokens_of(theirs.config, seed=4, batch=3, length=13)
    return tokens, *logits_and_loss(theirs, tokens), gradients(theirs)


def test_parity_logits(ours, computed):
    tokens, logits, _, _ = computed
    error = np.abs(ours.logits(tokens[:, :-1]) - logits).max()
    print(f"largest difference of a logit: {error:.1e}")
    assert error < 1e-4


def test_parity_loss(ours, computed):
    tokens, _, expected, _ = computed
    error = abs(float(ours.loss(tokens[:, :-1], tokens[:, 1:]).main) - expected)
    print(f"difference of the loss: {error:.1e}")
    assert error < 1e-5


def test_parity_gradients_of_every_parameter(ours, computed):
    """Relative to the largest number of each tensor: single numbers may cancel to near zero."""
    tokens, _, _, expected = computed
    for parameter in ours.parameters():
        parameter.zero_grad()
    backward(ours.loss(tokens[:, :-1], tokens[:, 1:], balance_weight=0.0).main)
    got = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert got.keys() == expected.keys()
    errors = {n: np.abs(got[n] - g).max() / max(np.abs(g).max(), 1e-6) for n, g in expected.items()}
    worst = max(errors, key=errors.get)
    print(f"largest relative difference of a gradient: {errors[worst]:.1e} in {worst}")
    assert errors[worst] < 1e-4


def test_parity_greedy_tokens(theirs, ours):
    """Prompts are redrawn until the best logit leads by more than 1e-4 at every step."""
    for seed in range(10):
        prompt = tokens_of(theirs.config, seed=seed)[0, :5]
        expected, lead = greedy(theirs, prompt, 16)
        if lead > 1e-4:
            break
    assert lead > 1e-4
    assert generate(ours, [prompt], 16).tokens[0].tolist() == expected.tolist()


def test_parity_saved_by_us_and_loaded_by_transformers(ours, computed, tmp_path):
    tokens, logits, _, _ = computed
    save_pretrained(ours, tmp_path / "ours", max_shard_bytes=40_000)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    with torch.no_grad():
        got = loaded.eval()(input_ids=torch.from_numpy(tokens[:, :-1])).logits.numpy()
    assert np.abs(got - logits).max() < 1e-4


def test_parity_model_with_mtp_modules_loads_in_transformers(tmp_path):
    """They read the main model and leave the layers behind the last alone."""
    config = ModelConfig.from_dict({**torch_config().to_dict(), "num_nextn_predict_layers": 2})
    model = Transformer(config)
    model.init_weights(np.random.default_rng(0), std=0.2)
    save_pretrained(model, tmp_path / "ours")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    tokens = tokens_of(loaded.config)
    with torch.no_grad():
        got = loaded.eval()(input_ids=torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(got, model.logits(tokens), rtol=0, atol=1e-4)


def test_parity_mtp_module_has_the_names_and_shapes_of_the_released_layer_61():
    layer = {name for name, _ in Transformer(ModelConfig.preset("deepseek-v3")).named_parameters()}
    extra = {n.removeprefix("model.layers.61.") for n in layer if n.startswith("model.layers.61.")}
    ordinary = {n.removeprefix("model.layers.60.") for n in layer if n.startswith("model.layers.60.")}
    assert extra - ordinary == {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}


def test_parity_mtp_logits_of_transformers(tmp_path):
    """Their MTP layer, given our weights by hand: h after the final norm, [enorm(embedding); hnorm(h)]."""
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpLayer"):
        pytest.skip("this version of transformers has no MTP layers")
    theirs = torch_model(torch_config())
    modelling = __import__("transformers.models.deepseek_v3.modeling_deepseek_v3", fromlist=["x"])
    mtp = layers.MtpLayer(theirs.config, modelling.DeepseekV3DecoderLayer, modelling.DeepseekV3RMSNorm, 2).eval()
    rng = np.random.default_rng(8)
    with torch.no_grad():
        for name, tensor in mtp.state_dict().items():
            values = rng.standard_normal(tuple(tensor.shape)) * 0.25
            tensor.copy_(torch.from_numpy(values + (1 if name.endswith("norm.weight") else 0)))
    theirs.save_pretrained(tmp_path / "model")
    main = load_pretrained(tmp_path / "model")
    config = ModelConfig.from_dict({**main.config.to_dict(), "num_nextn_predict_layers": 1})
    ours = Transformer(config)
    ours.allocate()
    weights = {name: p.data for name, p in main.named_parameters()} | dict(main.named_buffers())
    for name, tensor in mtp.state_dict().items():
        renamed = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        stem, _, last = renamed.rpartition(".")
        if stem.endswith("experts"):
            for e, one in enumerate(tensor.numpy()):
                parts = np.split(one, 2) if last == "gate_up_proj" else [one]
                kinds = ["gate_proj", "up_proj"] if last == "gate_up_proj" else [last]
                for kind, part in zip(kinds, parts):
                    weights[f"model.layers.2.{stem}.{e}.{kind}.weight"] = part
        else:
            weights[f"model.layers.2.{renamed}"] = tensor.numpy()
    for name, parameter in ours.named_parameters():
        parameter.data[...] = weights[name]
    for name, buffer in ours.named_buffers():
        buffer[...] = weights[name]
    tokens = tokens_of(theirs.config)
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        h = theirs.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        positions = torch.arange(h.shape[1])[None]
        mask = torch.full((h.shape[1], h.shape[1]), -torch.inf).triu(1)[None, None]
        h = mtp(theirs.model.embed_tokens(ids[:, 1:]), h, theirs.model.rotary_emb(h, positions), mask, positions, None)
        h = h[0] if isinstance(h, tuple) else h
        expected = theirs.lm_head(h).numpy()
    np.testing.assert_allclose(ours.mtp_logits(tokens)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["V3", "V2"])
def test_parity_parameter_count_of_the_default_config(kind):
    """At the real shapes, on torch's meta device and with our lazy weights, without MTP."""
    config = {"V3": transformers.DeepseekV3Config, "V2": transformers.DeepseekV2Config}[kind]()
    if kind == "V2":
        config.num_experts_per_tok = 6  # has no default
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    raw = {**json.loads(config.to_json_string(use_diff=False)), "num_nextn_predict_layers": 0}
    raw.pop("num_mtp_layers", None)
    ours = Transformer(ModelConfig.from_dict(raw))
    assert sum(p.numel() for p in theirs.parameters()) == sum(int(np.prod(p.shape)) for p in ours.parameters())
