"""Multi-token prediction: modules behind the last layer, each predicting one token further (V3 report, section 2.2).

Module k joins what the model knows at position i, h_i, with the embedding of token i+k, passes one more decoder layer,
and predicts token i+k+1 with the model's own head:

    position i            0    1    2    3
    main model  sees      t0   t1   t2   t3     predicts t1 t2 t3 t4
    module 1    also sees t1   t2   t3          predicts t2 t3 t4        (from h_i and t_{i+1})
    module 2    also sees t2   t3               predicts t3 t4           (from module 1's h_i and t_{i+2})

So a module never sees the token it is to predict; getting this off by one gives a loss near zero and a copy function.
Embedding and head are the model's own. `eh_proj` takes [enorm(embedding); hnorm(h)] in this order, and h is taken
*after* the final norm, as in the released weights; Eq. 21 writes the two the other way round. A later module takes its
predecessor's h after `shared_head.norm` likewise.
"""

from __future__ import annotations

from typing import Any

from ..autograd import Array, Tensor
from ..config import ModelConfig
from ..ops.shape import concat_last
from .layers import Linear, Recipe, RMSNorm, gemm_of
from .mla import LayerCache
from .module import Module


class SharedHead(Module):
    """The norm in front of the shared output head (the head itself is the model's)."""

    def __init__(self, cfg: ModelConfig) -> None:
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class MTPModule(Module):
    """One prediction depth: (h [B, S, D], embedding of the next known token [B, S, D]) -> (h [B, S, D], Routing).

    `layer` is a decoder layer whose parameters are listed under this module's own name, as the checkpoint has them.
    """

    def __init__(self, cfg: ModelConfig, layer: Module, recipe: Recipe | None = None) -> None:
        D = cfg.hidden_size
        self.enorm = RMSNorm(D, cfg.rms_norm_eps)
        self.hnorm = RMSNorm(D, cfg.rms_norm_eps)
        self.eh_proj = Linear(2 * D, D, gemm_of(recipe, "eh_proj"))
        self.layer = layer
        self.shared_head = SharedHead(cfg)

    def named_children(self) -> Any:
        """As stored: the decoder layer's modules stand beside enorm, hnorm and eh_proj."""
        for name, child in super().named_children():
            if child is self.layer:
                yield from child.named_children()
            else:
                yield name, child

    def forward(
        self, h: Tensor, embedded: Tensor, rotation: Array, cache: LayerCache | None = None
    ) -> tuple[Tensor, Any]:
        x = self.eh_proj(concat_last(self.enorm(embedded), self.hnorm(h)))  # [B, S, 2D] -> [B, S, D]
        x, routing = self.layer(x, rotation, cache)
        return self.shared_head.norm(x), routing
