"""One token's journey: what a real token meets on its way through the model, in four panels.

    what the cache keeps     the latent c_kv and the rotated key of the token, layer by layer
    where it looks           attention of each head of the last layer over the text so far
    where it is sent         affinity to every routed expert, layer by layer, and the experts that were chosen
    what it says             the most likely next tokens, and what the MTP module thinks comes after

All numbers are read from a `record` of one forward pass; the drawing functions take arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..autograd import Array
from ..plots import DIVERGING, colour, describe, headline, new_figure, style
from .record import record
from .transformer import Transformer


def cached_latents(ax: Axes, latent: Array, k_rope: Array, full_cache: int) -> Axes:
    """Cache entries of one token: latent [L, r_kv] and k_rope [L, d_r]; `full_cache` numbers a layer without MLA."""
    kept, L = latent.shape[1] + k_rope.shape[1], len(latent)
    values = np.concatenate([latent, k_rope], axis=1)
    limit = float(np.abs(values).max())
    image = ax.imshow(values, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto")
    ax.axvline(latent.shape[1] - 0.5, color="black", linewidth=1.5)
    ax.set(xlabel=f"number kept: latent c_kv 0-{latent.shape[1] - 1} | rotated key", ylabel="layer", yticks=range(L))
    ax.grid(visible=False)
    ax.figure.colorbar(image, ax=ax, label="value (no unit)")
    finding = f"The cache keeps {kept} numbers a layer, not {full_cache}"
    describe(
        ax, f"{finding}: heat map of {L} layers by {kept} values between {values.min():.1f} and {values.max():.1f}."
    )
    return headline(ax, finding)


def attention_over_text(ax: Axes, weights: Array, labels: Sequence[str]) -> Axes:
    """Attention of one token: weights [H, S] over the characters `labels` so far."""
    H, S = weights.shape
    image = ax.imshow(weights, cmap="Greys", vmin=0, vmax=float(weights.max()), aspect="auto")
    ax.set_xticks(range(S), labels, family="monospace", fontsize=12 if S <= 20 else 9)
    ax.set(xlabel="text so far", ylabel="head of the last layer", yticks=range(H))
    ax.grid(visible=False)
    ax.figure.colorbar(image, ax=ax, label="attention weight")
    head, position = divmod(int(weights.argmax()), S)
    finding = f"Head {head} looks most at {labels[position]!r}, {S - 1 - position} back, with {weights.max():.0%}"
    describe(ax, f"{finding}: heat map of {H} heads by {S} characters.")
    return headline(ax, finding)


def experts_chosen(ax: Axes, scores: Array, chosen: Sequence[Sequence[int]], layers: Sequence[str]) -> Axes:
    """Affinity of one token to each expert: scores [Lm, E]; `chosen` experts of each layer get a dot."""
    Lm, E = scores.shape
    image = ax.imshow(scores, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    dots = [(e, layer) for layer, experts in enumerate(chosen) for e in experts]
    ax.plot(*zip(*dots), linestyle="none", marker="o", color=colour(1), markersize=9, label="chosen (affinity + bias)")
    ax.set_yticks(range(Lm), layers)
    ax.set_xticks(range(E) if E <= 32 else range(0, E, 16))
    ax.set_xlabel("routed expert")
    ax.grid(visible=False)
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.18))
    ax.figure.colorbar(image, ax=ax, label="affinity (sigmoid)")
    best = [set(np.argsort(-row, kind="stable")[: len(c)].tolist()) for row, c in zip(scores, chosen)]
    moved = sum(len(b - set(c)) for b, c in zip(best, chosen))
    finding = f"{len(chosen[0])} of {E} experts work on it; the balance bias changed {moved} of {len(dots)} choices"
    describe(ax, f"{finding}: heat map of {Lm} layers by {E} experts with the chosen ones marked.")
    return headline(ax, finding)


def next_tokens(ax: Axes, names: Sequence[str], p: Array, after: tuple[str, str, float] | None) -> Axes:
    """Most likely next tokens with probabilities p, best first.

    `after` is the MTP module's view: the next token that it was shown, its guess of the one after, the probability.
    """
    where = np.arange(len(p), dtype=np.int64)
    ax.barh(where, p, color=[colour(0)] + [colour(6)] * (len(p) - 1))
    ax.set_yticks(where, names, family="monospace")
    ax.invert_yaxis()
    ax.set(xlabel="probability", xlim=(0, 1), ylabel="next token")
    finding = f"It expects {names[0]} next ({p[0]:.0%})"
    if after is not None:
        finding += f"; after a real {after[0]}, the MTP module expects {after[1]} ({after[2]:.0%})"
    describe(ax, f"{finding}: bars for the {len(p)} most likely tokens.")
    return headline(ax, finding)


def token_journey(model: Transformer, tokens: Array, labels: Sequence[str], names: Sequence[str]) -> Figure:
    """The journey of the last but one token of `tokens` int [S] in four panels.

    Parameters
    ----------
    labels : one string for each token
    names : one string for each id of the vocabulary

    Notes
    -----
    The last token is there so that the MTP module has something to see: its guess is what comes after that token.
    """
    cfg, at = model.config, len(tokens) - 2
    with record() as r:
        model.logits(tokens[None, :-1])
    latent = np.stack([r[f"model.layers.{i}.self_attn.kv_a_layernorm"].output[0, at] for i in range(len(model.layers))])
    last = model.layers[-1]
    x = r[f"{last.name}.input_layernorm"].output
    explained = [
        layer.self_attn.explain(r[f"{layer.name}.input_layernorm"].output, model.rotation(0, at + 1))
        for layer in model.layers
    ]
    k_rope = np.stack([e.k_rope[0, at] for e in explained])
    weights = explained[-1].weights[0, :, at]
    gates = [name for name in (f"model.layers.{i}.mlp.gate" for i in range(len(model.layers))) if name in r]
    scores = np.stack([r[name].outputs[0][at] for name in gates])
    chosen = [r[name].outputs[1][at].tolist() for name in gates]
    p = _softmax(model.logits(tokens[None, :-1])[0, at])
    best = np.argsort(-p, kind="stable")[:8]
    after = None
    if model.mtp:
        q = _softmax(model.mtp_logits(tokens[None])[0][0, at])
        after = (names[int(tokens[-1])], names[int(q.argmax())], float(q.max()))
    assert x.shape[1] == at + 1
    figure, (a, b, c, d) = new_figure(2, 2, panel=(6.4, 3.9))
    with style():
        full = cfg.num_attention_heads * (cfg.qk_head_dim + cfg.v_head_dim)
        cached_latents(a, latent, k_rope, full)
        shown = min(len(labels) - 1, 40)
        attention_over_text(b, weights[:, -shown:], labels[-shown - 1 : -1])
        experts_chosen(c, scores, chosen, [name.split(".")[2] for name in gates])
        c.set_ylabel("layer")
        next_tokens(d, [names[i] for i in best], p[best], after)
        figure.suptitle(f"One token's journey: {labels[at]!r} in “{''.join(labels[:-1])[-40:]}”", fontsize=13)
    return figure


def _softmax(logits: Array) -> Array:
    p = np.exp(logits.astype(np.float64) - logits.max())
    return p / p.sum()


def scores_of_parts(
    axes: Sequence[Axes], content: Array, position: Array, labels: Sequence[str], *, with_position: bool = True
) -> Sequence[Axes]:
    """What content says, what position says, and the attention weights of their sum, for one head in three panels.

    Parameters
    ----------
    content, position : [S, S]
        Scaled scores of the two parts (`MLA.explain`); row i looks at column j <= i.
    labels : one string for each token
    with_position : bool
        False: the weights are those of the content alone.
    """
    seen = np.tri(len(labels), dtype=bool)
    total = np.where(seen, content + position if with_position else content, -np.inf)
    weights = np.stack([_softmax(row) for row in total])
    for ax, values, name in zip(axes, (content, position, weights), ("content", "position", "weights")):
        drawn, limit = name == "weights", float(np.abs(values[seen]).max())
        image = ax.imshow(
            np.where(seen, values, np.nan),
            cmap="Greys" if drawn else DIVERGING,
            vmin=0 if drawn else -limit,
            vmax=1 if drawn else limit,
        )
        ax.set_xticks(range(len(labels)), labels, family="monospace", fontsize=8)
        ax.set_yticks(range(len(labels)), labels, family="monospace", fontsize=8)
        ax.set(xlabel="key", ylabel="query" if ax is axes[0] else "")
        ax.grid(visible=False)
        label = "attention weight" if drawn else "score (scaled)"
        ax.figure.colorbar(image, ax=ax, label=label, shrink=0.7)
    spread = [float(np.ptp(values[seen])) for values in (content, position)]
    used = "Weights of both" if with_position else "Weights of the content alone"
    best = weights.argmax(axis=1)
    findings = (
        f"Content: scores range over {spread[0]:.1f}",
        f"Position: scores range over {spread[1]:.1f}",
        f"{used}: the last token looks at {labels[best[-1]]!r}",
    )
    for ax, finding in zip(axes, findings):
        describe(headline(ax, finding), f"{finding}; heat map of {len(labels)} queries by {len(labels)} keys.")
    return axes


def group_choice(ax: Axes, scores: Array, chosen: Array, *, n_group: int, topk_group: int) -> Axes:
    """How one token chose: its scores [E] group by group, and the experts `chosen` [K].

    The heading counts experts that were better than a chosen one and were passed over because of their group.
    """
    E, size = len(scores), len(scores) // n_group
    best = min(2, size)
    group_score = np.sort(scores.reshape(n_group, size), axis=1)[:, -best:].sum(axis=1)
    kept = np.sort(np.argsort(-group_score, kind="stable")[:topk_group])
    expert = np.arange(E, dtype=np.int64)
    is_chosen, is_kept = np.isin(expert, chosen), np.isin(expert // size, kept)
    for index, hatch, label, which in (
        (0, "", "chosen", is_chosen),
        (6, "..", "its group is kept", is_kept & ~is_chosen),
        (7, "//", "its group is masked", ~is_kept),
    ):
        ax.bar(expert[which], scores[which], 0.8, color=colour(index), hatch=hatch, label=label)
    highest = float(scores.max())
    for group in range(n_group):
        ax.axvline(group * size - 0.5, color="black", linewidth=1, linestyle=":")
        middle = (group + 0.5) * size - 0.5
        ax.text(middle, 1.06 * highest, f"group {group}: {group_score[group]:.2f}", ha="center", fontsize=9)
    ax.set(xlabel="expert", ylabel="score (affinity + bias)", ylim=(0, 1.45 * highest), xlim=(-0.6, E - 0.4))
    ax.legend(loc="upper center", ncols=3)
    passed = int(np.sum(scores[~is_kept] > scores[is_chosen].min()))
    finding = f"Groups {' and '.join(map(str, kept))} are kept; better experts passed over: {passed}"
    describe(ax, f"{finding}: bars for {E} experts in {n_group} groups, chosen: {sorted(int(e) for e in chosen)}.")
    return headline(ax, finding)


def experts_of_text(ax: Axes, chosen: Array, weight: Array, labels: Sequence[str], E: int, n_group: int = 1) -> Axes:
    """Experts of each token of a text: chosen int [S, K], weight [S, K], one column a token and one row an expert."""
    S = len(labels)
    values = np.zeros((E, S), dtype=np.float64)
    np.put_along_axis(values, chosen.T, weight.T, axis=0)
    image = ax.imshow(values, cmap="Blues", vmin=0, vmax=float(weight.max()), aspect="auto")
    for group in range(1, n_group):
        ax.axhline(group * E // n_group - 0.5, color="black", linewidth=1, linestyle=":")
    ax.set_xticks(range(S), labels, family="monospace", fontsize=10 if S <= 50 else 7)
    ax.set_yticks(range(0, E, max(1, E // 16)))
    ax.set(xlabel="text", ylabel="routed expert")
    ax.grid(visible=False)
    ax.figure.colorbar(image, ax=ax, label="weight")
    load = (values > 0).sum(axis=1)
    busiest = int(load.argmax())
    used = np.count_nonzero(load)
    finding = f"{used} of {E} experts work on these {S} tokens, expert {busiest} on {load[busiest]} of them"
    describe(ax, f"{finding}: heat map of {E} experts by {S} characters, {chosen.shape[1]} experts each.")
    return headline(ax, finding)
