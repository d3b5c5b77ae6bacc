"""Where every row goes: the two-hop routes of DeepEP's kernels, planned once, used by dispatch, combine and backward.

A token and one of its experts are an *entry*. Entries keep one order at every place:

    source          by node of the expert, then token, then k     hop 1: to the GPU of that node that has the source's
                                                                          own slot, over InfiniBand
    forwarder       by rank of the expert, then as they came      hop 2: to that rank of the node, over NVLink
    expert's rank   by expert, then source rank, then token       (as a local dispatcher over all ranks sorts them)

Entries of one token that go the same way are neighbours, so the token travels once for all of them: the first entry
of each such run is marked, and the marked ones are the *rows* that travel. There are four ways to move along a route:

    multicast       a token's row once to each node, then once to each rank, that needs it       (dispatch)
    sum_back        its transpose: sums of a rank, of a node, and at the source                  (combine)
    there, back     a row for every entry: nothing is shared, nothing summed                     (exact wire, weights)

A direct route (low-latency kernels) has one hop, straight to the expert's rank, and shares nothing.

Each function takes and returns ``{rank: value}`` for the local ranks and does to each what this rank would do; what
is another rank's comes through the communicator only. All sorts are stable, so every sum has one order: by ascending
rank and node, or at the source by k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..autograd import Array
from .comm import Communicator, Parts, RankError

Rows = dict[int, Array]
EXPERT, SOURCE, TOKEN, FIRST = range(4)  # the int32 numbers that travel with an entry: a header of 16 bytes


class Hop(NamedTuple):
    """One rank's side of one exchange; `out` and `in` are int64 [R], towards and from each rank."""

    entry_order: Array  # [n] which of the held entries departs n-th
    entries_out: Array
    entries_in: Array
    row_order: Array  # [m] which of the held rows departs m-th
    rows_out: Array
    rows_in: Array
    rows_held: int


class Route(NamedTuple):
    """What one rank does: as a source, as a forwarder, and for its own experts."""

    hops: tuple[Hop, ...]
    entry_order: Array  # [N] which of the arrived entries is the n-th in the order of the experts
    row_of_entry: Array  # [N] the arrived row of that entry
    rows_arrived: int
    rows_per_expert: Array  # int64 [E / R]


class _Held(NamedTuple):
    """Entries at one place on their way."""

    header: Array  # int32 [n, 4]
    row: Array  # [n] the held row of each
    rows: int


def plan(
    comm: Communicator, topk_idx: Rows, experts_per_rank: int, operation: str, payload: Rows | None = None
) -> tuple[dict[int, Route], Rows]:
    """Plan the routes of expert ids [T, K] of every local rank; the headers travel as `operation`.

    Parameters
    ----------
    payload : {rank: uint8 [T, bytes]}, optional
        Plan direct routes, on which header and payload of an entry are one message.

    Returns
    -------
    routes : {rank: Route}
    payload : {rank: uint8 [entries, bytes]}
        What arrived of the payload.
    """
    held = {r: _entries(r, idx) for r, idx in topk_idx.items()}
    hops: dict[int, tuple[Hop, ...]] = dict.fromkeys(held, ())
    arrived: Rows = {}
    for by_node in (False,) if payload is not None else (True, False):
        departing, send = {}, {}
        for r, (header, row, _) in held.items():
            goal = header[:, EXPERT] // experts_per_rank
            if by_node:
                goal = goal - goal % comm.gpus_per_node + r % comm.gpus_per_node
            order = np.argsort(goal.astype(np.uint16), kind="stable")
            header, goal, row = header[order], goal[order], row[order]
            first = np.ones(len(row), dtype=bool)
            if payload is None:
                np.not_equal(goal[1:], goal[:-1], out=first[1:])
                first[1:] |= row[1:] != row[:-1]
            header[:, FIRST] = first
            counts = np.bincount(goal, minlength=comm.ranks)
            departing[r] = order, counts, row[first], np.bincount(goal[first], minlength=comm.ranks)
            send[r] = Parts(header if payload is None else _joined(header, payload[r][row]), counts)
        received = comm.all_to_all_v(send, operation, row_messages=payload is not None)
        for r, (message, entries_in) in received.items():
            header, arrived[r] = (message, message[:, :0]) if payload is None else _parted(message)
            marks = np.concatenate([[0], np.cumsum(header[:, FIRST], dtype=np.int64)])
            rows_in = np.diff(marks[np.concatenate([[0], np.cumsum(entries_in)])])
            order, entries_out, row_order, rows_out = departing[r]
            hop = Hop(order, entries_out, entries_in, row_order, rows_out, rows_in, held[r].rows)
            hops[r] = (*hops[r], hop)
            held[r] = _Held(header, marks[1:] - 1, int(marks[-1]))
    return {r: _route(r, hops[r], held[r], experts_per_rank, comm.ranks) for r in held}, arrived


def _entries(rank: int, topk_idx: Array) -> _Held:
    """All entries of the tokens of one rank."""
    T, K = topk_idx.shape
    token = np.repeat(np.arange(T, dtype=np.int64), K)
    header = np.empty((T * K, 4), dtype=np.int32)
    header[:, EXPERT], header[:, SOURCE], header[:, TOKEN] = topk_idx.reshape(-1), rank, token
    return _Held(header, token, T)


