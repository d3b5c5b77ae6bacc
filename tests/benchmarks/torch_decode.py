"""The PyTorch peer of a decoding step: the same absorbed attention over the same latent cache, eager, no compile.

Plain and well made: weights as tensors, ``torch.inference_mode``, a preallocated cache, shared and chosen experts only.
It imports nothing of minidsv3 and reads a directory that `save_pretrained` wrote.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file


class TorchDecoder:
    """Greedy decoding of one sequence; supports what the small presets use (sigmoid gate, no groups, no YaRN)."""

    def __init__(self, path: Path, capacity: int) -> None:
        self.cfg = cfg = json.loads((path / "config.json").read_text(encoding="utf-8"))
        self.w = load_file(path / "model.safetensors")
        self.r, self.d_r, self.d_n = cfg["kv_lora_rank"], cfg["qk_rope_head_dim"], cfg["qk_nope_head_dim"]
        self.cache = [torch.zeros(capacity, self.r + self.d_r) for _ in range(cfg["num_hidden_layers"])]
        angles = torch.arange(capacity)[:, None] * cfg["rope_theta"] ** (-torch.arange(0, self.d_r, 2) / self.d_r)
        self.rotation = torch.polar(torch.ones_like(angles), angles)
        self.layers = [self._layer(i) for i in range(cfg["num_hidden_layers"])]

    def _layer(self, i: int) -> dict:
        cfg, p = self.cfg, f"model.layers.{i}."
        layer = {k.removeprefix(p): v for k, v in self.w.items() if k.startswith(p)}
        kv_b = layer["self_attn.kv_b_proj.weight"].view(cfg["num_attention_heads"], -1, self.r)
        layer["w_uk"], layer["w_uv"] = kv_b[:, : self.d_n].contiguous(), kv_b[:, self.d_n :].contiguous()
        if i >= cfg["first_k_dense_replace"]:
            experts = range(cfg["n_routed_experts"])
            gate_up = (f"mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up"))
            gate_up = [[layer[name.format(e)] for e in experts] for name in gate_up]
            layer["gate_up"] = [torch.cat(pair) for pair in zip(*gate_up)]
            layer["down"] = [layer[f"mlp.experts.{e}.down_proj.weight"] for e in experts]
            prefix = "mlp.shared_experts."
        else:
            prefix = "mlp."
        layer["dense_up"] = torch.cat([layer[f"{prefix}gate_proj.weight"], layer[f"{prefix}up_proj.weight"]])
        layer["dense_down"] = layer[f"{prefix}down_proj.weight"]
        return layer

    @torch.inference_mode()
    def step(self, token: int, at: int) -> torch.Tensor:
        """Logits [V] after one more token at position `at`."""
        cfg = self.cfg
        x = self.w["model.embed_tokens.weight"][token][None]
        for layer, cache in zip(self.layers, self.cache):
            x = x + self._attention(layer, cache, self._norm(x, layer["input_layernorm.weight"]), at)
            y = self._norm(x, layer["post_attention_layernorm.weight"])
            out = self._swiglu(y, layer["dense_up"], layer["dense_down"])
            if "gate_up" in layer:
                scores = torch.sigmoid(y @ layer["mlp.gate.weight"].T)[0]
                _, chosen = torch.topk(scores + layer["mlp.gate.e_score_correction_bias"], cfg["num_experts_per_tok"])
                weights = scores[chosen]
                weights = weights / weights.sum() * cfg["routed_scaling_factor"]
                for e, weight in zip(chosen.tolist(), weights):
                    out = out + weight * self._swiglu(y, layer["gate_up"][e], layer["down"][e])
            x = x + out
        return (self._norm(x, self.w["model.norm.weight"]) @ self.w["lm_head.weight"].T)[0]

    def _attention(self, layer: dict, cache: torch.Tensor, x: torch.Tensor, at: int) -> torch.Tensor:
        H = self.cfg["num_attention_heads"]
        c_q = self._norm(x @ layer["self_attn.q_a_proj.weight"].T, layer["self_attn.q_a_layernorm.weight"])
        q = (c_q @ layer["self_attn.q_b_proj.weight"].T).view(H, -1)
        latent = (x @ layer["self_attn.kv_a_proj_with_mqa.weight"].T)[0]
        cache[at, : self.r] = self._norm(latent[: self.r], layer["self_attn.kv_a_layernorm.weight"])
        cache[at, self.r :] = self._rotate(latent[self.r :], at)
        absorbed = torch.bmm(q[:, None, : self.d_n], layer["w_uk"])[:, 0]
        query = torch.cat([absorbed, self._rotate(q[:, self.d_n :], at)], dim=1)
        past = cache[: at + 1]
        p = torch.softmax(query @ past.T / math.sqrt(q.shape[1]), dim=-1)
        o = torch.bmm((p @ past[:, : self.r])[:, None], layer["w_uv"].transpose(1, 2))
        return o.reshape(1, -1) @ layer["self_attn.o_proj.weight"].T

    def _rotate(self, x: torch.Tensor, at: int) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * self.rotation[at]
        return torch.view_as_real(pairs).flatten(-2)

    def _norm(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), w, self.cfg["rms_norm_eps"])

    @staticmethod
    def _swiglu(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gate, value = (x @ up.T).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * value) @ down.T


class TorchBatchDecoder(TorchDecoder):
    """The same for a batch of equally long sequences: rows sorted by expert, one product for each expert in use."""

    def __init__(self, path: Path, batch: int, capacity: int) -> None:
        super().__init__(path, capacity)
        self.cache = [torch.zeros(batch, capacity, self.r + self.d_r) for _ in self.cache]

    @torch.inference_mode()
    def step(self, tokens: list[int], at: int) -> torch.Tensor:
        """Logits [B, V] after one more token of each sequence at position `at`."""
        cfg = self.cfg
        x = self.w["model.embed_tokens.weight"][tokens]  # [B, D]
        for layer, cache in zip(self.layers, self.cache):
            x = x + self._attention(layer, cache, self._norm(x, layer["input_layernorm.weight"]), at)
            y = self._norm(x, layer["post_attention_layernorm.weight"])
            out = self._swiglu(y, layer["dense_up"], layer["dense_down"])
            if "gate_up" in layer:
                scores = torch.sigmoid(y @ layer["mlp.gate.weight"].T)
                _, chosen = torch.topk(scores + layer["mlp.gate.e_score_correction_bias"], cfg["num_experts_per_tok"])
                weights = scores.gather(1, chosen)
                weights = weights / weights.sum(1, keepdim=True) * cfg["routed_scaling_factor"]
                out = out + self._experts(layer, y, chosen, weights)
            x = x + out
        return self._norm(x, self.w["model.norm.weight"]) @ self.w["lm_head.weight"].T

    def _experts(self, layer: dict, y: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        rows = y[order // chosen.shape[1]].split(torch.bincount(flat, minlength=len(layer["down"])).tolist())
        done = [self._swiglu(r, layer["gate_up"][e], layer["down"][e]) for e, r in enumerate(rows) if len(r)]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return (torch.cat(done)[back].view(*chosen.shape, -1) * weights[:, :, None]).sum(1)

    def _attention(self, layer: dict, cache: torch.Tensor, x: torch.Tensor, at: int) -> torch.Tensor:
        c_q = self._norm(x @ layer["self_attn.q_a_proj.weight"].T, layer["self_attn.q_a_layernorm.weight"])
        q = (c_q @ layer["self_attn.q_b_proj.weight"].T).view(len(x), self.cfg["num_attention_heads"], -1)
        latent = x @ layer["self_attn.kv_a_proj_with_mqa.weight"].T
        cache[:, at, : self.r] = self._norm(latent[:, : self.r], layer["self_attn.kv_a_layernorm.weight"])
        cache[:, at, self.r :] = self._rotate(latent[:, self.r :], at)
        absorbed = torch.bmm(q[:, :, : self.d_n].transpose(0, 1), layer["w_uk"]).transpose(0, 1)
        query = torch.cat([absorbed, self._rotate(q[:, :, self.d_n :], at)], dim=2)  # [B, H, r + d_r]
        past = cache[:, : at + 1]
        p = torch.softmax(torch.bmm(query, past.transpose(1, 2)) / math.sqrt(q.shape[2]), dim=-1)
        latents = torch.bmm(p, past[:, :, : self.r]).transpose(0, 1)  # [H, B, r]
        o = torch.bmm(latents, layer["w_uv"].transpose(1, 2)).transpose(0, 1)
        return o.reshape(len(x), -1) @ layer["self_attn.o_proj.weight"].T
