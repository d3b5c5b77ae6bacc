"""The PyTorch peer of a training step: the same model, eager, plain and well made. It imports nothing of minidsv3.

Of each part the variant that was fastest on a CPU: an additive mask and a softmax for attention (scaled_dot_product
with its CPU flash kernel does not pay at head dims of 24), experts by a stable sort with one gemm each and an inverse
permutation on the way back, one parameter per expert, fused AdamW. It does all that our step does: main and MTP loss,
the sequence-wise balance loss, clipping, decoupled weight decay on matrices only, and the balance bias.
"""

import json
import math
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


class Norm(nn.Module):
    def __init__(self, w: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(w), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Linear(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class MLP(nn.Module):
    """SwiGLU; gate and up in one gemm."""

    def __init__(self, w: dict[str, Tensor], name: str) -> None:
        super().__init__()
        self.gate_up = Linear(torch.cat([w[f"{name}.gate_proj.weight"], w[f"{name}.up_proj.weight"]]))
        self.down_proj = Linear(w[f"{name}.down_proj.weight"])

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class MLA(nn.Module):
    def __init__(self, cfg: dict, w: dict[str, Tensor], name: str) -> None:
        super().__init__()
        self.q_a_proj, self.q_b_proj, self.kv_a_proj_with_mqa, self.kv_b_proj, self.o_proj = (
            Linear(w[f"{name}.{p}.weight"])
            for p in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
        )
        self.q_a_layernorm, self.kv_a_layernorm = (Norm(w[f"{name}.{p}_a_layernorm.weight"], 1e-6) for p in ("q", "kv"))
        self.cfg = cfg

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor) -> Tensor:
        cfg, (B, S, _) = self.cfg, x.shape
        H, d_n, d_r = cfg["num_attention_heads"], cfg["qk_nope_head_dim"], cfg["qk_rope_head_dim"]
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(B, S, H, -1).transpose(1, 2)
        q_nope, q_rope = q.split((d_n, d_r), dim=-1)
        c_kv, k_rope = self.kv_a_proj_with_mqa(x).split((cfg["kv_lora_rank"], d_r), dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(c_kv)).view(B, S, H, -1).transpose(1, 2)
        k_nope, v = kv.split((d_n, cfg["v_head_dim"]), dim=-1)
        k_rope = rotate(k_rope[:, None], rotation).expand(-1, H, -1, -1)
        query = torch.cat([q_nope, rotate(q_rope, rotation)], dim=-1)
        key = torch.cat([k_nope, k_rope], dim=-1)
        scores = query @ key.transpose(2, 3) * (d_n + d_r) ** -0.5 + mask
        o = torch.softmax(scores, dim=-1) @ v
        return self.o_proj(o.transpose(1, 2).reshape(B, S, -1))


class MoE(nn.Module):
    def __init__(self, cfg: dict, w: dict[str, Tensor], name: str) -> None:
        super().__init__()
        self.gate = Linear(w[f"{name}.gate.weight"])
        self.register_buffer("bias", w[f"{name}.gate.e_score_correction_bias"].clone())
        self.experts = nn.ModuleList(MLP(w, f"{name}.experts.{e}") for e in range(cfg["n_routed_experts"]))
        self.shared_experts = MLP(w, f"{name}.shared_experts")
        self.cfg = cfg

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        cfg, (B, S, D) = self.cfg, x.shape
        E, K = cfg["n_routed_experts"], cfg["num_experts_per_tok"]
        tokens = x.view(B * S, D)
        scores = torch.sigmoid(self.gate(tokens))
        with torch.no_grad():
            chosen = torch.topk(scores + self.bias, K).indices
            slots = chosen.flatten()
            order = torch.argsort(slots, stable=True)
            inverse = torch.empty_like(order)
            inverse[order] = torch.arange(len(order))
            self.load = torch.bincount(slots, minlength=E)
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(dim=1, keepdim=True) * cfg["routed_scaling_factor"]
        rows = tokens[order // K].split(self.load.tolist())
        out = torch.cat([expert(r) for expert, r in zip(self.experts, rows)])
        y = (out[inverse].view(B * S, K, D) * weights[..., None]).sum(dim=1)
        counts = F.one_hot(chosen.view(B, S * K), E).sum(dim=1)  # of each sequence
        share = (scores / scores.sum(dim=1, keepdim=True)).view(B, S, E).mean(dim=1)
        balance = (counts * (E / (K * S)) * share).sum() / B
        return (y + self.shared_experts(tokens)).view(B, S, D), balance


class Layer(nn.Module):
    def __init__(self, cfg: dict, w: dict[str, Tensor], i: int) -> None:
        super().__init__()
        name = f"model.layers.{i}"
        self.input_layernorm = Norm(w[f"{name}.input_layernorm.weight"], cfg["rms_norm_eps"])
        self.post_attention_layernorm = Norm(w[f"{name}.post_attention_layernorm.weight"], cfg["rms_norm_eps"])
        self.self_attn = MLA(cfg, w, f"{name}.self_attn")
        self.routed = i >= cfg["first_k_dense_replace"]
        self.mlp = MoE(cfg, w, f"{name}.mlp") if self.routed else MLP(w, f"{name}.mlp")

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | float]:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        y = self.mlp(self.post_attention_layernorm(x))
        y, balance = y if self.routed else (y, 0.0)
        return x + y, balance


class MTP(nn.Module):
    def __init__(self, cfg: dict, w: dict[str, Tensor], i: int) -> None:
        super().__init__()
        name, eps = f"model.layers.{i}", cfg["rms_norm_eps"]
        self.enorm, self.hnorm = Norm(w[f"{name}.enorm.weight"], eps), Norm(w[f"{name}.hnorm.weight"], eps)
        self.eh_proj = Linear(w[f"{name}.eh_proj.weight"])
        self.layer = Layer(cfg, w, i)
        self.norm = Norm(w[f"{name}.shared_head.norm.weight"], eps)


class TorchModel(nn.Module):
    """Read from a directory that `save_pretrained` wrote; `mtp` false leaves the MTP modules out."""

    def __init__(self, path: Path, mtp: bool = True) -> None:
        super().__init__()
        self.cfg = cfg = json.loads((path / "config.json").read_text(encoding="utf-8"))
        w, L = load_file(path / "model.safetensors"), cfg["num_hidden_layers"]
        self.embed_tokens = nn.Parameter(w["model.embed_tokens.weight"])
        self.layers = nn.ModuleList(Layer(cfg, w, i) for i in range(L))
        self.mtp = nn.ModuleList(MTP(cfg, w, L + k) for k in range(cfg["num_nextn_predict_layers"] if mtp else 0))
        self.norm, self.lm_head = Norm(w["model.norm.weight"], cfg["rms_norm_eps"]), Linear(w["lm_head.weight"])

    @cache  # noqa: B019 - one model a process
    def tables(self, S: int) -> tuple[Tensor, Tensor]:
        """Rotation [S, d_r/2] and additive causal mask [S, S]."""
        d_r = self.cfg["qk_rope_head_dim"]
        angles = torch.arange(S)[:, None] * self.cfg["rope_theta"] ** (-torch.arange(0, d_r, 2) / d_r)
        return torch.polar(torch.ones_like(angles), angles), torch.full((S, S), -math.inf).triu(1)

    def loss(self, tokens: Tensor, targets: Tensor, mtp_weight: float, balance_weight: float) -> Tensor:
        S = tokens.shape[1]
        rotation, mask = self.tables(S)
        embedded = F.embedding(tokens, self.embed_tokens)
        x, balance = embedded, 0.0
        for layer in self.layers:
            x, b = layer(x, rotation, mask)
            balance = balance + b
        h = self.norm(x)
        total = F.cross_entropy(self.lm_head(h).flatten(0, 1), targets.flatten())
        for k, module in enumerate(self.mtp, start=1):
            n = S - k
            joined = torch.cat([module.enorm(embedded[:, k:]), module.hnorm(h[:, :n])], dim=-1)
            x, b = module.layer(module.eh_proj(joined), rotation[:n], mask[:n, :n])
            h, balance = module.norm(x), balance + b
            loss = F.cross_entropy(self.lm_head(h).flatten(0, 1), targets[:, k:].flatten())
            total = total + mtp_weight / len(self.mtp) * loss
        return total + balance_weight * balance

    def gradients(self) -> dict[str, Tensor]:
        """Gradient of each tensor under its released name."""
        found, L = {"model.embed_tokens.weight": self.embed_tokens.grad}, len(self.layers)
        for name, p in self.named_parameters():
            if name.startswith("mtp."):  # as stored: behind the last layer, the decoder layer's parts unnested
                _, k, rest = name.split(".", 2)
                rest = "shared_head." + rest if rest.startswith("norm") else rest.removeprefix("layer.")
                name = f"layers.{L + int(k)}.{rest}"
            name = name if name.startswith("lm_head") else f"model.{name}"
            if "gate_up" in name:
                gate, up = p.grad.chunk(2)
                found[name.replace("gate_up", "gate_proj")], found[name.replace("gate_up", "up_proj")] = gate, up
            elif name != "model.embed_tokens":
                found[name] = p.grad
        return found


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2)


class TorchTrainer:
    """A whole training step around `TorchModel`, or around transformers' model of the same directory."""

    def __init__(self, model: nn.Module, loss, settings: dict) -> None:
        self.model, self.loss, self.settings = model, loss, settings
        decayed = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": settings["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=(0.9, 0.95), eps=1e-8, fused=True)
        self.gates = [m for m in model.modules() if isinstance(m, MoE)]

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """One step; returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings["grad_clip"])
        self.optimizer.step()
        for gate in self.gates:
            load = gate.load.float()
            gate.bias += self.settings["gamma"] * torch.sign(load.mean() - load)
        return loss.item()
