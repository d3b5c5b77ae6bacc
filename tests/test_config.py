"""Configs: released files as they stand, round trips, presets, and errors that name field, value and rule."""

import dataclasses
import json

import pytest
from reference_model import ODD, odd_config

from minidsv3.config import PRESETS, ModelConfig, TrainConfig, data_file, replace_settings

# The released config.json of DeepSeek-V3, key by key.
V3_FILE = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def without(raw, *keys):
    return {key: value for key, value in raw.items() if key not in keys}


def written(tmp_path, raw):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def respelled():
    """The same model as transformers 5 writes it: one dictionary for all RoPE settings."""
    scaling = without(V3_FILE["rope_scaling"], "type")
    return {
        **without(V3_FILE, "rope_scaling", "rope_theta"),
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **scaling},
    }


def test_released_v3_file_gives_the_preset(tmp_path):
    assert ModelConfig.from_json(written(tmp_path, V3_FILE)) == ModelConfig.preset("deepseek-v3")


def test_released_v3_file_survives_a_round_trip_with_every_unknown_key(tmp_path):
    ModelConfig.from_json(written(tmp_path, V3_FILE)).to_json(tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))
    assert {key: again.get(key) for key in V3_FILE} == V3_FILE


def test_unknown_keys_are_kept_in_extra():
    extra = ModelConfig.from_dict(V3_FILE).extra
    assert {key: extra[key] for key in ("auto_map", "quantization_config", "ep_size")} == {
        key: V3_FILE[key] for key in ("auto_map", "quantization_config", "ep_size")
    }


def test_unknown_keys_do_not_make_a_model_different():
    assert ModelConfig.from_dict(without(V3_FILE, "ep_size", "auto_map")) == ModelConfig.from_dict(V3_FILE)


def test_transformers_5_spelling_gives_the_same_model():
    assert ModelConfig.from_dict(respelled()) == ModelConfig.from_dict(V3_FILE)


def test_rope_spellings_that_agree_are_both_read():
    both = {**respelled(), "rope_scaling": V3_FILE["rope_scaling"], "rope_theta": 10000}
    assert ModelConfig.from_dict(both) == ModelConfig.from_dict(V3_FILE)


