"""DeepSeekMoE: a gate, many small routed experts of which each token uses a few, and shared experts that all use.

``y = sum_i g_i E_i(x) + E_shared(x)`` (V3 report, section 2.1.2, Eq. 12-16). Where the tokens go is the dispatcher's
business: it turns token rows into rows sorted by expert, and brings the results back. `LocalTokenDispatcher` permutes
rows in this process; the dispatcher of `minidsv3.parallel` sends them to other ranks. The model never asks which.

The gate computes in the precision of its input, float32 or better, in every recipe as published: a routing decision is
a comparison, and rounding flips comparisons. `e_score_correction_bias` is a buffer: no gradient reaches it, it is moved
by `train.balance` after each step.

Simplified against the real system: nothing is dropped, and all experts of a layer live in one array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..autograd import Array, Parameter, ParameterPart, Tensor
from ..config import ModelConfig
from ..ops.linear import grouped_linear, linear
from ..ops.routing import gate_scores, gate_weights, permute, select_experts, unpermute
from ..ops.shape import add, reshape
from ..ops.swiglu import swiglu
from .layers import MLP, Recipe, gemm_of
from .module import Module

SelectExperts = Callable[..., Array]


class Routing(NamedTuple):
    """What the gate decided for T tokens."""

    scores: Tensor  # [T, E] affinities, before any bias
    topk_idx: Array  # int64 [T, K], ascending
    topk_weight: Tensor  # [T, K]

    def load(self) -> Array:
        """Tokens per expert, int64 [E]."""
        return np.bincount(self.topk_idx.reshape(-1), minlength=self.scores.shape[1])


class Dispatcher(Protocol):
    """Brings token rows to their experts and back."""

    def dispatch(self, x: Tensor, topk_idx: Array, topk_weight: Tensor) -> tuple[Tensor, Any]:
        """Rows sorted by expert [N, D], and a handle for the way back.

        The handle says which `experts` they are for (an index into the E experts, None for all) and their number for
        each, `rows_per_expert`.
        """
        ...

    def combine(self, rows: Tensor, handle: Any) -> Tensor:
        """Weighted sums of the experts' rows, in token order [T, D]."""
        ...


class LocalHandle(NamedTuple):
    """How rows were permuted."""

    rows_per_expert: Array  # int64 [E]
    token_of_row: Array  # int64 [N]
    row_of_slot: Array  # int64 [T, K]
    topk_weight: Tensor  # [T, K]
    experts: None = None  # all of them


class LocalTokenDispatcher:
    """All experts in this process: dispatch is a stable sort of rows by expert, combine its inverse."""

    def __init__(self, n_routed_experts: int) -> None:
        self._E = n_routed_experts

    def dispatch(self, x: Tensor, topk_idx: Array, topk_weight: Tensor) -> tuple[Tensor, LocalHandle]:
        """x [T, D] -> rows [T K, D] sorted by expert, tokens in order within each expert."""
        T, K = topk_idx.shape
        small = np.uint8 if self._E <= 256 else np.uint16  # small integers sort several times faster
        slot_of_row = np.argsort(topk_idx.reshape(-1).astype(small), kind="stable")  # [N]
        row_of_slot = np.empty(T * K, dtype=np.int64)
        row_of_slot[slot_of_row] = np.arange(T * K, dtype=np.int64)
        rows_per_expert = np.bincount(topk_idx.reshape(-1), minlength=self._E)
        token_of_row, row_of_slot = slot_of_row // K, row_of_slot.reshape(T, K)
        handle = LocalHandle(rows_per_expert, token_of_row, row_of_slot, topk_weight)
        return permute(x, token_of_row, row_of_slot), handle

    def combine(self, rows: Tensor, handle: LocalHandle) -> Tensor:
        """rows [T K, D] -> [T, D], summed in ascending order of experts."""
        return unpermute(rows, handle.topk_weight, handle.token_of_row, handle.row_of_slot)


