"""Gradients of weights that several ranks hold, added up.

In a pipeline a weight may be held more than once: DualPipe keeps each stage on two ranks, the ranks of an
expert-parallel group share a stage (of its experts each holds a part), and an embedding may serve two stages. After
the last chunk every holder gets the sum of all, added in rank order, so that it depends on no process and no engine.

Weights have no names here. They are numbered in the order in which the stages list them, which is the same in every
process; a part of a weight is known by its number and its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..autograd import Array, GradientBuffer, Parameter, ParameterPart
from .ranks import Ranks
from .schedules import Schedule

SUM_TAG = 0  # of messages; those of chunks have tags from 1 on
Key = tuple[int, int, int]  # number of the parameter, first and last row of the part that a rank holds (-1, -1: whole)


def sum_copies(
    plan: Schedule, rank: int, replicas: int, stages: Mapping[int, Any], ranks: Ranks, gradients: GradientBuffer
) -> None:
    """Where several ranks hold a parameter, give each of them the sum of all, added in rank order.

    DualPipe holds every stage twice, replicas hold the same stages (of the experts each its part), and an embedding
    may serve two stages.
    """
    numbers, whole_on = _numbered(plan, replicas, stages, ranks, gradients)
    mine = {_key(parameter, numbers): parameter for parameter in gradients}
    table = np.array(list(mine), dtype=np.int64).reshape(-1, 3)
    everybody = ranks.meet(table, lambda values: ranks.comm.all_gather(values, "names of weights"), "names of weights")
    touched: dict[Key, list[int]] = {}
    for other, keys in enumerate(everybody):
        for number, first, last in keys.tolist():
            touched.setdefault((number, first, last), []).append(other)
    parameter_of_number = {number: parameter for parameter, number in numbers.items()}
    for key in sorted(touched):
        having = whole_on[key[0]] if key[1] < 0 and whole_on else touched[key]
        if len(having) > 1 and rank in having:
            parameter = mine.get(key, parameter_of_number[key[0]])
            own = gradients.get(parameter)
            own = np.zeros_like(parameter.data) if own is None else own
            gradients[parameter] = _summed(own, rank, having, ranks)


def _summed(own: Array, rank: int, having: list[int], ranks: Ranks) -> Array:
    """The sum of all `having`'s arrays: the first of them adds in rank order and sends it back."""
    first, *others = having
    if rank != first:
        ranks.send(own, first, SUM_TAG, "gradient copies")
        return ranks.receive(first, SUM_TAG, "gradient copies")
    for other in others:
        own = own + ranks.receive(other, SUM_TAG, "gradient copies")
    for other in others:
        ranks.send(own, other, SUM_TAG, "gradient copies")
    return own


def _numbered(
    plan: Schedule, replicas: int, stages: Mapping[int, Any], ranks: Ranks, gradients: GradientBuffer
) -> tuple[dict[Parameter, int], dict[int, list[int]]]:
    """A number for each parameter, the same in every process; and, where stages list them, the ranks that hold it."""
    numbers: dict[Parameter, int] = {}
    whole_on: dict[int, list[int]] = {}
    if all(hasattr(stages.get(s), "parameters") for s in range(plan.stages)):
        for rank in range(plan.ranks * replicas):
            held = [stages[plan.stage_of(rank // replicas, d)] for d in plan.directions]
            for parameter in dict.fromkeys(p for stage in held for p in stage.parameters()):
                whole_on.setdefault(numbers.setdefault(parameter, len(numbers)), []).append(rank)
        return numbers, whole_on
    if len(ranks.comm.local_ranks) < ranks.comm.ranks:
        raise ValueError("across processes every process needs all stages, each with parameters(), to name its weights")
    met = ranks.meet(
        [_whole(p) for p in gradients], lambda values: dict.fromkeys(values, tuple(values.items())), "names"
    )
    for _, parameters in met:
        for parameter in parameters:
            numbers.setdefault(parameter, len(numbers))
    return numbers, whole_on


def _whole(parameter: Parameter) -> Parameter:
    """The parameter itself, or that of which it is a part."""
    return parameter._whole if isinstance(parameter, ParameterPart) else parameter


def _key(parameter: Parameter, numbers: dict[Parameter, int]) -> Key:
    if not isinstance(parameter, ParameterPart):
        return numbers[parameter], -1, -1
    return numbers[parameter._whole], parameter._index.start, parameter._index.stop


def add_gradient(parameter: Parameter, gradient: Array) -> None:
    """Add to ``parameter.grad``, for which memory may not have been spent yet."""
    whole = _whole(parameter)
    if whole.grad is None or not whole.grad.flags.writeable:
        whole.grad = np.zeros_like(whole.data)
    whole.grad[parameter._index if isinstance(parameter, ParameterPart) else ...] += gradient
