"""Parameters: the real `Transformer` at its real shapes, counted.

A Parameter is lazy until it is filled, so the 671B model is built in a twentieth of a second and 50 MB, and what is
counted is the class that trains: there is no second set of formulas. What a checkpoint holds is asked of the writer
(`pretrained.writer`): which tensors there are, which of them are FP8, how large their scales are.

Four totals go by the name "671B", and they differ:

    parameters                    what is trained, MTP left out
    parameters_with_gate_bias     and the correction bias of every gate: a buffer, moved by a rule
    checkpoint_elements           all numbers in the released files: MTP with its copies of embedding and head, scales
    active                        what one token meets: of the routed experts only num_experts_per_tok; published with
                                  the head ("36.6B") or with head and embedding ("37.6B")
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from ..autograd import Parameter
from ..config import ModelConfig
from ..model.layers import RMSNorm
from ..model.module import Module
from ..model.transformer import Transformer
from ..pretrained.tensors import DTYPES
from ..pretrained.writer import STORED, plan, released_tensors

PARTS = ("embedding", "attention", "dense_ffn", "routed_experts", "shared_experts", "gate", "norms", "lm_head")


class Weight(NamedTuple):
    """One parameter array of the model, and where it belongs."""

    part: str  # one of PARTS, or 'mtp_join' (enorm, hnorm, eh_proj, shared_head.norm)
    layer: int | None  # MTP modules stand behind the last layer; None: embedding, final norm, head
    name: str  # of the attribute that holds it: 'q_b_proj', 'gate_up', 'down', ...
    shape: tuple[int, ...]  # as held; routed experts carry their number as first axis
    stored_name: str  # of its (first) tensor in the checkpoint, its last two words: 'gate_proj.weight'

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


class Checkpoint(NamedTuple):
    """What the released files hold: elements, tensors and bytes of each safetensors dtype."""

    stored_as: str  # 'fp8', 'bf16' or 'fp32'
    elements: dict[str, int]
    tensors: dict[str, int]
    nbytes: dict[str, int]


class Parameters(NamedTuple):
    """The counts of one model (see the module's text)."""

    by_part: dict[str, int]  # PARTS, the main model only
    gate_bias: int  # buffers of the main model
    mtp_gate_bias: int
    mtp: dict[str, int]  # 'mtp_join' and the PARTS of the MTP modules' layers, gate bias left out
    total: int  # each array once, also where embedding and head are one
    active_with_head: int
    active_with_head_and_embedding: int
    mtp_active: int  # of the MTP modules' own: what a token meets, eh_proj included


class Shapes(NamedTuple):
    """What is known of a model once its numbers are forgotten."""

    weights: tuple[Weight, ...]
    gate_biases: tuple[tuple[int, int], ...]  # (layer, numbers) of every correction bias


def shapes(cfg: ModelConfig) -> Shapes:
    """Shapes of all arrays of the real model; built once for each config, since nearly every account begins here."""
    fields = dataclasses.asdict(cfg)
    del fields["extra"]
    return _shapes(json.dumps(fields))


@lru_cache(maxsize=16)
def _shapes(fields: str) -> Shapes:
    model = Transformer(ModelConfig(**json.loads(fields)))
    found = [
        Weight(part, layer, name, p.shape, ".".join(next(iter(p.parts or {f"{name}.weight": 0})).split(".")[-2:]))
        for part, layer, name, p in parameters_by_place(model)
    ]
    biases = [(int(name.split(".")[2]), bias.size) for name, bias in model.named_buffers()]
    return Shapes(tuple(found), tuple(biases))


def parameters_by_place(model: Transformer) -> Iterator[tuple[str, int | None, str, Parameter]]:
    """(part, layer, name, parameter) of every array of the model once; a tied head is the embedding."""
    yield "embedding", None, "embed_tokens", model.embed_tokens.weight
    for i, layer in enumerate([*model.layers, *(module.layer for module in model.mtp)]):
        for name, module in layer.named_modules():
            for parameter_name, value in vars(module).items():
                if isinstance(value, Parameter):
                    own = name.split(".")[-1] if parameter_name == "weight" else parameter_name
                    yield _part(name, module), i, own, value
    for k, module in enumerate(model.mtp, start=len(model.layers)):
        yield "mtp_join", k, "enorm", module.enorm.weight
        yield "mtp_join", k, "hnorm", module.hnorm.weight
        yield "mtp_join", k, "eh_proj", module.eh_proj.weight
        yield "mtp_join", k, "norm", module.shared_head.norm.weight
    yield "norms", None, "norm", model.norm.weight
    if model.lm_head.weight is not model.embed_tokens.weight:
        yield "lm_head", None, "lm_head", model.lm_head.weight


def _part(name: str, module: Module) -> str:
    """The part to which a module inside a decoder layer belongs."""
    if name.startswith("self_attn"):
        return "attention"
    if isinstance(module, RMSNorm):
        return "norms"
    routed = {"mlp.experts": "routed_experts", "mlp.gate": "gate"}
    return routed.get(name, "shared_experts" if name.startswith("mlp.shared_experts") else "dense_ffn")


def count_parameters(cfg: ModelConfig) -> Parameters:
    """Count the real model at the shapes of `cfg`."""
    known = shapes(cfg)
    main, mtp = Counter(dict.fromkeys(PARTS, 0)), Counter[str]()
    for w in known.weights:
        (main if w.layer is None or w.layer < cfg.num_hidden_layers else mtp)[w.part] += w.size
    idle = cfg.n_routed_experts - cfg.num_experts_per_tok
    total, experts = main.total(), main["routed_experts"]
    active = total - experts // cfg.n_routed_experts * idle
    tied = cfg.tie_word_embeddings  # the one matrix is the head already
    return Parameters(
        by_part=dict(main),
        gate_bias=sum(size for layer, size in known.gate_biases if layer < cfg.num_hidden_layers),
        mtp_gate_bias=sum(size for layer, size in known.gate_biases if layer >= cfg.num_hidden_layers),
        mtp=dict(mtp),
        total=total,
        active_with_head=active - (0 if tied else main["embedding"]),
        active_with_head_and_embedding=active,
        mtp_active=mtp.total() - mtp["routed_experts"] // cfg.n_routed_experts * idle,
    )


def stored_as(cfg: ModelConfig) -> str:
    """How the released files of this config hold the weights: 'fp8', 'bf16' or 'fp32'.

    `quantization_config` and `torch_dtype` of the file decide; where it has neither, V3 is FP8 and V2 is BF16, as they
    were released.

    Raises ValueError for a quantisation or dtype that the writer does not know.
    """
    settings = cfg.extra.get("quantization_config")
    dtype = cfg.extra.get("torch_dtype") or cfg.extra.get("dtype")
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        if method != "fp8":
            raise ValueError(f"quantization_config has quant_method={method!r}: only 'fp8' in 128x128 blocks is known")
        return "fp8"
    if dtype is None:
        return "fp8" if cfg.model_type == "deepseek_v3" else "bf16"
    names = {"bfloat16": "bf16", "float32": "fp32"}
    if dtype not in names:
        raise ValueError(f"torch_dtype={dtype!r} is not one of {', '.join(map(repr, names))}")
    return names[dtype]


def count_checkpoint(cfg: ModelConfig, dtype: str | None = None) -> Checkpoint:
    """Count what a released directory holds, tensor by tensor, as the writer would write it.

    Parameters
    ----------
    dtype : 'fp8', 'bf16', 'fp32' or None
        None: as released (`stored_as`).

    Raises
    ------
    ValueError
        Another dtype.
    """
    dtype = stored_as(cfg) if dtype is None else dtype
    if dtype not in STORED:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(map(repr, STORED))}")
    names = {value: name for name, value in DTYPES.items()}
    elements, tensors, nbytes = Counter[str](), Counter[str](), Counter[str]()
    for name, array in released_tensors(Transformer(cfg)):
        for t in plan(name, array, dtype):
            kind = names[t.dtype]
            elements[kind] += math.prod(t.shape)
            tensors[kind] += 1
            nbytes[kind] += t.nbytes
    return Checkpoint(dtype, dict(elements), dict(tensors), dict(nbytes))


