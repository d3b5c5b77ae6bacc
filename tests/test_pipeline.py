"""Executed schedules against plain training: gradients, live activations counted on the tape, mailboxes, errors."""

import threading
import weakref

import numpy as np
import pytest

from minidsv3.autograd import Function, Parameter, Tensor, backward
from minidsv3.ops.linear import linear
from minidsv3.ops.loss import cross_entropy
from minidsv3.ops.shape import add
from minidsv3.ops.swiglu import swiglu
from minidsv3.parallel.comm import RankError, SimCommunicator
from minidsv3.parallel.ledger import Ledgered
from minidsv3.parallel.pipeline import run
from minidsv3.parallel.ranks import Ranks
from minidsv3.parallel.schedules import Schedule, build, peak_live

D, HIDDEN, ROWS = 7, 5, 3
CASES = [("1f1b", 4, 6), ("1f1b", 3, 2), ("zb1p", 4, 7), ("dualpipe", 4, 10), ("dualpipe", 2, 4), ("dualpipev", 3, 8),
         ("dualpipev", 1, 3)]  # fmt: skip
IDS = ["-".join(map(str, case)) for case in CASES]


class Chain:
    """`stages` residual SwiGLU blocks in float64; the last one ends in a cross-entropy."""

    def __init__(self, stages, seed=0):
        rng = np.random.default_rng(seed)
        self.weights = []
        for _ in range(stages):
            pair = Parameter((2 * HIDDEN, D)), Parameter((D, HIDDEN))
            for p in pair:
                p.allocate(np.float64)
                p.data[...] = 0.4 * rng.standard_normal(p.shape)
            self.weights.append(pair)
        self.stages = [self.stage(s, s == stages - 1) for s in range(stages)]

    def stage(self, s, last):
        up, down = self.weights[s]

        def forward(x, *targets):
            y = add(x, linear(swiglu(linear(x, up)), down))
            return cross_entropy(y, *targets) if last else y

        return forward

    def plain(self, microbatches):
        """Losses and gradients of one micro-batch after the other."""
        losses = []
        for x, targets in microbatches:
            h = Tensor(x)
            for stage in self.stages[:-1]:
                h = stage(h)
            loss = self.stages[-1](h, targets)
            losses.append(float(loss))
            backward(loss)
        return losses, self.take()

    def take(self):
        """Gradients, and zeros in their place."""
        taken = [p.grad.copy() for pair in self.weights for p in pair]
        for pair in self.weights:
            for p in pair:
                p.zero_grad()
        return taken


def data(chunks, seed=1):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((ROWS, D)), rng.integers(0, D, ROWS)) for _ in range(chunks)]


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("name, ranks, chunks", CASES, ids=IDS)
def test_gradients_and_losses_are_those_of_plain_training(name, ranks, chunks):
    schedule = build(name, ranks, chunks)
    chain, batches = Chain(schedule.stages), data(chunks)
    losses, expected = chain.plain(batches)
    result = run(schedule, chain.stages, batches)
    assert result.losses == losses
    for got, want in zip(chain.take(), expected):
        if name == "dualpipe":
            assert relative(got, want) < 1e-12  # float64, two halves added
        else:
            assert np.array_equal(got, want)


def test_dualpipe_is_the_sum_of_its_two_halves_to_the_bit():
    chain, batches = Chain(4), data(10)
    (_, first), (_, second) = chain.plain(batches[:5]), chain.plain(batches[5:])
    run(build("dualpipe", 4, 10), chain.stages, batches)
    for got, a, b, s in zip(chain.take(), first, second, [0, 0, 1, 1, 2, 2, 3, 3]):
        lower, higher = (a, b) if s < 2 else (b, a)  # added in rank order; rank s has dir 0 of stage s
        assert np.array_equal(got, lower + higher)


def test_gradients_are_added_to_what_is_there():
    chain, batches = Chain(2), data(3)
    _, once = chain.plain(batches)
    for _ in range(2):
        run(build("1f1b", 2, 3), chain.stages, batches)
    for got, g in zip(chain.take(), once):
        assert np.array_equal(got, g + g)


class Watched(Function):
    """Keeps a copy of its input for the backward pass, and knows how many copies exist in its thread's rank."""

    alive: dict = {}  # noqa: RUF012

    def forward(self, x):
        kept, rank = x.copy(), threading.current_thread().name
        counts = self.alive.setdefault(rank, [0, 0])
        counts[0] += 1
        counts[1] = max(counts)
        weakref.finalize(kept, self.gone, counts)
        self.save(kept)
        return x.copy()

    @classmethod
    def gone(cls, counts):
        counts[0] -= 1

    def backward(self, dy):
        (kept,) = self.saved
        return dy + 0 * kept


@pytest.mark.parametrize("name, ranks, chunks, most", [
    ("1f1b", 4, 9, [4, 3, 2, 1]), ("dualpipe", 4, 12, [5] * 4), ("dualpipev", 2, 6, [5] * 2),
])  # fmt: skip
def test_activations_alive_on_the_tape_are_those_of_theory(name, ranks, chunks, most):
    """Counted by the garbage collector's own book: arrays that the tape holds, at most PP, or PP+1 in DualPipe."""
    schedule = build(name, ranks, chunks)
    chain = Chain(schedule.stages)
    Watched.alive.clear()
    stages = [lambda x, *t, stage=stage: stage(Watched.apply(x), *t) for stage in chain.stages]
    result = run(schedule, stages, [(Tensor(x, requires_grad=True), targets) for x, targets in data(chunks)])
    assert [Watched.alive[f"rank {r}"] for r in range(ranks)] == [[0, n] for n in most]
    assert result.peak_live == most == peak_live(schedule)