def _route(rank: int, hops: tuple[Hop, ...], held: _Held, experts_per_rank: int, ranks: int) -> Route:
    """Sort what arrived at an expert's rank by expert and source; on one source it is in order of tokens already."""
    expert = held.header[:, EXPERT] - rank * experts_per_rank
    key = expert * ranks + held.header[:, SOURCE]
    order = np.argsort(key.astype(np.uint16) if experts_per_rank * ranks <= 1 << 16 else key, kind="stable")
    return Route(hops, order, held.row[order], held.rows, np.bincount(expert, minlength=experts_per_rank))


def multicast(comm: Communicator, rows: Rows, routes: dict[int, Route], operation: str) -> Rows:
    """Rows of tokens [T, ...] to every rank that needs them -> rows as they arrived."""
    for number in range(_hops(routes)):
        hops = {r: route.hops[number] for r, route in routes.items()}
        send = {r: Parts(np.take(rows[r], hop.row_order, axis=0), hop.rows_out) for r, hop in hops.items()}
        rows = _exchange(comm, send, {r: hop.rows_in for r, hop in hops.items()}, operation)
    return rows


def sum_back(
    comm: Communicator,
    values: Rows,
    routes: dict[int, Route],
    operation: str,
    encode: Callable[[Array], Array],
    decode: Callable[[Array], Array],
) -> Rows:
    """The transpose of `multicast`: a value for each arrived row -> sums for the tokens [T, ...].

    `encode` gives what is sent of a value, `decode` what is added of it; every sum is encoded again for the next hop.
    """
    for number in reversed(range(_hops(routes))):
        hops = {r: route.hops[number] for r, route in routes.items()}
        send = {r: Parts(encode(values[r]), hop.rows_in) for r, hop in hops.items()}
        received = _exchange(comm, send, {r: hop.rows_out for r, hop in hops.items()}, operation)
        values = {r: sum_rows(decode(received[r]), hop.row_order, hop.rows_held) for r, hop in hops.items()}
    return values


def there(comm: Communicator, values: Rows, routes: dict[int, Route], operation: str) -> Rows:
    """A value for each entry at its source [T K, ...], by token and k -> at the experts' ranks, in their order."""
    for number in range(_hops(routes)):
        hops = {r: route.hops[number] for r, route in routes.items()}
        send = {r: Parts(np.take(values[r], hop.entry_order, axis=0), hop.entries_out) for r, hop in hops.items()}
        values = _exchange(comm, send, {r: hop.entries_in for r, hop in hops.items()}, operation)
    return {r: np.take(values[r], route.entry_order, axis=0) for r, route in routes.items()}


def back(
    comm: Communicator, values: Rows, routes: dict[int, Route], operation: str, row_messages: bool = False
) -> Rows:
    """The way back of `there`."""
    values = {r: np.take(values[r], inverse(route.entry_order), axis=0) for r, route in routes.items()}
    for number in reversed(range(_hops(routes))):
        hops = {r: route.hops[number] for r, route in routes.items()}
        send = {r: Parts(values[r], hop.entries_in) for r, hop in hops.items()}
        values = _exchange(comm, send, {r: hop.entries_out for r, hop in hops.items()}, operation, row_messages)
        values = {r: np.take(values[r], inverse(hop.entry_order), axis=0) for r, hop in hops.items()}
    return values


def sum_rows(values: Array, row: Array, rows: int) -> Array:
    """``out[i] = sum of values[j] with row[j] == i``, added in the order of j; [n, ...] -> [rows, ...]."""
    order = np.argsort(row.astype(np.uint16) if rows <= 1 << 16 else row, kind="stable")
    terms = np.bincount(row, minlength=rows)
    first = np.cumsum(terms) - terms  # where in `order` the terms of each row begin
    if rows and terms.min() > 0:  # the usual case: the first terms make the sums, the others are added
        out = np.take(values, order[first], axis=0)
    else:
        out = np.zeros((rows, *values.shape[1:]), dtype=values.dtype)
        out[terms > 0] = values[order[first[terms > 0]]]
    for n in range(1, int(terms.max(initial=0))):
        longer = np.flatnonzero(terms > n)
        out[longer] += np.take(values, order[first[longer] + n], axis=0)
    return out


def inverse(order: Array) -> Array:
    """The permutation that undoes `order`."""
    place = np.empty_like(order)
    place[order] = np.arange(len(order), dtype=order.dtype)
    return place


def _hops(routes: dict[int, Route]) -> int:
    return len(next(iter(routes.values())).hops)


def _exchange(
    comm: Communicator, send: dict[int, Parts], expected: Rows, operation: str, row_messages: bool = False
) -> Rows:
    """All-to-all of rows; RankError unless every rank sends as many as the plan says."""
    rows = {}
    for r, (received, counts) in comm.all_to_all_v(send, operation, row_messages).items():
        if not np.array_equal(counts, expected[r]):
            source = int(np.flatnonzero(counts != expected[r])[0])
            raise RankError(
                f"rank {comm.members[source]} sent {counts[source]} rows to rank {comm.members[r]} in {operation}, "
                f"where the routing has {expected[r][source]}"
            )
        rows[r] = received
    return rows


def _joined(header: Array, payload: Array) -> Array:
    """Header and payload as one message: uint8 [n, 16 + bytes]."""
    return np.concatenate([header.view(np.uint8), payload], axis=1)


def _parted(message: Array) -> tuple[Array, Array]:
    """Header int32 [n, 4] and payload uint8 [n, bytes] of messages."""
    return np.ascontiguousarray(message[:, :16]).view(np.int32), message[:, 16:]
