"""What a model is and how it is trained: two frozen records, checked when they are made.

`ModelConfig` has the field names of the released ``config.json`` (deepseek-ai/DeepSeek-V3), so that a released file
is read as it stands and a student who knows one knows the other. `TrainConfig` holds everything that decides the
numbers of a training run. Both are read in one direction only: nothing in the package changes a config.

Published shapes (`deepseek-v3`, `deepseek-v2`, `deepseek-v2-lite`) stand in ``data/configs/*.json``; the three sizes
that train on a CPU (`nano`, `tiny`, `small`) stand here, beside what they deviate in from the paper.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config", "ModelConfig", "TrainConfig")


def data_file(relative: str) -> Path:
    """Path of a file of the project's ``data/`` folder, in a clone and in an installed wheel alike."""
    package = Path(__file__).parent
    for root in (package / "_data", package.parent / "data"):
        if (root / relative).exists():
            return root / relative
    raise FileNotFoundError(f"data file {relative!r} is neither in the wheel nor in the clone: reinstall minidsv3")


# Keys of a released config.json that are not fields, with the only value this model family has. Anything else is a
# different architecture, and is refused rather than silently computed wrong.
_FIXED_KEYS: dict[str, tuple[Any, ...]] = {
    "model_type": ("deepseek_v3", "deepseek_v2"),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
}
# The same architecture under another name: Kimi-K2's released file (its architectures: DeepseekV3ForCausalLM).
_RENAMED = {"kimi_k2": "deepseek_v3"}
# Other spellings of a field, as the transformers library writes them.
_ALIASES = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
_ROPE_SCALING_KEYS = {
    "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model; field names and meanings as in the released ``config.json``.

    Raises ValueError, naming field, value and rule, when the fields contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # width of a dense FFN
    moe_intermediate_size: int  # width of one expert
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None  # None: the query is projected straight from x (V2-Lite)
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    num_nextn_predict_layers: int = 0
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_interleave: bool = True
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    model_type: str = "deepseek_v3"
    extra: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # keys that we keep and do not use

    def __post_init__(self) -> None:
        _check_types(self)
        positive = (
            "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
            "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts num_experts_per_tok n_group "
            "topk_group max_position_embeddings rope_theta rms_norm_eps initializer_range routed_scaling_factor"
        )
        _require_positive(self, positive.split())
        for name in ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} is negative")
        _require(self.q_lora_rank is None or self.q_lora_rank > 0, f"q_lora_rank={self.q_lora_rank} is not positive")
        _require(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim={self.qk_rope_head_dim} is not even")
        _require(
            self.first_k_dense_replace <= self.num_hidden_layers,
            f"first_k_dense_replace={self.first_k_dense_replace} exceeds num_hidden_layers={self.num_hidden_layers}",
        )
        _one_of("scoring_func", self.scoring_func, ("sigmoid", "softmax"))
        _one_of("topk_method", self.topk_method, ("noaux_tc", "group_limited_greedy", "greedy"))
        _one_of("model_type", self.model_type, _FIXED_KEYS["model_type"])
        self._check_groups()
        if self.rope_scaling is not None:
            _check_rope_scaling(self.rope_scaling)

    def _check_groups(self) -> None:
        E, G, K = self.n_routed_experts, self.n_group, self.num_experts_per_tok
        _require(E % G == 0, f"n_routed_experts={E} is not a multiple of n_group={G}")
        _require(self.topk_group <= G, f"topk_group={self.topk_group} exceeds n_group={G}")
        reachable = E if self.topk_method == "greedy" else self.topk_group * (E // G)
        _require(K <= reachable, f"num_experts_per_tok={K} exceeds the {reachable} experts that topk_group leaves")

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key: the content part and the RoPE part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts, the MTP modules included."""
        return self.num_hidden_layers - self.first_k_dense_replace + self.num_nextn_predict_layers

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (0-based; MTP modules stand behind the last) has routed experts."""
        return layer >= self.first_k_dense_replace

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """A named model: 'nano', 'tiny', 'small', or a published one ('deepseek-v3', ...)."""
        if name in _SMALL_MODELS:
            return cls(**_SMALL_MODELS[name])
        _one_of("preset", name, PRESETS)
        return cls.from_json(data_file(f"configs/{name}.json"))

    @classmethod
    def from_json(cls, path: str | Path) -> ModelConfig:
        """Read a released ``config.json``.

        Unknown keys are kept in `extra` and ignored; both spellings of the RoPE settings are read (`rope_scaling`
        with `type`, and `rope_parameters` with `rope_type`).

        Raises
        ------
        ValueError
            A shape is missing, a value contradicts another, or the file describes another architecture.
        """
        raw = _read_json_object(path)
        raw = {key: value for key, value in raw.items() if not key.startswith("_")}  # "_source" in data/configs
        try:
            return cls.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """The config that the keys of a ``config.json`` describe (see `from_json`)."""
        raw = dict(raw)
        if (renamed := _RENAMED.get(str(raw.get("model_type")))) is not None:
            raw["model_type"] = renamed
        for key, allowed in _FIXED_KEYS.items():
            if raw.get(key) is not None:
                _one_of(key, raw[key], allowed)
        for alias, name in _ALIASES.items():
            value = raw.pop(alias, None)
            agree = value is None or raw.get(name) in (None, value)
            _require(agree, f"{alias}={value} contradicts {name}={raw.get(name)}: two names of one field")
            if value is not None:
                raw[name] = value
        if raw.get("model_type") == "deepseek_v2":  # what the V2 modelling code assumes where its file is silent
            raw.setdefault("scoring_func", "softmax")
            raw.setdefault("topk_method", "greedy")
        if raw.get("n_shared_experts") is None:  # null in some released files
            raw["n_shared_experts"] = 0
        for name in ("n_group", "topk_group"):  # null where the gate has no groups
            raw[name] = 1 if raw.get(name) is None else raw[name]
        raw.update(_rope_settings(raw))
        names = {f.name: f for f in dataclasses.fields(cls) if f.name != "extra"}
        missing = [n for n, f in names.items() if f.default is dataclasses.MISSING and n not in raw]
        _require(not missing, f"missing {', '.join(missing)}")
        H, kv_heads = raw["num_attention_heads"], raw.get("num_key_value_heads")
        _require(kv_heads in (None, H), f"num_key_value_heads={kv_heads} is not num_attention_heads={H}, as MLA has it")
        fields = {name: value for name, value in raw.items() if name in names}
        for name, f in names.items():
            if fields.get(name, 0) is None and f.default not in (None, dataclasses.MISSING):
                del fields[name]  # an explicit null means the default
        config = cls(**fields, extra={k: v for k, v in raw.items() if k not in names})
        q_k = config.extra.get("qk_head_dim", config.qk_head_dim)
        _require(q_k == config.qk_head_dim, f"qk_head_dim={q_k} is not qk_nope_head_dim + qk_rope_head_dim")
        return config

    def to_dict(self) -> dict[str, Any]:
        """Keys and values of a released-style ``config.json``, unknown keys included."""
        values = dataclasses.asdict(self)
        extra = values.pop("extra")
        architecture = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}
        return {
            "architectures": [architecture[self.model_type]],
            "hidden_act": "silu",
            "num_key_value_heads": self.num_attention_heads,
            **extra,
            **values,
        }

    def to_json(self, path: str | Path) -> None:
        """Write a released-style ``config.json`` (keys sorted, as released)."""
        write_json(path, dict(sorted(self.to_dict().items())))


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the numbers of a training run; defaults suit the small models on a CPU.

    A schedule is a list of phases ``(shape, until, end)``: up to the share `until` of all steps the value goes by
    `shape` ('constant', 'linear' or 'cosine') to `end` times its peak (`train.schedule`). The report's schedules
    (section 4.2) are `TrainConfig.preset("deepseek-v3")`.

    Where the defaults leave the paper, and why: learning rate 3e-3 instead of 2.2e-4 (the models are 500,000 times
    smaller); 100 warm-up steps instead of 2,000; `bias_update_speed` is studied in the README, because 0.001 was
    chosen for batches of 63 million tokens; no batch ramp.
    """

    data: str = "shakespeare"
    steps: int = 1000
    seed: int = 0
    batch_size: int = 16  # sequences a step, over all shards
    seq_len: int = 128
    shards: int = 2  # the batch is cut in this many; the unit of bit equality (see train.step)
    workers: int | None = None  # threads that compute shards; None: as many as cores and shards allow
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    lr_phases: tuple[tuple[str, float, float], ...] = (("cosine", 1.0, 0.1),)
    batch_ramp: tuple[float, float] | None = None  # (share of batch_size to begin with, share of the steps to ramp)
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    moments_dtype: str = "float32"  # 'bfloat16' as in the report (section 3.3.3)
    precision: str = "fp32"  # a recipe of quant.recipe, with changed rows behind a colon: 'fp8:lm_head=fp8'
    accumulate: str = "fast"  # or 'exact': FP8 products on the emulated tensor core
    bias_update_speed: float = 0.001  # gamma of section 2.1.2
    bias_phases: tuple[tuple[str, float, float], ...] = (("constant", 1.0, 1.0),)
    mtp_weight: float = 0.3  # lambda of Eq. 25
    mtp_phases: tuple[tuple[str, float, float], ...] = (("constant", 10 / 14.8, 1.0), ("constant", 1.0, 1 / 3))
    balance_weight: float = 1e-4  # alpha of Eq. 17
    init_from: str | None = None  # a run folder or model directory to take the first weights from
    recompute: bool = False  # recompute every layer in the backward pass instead of keeping its activations
    eval_every: int = 500  # steps; 0: only at the end
    checkpoint_every: int = 500  # steps; 0: only at the end
    keep: int = 2  # checkpoints that stay on disk

    def __post_init__(self) -> None:
        _check_types(self)
        _require_positive(
            self,
            "steps batch_size seq_len shards learning_rate adam_eps grad_clip keep".split(),
        )
        for name in "seed warmup_steps weight_decay bias_update_speed mtp_weight balance_weight eval_every".split():
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} is negative")
        _require(self.checkpoint_every >= 0, f"checkpoint_every={self.checkpoint_every} is negative")
        _require(self.workers is None or self.workers > 0, f"workers={self.workers} is not positive")
        _require(
            self.batch_size % self.shards == 0,
            f"batch_size={self.batch_size} is not a multiple of shards={self.shards}",
        )
        for name in ("adam_beta1", "adam_beta2"):
            _require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} is not in [0, 1)")
        _one_of("moments_dtype", self.moments_dtype, ("float32", "bfloat16"))
        _one_of("precision", self.precision.partition(":")[0], PRECISIONS)
        _one_of("accumulate", self.accumulate, ("fast", "exact"))
        for name in ("lr_phases", "bias_phases", "mtp_phases"):
            _check_phases(name, getattr(self, name))
        if self.batch_ramp is not None:
            start, until = self.batch_ramp
            _require(0 < start <= 1 and 0 < until <= 1, f"batch_ramp={self.batch_ramp} has shares outside (0, 1]")

    @classmethod
    def preset(cls, name: str) -> TrainConfig:
        """Training settings that go with `ModelConfig.preset(name)`; the report's own for the published shapes."""
        _one_of("preset", name, PRESETS)
        return cls(**_TRAINING.get(name, _REPORT_TRAINING))


# Sizes that train on a CPU. Against the report: one group where there are too few experts to limit, top-2 and top-4,
# a byte vocabulary (256 bytes and the document boundary), routed_scaling_factor 1 (2.5 belongs to top-8 of 256), and
# initializer_range 0.02 and 0.04 (0.006 belongs to a hidden size of 7168).
_SMALL_MODELS: dict[str, dict[str, Any]] = {
    "nano": dict(
        vocab_size=257, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=4, q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4, first_k_dense_replace=1, n_group=4,
        topk_group=2, num_nextn_predict_layers=1,
    ),
    "tiny": dict(
        vocab_size=257, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1,
        num_nextn_predict_layers=1, initializer_range=0.04,
    ),
    "small": dict(
        vocab_size=257, hidden_size=384, intermediate_size=1024, moe_intermediate_size=192, num_hidden_layers=6,
        num_attention_heads=6, q_lora_rank=192, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=16,
        v_head_dim=32, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4, first_k_dense_replace=1,
        num_nextn_predict_layers=1,
    ),
}  # fmt: skip
PRECISIONS = ("fp32", "bf16", "fp8", "fp8-tensorwise", "fp8-blockwise-dgrad", "mxfp8")  # the tables: quant.recipe
PRESETS = (*_SMALL_MODELS, "deepseek-v3", "deepseek-v2", "deepseek-v2-lite")

_TRAINING: dict[str, dict[str, Any]] = {
    "nano": dict(batch_size=16, seq_len=64, steps=500, warmup_steps=50),
    "tiny": dict(batch_size=16, seq_len=128, steps=2000),
    "small": dict(batch_size=8, seq_len=256, steps=2000, learning_rate=1e-3),
}
# Section 4.2: 14.8T tokens; LR constant to 10T, cosine to a tenth over 4.3T, 333B at a tenth, 167B at 7.3e-6;
# gamma 0 for the last 500B; lambda 0.1 after 10T; batch 3072 -> 15360 over the first 469B tokens.
_REPORT_TRAINING: dict[str, Any] = dict(
    data="14.8T tokens, not published", steps=240_000, batch_size=15360, seq_len=4096, shards=128,
    learning_rate=2.2e-4, warmup_steps=2000, moments_dtype="bfloat16",
    lr_phases=(
        ("constant", 10 / 14.8, 1.0), ("cosine", 14.3 / 14.8, 0.1), ("constant", 14.633 / 14.8, 0.1),
        ("constant", 1.0, 7.3e-6 / 2.2e-4),
    ),
    bias_phases=(("constant", 14.3 / 14.8, 1.0), ("constant", 1.0, 0.0)),
    mtp_phases=(("constant", 10 / 14.8, 1.0), ("constant", 1.0, 1 / 3)),
    batch_ramp=(0.2, 0.469 / 14.8),
)  # fmt: skip


def replace_settings(
    model: ModelConfig, train: TrainConfig, settings: dict[str, Any]
) -> tuple[ModelConfig, TrainConfig]:
    """Both configs with the fields in `settings` replaced; an unknown name is a ValueError that names the nearest."""
    changes: dict[type, dict[str, Any]] = {ModelConfig: {}, TrainConfig: {}}
    owner = {f.name: cls for cls in changes for f in dataclasses.fields(cls) if f.name != "extra"}
    for name, value in settings.items():
        if name not in owner:
            near = get_close_matches(name, owner, n=1)
            raise ValueError(f"unknown setting {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
        changes[owner[name]][name] = value
    return dataclasses.replace(model, **changes[ModelConfig]), dataclasses.replace(train, **changes[TrainConfig])


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, UTF-8 on every system."""
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def _read_json_object(path: str | Path) -> dict[str, Any]:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object with the config's keys")
    return value


def _rope_settings(raw: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling of either spelling, as the old one writes them."""
    new, old = raw.pop("rope_parameters", None), raw.get("rope_scaling")
    if new and old:
        both = [_rope_settings({**raw, "rope_parameters": None, "rope_scaling": dict(one)}) for one in (new, old)]
        _require(both[0] == both[1], f"rope_parameters={new} contradicts rope_scaling={old}")
    scaling = dict(new or old or {})
    thetas = {float(t) for t in (scaling.pop("rope_theta", None), raw.get("rope_theta")) if t is not None}
    _require(len(thetas) <= 1, f"rope_theta is both {' and '.join(map(str, sorted(thetas)))}")
    theta = thetas.pop() if thetas else 10000.0
    kinds = {str(scaling.pop(key)) for key in ("type", "rope_type") if scaling.get(key) is not None}
    _require(len(kinds) <= 1, f"rope type is both {' and '.join(sorted(kinds))}")
    kind = kinds.pop() if kinds else "default"
    _one_of("rope type", kind, ("default", "yarn"))
    scaling = {key: value for key, value in scaling.items() if value is not None}  # _check_rope_scaling names strangers
    return {"rope_theta": theta, "rope_scaling": {"type": "yarn", **scaling} if kind == "yarn" else None}


def _check_rope_scaling(scaling: dict[str, Any]) -> None:
    _one_of("rope_scaling type", scaling.get("type"), ("yarn",))
    unknown = set(scaling) - _ROPE_SCALING_KEYS - {"type"}
    _require(not unknown, f"rope_scaling has unknown keys {sorted(unknown)}")
    for key in ("factor", "original_max_position_embeddings"):
        value = scaling.get(key)
        ok = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        _require(ok, f"rope_scaling {key}={value!r} is not a positive number")
    fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)
    _require(0 < slow <= fast, f"rope_scaling needs 0 < beta_slow <= beta_fast, got {slow} and {fast}")


def _check_phases(name: str, phases: tuple[tuple[str, float, float], ...]) -> None:
    last = 0.0
    for phase in phases:
        _require(len(phase) == 3, f"{name}: {phase!r} is not (shape, until, end)")
        shape, until, end = phase
        _one_of(f"{name} shape", shape, ("constant", "linear", "cosine"))
        _require(last < until <= 1, f"{name}: until={until} does not lie in ({last}, 1]")
        _require(end >= 0, f"{name}: end={end} is negative")
        last = until
    _require(last == 1, f"{name} ends at {last} of the steps, not at 1")


def _check_types(config: ModelConfig | TrainConfig) -> None:
    """Each field's value has the annotated type; ints pass as floats, JSON lists as tuples."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        plain = tuple(typing.get_origin(t) or t for t in allowed)
        if isinstance(value, list) and tuple in plain:
            value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
            object.__setattr__(config, name, value)
        if isinstance(value, int) and not isinstance(value, bool) and float in plain and int not in plain:
            value = float(value)
            object.__setattr__(config, name, value)
        is_bool = isinstance(value, bool)
        if not isinstance(value, plain) or (is_bool and bool not in plain):
            wanted = " or ".join("null" if t is types.NoneType else t.__name__ for t in plain)
            raise ValueError(f"{name}={value!r} is not {wanted}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_positive(config: ModelConfig | TrainConfig, names: list[str]) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 < value < float("inf"), f"{name}={value} is not a positive number")


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