def test_zero_bubble_holds_pp_chunks_with_the_weight_parts():
    assert run(build("zb1p", 4, 9), Chain(4).stages, data(9)).peak_live == [4] * 4


@pytest.mark.parametrize("name", ["1f1b", "dualpipe", "dualpipev"])
def test_a_rank_computes_its_own_stages_only(name):
    schedule, seen = build(name, 4, 8), set()

    def watched(s, stage):
        def forward(*inputs):
            seen.add((threading.current_thread().name, s))
            return stage(*inputs)

        return forward

    chain = Chain(schedule.stages)
    run(schedule, [watched(s, stage) for s, stage in enumerate(chain.stages)], data(8))
    own = {(f"rank {r}", schedule.stage_of(r, d)) for r in range(4) for d in schedule.directions}
    assert seen == own


def test_messages_cross_the_communicator_and_are_counted():
    ranks = Ranks(Ledgered(SimCommunicator(3)))
    run(build("1f1b", 3, 5), Chain(3).stages, data(5), ranks)
    ledger, header, payload = ranks.comm.ledger, 8, ROWS * D * 8
    for operation in ("pipeline activations", "pipeline gradients"):
        assert ledger.total_bytes(operation) == 2 * 5 * (header + payload)
    assert "gradient copies" not in ledger.operations
    ranks = Ranks(Ledgered(SimCommunicator(2)))
    run(build("dualpipe", 2, 4), Chain(2).stages, data(4), ranks)
    one_stage = 3 * HIDDEN * D * 8
    assert ranks.comm.ledger.total_bytes("gradient copies") == 2 * 2 * one_stage  # each stage there and back


def test_an_order_nobody_planned_runs_as_well():
    """All forwards first (GPipe), the last rank's backwards in reverse: the mailboxes sort it out."""
    F, B = [("F", 0, c) for c in range(4)], [("B", 0, c) for c in range(4)]
    chain, batches = Chain(2), data(4)
    _, expected = chain.plain(batches)
    result = run([F + B, F + B[::-1]], chain.stages, batches)
    assert result.peak_live == [4, 4]
    assert all(relative(got, want) < 1e-12 for got, want in zip(chain.take(), expected))


def test_several_tensors_and_whole_numbers_travel_together():
    """A stage may hand on tokens and a running scalar beside its activations; gradients return for the floats only."""
    w = Parameter((D, D))
    w.allocate(np.float64)
    w.data[...] = np.eye(D)
    tag = np.arange(ROWS)

    def first(x):
        return linear(x, w), Tensor(np.float64(2.0)), Tensor(tag)

    def second(y, scalar, whole):
        assert scalar.shape == () and whole.dtype == tag.dtype and np.array_equal(whole.data, tag)
        return cross_entropy(y, whole.data)

    (x, _), *_ = data(1)
    run(build("1f1b", 2, 1), [first, second], [x])
    got = w.grad.copy()
    w.zero_grad()
    backward(cross_entropy(linear(Tensor(x), w), tag))
    assert np.array_equal(got, w.grad)


def without(schedule, rank, op):
    return Schedule(schedule.name, [[o for o in row if r != rank or o != op] for r, row in enumerate(schedule)])


def test_a_missing_message_is_an_error_that_names_who_waits():
    broken = without(without(build("1f1b", 3, 4), 0, ("F", 0, 3)), 0, ("B", 0, 3))
    with pytest.raises(RankError, match="rank 1 waits for a message of rank 0"):
        run(broken, Chain(3).stages, data(4))


@pytest.mark.parametrize("op, rule", [
    (("W", 0, 2), "without the weight part"), (("Bi", 0, 2), "out of place"), (("F", 0, 2), "out of place"),
])  # fmt: skip
def test_a_missing_instruction_is_an_error(op, rule):
    broken = without(build("zb1p", 1, 4), 0, op)
    with pytest.raises(ValueError, match=rule):
        run(broken, Chain(1).stages, data(4))


def test_an_error_of_a_stage_comes_out_as_it_is():
    def broken(x, *targets):
        raise KeyError("my own mistake")

    with pytest.raises(KeyError, match="my own mistake"):
        run(build("1f1b", 2, 2), [Chain(2).stages[0], broken], data(2))


def test_numbers_that_do_not_fit_are_refused():
    chain = Chain(2)
    with pytest.raises(ValueError, match="2 stages, got 1"):
        run(build("1f1b", 2, 3), chain.stages[:1], data(3))
    with pytest.raises(ValueError, match="3 chunks"):
        run(build("1f1b", 2, 3), chain.stages, data(4))
    with pytest.raises(ValueError, match="need 2, got 3"):
        run(build("1f1b", 2, 3), chain.stages, data(3), Ranks(SimCommunicator(3)))
    with pytest.raises(ValueError, match="a loss is one number"):
        run(build("1f1b", 2, 3), [chain.stages[0], chain.stages[0]], [x for x, _ in data(3)])


def test_replicas_have_micro_batches_of_their_own_and_share_the_weights():
    chain, batches = Chain(2), data(6)
    losses, expected = chain.plain(batches)
    result = run(build("1f1b", 2, 3), chain.stages, batches, replicas=2)
    assert result.losses == losses
    assert all(relative(got, want) < 1e-12 for got, want in zip(chain.take(), expected))
