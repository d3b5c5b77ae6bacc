"""Random shapes and settings of the V3 and V2 families, for comparing with the transformers library.

What the library can't do is not drawn: hidden sizes and expert widths that are no multiple of four (its grouped
product wants rows of 16 bytes), and no shared expert at all. Nor is one normalised expert per token: the library gives
it weight one, we (as the released code) its score, because a constant leaves the gate without a gradient.
"""

import numpy as np

NO_SPECIAL_TOKENS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)


def random_case(seed):
    """Keywords for `make_goldens.torch_config`: every setting that both libraries know is drawn."""
    rng = np.random.default_rng(seed)

    def pick(*values):
        return values[int(rng.integers(len(values)))]

    v2 = seed % 3 == 2
    heads, layers, groups = pick(1, 2, 3, 5), pick(1, 2, 3, 4), pick(1, 2, 3, 4)
    per_group = pick(2, 3, 4)
    topk_group = int(rng.integers(1, groups + 1))
    case = dict(
        vocab_size=pick(23, 64, 101), hidden_size=heads * pick(4, 8, 12), intermediate_size=pick(13, 24, 40),
        moe_intermediate_size=pick(4, 12, 16), num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, q_lora_rank=pick(None, 7, 12), kv_lora_rank=pick(5, 8, 11),
        qk_nope_head_dim=pick(3, 6, 8), qk_rope_head_dim=pick(2, 4, 6), v_head_dim=pick(3, 6, 7),
        n_routed_experts=groups * per_group, n_shared_experts=pick(1, 1, 2, 3), n_group=groups, topk_group=topk_group,
        num_experts_per_tok=int(rng.integers(1, topk_group * per_group + 1)),
        first_k_dense_replace=int(rng.integers(0, layers + 1)), routed_scaling_factor=pick(1.0, 0.7, 2.5),
        norm_topk_prob=pick(True, False), tie_word_embeddings=pick(False, False, True),
        rms_norm_eps=pick(1e-6, 1e-5, 1e-3), max_position_embeddings=64, **NO_SPECIAL_TOKENS,
    )  # fmt: skip
    case["norm_topk_prob"] = case["norm_topk_prob"] and case["num_experts_per_tok"] > 1
    if v2:  # where the library does not look at norm_topk_prob, and needs even widths in front of the rotated part
        case |= dict(model_type="deepseek_v2", norm_topk_prob=False, topk_method=pick("greedy", "group_limited_greedy"))
        case |= dict(qk_nope_head_dim=pick(2, 6, 8), kv_lora_rank=pick(6, 8, 10))
    else:
        case |= dict(rope_interleave=pick(True, True, False))
    theta = pick(10000.0, 500.0, 1e6)
    case["rope_parameters"] = dict(rope_type="default", rope_theta=theta)
    if rng.random() < 0.5:
        mscale = pick(None, 1.0, 0.707)
        case["rope_parameters"] = dict(
            rope_type="yarn", rope_theta=theta, factor=pick(2.0, 4.0, 40.0), beta_fast=pick(32, 8),
            beta_slow=pick(1, 2),
            original_max_position_embeddings=pick(8, 16),
            **(dict(mscale=mscale, mscale_all_dim=pick(mscale, 0.4)) if mscale else {}),
        )  # fmt: skip
    return case
