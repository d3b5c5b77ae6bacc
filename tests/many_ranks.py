"""Tokens on several ranks, and the local dispatcher on the same rows, for the tests of `minidsv3.parallel`."""

import numpy as np

from minidsv3.autograd import Function, Tensor, backward
from minidsv3.model.moe import LocalTokenDispatcher
from minidsv3.parallel.comm import Parts, SimCommunicator
from minidsv3.parallel.dispatcher import AllToAllTokenDispatcher
from minidsv3.parallel.ledger import Ledgered
from minidsv3.parallel.ranks import Ranks
from minidsv3.parallel.wire import EXACT


def uneven_parts(R, width=3, seed=0):
    """Parts of every rank, of different sizes, some empty; each row says where it comes from and goes to."""
    rng = np.random.default_rng(seed)
    send = {}
    for s in range(R):
        counts = rng.integers(0, 4, R)
        rows = [[100 * s + d, n, 7] for d in range(R) for n in range(counts[d])]
        send[s] = Parts(np.array(rows, dtype=np.int32).reshape(-1, width), counts)
    return send


class Dot(Function):
    """``sum(y * dy)``: its gradient with respect to y is dy."""

    def forward(self, y, *, dy):
        self._dy = dy
        return np.asarray((y * dy).sum(), dtype=y.dtype)

    def backward(self, dloss):
        return self._dy


class Scale(Function):
    """A stand-in for experts: each row times its expert's factor, which shows when a row is at the wrong expert."""

    def forward(self, rows, *, factor_of_row):
        self._factor = factor_of_row[:, None].astype(rows.dtype)
        return rows * self._factor

    def backward(self, dy):
        return dy * self._factor


class Case:
    """Tokens of R ranks with their routing; sizes differ from each other."""

    def __init__(self, tokens, E, K, D, dtype=np.float32, seed=0, idx=None):
        rng, T = np.random.default_rng(seed), sum(tokens)
        self.tokens, self.E, self.K = tokens, E, K
        self.x = rng.standard_normal((T, D)).astype(dtype)
        self.dy = rng.standard_normal((T, D)).astype(dtype)
        self.weight = rng.random((T, K)).astype(dtype)
        self.idx = np.sort(np.argsort(rng.random((T, E)), axis=1)[:, :K], axis=1) if idx is None else idx
        stops = np.cumsum(tokens)
        self.slices = [slice(b - n, b) for n, b in zip(tokens, stops.tolist())]

    def program(self, dispatcher, slice_, factor):
        """Dispatch, scale, combine, backward; what is left of it."""
        x, weight = Tensor(self.x[slice_], True), Tensor(self.weight[slice_], True)
        rows, handle = dispatcher.dispatch(x, self.idx[slice_], weight)
        experts = np.arange(self.E)[slice(None) if handle.experts is None else handle.experts]
        y = dispatcher.combine(
            Scale.apply(rows, factor_of_row=np.repeat(factor[experts], handle.rows_per_expert)), handle
        )
        backward(Dot.apply(y, dy=self.dy[slice_]))  # ranks without tokens take part all the same
        return rows.data, y.data, x.grad, weight.grad

    @property
    def factor(self):
        return 1 + np.arange(self.E) / 7

    def local(self):
        """rows, y, dx, dweight of a local dispatcher over all tokens."""
        return self.program(LocalTokenDispatcher(self.E), slice(None), self.factor)

    def on_ranks(self, gpus_per_node, wire=EXACT, workers=1, placement=None):
        """The same from ranks, in rank order; and the communicator with its ledger."""
        comm = Ledgered(SimCommunicator(len(self.tokens), gpus_per_node))
        ranks = Ranks(comm, workers)
        dispatcher = AllToAllTokenDispatcher(ranks, self.E, wire, placement=placement)
        results = ranks.run(lambda rank: self.program(dispatcher, self.slices[rank], self.factor))
        return [np.concatenate(parts) for parts in zip(*results)], comm
