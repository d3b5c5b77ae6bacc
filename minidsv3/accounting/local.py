"""One machine: does the model fit, and how many tokens a second can it give at most?

Decoding one sequence is bound by memory: every token reads the weights that it meets, and its cache. So the ceiling is
bandwidth over bytes, whatever the processor. A dense model reads all of itself; a mixture of experts only the active
part, which is why V2 with 21B active parameters of 236B answers at reading speed on a machine where a dense 70B does
not (Insights into DeepSeek-V3, section 2.2.2). MLA keeps the second term small at long contexts.

MTP gives 1 + p tokens a pass, but checks two tokens at once, and the two choose different experts: of E experts,
``K (2 - K/E)`` instead of K are read. For a dense model that is free; for a mixture of experts it eats the gain.

Weights that do not fit stay on the disk: what is met of them is read from there, every time. Simplified: experts are
met evenly, nothing is cached cleverly, disk and memory are read one after the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..config import ModelConfig
from .dense import MODELS, AnyConfig, DenseConfig, check_context, load_config
from .inference import cache_bytes_per_token
from .params import count_parameters

BITS = {"bf16": 16.0, "fp8": 8.0, "4-bit": 4.25}  # the last: four bits, and a 16-bit scale for 64 numbers


class Met(NamedTuple):
    """Parameters of a model, by when a decoding step reads them."""

    everything: int
    always: float  # read for every token
    spread: float  # stored in the part of which a token meets a share: routed experts; of a dense model all layers
    met: float  # read in that part, when one token is computed
    met_by_two: float  # when two tokens are
    drafting: float  # read more for a draft by the MTP module; 0: there is none


def weights_met(cfg: AnyConfig) -> Met:
    """What one token and what two tokens at once read; the embedding is a look-up and is not read.

    Two tokens choose their experts independently: E (1 - (1 - K/E)^2) of them are met.
    """
    if isinstance(cfg, DenseConfig):
        read = cfg.parameters - (0 if cfg.tie_word_embeddings else cfg.vocab_size * cfg.hidden_size)
        return Met(cfg.parameters, 0, read, read, read, 0)
    p = count_parameters(cfg)
    share = cfg.num_experts_per_tok / cfg.n_routed_experts
    routed = p.by_part["routed_experts"]
    drafting = p.mtp_active + (p.by_part["lm_head"] or p.by_part["embedding"]) if p.mtp else 0
    met = routed * share
    return Met(p.total, p.active_with_head - met, routed, met, routed * (1 - (1 - share) ** 2), drafting)


class Machine(NamedTuple):
    """Bytes, and bytes a second; `disk` None: what does not fit in memory cannot be used."""

    memory: float
    bandwidth: float
    disk: float | None = None

    def tokens_per_second(self, near: float, far: float) -> float | None:
        """The ceiling for `near` bytes from memory and `far` bytes from disk a token."""
        if far > 0 and self.disk is None:
            return None
        return 1 / (near / self.bandwidth + (far / self.disk if self.disk else 0.0))


def local_row(
    cfg: AnyConfig, precision: str, machine: Machine, context: int, acceptance: float = 0.0
) -> dict[str, Any]:
    """One model at one precision on one machine; tokens a second are None where it can't run."""
    scale, cache = BITS[precision] / 8, cache_bytes_per_token(cfg)
    everything, always, spread, met, by_two, drafting = (scale * n for n in weights_met(cfg))
    room = machine.memory - everything
    share = (room - cache * context + spread) / spread  # of the spread part that memory holds
    resident = min(1.0, max(0.0, share))
    plain = mtp = None
    if share >= 0:  # the rest fits
        plain = machine.tokens_per_second(always + met * resident + cache * context, met * (1 - resident))
        if drafting:
            near = always + drafting + by_two * resident + cache * context
            passes = machine.tokens_per_second(near, by_two * (1 - resident))
            mtp = passes and (1 + acceptance) * passes
    return {
        "precision": precision,
        "weight_bytes": everything,
        "fits": share >= 1,
        "longest_context": max(0, min(int(room // cache), cfg.max_position_embeddings)),
        "bytes_read_per_token": always + met + cache * context,
        "share_in_memory": resident,
        "tokens_per_second": plain,
        "tokens_per_second_with_mtp": mtp,
    }


def local_report(
    machine: Machine, context: int, models: dict[str, AnyConfig] | None = None, acceptance: float = 0.0
) -> dict[str, Any]:
    """What a machine does with each model (those of `MODELS` by default) at each precision.

    `acceptance` is the share of MTP drafts that the main model accepts.
    Raises ValueError for a context that a model has no positions for, or sizes that are not positive.
    """
    for name, value in machine._asdict().items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} is not positive")
    rows = []
    for model, cfg in (models or {name: load_config(name, None) for name in MODELS}).items():
        check_context(cfg, context)
        kind = "MoE, MLA" if isinstance(cfg, ModelConfig) else "dense, GQA"
        for precision in BITS:
            rows.append({"model": model, "kind": kind, **local_row(cfg, precision, machine, context, acceptance)})
    return {**machine._asdict(), "context": context, "rows": rows}