def test_default_rope_type_means_no_scaling():
    raw = {
        **without(V3_FILE, "rope_scaling", "rope_theta"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }
    config = ModelConfig.from_dict(raw)
    assert (config.rope_scaling, config.rope_theta) == (None, 5e5)


@pytest.mark.parametrize(
    "alias, name, value",
    [("num_local_experts", "n_routed_experts", 64), ("num_mtp_layers", "num_nextn_predict_layers", 3)],
)
def test_alias_is_read_as_its_field(alias, name, value):
    config = ModelConfig.from_dict({**without(V3_FILE, name), alias: value})
    assert getattr(config, name) == value and alias not in config.extra


@pytest.mark.parametrize(
    "alias, name", [("num_local_experts", "n_routed_experts"), ("num_mtp_layers", "num_nextn_predict_layers")]
)
def test_alias_that_repeats_its_field_is_accepted(alias, name):
    assert ModelConfig.from_dict({**V3_FILE, alias: V3_FILE[name]}) == ModelConfig.from_dict(V3_FILE)


@pytest.mark.parametrize("old", [V3_FILE, {**V3_FILE, "num_key_value_heads": None}])
def test_key_value_heads_may_be_absent_or_all(old):
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(without(V3_FILE, "num_key_value_heads"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_routed_experts": 30}, "n_routed_experts=30 is not a multiple of n_group=8"),
        ({"topk_group": 9}, "topk_group=9 exceeds n_group=8"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok=129 exceeds the 128 experts that topk_group leaves"),
        ({"first_k_dense_replace": 62}, "first_k_dense_replace=62 exceeds num_hidden_layers=61"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim=63 is not even"),
        ({"hidden_size": 0}, "hidden_size=0 is not a positive number"),
        ({"n_group": 0}, "n_group=0 is not a positive number"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1 is negative"),
        ({"q_lora_rank": 0}, "q_lora_rank=0 is not positive"),
        ({"hidden_size": "7168"}, "hidden_size='7168' is not int"),
        ({"hidden_size": 7168.0}, "hidden_size=7168.0 is not int"),
        ({"hidden_size": True}, "hidden_size=True is not int"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1 is not bool"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is not a positive number"),
        ({"scoring_func": "relu"}, "scoring_func='relu' is not one of 'sigmoid', 'softmax'"),
        ({"topk_method": "best"}, "topk_method='best' is not one of"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8 is not num_attention_heads=128"),
        ({"qk_head_dim": 128}, "qk_head_dim=128 is not qk_nope_head_dim"),
        ({"num_local_experts": 128}, "num_local_experts=128 contradicts n_routed_experts=256"),
        ({"num_mtp_layers": 2}, "num_mtp_layers=2 contradicts num_nextn_predict_layers=1"),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope type='linear' is not one of 'default', 'yarn'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "original_max_position_embeddings=None is not a positive"),
        ({"rope_scaling": {**V3_FILE["rope_scaling"], "factor": 0}}, "rope_scaling factor=0 is not a positive number"),
        ({"rope_scaling": {**V3_FILE["rope_scaling"], "beta_slow": 40}}, "0 < beta_slow <= beta_fast, got 40 and 32"),
        ({"rope_scaling": {**V3_FILE["rope_scaling"], "attention_factor": 2}}, "unknown keys .'attention_factor'"),
        ({"rope_scaling": {**V3_FILE["rope_scaling"], "rope_type": "default"}}, "rope type is both default and yarn"),
        ({"rope_scaling": {**V3_FILE["rope_scaling"], "rope_theta": 5.0}}, "rope_theta is both 5.0 and 10000.0"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters=.* contradicts rope_scaling="),
        ({"model_type": "llama"}, "model_type='llama' is not one of 'deepseek_v3', 'deepseek_v2'"),
        ({"model_type": "deepseek_v32"}, "model_type='deepseek_v32' is not one of"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not one of 'silu'"),
        ({"attention_bias": True}, "attention_bias=True is not one of False"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 is not one of 1"),
    ],
)  # fmt: skip
def test_wrong_config_names_field_value_and_rule(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict({**V3_FILE, **changes})


@pytest.mark.parametrize(
    "name", ["vocab_size", "kv_lora_rank", "v_head_dim", "n_routed_experts", "num_attention_heads"]
)
def test_missing_shape_is_named(name):
    with pytest.raises(ValueError, match=f"missing {name}"):
        ModelConfig.from_dict(without(V3_FILE, name))


def test_the_same_architecture_under_another_name_is_read():
    """Kimi-K2: model_type of its own, and YaRN that blends at one point."""
    scaling = {**V3_FILE["rope_scaling"], "factor": 32, "beta_fast": 1, "beta_slow": 1}
    config = ModelConfig.from_dict({**V3_FILE, "model_type": "kimi_k2", "rope_scaling": scaling})
    assert config.model_type == "deepseek_v3" and config.rope_scaling["beta_fast"] == 1


def test_another_architecture_file_is_refused():
    llama = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
    with pytest.raises(ValueError, match="model_type='llama'"):
        ModelConfig.from_dict(llama)


@pytest.mark.parametrize("text, message", [("{", "is not JSON"), ("[1]", "holds a list, not an object")])
def test_file_that_is_no_config_is_named(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_json(path)


def test_error_in_a_file_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: n_routed_experts=30 is not"):
        ModelConfig.from_json(written(tmp_path, {**V3_FILE, "n_routed_experts": 30}))


def test_direct_construction_is_checked_too():
    with pytest.raises(ValueError, match="n_routed_experts=13 is not a multiple of n_group=4"):
        odd_config(n_routed_experts=13)


def test_greedy_method_reaches_all_experts():
    config = odd_config(topk_method="greedy", scoring_func="softmax", num_experts_per_tok=12)
    assert config.num_experts_per_tok == 12


# name: D, layers, heads, q latent, kv latent, nope, rope, v, routed, top-k, shared, expert width, dense width, V, MTP
SMALL = {
    "nano": (64, 4, 4, 32, 16, 8, 8, 8, 16, 4, 1, 32, 128, 257, 1),
    "tiny": (128, 4, 4, 64, 32, 16, 8, 16, 8, 2, 1, 64, 256, 257, 1),
    "small": (384, 6, 6, 192, 128, 32, 16, 32, 16, 4, 1, 192, 1024, 257, 1),
    # the papers: DeepSeek-V3 section 4.2, DeepSeek-V2 section 3.1.2 and appendix B.1
    "deepseek-v3": (7168, 61, 128, 1536, 512, 128, 64, 128, 256, 8, 1, 2048, 18432, 129280, 1),
    "deepseek-v2": (5120, 60, 128, 1536, 512, 128, 64, 128, 160, 6, 2, 1536, 12288, 102400, 0),
    "deepseek-v2-lite": (2048, 27, 16, None, 512, 128, 64, 128, 64, 6, 2, 1408, 10944, 102400, 0),
}
SHAPE = (
    "hidden_size num_hidden_layers num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim "
    "v_head_dim n_routed_experts num_experts_per_tok n_shared_experts moe_intermediate_size intermediate_size "
    "vocab_size num_nextn_predict_layers"
).split()


@pytest.mark.parametrize("name", SMALL)
def test_preset_has_the_stated_shape(name):
    config = ModelConfig.preset(name)
    assert {field: getattr(config, field) for field in SHAPE} == dict(zip(SHAPE, SMALL[name]))


@pytest.mark.parametrize("name", ["nano", "tiny", "small"])
def test_small_presets_have_one_dense_layer_in_front(name):
    config = ModelConfig.preset(name)
    assert [config.is_moe_layer(i) for i in range(3)] == [False, True, True]


def test_nano_routes_in_groups():
    config = ModelConfig.preset("nano")
    assert (config.n_group, config.topk_group) == (4, 2)


@pytest.mark.parametrize(
    "name, gate",
    [
        ("deepseek-v3", ("sigmoid", "noaux_tc", True, 8, 4, 2.5)),
        ("deepseek-v2", ("softmax", "group_limited_greedy", False, 8, 3, 16.0)),
        ("deepseek-v2-lite", ("softmax", "greedy", False, 1, 1, 1.0)),
    ],
)
def test_published_preset_has_its_gate(name, gate):
    c = ModelConfig.preset(name)
    assert (c.scoring_func, c.topk_method, c.norm_topk_prob, c.n_group, c.topk_group, c.routed_scaling_factor) == gate


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_a_round_trip(name, tmp_path):
    config = ModelConfig.preset(name)
    config.to_json(tmp_path / "config.json")
    assert ModelConfig.from_json(tmp_path / "config.json") == config


@pytest.mark.parametrize("name", PRESETS)
def test_preset_ties_no_embeddings(name):
    """Pitfall 21: V3's embedding and head are two matrices of 926.7 M parameters each."""
    assert ModelConfig.preset(name).tie_word_embeddings is False


@pytest.mark.parametrize("name", ["nano", "tiny", "small"])
def test_small_presets_do_not_inherit_the_large_route_scale(name):
    """Pitfall 22: 2.5 belongs to top-8 of 256."""
    assert ModelConfig.preset(name).routed_scaling_factor == 1.0


def test_v2_file_silent_about_the_gate_means_softmax_greedy():
    raw = without(
        json.loads(data_file("configs/deepseek-v2-lite.json").read_text(encoding="utf-8")),
        "scoring_func",
        "topk_method",
    )
    config = ModelConfig.from_dict(raw)
    assert (config.scoring_func, config.topk_method) == ("softmax", "greedy")


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="preset='huge' is not one of 'nano', 'tiny', 'small'"):
        ModelConfig.preset("huge")


def test_missing_data_file_says_so():
    with pytest.raises(FileNotFoundError, match=r"configs/none\.json"):
        data_file("configs/none.json")


@pytest.mark.parametrize("config", [odd_config(), TrainConfig()], ids=["model", "train"])
def test_config_is_frozen(config):
    field = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, 1)


def test_qk_head_dim_is_content_plus_rope():
    assert odd_config().qk_head_dim == ODD["qk_nope_head_dim"] + ODD["qk_rope_head_dim"] == 14


def test_moe_layers_count_mtp_modules():
    assert ModelConfig.preset("deepseek-v3").num_moe_layers == 58 + 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 15}, "batch_size=15 is not a multiple of shards=2"),
        ({"steps": 0}, "steps=0 is not a positive number"),
        ({"steps": 10.0}, "steps=10.0 is not int"),
        ({"learning_rate": -1e-3}, "learning_rate=-0.001 is not a positive number"),
        ({"learning_rate": float("inf")}, "learning_rate=inf is not a positive number"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 is negative"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1 is negative"),
        ({"workers": 0}, "workers=0 is not positive"),
        ({"adam_beta2": 1.0}, r"adam_beta2=1.0 is not in \[0, 1\)"),
        ({"moments_dtype": "float16"}, "moments_dtype='float16' is not one of 'float32', 'bfloat16'"),
        ({"lr_phases": (("step", 1.0, 0.1),)}, "lr_phases shape='step' is not one of"),
        ({"lr_phases": (("cosine", 0.5, 0.1),)}, "lr_phases ends at 0.5 of the steps, not at 1"),
        ({"lr_phases": (("constant", 0.6, 1.0), ("cosine", 0.5, 0.1))}, "lr_phases: until=0.5 does not lie in"),
        ({"mtp_phases": (("constant", 1.0, -1.0),)}, "mtp_phases: end=-1.0 is negative"),
        ({"bias_phases": (("constant", 1.0),)}, "bias_phases: .* is not .shape, until, end."),
        ({"batch_ramp": (0.0, 0.5)}, "batch_ramp=.* has shares outside"),
    ],
)
def test_wrong_training_setting_names_field_value_and_rule(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_training_phases_read_from_json_are_tuples():
    assert TrainConfig(lr_phases=[["cosine", 1.0, 0.1]]) == TrainConfig(lr_phases=(("cosine", 1.0, 0.1),))


def test_report_training_has_the_numbers_of_section_4_2():
    c = TrainConfig.preset("deepseek-v3")
    assert (c.learning_rate, c.warmup_steps, c.adam_beta1, c.adam_beta2, c.weight_decay, c.grad_clip) == (
        2.2e-4, 2000, 0.9, 0.95, 0.1, 1.0,
    )  # fmt: skip
    assert (c.batch_size, c.seq_len, c.bias_update_speed, c.mtp_weight, c.balance_weight) == (
        15360,
        4096,
        0.001,
        0.3,
        1e-4,
    )
    assert (c.moments_dtype, c.batch_ramp[0] * c.batch_size) == ("bfloat16", 3072)


def test_report_training_phases_cut_14_8T_tokens():
    c = TrainConfig.preset("deepseek-v3")
    ends = {
        name: [round(until * 14.8, 3) for _, until, _ in getattr(c, f"{name}_phases")] for name in ("lr", "bias", "mtp")
    }
    assert ends == {"lr": [10, 14.3, 14.633, 14.8], "bias": [14.3, 14.8], "mtp": [10, 14.8]}


def test_report_training_ends_at_its_learning_rate_and_mtp_weight():
    c = TrainConfig.preset("deepseek-v3")
    assert (c.learning_rate * c.lr_phases[-1][2], c.mtp_weight * c.mtp_phases[-1][2]) == pytest.approx((7.3e-6, 0.1))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_training_settings(name):
    assert isinstance(TrainConfig.preset(name), TrainConfig)


def test_replace_settings_reaches_both_configs():
    model, train = replace_settings(odd_config(), TrainConfig(), {"n_shared_experts": 2, "steps": 7})
    assert (model, train) == (odd_config(n_shared_experts=2), TrainConfig(steps=7))


def test_replace_settings_names_the_nearest_field():
    with pytest.raises(ValueError, match="unknown setting 'learning_rat': did you mean 'learning_rate'"):
        replace_settings(odd_config(), TrainConfig(), {"learning_rat": 1.0})


def test_replace_settings_checks_the_result():
    with pytest.raises(ValueError, match="n_routed_experts=13 is not a multiple"):
        replace_settings(odd_config(), TrainConfig(), {"n_routed_experts": 13})
