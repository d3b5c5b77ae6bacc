"""FLOPs: what a token costs forward, in training and in decoding, and what share of the peak a step time means.

Only gemms count, a multiply-add is two. The matrices are those of the real model (`params.shapes`): every matrix
costs twice its size a token, a routed expert in K of E cases; the embedding is a look-up. Attention comes on top:
scores and sums over the keys that a query sees, ``2 H (d_qk + d_v)`` FLOPs each. How many keys is a convention:

    'full'    all S keys: what a kernel without causal skipping computes
    'causal'  S/2: the convention of "Insights into DeepSeek-V3", Tables 2 and 4
    'exact'   (S + 1)/2, the diagonal included: what `ops.attention` reports, so the tape equals it to the FLOP

Training is three times forward. The published FLOPs leave out the gates (and norms) and the MTP modules, and so do
`COUNTED` and every total made of it; the parts that are left out are listed all the same.
"""

from __future__ import annotations

from ..config import ModelConfig
from ..generation.costs import attention_cost
from .dense import check_context
from .params import shapes

COUNTED = ("projections", "attention", "dense_ffn", "shared_experts", "routed_experts", "lm_head")
ATTENTION = ("full", "causal", "exact")
_OF_PART = {"attention": "projections", "mtp_join": "mtp"}  # where the name in params is another one


def forward_flops(cfg: ModelConfig, seq_len: int, attention: str = "causal") -> dict[str, float]:
    """FLOPs of one forward pass over one sequence, by part: `COUNTED`, 'gate' and 'mtp'.

    Parameters
    ----------
    seq_len : int
        Tokens S of the sequence. Depth k of MTP runs over S - k of them.
    attention : 'full', 'causal' or 'exact'

    Raises
    ------
    ValueError
        `seq_len` is not positive, or beyond the positions that the config allows.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention={attention!r} is not one of {', '.join(map(repr, ATTENTION))}")
    check_context(cfg, seq_len)
    return _forward(cfg, _matrices(cfg), seq_len, attention)


Matrices = list[tuple[str, int | None, int]]  # (part, layer, FLOPs a token)


def _forward(cfg: ModelConfig, matrices: Matrices, seq_len: int, attention: str) -> dict[str, float]:
    parts: dict[str, float] = dict.fromkeys((*COUNTED, "gate", "mtp"), 0)
    for part, layer, matrix in matrices:
        depth = 0 if layer is None else max(0, layer - cfg.num_hidden_layers + 1)
        parts["mtp" if depth else _OF_PART.get(part, part)] += matrix * max(0, seq_len - depth)
    for depth in range(cfg.num_nextn_predict_layers + 1):
        S = max(0, seq_len - depth)
        pairs = {"full": S * S, "causal": S * S / 2, "exact": S * (S + 1) // 2}[attention]
        of_layer = 2 * pairs * cfg.num_attention_heads * (cfg.qk_head_dim + cfg.v_head_dim)
        if depth:
            parts["mtp"] += of_layer + 2 * S * cfg.vocab_size * cfg.hidden_size
        else:
            parts["attention"] = cfg.num_hidden_layers * of_layer
    return parts


def _matrices(cfg: ModelConfig) -> Matrices:
    """Every matrix that a token is multiplied with; a tied head counts as head."""
    found: Matrices = []
    for w in shapes(cfg).weights:
        if w.part == "embedding" or len(w.shape) < 2:
            continue
        experts = (cfg.num_experts_per_tok, cfg.n_routed_experts) if w.part == "routed_experts" else (1, 1)
        found.append((w.part, w.layer, 2 * w.size * experts[0] // experts[1]))
    if cfg.tie_word_embeddings:
        found.append(("lm_head", None, 2 * cfg.vocab_size * cfg.hidden_size))
    return found


def forward_flops_per_token(cfg: ModelConfig, context: int, attention: str = "causal") -> float:
    """FLOPs of one token's forward pass in a sequence of `context` tokens, in the published convention."""
    parts = forward_flops(cfg, context, attention)
    return sum(parts[part] for part in COUNTED) / context


def training_flops_per_token(cfg: ModelConfig, context: int, attention: str = "causal") -> float:
    """Forward and backward: three times `forward_flops_per_token`."""
    return 3 * forward_flops_per_token(cfg, context, attention)


def decode_flops(cfg: ModelConfig, context: int) -> dict[str, float]:
    """FLOPs of decoding one token behind a latent cache (absorbed), `context` tokens with the new one; by part.

    kv_b_proj is not run: it is inside 'attention', absorbed into query and output (`generation.costs`).
    """
    check_context(cfg, context)
    return _decode(cfg, _matrices(cfg), context)


def _decode(cfg: ModelConfig, matrices: Matrices, context: int) -> dict[str, float]:
    parts: dict[str, float] = dict.fromkeys((*COUNTED, "gate"), 0)
    for part, layer, matrix in matrices:
        if layer is None or layer < cfg.num_hidden_layers:
            parts[_OF_PART.get(part, part)] += matrix
    up = 2 * cfg.num_attention_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim) * cfg.kv_lora_rank
    parts["projections"] -= cfg.num_hidden_layers * up
    parts["attention"] = cfg.num_hidden_layers * attention_cost(cfg, "absorbed", context).flops
    return parts


def flops_of_contexts(cfg: ModelConfig, contexts: list[int]) -> dict[str, list[float]]:
    """Forward FLOPs a token in 'matrices' and causal 'attention', and of a decoded one ('decode'), for each context."""
    matrices = _matrices(cfg)
    found: dict[str, list[float]] = {name: [] for name in ("matrices", "attention", "decode")}
    for context in contexts:
        check_context(cfg, context)
        forward, decoded = _forward(cfg, matrices, context, "causal"), _decode(cfg, matrices, context)
        attention = forward["attention"] / context
        found["attention"].append(attention)
        found["matrices"].append(sum(forward[part] for part in COUNTED) / context - attention)
        found["decode"].append(sum(decoded[part] for part in COUNTED))
    return found


def achieved_flops(flops_per_token: float, tokens: float, seconds: float, gpus: int = 1) -> float:
    """FLOP/s of each GPU, when `gpus` of them work through `tokens` tokens in `seconds`.

    Raises ValueError for a time or a number of GPUs that is not positive.
    """
    if not (seconds > 0 and gpus > 0):
        raise ValueError(f"step_seconds={seconds} and gpus={gpus} must be positive")
    return flops_per_token * tokens / (seconds * gpus)


def tokens_per_day(tokens: float, seconds: float) -> float:
    """Tokens that steps of `tokens` in `seconds` make in a day."""
    return achieved_flops(1, tokens, seconds) * 86400
