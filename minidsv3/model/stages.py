"""A Transformer cut into pipeline stages: consecutive layers each, embedding in front, head and MTP behind.

A stage takes what the one before it returned and returns (hidden states [B, S, D], balance loss so far); the last one
takes the targets too and returns the training loss. Together they compute what `Transformer.loss` computes, with the
same ops in the same order, so their gradients are equal to the bit. The MTP modules sit on the last stage and use the
embedding of the first: both stages list that weight, and its two gradients are added (the report keeps both ends on
one rank, which DualPipe allows, for this reason).

A micro-batch is a tuple ``(tokens_in, targets, tokens_in)``: the first entry enters at the first stage, the others at
the last, whose MTP modules need the tokens once more.

Simplified: layers are spread as evenly as they go, without regard to what embedding, head and MTP cost on their stage
(the report's own map of 61 layers on 16 stages is not published).
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from ..autograd import Array, Tensor
from ..ops.loss import cross_entropy, sequence_balance_loss
from ..ops.shape import add
from .module import Module
from .moe import Routing
from .transformer import Transformer, run_layer


def layers_of_stage(layers: int, stages: int) -> list[range]:
    """Which layers each stage has: consecutive, sizes differ by one at most.

    Raises ValueError when a stage would have none.
    """
    if not 1 <= stages <= layers:
        raise ValueError(f"stages={stages} must lie between 1 and num_hidden_layers={layers}: a stage needs a layer")
    bounds = [layers * s // stages for s in range(stages + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


def cut(model: Transformer, stages: int, *, mtp_weight: float = 0.3, balance_weight: float = 1e-4) -> list[Module]:
    """The model as `stages` modules that share its parameters; weights of the losses as in `Transformer.loss`."""
    pieces: list[Module] = []
    for s, layers in enumerate(layers_of_stage(model.config.num_hidden_layers, stages)):
        last = (mtp_weight, balance_weight) if s == stages - 1 else None
        pieces.append(Stage(model, layers, s == 0, last))
    return pieces


class Stage(Module):
    """Some layers of a model; `last` are the weights of the MTP and balance losses, on the stage that has the head."""

    def __init__(self, model: Transformer, layers: range, first: bool, last: tuple[float, float] | None) -> None:
        self.layers = model.layers[layers.start : layers.stop]
        self.mtp = model.mtp if last else []
        if first or self.mtp:
            self.embed_tokens = model.embed_tokens
        if last:
            self.norm, self.lm_head = model.norm, model.lm_head
        self._model, self._first, self._last = (model,), first, last  # in a tuple: not a part of the stage

    def forward(self, *inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
        """(tokens) or (h, balance) -> (h, balance); behind the last layer (..., targets, tokens) -> loss."""
        model, rest = self._model[0], inputs[1 if self._first else 2 :]
        if self._first:
            tokens = inputs[0]
            h = self.embed_tokens(tokens)
            balance = Tensor(np.zeros((), dtype=h.dtype))
        else:
            h, balance = inputs[:2]
        rotation, batch = model.rotation(0, h.shape[1]), h.shape[0]
        for layer in self.layers:
            h, routing = run_layer(layer, h, rotation, False)
            balance = _with_balance(balance, routing, batch)
        return self._loss(h, balance, *rest) if self._last else (h, balance)

    def _loss(self, h: Tensor, balance: Tensor, targets: Array, tokens: Array) -> Tensor:
        model, (mtp_weight, balance_weight) = self._model[0], self._last or (0.0, 0.0)
        h = self.norm(h)
        main = cross_entropy(self.lm_head(h), targets)
        depths = []
        for k, (h_k, routing) in enumerate(model._deeper(h, tokens), start=1):
            depths.append(cross_entropy(self.lm_head(h_k), targets[:, k:]))
            balance = _with_balance(balance, routing, len(tokens))
        zero = Tensor(np.zeros((), dtype=main.dtype))
        mtp = add(*depths, weights=(1 / len(depths),) * len(depths)) if depths else zero
        return add(main, mtp, balance, weights=(1.0, mtp_weight, balance_weight))


def _with_balance(balance: Tensor, routing: Routing | None, batch: int) -> Tensor:
    if routing is None:
        return balance
    return add(balance, sequence_balance_loss(routing.scores, routing.topk_idx, batch))
