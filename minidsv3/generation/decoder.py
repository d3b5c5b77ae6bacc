"""One token at a time, with as few NumPy calls as it takes: what `generate` runs for small steps.

`Transformer.decode` is the definition. It goes through modules and ops that also train, take any number of tokens and
let themselves be watched; for one token of a small model that bookkeeping is nearly all of the time, because the
arithmetic of a call takes less than the call. `Decoder` computes the same numbers in the same order, from views of the
same weights (nothing is copied, a weight that is changed in place is changed here), on vectors:

* layer by layer, and in a layer token by token: every product is a matrix times a vector, no mask is needed (a token
  is stored before the next one attends), and sequences of different length need no padding;
* what a step needs is prepared once: `vector_steps` makes functions that hold their views and scratch buffers;
* attention is absorbed (`ops.latent`), over the pages of the cache as they lie in memory.

Whoever wants to look or to change something gets the modules: under `record`, `observing` or `replacing`, with a
recipe or dispatcher handed in, over a cache of another dtype or with another way to attend, and for more than a few
tokens at once, where gemms pay, `Decoder` hands the call on to the model. The two agree within rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..autograd import Array, engine_state
from ..model.transformer import Transformer
from ..ops.latent import absorbed_attention
from ..ops.rope import rotation_table
from .cache import LatentCache
from .vector_steps import Attend, FeedForward, layer_steps, norm_step

FEW = 6  # tokens at once up to which products with vectors beat gemms


class Decoder:
    """Decode steps of few tokens; `decode`, `draft` and `head` take and return what the model's methods do.

    Parameters
    ----------
    model : Transformer
        Its weights may change in place afterwards, and must not be bound to other arrays.

    Notes
    -----
    A decoder owns scratch buffers: one thread at a time.
    """

    def __init__(self, model: Transformer) -> None:
        self._model, cfg = model, model.config
        self._dtype, self._ready = model.norm.weight.dtype, model.is_bare and not model.norm.weight.is_lazy
        self._rotation, self._vocab_size = np.empty((0, cfg.qk_rope_head_dim // 2), dtype=np.complex64), cfg.vocab_size
        if self._ready:
            self._layers = [layer_steps(layer, cfg) for layer in model.layers]
            self._drafters = [layer_steps(module.layer, cfg) for module in model.mtp]
            self._norm = norm_step(model.norm)
            self._joins = [tuple(map(norm_step, (m.enorm, m.hnorm, m.shared_head.norm))) for m in model.mtp]

    def decode(self, tokens: Array, cache: LatentCache) -> Array:
        """Hidden states [B, S, D] of new tokens int [B, S] behind what `cache` holds (`Transformer.decode`)."""
        tokens = np.asarray(tokens)
        if not self._takes(tokens, cache):
            return self._model.decode(tokens, cache)
        x = self._embedded(tokens)
        self._run(self._layers, x, tokens.shape[1], cache)
        for row in x:
            row[...] = self._norm(row)
        return x.reshape(*tokens.shape, -1)

    def draft(self, depth: int, h: Array, tokens: Array, cache: LatentCache) -> Array:
        """Hidden states [B, S, D] of MTP module `depth`, from 1 (`Transformer.draft`)."""
        tokens = np.asarray(tokens)
        if not self._takes(tokens, cache):
            return self._model.draft(depth, h, tokens, cache)
        enorm, hnorm, last_norm = self._joins[depth - 1]
        join, x = self._model.mtp[depth - 1].eh_proj.weight.data, self._embedded(tokens)
        for row, before in zip(x, h.reshape(x.shape)):
            join.dot(np.concatenate([enorm(row), hnorm(before)]), row)
        self._run(self._drafters[depth - 1 : depth], x, tokens.shape[1], cache)
        for row in x:
            row[...] = last_norm(row)
        return x.reshape(h.shape)

    def head(self, h: Array) -> Array:
        """Logits [..., V] of hidden states [..., D] (`Transformer.head`)."""
        rows = h.reshape(-1, h.shape[-1])
        if not self._ready or len(rows) > FEW or any(engine_state()):
            return self._model.head(h)
        w = self._model.lm_head.weight.data
        logits = np.empty((len(rows), len(w)), dtype=w.dtype)
        for row, out in zip(rows, logits):
            w.dot(row, out)
        return logits.reshape(*h.shape[:-1], -1)

    def _takes(self, tokens: Array, cache: LatentCache) -> bool:
        """Whether this call is ours; everything unusual, errors included, is the model's."""
        return (
            self._ready
            and not any(engine_state())
            and tokens.ndim == 2
            and len(tokens) == len(cache.lengths)
            and 0 < tokens.size <= FEW
            and cache.dtype == self._dtype
            and cache.attention is absorbed_attention
            and all(type(t) is int and 0 <= t < self._vocab_size for t in tokens.reshape(-1).tolist())
        )

    def _embedded(self, tokens: Array) -> Array:
        return self._model.embed_tokens.weight.data[tokens.reshape(-1)]  # a copy [B S, D]

    def _run(self, layers: Sequence[tuple[Attend, FeedForward]], x: Array, S: int, cache: LatentCache) -> None:
        """Pass rows x [B S, D] through `layers`, in place."""
        places = [(b, at + s) for b, at in enumerate(cache.lengths.tolist()) for s in range(S)]
        rotations = self._rotations([at for _, at in places])
        with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit of a sigmoid, 0
            for (attend, feed_forward), store in zip(layers, cache.layers):
                for row, (b, at), rotation in zip(x, places, rotations):
                    attend(row, rotation, store, b, at)
                    feed_forward(row)

    def _rotations(self, positions: list[int]) -> list[Array]:
        if max(positions) >= len(self._rotation):
            cfg, at = self._model.config, np.arange(2 * max(positions) + 64, dtype=np.int64)
            self._rotation = rotation_table(at, cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling, self._dtype)
        return [self._rotation[at] for at in positions]
