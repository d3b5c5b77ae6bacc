"""FLOPs and bytes of the three ways to decode: against counts by hand, against measured arrays, and their crossing."""

import numpy as np
import pytest

from minidsv3 import LatentCache, ModelConfig
from minidsv3.generation.costs import PATHS, absorbing_pays_up_to, attention_cost

V3 = ModelConfig.preset("deepseek-v3")


def test_attention_cost_absorbed_counts_every_gemm_of_a_step():
    H, r, d_r, d_n, d_v, L = 128, 512, 64, 128, 128, 1000
    into_query, scores = 2 * H * d_n * r, 2 * H * L * (r + d_r)
    mix, out = 2 * H * L * r, 2 * H * r * d_v
    assert attention_cost(V3, "absorbed", L).flops == into_query + scores + mix + out


def test_attention_cost_recomputed_counts_every_gemm_of_a_step():
    H, r, d_r, d_n, d_v, L = 128, 512, 64, 128, 128, 1000
    keys_values, scores, mix = 2 * L * r * H * (d_n + d_v), 2 * H * L * (d_n + d_r), 2 * H * L * d_v
    assert attention_cost(V3, "recomputed", L).flops == keys_values + scores + mix


def test_attention_cost_bytes_are_those_of_the_cache():
    cfg = ModelConfig.preset("nano")
    cache = LatentCache(cfg, 1, np.float32)
    for layer in cache.layers:
        layer.append(np.zeros((1, 5, cfg.kv_lora_rank), np.float32), np.zeros((1, 5, cfg.qk_rope_head_dim), np.float32))
    weight = 4 * cfg.num_attention_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim) * cfg.kv_lora_rank
    per_token = (attention_cost(cfg, "absorbed", 5, bytes_per_number=4).bytes_read - weight) / 5
    assert per_token * cfg.num_hidden_layers == cache.bytes_per_token


def test_absorbing_pays_up_to_is_where_the_flops_cross():
    context, crossing = 10_000_000, absorbing_pays_up_to(V3)  # long: what does not grow with context vanishes
    assert crossing == pytest.approx(512 * 256 / 768)
    below, above = ({p: attention_cost(V3, p, context, n).flops for p in PATHS} for n in (170, 171))
    assert below["absorbed"] < below["recomputed"] and above["absorbed"] > above["recomputed"]


@pytest.mark.parametrize(("path", "context", "new"), [("naive", 5, 1), ("absorbed", 3, 4), ("absorbed", 3, 0)])
def test_attention_cost_names_what_is_wrong(path, context, new):
    with pytest.raises(ValueError, match=r"path=|new_tokens="):
        attention_cost(V3, path, context, new)
