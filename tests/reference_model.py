"""A small model whose sizes are pairwise different, and its forward pass written out in loops.

The loops follow the equations of the V3 report token by token and head by head in float64 and share no code with the
package: what the tests compare against, not a test itself.
"""

from typing import Any

import numpy as np

from minidsv3 import ModelConfig, Transformer

ODD: dict[str, Any] = dict(
    vocab_size=29, hidden_size=14, intermediate_size=22, moe_intermediate_size=11, num_hidden_layers=2,
    num_attention_heads=3, q_lora_rank=10, kv_lora_rank=9, qk_nope_head_dim=8, qk_rope_head_dim=6, v_head_dim=5,
    n_routed_experts=12, n_shared_experts=1, num_experts_per_tok=4, first_k_dense_replace=1, n_group=4, topk_group=2,
    routed_scaling_factor=2.5, num_nextn_predict_layers=1,
)  # fmt: skip
V2_ROUTING: dict[str, Any] = dict(
    scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False, model_type="deepseek_v2"
)
YARN = dict(type="yarn", factor=4, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.5)


def odd_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**ODD, **changes})


def odd_model(dtype: Any = np.float64, seed: int = 3, std: float = 0.3, **changes: Any) -> Transformer:
    """Weights large enough (std) that scores, gates and logits are far from uniform; biases that matter."""
    model = Transformer(odd_config(**changes))
    rng = np.random.default_rng(seed)
    model.init_weights(rng, dtype, std=std)
    for _, parameter in model.named_parameters():
        if len(parameter.shape) == 1:  # norm weights of one would hide a norm that forgets its weight
            parameter.data[...] = 1 + 0.2 * rng.standard_normal(parameter.shape, dtype=np.float32)
    for _, bias in model.named_buffers():
        bias[...] = rng.uniform(-0.3, 0.1, bias.shape)
    return model


def odd_tokens(batch: int = 2, length: int = 7, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, ODD["vocab_size"], (batch, length), dtype=np.int64)