def parameter_report(cfg: ModelConfig, dtype: str | None = None) -> dict[str, Any]:
    """All counts of one model under the names that ``report params --json`` prints; every value an int but `stored_as`.

    `by_dtype`, `tensors_by_dtype` and `bytes_by_dtype` have the keys of the files' own metadata (BF16, F8_E4M3, F32).
    """
    p, c = count_parameters(cfg), count_checkpoint(cfg, dtype)
    mtp = sum(p.mtp.values())
    join = 2 * cfg.hidden_size**2 * cfg.num_nextn_predict_layers  # eh_proj, which the published MTP figures leave out
    shared = p.by_part["embedding"] + (p.by_part["lm_head"] or p.by_part["embedding"])  # repeated in the files
    return {
        "parameters": p.total,
        "parameters_with_gate_bias": p.total + p.gate_bias,
        "active_with_head": p.active_with_head,
        "active_with_head_and_embedding": p.active_with_head_and_embedding,
        "by_part": p.by_part,
        "mtp_parameters": mtp,
        "mtp_parameters_without_eh_proj": mtp - join,
        "mtp_parameters_as_stored": mtp + p.mtp_gate_bias + shared * cfg.num_nextn_predict_layers,
        "mtp_active": p.mtp_active,
        "stored_as": c.stored_as,
        "checkpoint_elements": sum(c.elements.values()),
        "checkpoint_tensors": sum(c.tensors.values()),
        "checkpoint_bytes": sum(c.nbytes.values()),
        "by_dtype": c.elements,
        "tensors_by_dtype": c.tensors,
        "bytes_by_dtype": c.nbytes,
    }
