"""The same weights, read in another way: what lessons and ablations compare.

A changed config field that leaves every shape alone (RoPE layout and scaling, the number of experts a token gets, the
scale of their weights), another selection rule, or a precision recipe: the result is a second model over the *same*
arrays. Nothing is copied, so training one trains both.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..ops.routing import select_experts
from .layers import Recipe
from .moe import SelectExperts
from .transformer import Transformer


def same_weights(
    model: Transformer, *, recipe: Recipe | None = None, select: SelectExperts = select_experts, **fields: Any
) -> Transformer:
    """A `Transformer` over the arrays of `model`.

    Parameters
    ----------
    recipe, select
        As `Transformer` takes them.
    **fields
        Fields of the config to replace.

    Raises
    ------
    ValueError
        The changed config has other weights, or fields that contradict each other.
    """
    other = Transformer(dataclasses.replace(model.config, **fields), recipe, select=select)
    ours, theirs = list(model.named_modules()), list(other.named_modules())
    shapes = [[p.shape for p in m.parameters()] for m in (model, other)]
    if shapes[0] != shapes[1] or len(ours) != len(theirs):
        raise ValueError(f"{', '.join(fields)}: the changed config has other weights, so they can't be shared")
    for mine, its in zip(other.parameters(), model.parameters()):
        mine.data, mine.grad = its.data, its.grad
    for (_, module), (_, source) in zip(theirs, ours):
        for name in getattr(module, "buffer_names", ()):
            setattr(module, name, getattr(source, name))
    return other
