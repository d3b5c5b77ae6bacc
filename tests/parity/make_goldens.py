"""Make tests/golden/transformers_*.npz: tiny DeepSeek models of the transformers library and what they compute.

    python tests/parity/make_goldens.py [CASE ...]   # needs torch and transformers, not minidsv3

Each file holds the config.json and the weights as transformers saves them (released names; every weight is a float16
number, so a small file holds it exactly), tokens, and in float32: logits, loss, some gradients, greedy tokens. The
versions that made a file stand in it under `made_by`. Weights are drawn large enough that gates, scores and logits are
far from uniform: at a standard deviation of 0.02 a wrong layer would hardly be seen.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config

GOLDEN = Path(__file__).parent.parent / "golden"
SHAPE = dict(
    vocab_size=31, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
    num_attention_heads=3, num_key_value_heads=3, q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6,
    qk_rope_head_dim=4, v_head_dim=5, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3,
    first_k_dense_replace=1, n_group=4, topk_group=2, routed_scaling_factor=2.5, bos_token_id=None, eos_token_id=None,
    pad_token_id=None, max_position_embeddings=64,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16, mscale=1.0,
    mscale_all_dim=0.5, beta_fast=32, beta_slow=1,
)  # fmt: skip
V2 = dict(  # hidden_size must be a multiple of the heads here, a rule that transformers inherits from Llama
    model_type="deepseek_v2", norm_topk_prob=False, routed_scaling_factor=1.5, num_attention_heads=4,
    num_key_value_heads=4,
)  # fmt: skip
CASES = {
    "v3": {},
    "v3_no_q_lora": dict(q_lora_rank=None),
    "v3_yarn": dict(rope_parameters=YARN),
    "v3_half_split_rope": dict(rope_interleave=False),
    "v3_unnormalised": dict(norm_topk_prob=False),
    "v3_shared_experts": dict(n_shared_experts=3),
    "v3_tied": dict(tie_word_embeddings=True),
    "v3_one_expert": dict(num_experts_per_tok=1, topk_group=1, norm_topk_prob=False),
    "v3_eps": dict(rms_norm_eps=1e-2),
    "v2_greedy": {**V2, "topk_method": "greedy", "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "v2_group_limited": {**V2, "topk_method": "group_limited_greedy", "n_shared_experts": 2},
    "v2_yarn": {**V2, "topk_method": "greedy", "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
}
BATCH, LENGTH, NEW_TOKENS = 2, 9, 12
GRADIENTS = ("embed_tokens", "q_a_proj", "q_proj", "kv_b_proj", "layers.1.mlp.gate.weight", "experts.3.", "norm.weight")


def torch_config(**changes):
    """The config of a case, as the transformers library has it."""
    values = {**SHAPE, **changes}
    kind = {"deepseek_v2": DeepseekV2Config}.get(values.pop("model_type", None), DeepseekV3Config)
    if "num_nextn_predict_layers" not in values:
        values["num_nextn_predict_layers"] = 0
    return kind(**values)


def torch_model(config, seed=0, std=0.25):
    """A model in float32 on the CPU: float16 numbers as weights, norms around one, biases that change the choice."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    rng = np.random.default_rng(seed)
    tensors = [*model.named_parameters(), *(b for b in model.named_buffers() if b[0].endswith("correction_bias"))]
    with torch.no_grad():
        for name, tensor in tensors:
            values = rng.standard_normal(tuple(tensor.shape)) * std
            values = 1 + values if name.endswith("norm.weight") else values
            tensor.copy_(torch.from_numpy(values.astype(np.float16).astype(np.float32)))
    return model


def tokens_of(config, seed=1, batch=BATCH, length=LENGTH):
    """Token ids int64 [batch, length + 1]: the last is a target only."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length + 1), dtype=np.int64)


def logits_and_loss(model, tokens):
    """Logits [B, S, V] of all tokens but the last, and the loss; gradients are left in the model."""
    model.zero_grad()
    ids = torch.from_numpy(tokens)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return logits.numpy(), float(loss.detach())


def gradients(model):
    """Gradient of every parameter under its released name (transformers keeps a layer's experts in one tensor)."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.numpy()
        stem, _, last = name.rpartition(".")
        for e, one in enumerate(gradient if stem.endswith("experts") else ()):
            expert = f"{stem}.{e}"
            if last == "gate_up_proj":
                half = len(one) // 2
                found[f"{expert}.gate_proj.weight"], found[f"{expert}.up_proj.weight"] = one[:half], one[half:]
            else:
                found[f"{expert}.{last}.weight"] = one
        if not stem.endswith("experts"):
            found[name] = gradient
    return found


def greedy(model, prompt, new_tokens):
    """Greedy tokens by a loop without a cache, and the smallest lead of the best logit over the second."""
    ids, lead = list(prompt), np.inf
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].numpy()
        second, first = np.sort(logits)[-2:]
        ids, lead = [*ids, int(logits.argmax())], min(lead, float(first - second))
    return np.array(ids[len(prompt) :], dtype=np.int64), lead


def golden(**changes):
    """Arrays of one golden file."""
    config = torch_config(**changes)
    model = torch_model(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder) / "model.safetensors")
        text = json.dumps(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")), sort_keys=True)
    tokens = tokens_of(config)
    logits, loss = logits_and_loss(model, tokens)
    new, lead = greedy(model, tokens[0, :4], NEW_TOKENS)
    if lead < 1e-4:  # another rounding could choose the other token
        raise ValueError(f"the two best logits are {lead} apart: take another seed")
    kept = {name: g for name, g in gradients(model).items() if any(part in name for part in GRADIENTS)}
    return {
        "made_by": np.array(f"torch {torch.__version__}, transformers {transformers.__version__}"),
        "config": np.array(text),
        "tokens": tokens.astype(np.int16),
        "logits": logits,
        "loss": np.array(loss),
        "greedy": new.astype(np.int16),
        **packed("weights", weights, np.float16),
        **packed("gradients", kept, np.float32),
    }


def packed(kind, arrays, dtype):
    """Many small arrays as one vector and a list of names and shapes: an .npz entry costs 250 bytes."""
    listed = json.dumps([[name, list(a.shape)] for name, a in sorted(arrays.items())])
    return {
        f"{kind}_listed": np.array(listed),
        kind: np.concatenate([arrays[name].ravel() for name in sorted(arrays)]).astype(dtype),
    }


def main():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    GOLDEN.mkdir(exist_ok=True)
    for name, changes in CASES.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        file = GOLDEN / f"transformers_{name}.npz"
        np.savez_compressed(file, **golden(**changes))
        print(f"{file.name}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
