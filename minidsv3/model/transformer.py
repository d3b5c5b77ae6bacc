"""The model: embedding, decoder layers, final norm, head, and the MTP modules behind them.

    x = embed(tokens);  for each layer: x += mla(norm(x)); x += ffn(norm(x));  logits = head(norm(x))

The first `first_k_dense_replace` layers have a dense FFN, all others routed experts (V3 report, Figure 2). Names are
those of the released checkpoint: the MTP modules are ``model.layers.{num_hidden_layers + k}``.

What is handed in at construction and never asked about: a precision recipe (which gemm each layer uses), a dispatcher
(where the experts are) and the selection rule of the gate. Parameters are lazy until `init_weights` or a checkpoint
fills them, so the real class at the real 671B shapes can be built and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..autograd import Array, Checkpoint, Tensor, no_grad
from ..config import ModelConfig
from ..ops.loss import cross_entropy, sequence_balance_loss
from ..ops.rope import rotation_table
from ..ops.routing import select_experts
from ..ops.shape import add, positions
from .layers import MLP, Embedding, Linear, Recipe, RMSNorm, gemm_of
from .mla import MLA, LayerCache
from .module import Module
from .moe import Dispatcher, MoE, Routing, SelectExperts
from .mtp import MTPModule


class Losses(NamedTuple):
    """What `Transformer.loss` returns: scalar Tensors (nats), and the experts' load."""

    total: Tensor
    main: Tensor
    mtp: Tensor
    balance: Tensor
    expert_load: Array  # int64 [layers with experts, E] tokens per expert, MTP modules last


class Cache(Protocol):
    """What the model sees of a latent cache (`generation.cache.LatentCache`)."""

    @property
    def layers(self) -> Sequence[LayerCache]:
        """One for each decoder layer (or the one of an MTP module)."""
        ...

    def positions(self, S: int) -> Array:
        """Positions of S new tokens, int [S] or [B, S]."""
        ...


class DecoderLayer(Module):
    """One block: x [B, S, D] -> ([B, S, D], Routing or None for a dense layer)."""

    def __init__(self, cfg: ModelConfig, layer: int, recipe: Recipe | None, **moe: Any) -> None:
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = MLA(cfg, recipe)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self._routed = cfg.is_moe_layer(layer)
        self.mlp: Module = MoE(cfg, recipe, **moe) if self._routed else MLP(cfg, cfg.intermediate_size, recipe)

    def forward(self, x: Tensor, rotation: Array, cache: LayerCache | None = None) -> tuple[Tensor, Routing | None]:
        x = add(x, self.self_attn(self.input_layernorm(x), rotation, cache))
        y = self.mlp(self.post_attention_layernorm(x))
        y, routing = y if self._routed else (y, None)
        return add(x, y), routing


