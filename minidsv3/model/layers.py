"""The small modules: Linear, RMSNorm, Embedding, and the dense FFN.

A Linear asks its gemm object for its three products; which layer gets which gemm is the recipe's business
(`Recipe.gemm(layer)`), never the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ..autograd import Array, Parameter, Tensor
from ..config import ModelConfig
from ..ops.linear import EXACT, Gemm, embedding, linear
from ..ops.norm import rms_norm
from ..ops.shape import rounded
from ..ops.swiglu import Store, swiglu
from .module import Module


class Recipe(Protocol):
    """What a precision recipe tells the model; None always means: as the arrays are."""

    def gemm(self, layer: str) -> Gemm | None:
        """The gemm of a layer, by the last part of its name: 'q_a_proj', 'experts.gate_up', 'gate', 'lm_head', ..."""
        ...

    def rounding(self, place: str) -> Callable[[Array], Array] | None:
        """What rounds the inputs of 'attention', or the rows of 'embed_tokens'."""
        ...

    def store(self, op: str) -> Store | None:
        """Where 'swiglu' keeps its input for the backward pass."""
        ...


def gemm_of(recipe: Recipe | None, layer: str) -> Gemm:
    """The recipe's gemm for `layer`; exact without a recipe."""
    return (recipe.gemm(layer) if recipe else None) or EXACT


class Linear(Module):
    """``x w^T`` without bias: [..., in_features] -> [..., out_features]."""

    def __init__(self, in_features: int, out_features: int, gemm: Gemm = EXACT) -> None:
        self.weight = Parameter((out_features, in_features))
        self._gemm = gemm

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self._gemm)


class RMSNorm(Module):
    """Root-mean-square norm over the last axis with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        self.weight = Parameter((size,))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self._eps)


class Embedding(Module):
    """Rows of a table: int [...] -> [..., hidden_size]."""

    def __init__(self, vocab_size: int, hidden_size: int, recipe: Recipe | None = None) -> None:
        self.weight = Parameter((vocab_size, hidden_size))
        self._rounding = recipe.rounding("embed_tokens") if recipe else None

    def forward(self, tokens: Array) -> Tensor:
        return rounded(embedding(self.weight, tokens), self._rounding)


class MLP(Module):
    """SwiGLU feed-forward: ``down(silu(gate x) * up x)``; gate and up stored side by side for one gemm."""

    def __init__(self, cfg: ModelConfig, width: int, recipe: Recipe | None = None) -> None:
        D, F = cfg.hidden_size, width
        parts: dict[str, Any] = {"gate_proj.weight": slice(0, F), "up_proj.weight": slice(F, 2 * F)}
        self.gate_up = Parameter((2 * F, D), parts)
        self.down_proj = Linear(F, D, gemm_of(recipe, "down_proj"))
        self._gemm = gemm_of(recipe, "gate_up")
        self._store = recipe.store("swiglu") if recipe else None

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(linear(x, self.gate_up, self._gemm), self._store))