class Reference:
    """The forward pass of `model` in loops, on a copy of its weights."""

    def __init__(self, model: Transformer) -> None:
        self.cfg = model.config
        self.w = {name: p.data.astype(np.float64) for name, p in model.named_parameters()}
        self.w.update({name: b.astype(np.float64) for name, b in model.named_buffers()})
        if self.cfg.tie_word_embeddings:
            self.w["lm_head.weight"] = self.w["model.embed_tokens.weight"]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        weight, length = self.w[f"{name}.weight"], len(x)
        mean_square = sum(v * v for v in x) / length
        eps = 1e-6 if name.endswith("_a_layernorm") else self.cfg.rms_norm_eps  # as in the released modelling code
        return np.array([weight[i] * x[i] / (mean_square + eps) ** 0.5 for i in range(length)])

    def project(self, name: str, x: np.ndarray) -> np.ndarray:
        return np.array([float(np.dot(row, x)) for row in self.w[f"{name}.weight"]])

    def turn(self, x: np.ndarray, position: int) -> np.ndarray:
        d_r, y = len(x), np.empty(len(x), dtype=np.float64)
        for j in range(d_r // 2):
            angle = position * self.cfg.rope_theta ** (-2 * j / d_r)
            a, b = x[2 * j], x[2 * j + 1]
            y[2 * j], y[2 * j + 1] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
        return y

    def attend(self, name: str, xs: list[np.ndarray]) -> list[np.ndarray]:
        cfg = self.cfg
        H, d_n, d_r, d_v, r_kv = (cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim,
                                  cfg.v_head_dim, cfg.kv_lora_rank)  # fmt: skip
        queries, keys, values = [], [], []
        for position, x in enumerate(xs):
            if cfg.q_lora_rank is None:
                q = self.project(f"{name}.q_proj", x)
            else:
                c_q = self.norm(f"{name}.q_a_layernorm", self.project(f"{name}.q_a_proj", x))
                q = self.project(f"{name}.q_b_proj", c_q)
            c_kv_k = self.project(f"{name}.kv_a_proj_with_mqa", x)
            kv = self.project(f"{name}.kv_b_proj", self.norm(f"{name}.kv_a_layernorm", c_kv_k[:r_kv]))
            k_rope = self.turn(c_kv_k[r_kv:], position)
            q_heads = [q[h * (d_n + d_r) : (h + 1) * (d_n + d_r)] for h in range(H)]
            kv_heads = [kv[h * (d_n + d_v) : (h + 1) * (d_n + d_v)] for h in range(H)]
            queries.append([(q_h[:d_n], self.turn(q_h[d_n:], position)) for q_h in q_heads])
            keys.append([(kv_h[:d_n], k_rope) for kv_h in kv_heads])
            values.append([kv_h[d_n:] for kv_h in kv_heads])
        outputs = []
        for i in range(len(xs)):
            heads = []
            for h in range(H):
                scores = [
                    (queries[i][h][0] @ keys[j][h][0] + queries[i][h][1] @ keys[j][h][1]) / (d_n + d_r) ** 0.5
                    for j in range(i + 1)
                ]
                weights = np.exp(scores) / np.exp(scores).sum()
                heads.append(sum(weights[j] * values[j][h] for j in range(i + 1)))
            outputs.append(self.project(f"{name}.o_proj", np.concatenate(heads)))
        return outputs

    def feed_forward(self, name: str, x: np.ndarray) -> np.ndarray:
        gate, up = self.project(f"{name}.gate_proj", x), self.project(f"{name}.up_proj", x)
        return self.project(f"{name}.down_proj", gate / (1 + np.exp(-gate)) * up)

    def route(self, name: str, x: np.ndarray) -> dict[int, float]:
        cfg, logits = self.cfg, self.project(name, x)
        sigmoid = cfg.scoring_func == "sigmoid"
        s = 1 / (1 + np.exp(-logits)) if sigmoid else np.exp(logits) / np.exp(logits).sum()
        biased = s + self.w[f"{name}.e_score_correction_bias"] if cfg.topk_method == "noaux_tc" else s
        chosen = chosen_experts(list(biased), cfg.num_experts_per_tok, cfg.n_group, cfg.topk_group, cfg.topk_method)
        total = sum(s[e] for e in chosen) if cfg.norm_topk_prob and len(chosen) > 1 else 1.0
        return {e: s[e] / total * cfg.routed_scaling_factor for e in chosen}

    def mixture(self, name: str, x: np.ndarray) -> np.ndarray:
        y = np.zeros(len(x), dtype=np.float64)
        for e, weight in self.route(f"{name}.gate", x).items():
            y = y + weight * self.feed_forward(f"{name}.experts.{e}", x)
        return y + self.feed_forward(f"{name}.shared_experts", x) if self.cfg.n_shared_experts else y

    def layer(self, i: int, xs: list[np.ndarray]) -> list[np.ndarray]:
        name, ffn = f"model.layers.{i}", self.mixture if i >= self.cfg.first_k_dense_replace else self.feed_forward
        attended = self.attend(f"{name}.self_attn", [self.norm(f"{name}.input_layernorm", x) for x in xs])
        xs = [x + a for x, a in zip(xs, attended)]
        return [x + ffn(f"{name}.mlp", self.norm(f"{name}.post_attention_layernorm", x)) for x in xs]

    def hidden(self, tokens: list[int]) -> list[np.ndarray]:
        """Hidden states of one sequence after the final norm."""
        xs = [self.w["model.embed_tokens.weight"][t] for t in tokens]
        for i in range(self.cfg.num_hidden_layers):
            xs = self.layer(i, xs)
        return [self.norm("model.norm", x) for x in xs]

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.array([[self.project("lm_head", h) for h in self.hidden(list(row))] for row in tokens])

    def mtp_logits(self, tokens: np.ndarray) -> list[np.ndarray]:
        """Of every depth k: [B, S-k, V]."""
        depths: list[list[Any]] = [[] for _ in range(self.cfg.num_nextn_predict_layers)]
        for row in tokens:
            h = self.hidden(list(row))
            for k in range(1, len(depths) + 1):
                i = self.cfg.num_hidden_layers + k - 1
                name, xs = f"model.layers.{i}", []
                for position in range(len(row) - k):
                    embedded = self.w["model.embed_tokens.weight"][row[position + k]]
                    joined = [self.norm(f"{name}.enorm", embedded), self.norm(f"{name}.hnorm", h[position])]
                    xs.append(self.project(f"{name}.eh_proj", np.concatenate(joined)))
                h = [self.norm(f"{name}.shared_head.norm", x) for x in self.layer(i, xs)]
                depths[k - 1].append([self.project("lm_head", x) for x in h])
        return [np.array(depth) for depth in depths]


def chosen_experts(biased: list[float], top_k: int, n_group: int, topk_group: int, method: str) -> list[int]:
    """Experts of one token by the text: groups first, then experts; sorted() is stable, so ties go to the lowest."""
    E = len(biased)
    allowed = list(range(E))
    if method != "greedy":
        size = E // n_group
        best = 2 if method == "noaux_tc" else 1
        group_scores = [sum(sorted(biased[g * size : (g + 1) * size])[-best:]) for g in range(n_group)]
        groups = sorted(range(n_group), key=lambda g: -group_scores[g])[:topk_group]
        allowed = [e for e in range(E) if e // size in groups]
    return sorted(sorted(allowed, key=lambda e: -biased[e])[:top_k])