class Transformer(Module):
    """DeepSeek-V3 (or V2) of any size.

    Parameters
    ----------
    cfg : ModelConfig
    recipe : `layers.Recipe`, optional
        Precision of each layer's matrix products; exact without.
    dispatcher : object with `dispatch` and `combine`, optional
        Where the routed experts are; in this process without.
    select : function, optional
        Selection rule of the gate (`ops.routing.select_experts`).
    """

    def __init__(
        self,
        cfg: ModelConfig,
        recipe: Recipe | None = None,
        dispatcher: Dispatcher | None = None,
        select: SelectExperts = select_experts,
    ) -> None:
        self.config = cfg
        self.is_bare = recipe is None and dispatcher is None  # exact products, all experts in this process
        moe = {"dispatcher": dispatcher, "select": select}
        layers = [
            DecoderLayer(cfg, i, recipe, **moe) for i in range(cfg.num_hidden_layers + cfg.num_nextn_predict_layers)
        ]
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, recipe)
        self.layers = layers[: cfg.num_hidden_layers]
        self.mtp = [MTPModule(cfg, layer, recipe) for layer in layers[cfg.num_hidden_layers :]]
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size, gemm_of(recipe, "lm_head"))
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        for name, module in self.named_modules():
            module.name = name
        for module in self.mtp:
            module.layer.name = module.name  # its parts are listed under the module's own name
        self.lm_head.name = "lm_head"  # a tied head is not listed, and has a name all the same

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Submodules under their released names; a tied head is the embedding and is not listed again."""
        yield "model.embed_tokens", self.embed_tokens
        for i, layer in enumerate([*self.layers, *self.mtp]):
            yield f"model.layers.{i}", layer
        yield "model.norm", self.norm
        if not self.config.tie_word_embeddings:
            yield "lm_head", self.lm_head

    def init_weights(self, rng: np.random.Generator, dtype: Any = np.float32, *, std: float | None = None) -> None:
        """Fill all weights from N(0, std), std = ``initializer_range`` unless given; norms one, buffers zero.

        Raises ValueError for a dtype other than float32 and float64.
        """
        if np.dtype(dtype) not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise ValueError(f"dtype={np.dtype(dtype)} is not float32 or float64: low precision is a recipe's")
        super().init_weights(rng, dtype, std=self.config.initializer_range if std is None else std)

    def forward(self, tokens: Array) -> Tensor:
        """Logits with a tape: tokens int [B, S] -> [B, S, V]."""
        h, _ = self._main(self._checked(tokens))
        return self.lm_head(h)

    def logits(self, tokens: Array) -> Array:
        """Logits of the next token without a tape: tokens int [B, S] -> [B, S, V] in the model's dtype."""
        with no_grad():
            return self(tokens).data

    def decode(self, tokens: Array, cache: Cache) -> Array:
        """Hidden states [B, S, D], after the final norm, of new tokens int [B, S] behind what `cache` holds.

        The caller says afterwards how many of them count (`cache.extend`); the rest was padding or a wrong guess.
        """
        tokens = self._checked(tokens)
        with no_grad():
            rotation = self._rotation(cache.positions(tokens.shape[1]))
            x = self.embed_tokens(tokens)
            for layer, layer_cache in zip(self.layers, cache.layers):
                x, _ = layer(x, rotation, layer_cache)
            return self.norm(x).data

    def draft(self, depth: int, h: Array, tokens: Array, cache: Cache) -> Array:
        """Hidden states [B, S, D] of MTP module `depth` (from 1) behind its own cache, ready for the head.

        `h` [B, S, D] comes from `decode` or from the module before, `tokens` int [B, S] are those `depth` further.
        """
        with no_grad():
            rotation = self._rotation(cache.positions(h.shape[1]))
            embedded = self.embed_tokens(self._checked(tokens))
            return self.mtp[depth - 1](Tensor(h), embedded, rotation, cache.layers[0])[0].data

    def head(self, h: Array) -> Array:
        """Logits [..., V] of hidden states [..., D] that `decode` or `draft` gave."""
        with no_grad():
            return self.lm_head(Tensor(h)).data

    def mtp_logits(self, tokens: Array) -> list[Array]:
        """Logits of the MTP modules: for depth k = 1..D an array [B, S-k, V].

        Entry ``[:, i]`` of depth k predicts token i+k+1, from h_i and tokens i+1..i+k.
        """
        tokens = self._checked(tokens)
        with no_grad():
            h, _ = self._main(tokens)
            return [self.lm_head(h_k).data for h_k, _ in self._deeper(h, tokens)]

    def loss(
        self,
        tokens_in: Array,
        targets: Array,
        *,
        mtp_weight: float = 0.3,
        balance_weight: float = 1e-4,
        recompute: bool = False,
    ) -> Losses:
        """Training loss: ``total = main + mtp_weight * mtp + balance_weight * balance``.

        Parameters
        ----------
        tokens_in, targets : int [B, S]
            ``targets[:, i]`` is the token after ``tokens_in[:, i]``; -100 is ignored.
        mtp_weight, balance_weight : float
            lambda of Eq. 25 and alpha of Eq. 17.
        recompute : bool
            Keep only each layer's input and run the layer again in the backward pass.

        Returns
        -------
        Losses
            `main`: mean over valid positions. `mtp`: unweighted mean over depths, each averaged over its own valid
            positions (the report divides by T at every depth; for depth 1 and 4096 tokens that is 0.02 % less).
            `balance`: sum over layers of the sequence-wise loss (Eq. 17 without alpha).
        """
        tokens, targets = self._checked(tokens_in), np.asarray(targets)
        if targets.shape != tokens.shape:
            raise ValueError(f"targets have shape {targets.shape}, tokens_in {tokens.shape}")
        h, routings = self._main(tokens, recompute)
        main = cross_entropy(self.lm_head(h), targets)
        depths = []
        for k, (h_k, routing) in enumerate(self._deeper(h, tokens, recompute), start=1):
            depths.append(cross_entropy(self.lm_head(h_k), targets[:, k:]))
            routings.append(routing)
        routed = [r for r in routings if r is not None]
        zero = Tensor(np.zeros((), dtype=main.dtype))
        mtp = add(*depths, weights=(1 / len(depths),) * len(depths)) if depths else zero
        balances = [sequence_balance_loss(r.scores, r.topk_idx, len(tokens)) for r in routed]
        balance = add(*balances, weights=(1.0,) * len(balances)) if balances else zero
        total = add(main, mtp, balance, weights=(1.0, mtp_weight, balance_weight))
        E = self.config.n_routed_experts
        load = np.array([r.load() for r in routed], dtype=np.int64).reshape(len(routed), E)
        return Losses(total, main, mtp, balance, load)

    def rotation(self, start: int, stop: int) -> Array:
        """RoPE rotation of positions start..stop-1: complex [stop - start, d_r/2]."""
        return self._rotation(np.arange(start, stop, dtype=np.int64))

    def _rotation(self, at: Array) -> Array:
        cfg = self.config
        return rotation_table(at, cfg.qk_rope_head_dim, cfg.rope_theta, cfg.rope_scaling, self.norm.weight.dtype)

    def _main(self, tokens: Array, recompute: bool = False) -> tuple[Tensor, list[Routing | None]]:
        """Hidden states after the final norm [B, S, D], and each layer's routing."""
        rotation = self.rotation(0, tokens.shape[1])
        x = self.embed_tokens(tokens)
        routings = []
        for layer in self.layers:
            x, routing = run_layer(layer, x, rotation, recompute)
            routings.append(routing)
        return self.norm(x), routings

    def _deeper(self, h: Tensor, tokens: Array, recompute: bool = False) -> Iterator[tuple[Tensor, Routing | None]]:
        """For each MTP depth k: hidden states of positions 0..S-k-1 [B, S-k, D] and the module's routing."""
        S = tokens.shape[1]
        if S <= len(self.mtp):
            raise ValueError(
                f"sequences of {S} leave depth {len(self.mtp)} of MTP nothing to predict: need more tokens"
            )
        for k, module in enumerate(self.mtp, start=1):
            h = positions(h, 0, S - k)
            embedded = self.embed_tokens(tokens[:, k:])
            h, routing = run_layer(module, h, self.rotation(0, S - k), recompute, embedded)
            yield h, routing

    def _checked(self, tokens: Array) -> Array:
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or tokens.size == 0:
            raise ValueError(f"tokens must be int [B, S] with B, S >= 1, got {tokens.dtype} {tokens.shape}")
        if self.norm.weight.is_lazy:
            raise ValueError("the model has no weights yet: call init_weights(rng) or load a checkpoint")
        return tokens


def run_layer(
    layer: Module, x: Tensor, rotation: Array, recompute: bool, *more: Tensor
) -> tuple[Tensor, Routing | None]:
    """``layer(x, *more, rotation)``, or the same through `Checkpoint` to keep only its inputs."""
    if not recompute:
        return layer(x, *more, rotation)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        y, routing = layer(*inputs, rotation)
        return (y,) if routing is None else (y, routing.scores, Tensor(routing.topk_idx), routing.topk_weight)

    y, *routed = Checkpoint.apply(x, *more, run=run)
    return y, Routing(routed[0], routed[1].data, routed[2]) if routed else None
