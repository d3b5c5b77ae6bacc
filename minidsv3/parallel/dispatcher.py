"""Expert-parallel dispatch and combine: the rows of every rank to the ranks of their experts, and back.

The same two calls as `model.moe.LocalTokenDispatcher`, handed to the model in its place:

    rows, handle = dispatcher.dispatch(x, topk_idx, topk_weight)      # this rank's tokens -> this rank's experts' rows
    y = dispatcher.combine(experts(rows), handle)                     # and back

The model runs as a rank's program (`ranks.Ranks`), once a rank, and each call meets those of the other ranks. Where
rows go is `routes`' business, what they look like on a link `wire`'s; here the two are made into ops with their
derivatives: the backward of dispatch is a combine of gradients, the backward of combine a dispatch of gradients, along
the route of the forward pass.

On the exact wire, all ranks' rows in rank order are what a local dispatcher over all tokens gives, bit for bit, and
so are combined outputs and gradients. Follows DeepEP (names, order of rows, rounding); V3 report, section 3.2.2.

Simplified against the real system: the group of experts is the group of all ranks (V3: 64 of 2,048 GPUs share the
experts, data parallel over 32 such groups), and no computation overlaps with communication.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..autograd import Array, Function, Tensor
from ..ops.routing import unpermute
from .comm import Communicator
from .placement import Placement
from .ranks import Ranks
from .routes import Route, Rows, back, multicast, plan, sum_back, sum_rows, there
from .wire import EXACT, Format, Wire


class TokenDispatcher(Protocol):
    """What `AllToAllTokenDispatcher` is, and what it falls back on outside of a rank's program."""

    def dispatch(self, x: Tensor, topk_idx: Array, topk_weight: Tensor) -> tuple[Tensor, Any]: ...
    def combine(self, rows: Tensor, handle: Any) -> Tensor: ...


class Handle(NamedTuple):
    """What one rank needs to bring its rows back."""

    rows_per_expert: Array  # int64 [E / R]
    experts: Any  # which experts they are: a slice, or (with redundant experts) an index array
    route: Route
    weight: Tensor  # [T, K] at the source; of each row [N] where sums are taken on the way