class Gate(Module):
    """Scores every expert for every token and selects: x [T, D] -> `Routing`."""

    def __init__(self, cfg: ModelConfig, select: SelectExperts = select_experts, recipe: Recipe | None = None) -> None:
        self.weight = Parameter((cfg.n_routed_experts, cfg.hidden_size))
        self.e_score_correction_bias: Array | None = None
        if cfg.topk_method == "noaux_tc":
            self.e_score_correction_bias = np.zeros(cfg.n_routed_experts, dtype=np.float32)
            self.buffer_names = ("e_score_correction_bias",)
        self._cfg, self._select, self._gemm = cfg, select, gemm_of(recipe, "gate")

    def forward(self, x: Tensor) -> Routing:
        cfg = self._cfg
        scores = gate_scores(linear(x, self.weight, self._gemm), cfg.scoring_func)  # [T, E]
        topk_idx = self._select(
            scores.data,
            self.e_score_correction_bias,
            top_k=cfg.num_experts_per_tok,
            n_group=cfg.n_group,
            topk_group=cfg.topk_group,
            method=cfg.topk_method,
        )
        topk_weight = gate_weights(scores, topk_idx, cfg.norm_topk_prob, cfg.routed_scaling_factor)
        return Routing(scores, topk_idx, topk_weight)


class Experts(Module):
    """All routed experts of a layer, one SwiGLU each, over rows sorted by expert: [N, D] -> [N, D]."""

    def __init__(self, cfg: ModelConfig, recipe: Recipe | None = None) -> None:
        E, D, F = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size
        self.gate_up = Parameter(
            (E, 2 * F, D),
            {
                f"{e}.{name}.weight": (e, rows)
                for e in range(E)
                for name, rows in (("gate_proj", slice(0, F)), ("up_proj", slice(F, 2 * F)))
            },
        )
        self.down = Parameter((E, D, F), {f"{e}.down_proj.weight": e for e in range(E)})
        self._gemm_up, self._gemm_down = gemm_of(recipe, "experts.gate_up"), gemm_of(recipe, "experts.down_proj")
        self._store = recipe.store("swiglu") if recipe else None

        self._held: dict[Any, tuple[Parameter, Parameter]] = {}

    def forward(self, rows: Tensor, rows_per_expert: Array, experts: Any = None) -> Tensor:
        """`experts` as a dispatcher's handle has it."""
        gate_up, down = self.held(experts)
        hidden = swiglu(grouped_linear(rows, gate_up, rows_per_expert, self._gemm_up), self._store)  # [N, F]
        return grouped_linear(hidden, down, rows_per_expert, self._gemm_down)

    def held(self, experts: slice | Array | None) -> tuple[Parameter, Parameter]:
        """gate_up and down of some experts, the same objects at each call: what one rank holds (None: all)."""
        if experts is None:
            return self.gate_up, self.down
        key = (experts.start, experts.stop) if isinstance(experts, slice) else (*experts, None)
        if key not in self._held:
            self._held[key] = ParameterPart(self.gate_up, experts), ParameterPart(self.down, experts)
        return self._held[key]


class MoE(Module):
    """The feed-forward part of a layer with routed experts; x [B, S, D] -> ([B, S, D], Routing)."""

    def __init__(
        self,
        cfg: ModelConfig,
        recipe: Recipe | None = None,
        dispatcher: Dispatcher | None = None,
        select: SelectExperts = select_experts,
    ) -> None:
        self.gate = Gate(cfg, select, recipe)
        self.experts = Experts(cfg, recipe)
        if cfg.n_shared_experts:  # n_shared_experts of them side by side are one wider FFN
            self.shared_experts = MLP(cfg, cfg.n_shared_experts * cfg.moe_intermediate_size, recipe)
        self._has_shared = cfg.n_shared_experts > 0
        self._dispatcher = dispatcher or LocalTokenDispatcher(cfg.n_routed_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        tokens = reshape(x, (-1, x.shape[-1]))  # [T, D]
        routing = self.gate(tokens)
        rows, handle = self._dispatcher.dispatch(tokens, routing.topk_idx, routing.topk_weight)  # [N, D]
        y = self.experts(rows, handle.rows_per_expert, handle.experts)  # [N, D]
        y = self._dispatcher.combine(y, handle)  # [T, D]
        if self._has_shared:
            y = add(y, self.shared_experts(tokens))
        return reshape(y, x.shape), routing