class AllToAllTokenDispatcher:
    """Experts spread over the ranks of a communicator, evenly and in order.

    Parameters
    ----------
    ranks : Ranks
        Whose programs call `dispatch` and `combine`.
    n_routed_experts : int
    wire : Wire
    comm : Communicator, optional
        The group of ranks that share the experts; all ranks if not given.
    alone : TokenDispatcher, optional
        Serves calls from outside of any rank's program (evaluation, generation), where all experts are at hand.
    placement : Placement, optional
        Redundant experts (`placement`).

    Raises
    ------
    ValueError
        The experts do not divide evenly.
    """

    def __init__(
        self,
        ranks: Ranks,
        n_routed_experts: int,
        wire: Wire = EXACT,
        *,
        comm: Communicator | None = None,
        alone: TokenDispatcher | None = None,
        placement: Placement | None = None,
    ) -> None:
        self.ranks, self.comm = ranks, comm or ranks.comm
        self.wire, self.placement, self._alone = wire, placement, alone
        self.n_routed_experts = n_routed_experts
        experts = placement.num_physical if placement else n_routed_experts
        if experts % self.comm.ranks:
            what = "physical experts" if placement else "n_routed_experts"
            raise ValueError(f"{what}={experts} is not a multiple of ranks={self.comm.ranks}")
        self.experts_per_rank = experts // self.comm.ranks
        self._place = {self.comm.members[r]: r for r in self.comm.local_ranks}  # global rank -> rank in the group
        self._group = tuple(self._place)

    def experts_of(self, rank: int) -> Any:
        """Index of the experts of a rank (of the group) into arrays over all experts."""
        first = rank * self.experts_per_rank
        mine = slice(first, first + self.experts_per_rank)
        return self.placement.expert_of_physical[mine] if self.placement else mine

    def dispatch(self, x: Tensor, topk_idx: Array, topk_weight: Tensor) -> tuple[Tensor, Any]:
        """x [T, D], topk_idx [T, K], topk_weight [T, K] -> rows [N, D] of this rank's experts, and a handle.

        Raises ValueError for expert ids outside of 0..E-1.
        """
        rank = self.ranks.rank
        if rank is None:
            return self._local().dispatch(x, topk_idx, topk_weight)
        if topk_idx.size and not 0 <= topk_idx.min() <= topk_idx.max() < self.n_routed_experts:
            E = self.n_routed_experts
            raise ValueError(f"dispatch: topk_idx {topk_idx.min()}..{topk_idx.max()} exceeds {E} experts")
        if self.placement:
            topk_idx = self.placement.physical_of_token(topk_idx)
        route, arrived = self.collective((topk_idx, self.wire.dispatch.encode(x.data)), self._send_tokens, "dispatch")
        rows = DispatchFunction.apply(x, dispatcher=self, route=route, arrived=arrived)
        weight = topk_weight
        if self.wire.sums_on_the_way:
            weight = WeightFunction.apply(topk_weight, dispatcher=self, route=route)
        return rows, Handle(route.rows_per_expert, self.experts_of(self._place[rank]), route, weight)

    def combine(self, rows: Tensor, handle: Any) -> Tensor:
        """rows [N, D] of this rank's experts -> weighted sums for this rank's tokens [T, D]."""
        if self.ranks.rank is None:
            return self._local().combine(rows, handle)
        if self.wire.sums_on_the_way:
            return CombineFunction.apply(rows, handle.weight, dispatcher=self, route=handle.route)
        rows = ReturnFunction.apply(rows, dispatcher=self, route=handle.route)  # [T K, D]
        slots = np.arange(handle.weight.data.size, dtype=np.int64)
        T, K = handle.weight.shape
        return unpermute(rows, handle.weight, slots // K, slots.reshape(T, K))

    def _local(self) -> TokenDispatcher:
        if self._alone is None:
            raise ValueError("dispatch and combine belong in a rank's program (Ranks.run): no `alone` was given")
        return self._alone

    def collective(self, value: Any, function: Callable[[dict[int, Any]], Mapping[int, Any]], operation: str) -> Any:
        """Meet the other ranks of the group: ``function({rank of the group: value})``, and this rank's result."""

        def together(values: dict[int, Any]) -> dict[int, Any]:
            results = function({self._place[rank]: v for rank, v in values.items()})
            return {self.comm.members[r]: result for r, result in results.items()}

        return self.ranks.meet(value, together, operation, self._group)

    def _send_tokens(self, values: dict[int, tuple[Array, Array]]) -> dict[int, tuple[Route, Array]]:
        """Plan the routes and send the encoded tokens along them."""
        topk_idx, encoded = ({r: v[i] for r, v in values.items()} for i in range(2))
        if self.wire.direct:
            routes, arrived = plan(self.comm, topk_idx, self.experts_per_rank, "dispatch", encoded)
        else:
            routes, _ = plan(self.comm, topk_idx, self.experts_per_rank, "dispatch routing")
            arrived = multicast(self.comm, encoded, routes, "dispatch")
        return {r: (routes[r], arrived[r]) for r in routes}

    def along(self, move: Callable[..., Rows], value: Array, route: Route, operation: str, *how: Any) -> Array:
        """``move`` (of `routes`) the values of all ranks along their routes."""

        def function(values: dict[int, tuple[Array, Route]]) -> Rows:
            arrays, routes = ({r: v[i] for r, v in values.items()} for i in range(2))
            return move(self.comm, arrays, routes, operation, *how)

        return self.collective((value, route), function, operation)

    def summed_back(self, rows: Array, route: Route, operation: str) -> Array:
        """Rows of experts [N, D] -> sums of ranks, of nodes, of tokens [T, D], each rounded as it travels."""
        wire, D = self.wire.combine, rows.shape[1]
        partial = sum_rows(rows, route.row_of_entry, route.rows_arrived)

        def decode(received: Array) -> Array:
            return wire.decode(received, D)

        total = self.along(sum_back, partial, route, operation, wire.encode, decode)
        return decode(wire.encode(total)).astype(rows.dtype, copy=False)

    def returned(self, rows: Array, route: Route, operation: str, wire: Format) -> Array:
        """Rows of experts [N, D] -> one by one to their tokens [T K, D], by token and k."""
        received = self.along(back, wire.encode(rows), route, operation, self.wire.direct)
        return wire.decode(received, rows.shape[1]).astype(rows.dtype, copy=False)


class DispatchFunction(Function):
    """x [T, D] -> rows of this rank's experts [N, D]; `arrived` is what the ranks sent (encoded)."""

    def forward(self, x: Array, *, dispatcher: AllToAllTokenDispatcher, route: Route, arrived: Array) -> Array:
        self._dispatcher, self._route = dispatcher, route
        tokens = dispatcher.wire.dispatch.decode(arrived, x.shape[1]).astype(x.dtype, copy=False)
        return np.take(tokens, route.row_of_entry, axis=0)

    def backward(self, drows: Array) -> Array:
        wire, route = self._dispatcher.wire, self._route
        if wire.sums_on_the_way:
            return self._dispatcher.summed_back(drows, route, "dispatch backward")
        slots = self._dispatcher.returned(drows, route, "dispatch backward", wire.combine)
        T = route.hops[0].rows_held
        slots = slots.reshape(T, len(slots) // max(T, 1) or 1, drows.shape[1])  # [T, K, D]
        dx = slots[:, 0].copy()
        for k in range(1, slots.shape[1]):
            dx += slots[:, k]
        return dx


class ReturnFunction(Function):
    """Rows of experts [N, D] -> one by one to their tokens [T K, D]."""

    def forward(self, rows: Array, *, dispatcher: AllToAllTokenDispatcher, route: Route) -> Array:
        self._dispatcher, self._route = dispatcher, route
        return dispatcher.returned(rows, route, "combine", dispatcher.wire.combine)

    def backward(self, dslots: Array) -> Array:
        wire = self._dispatcher.wire.dispatch
        received = self._dispatcher.along(there, wire.encode(dslots), self._route, "combine backward")
        return wire.decode(received, dslots.shape[1]).astype(dslots.dtype, copy=False)


class WeightFunction(Function):
    """topk_weight [T, K] -> the weight of each row of this rank's experts [N]."""

    def forward(self, weight: Array, *, dispatcher: AllToAllTokenDispatcher, route: Route) -> Array:
        self._dispatcher, self._route, self._shape = dispatcher, route, weight.shape
        return dispatcher.along(there, weight.reshape(-1), route, "dispatch routing")

    def backward(self, dweight: Array) -> Array:
        return self._dispatcher.along(back, dweight, self._route, "dispatch backward routing").reshape(self._shape)


class CombineFunction(Function):
    """rows [N, D], weight [N] -> weighted sums [T, D], taken at the experts' rank, on the node and at the source."""

    def forward(self, rows: Array, weight: Array, *, dispatcher: AllToAllTokenDispatcher, route: Route) -> Array:
        self._dispatcher, self._route = dispatcher, route
        self.save(rows, weight)
        return dispatcher.summed_back(rows * weight[:, None], route, "combine")

    def backward(self, dy: Array) -> tuple[Array, Array]:
        rows, weight = self.saved
        wire = self._dispatcher.wire.dispatch
        arrived = self._dispatcher.along(multicast, wire.encode(dy), self._route, "combine backward")
        dy_of_token = wire.decode(arrived, dy.shape[1]).astype(dy.dtype, copy=False)
        dy_of_row = np.take(dy_of_token, self._route.row_of_entry, axis=0)  # [N, D]
        return dy_of_row * weight[:, None], np.vecdot(dy_of_row, rows)
