"""Ranks as threads: who meets whom, who is told what, and that nobody waits for ever."""

import threading

import numpy as np
import pytest

from minidsv3.autograd import Function, Tensor, replacing
from minidsv3.parallel.comm import RankError, SimCommunicator
from minidsv3.parallel.ranks import Ranks


def swap(values):
    """A collective: everybody gets everybody's value."""
    return {rank: list(values.items()) for rank in values}


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_everybody_meets_everybody_in_rank_order(workers):
    ranks = Ranks(SimCommunicator(4), workers)

    def program(rank):
        return [ranks.meet((rank, turn), swap, "swap") for turn in range(3)]

    expected = [[(r, (r, turn)) for r in range(4)] for turn in range(3)]
    assert ranks.run(program) == [expected] * 4
    assert ranks.rank is None


def test_one_worker_runs_the_ranks_in_turn():
    ranks, seen = Ranks(SimCommunicator(3)), []

    def program(rank):
        for turn in range(2):
            seen.append((turn, rank))
            ranks.meet(None, lambda values: values, "turn")

    ranks.run(program)
    assert seen[:3] == [(0, 0), (0, 1), (0, 2)] and sorted(seen[3:]) == [(1, 0), (1, 1), (1, 2)]


def test_no_more_threads_run_than_there_are_workers():
    ranks, running, most, lock = Ranks(SimCommunicator(6), 2), [0], [0], threading.Lock()

    def program(rank):
        for _ in range(5):
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            sum(range(2000))
            with lock:
                running[0] -= 1
            ranks.meet(None, lambda values: values, "turn")

    ranks.run(program)
    assert most[0] <= 2


def test_groups_meet_apart():
    ranks = Ranks(SimCommunicator(4))

    def program(rank):
        group = (0, 2) if rank % 2 == 0 else (1, 3)
        return ranks.meet(10 * rank, swap, "pair", group)

    assert ranks.run(program) == [[(0, 0), (2, 20)], [(1, 10), (3, 30)]] * 2


def test_messages_go_round_a_ring():
    ranks = Ranks(SimCommunicator(5))

    def program(rank):
        ranks.send(np.array([rank]), (rank + 1) % 5, tag=rank)
        return int(ranks.receive((rank - 1) % 5, tag=(rank - 1) % 5)[0])

    assert ranks.run(program) == [4, 0, 1, 2, 3]


def test_a_message_that_nobody_sends_is_an_error_that_says_so():
    ranks = Ranks(SimCommunicator(3))

    def program(rank):
        if rank == 1:
            ranks.receive(2, tag=7, operation="stage")

    with pytest.raises(RankError, match="rank 1 waits for a message of rank 2 with tag 7 in stage"):
        ranks.run(program)


def test_a_rank_that_ends_too_early_leaves_no_deadlock():
    ranks, told = Ranks(SimCommunicator(3)), {}

    def program(rank):
        if rank == 2:
            return
        try:
            ranks.meet(None, swap, "combine")
        except RankError as error:
            told[rank] = str(error)
            raise

    with pytest.raises(RankError, match="rank 0 waits for combine for rank 2"):
        ranks.run(program)
    assert sorted(told) == [0, 1]


def test_ranks_at_different_collectives_are_an_error():
    ranks = Ranks(SimCommunicator(2))
    with pytest.raises(RankError, match="rank 0 is in dispatch 0, rank 1 in dispatch 1"):
        ranks.run(lambda rank: ranks.meet(None, swap, f"dispatch {rank}"))


def test_an_error_of_one_rank_stops_the_others_and_comes_out():
    ranks, told = Ranks(SimCommunicator(4)), {}

    def program(rank):
        if rank == 1:
            raise KeyError("expert 9")
        try:
            ranks.meet(None, swap, "dispatch")
        except RankError as error:
            told[rank] = str(error)
            raise

    with pytest.raises(KeyError, match="expert 9"):
        ranks.run(program)
    assert set(told) == {0, 2, 3} and all("rank 1 ended: KeyError" in said for said in told.values())


def test_an_error_in_the_collective_reaches_every_rank():
    ranks, told = Ranks(SimCommunicator(3), 2), []

    def broken(values):
        raise RankError("rank 2 died in gather")

    def program(rank):
        try:
            ranks.meet(None, broken, "gather")
        except RankError as error:
            told.append(str(error))
            raise

    with pytest.raises(RankError, match="rank 2 died in gather"):
        ranks.run(program)
    assert told == ["rank 2 died in gather"] * 3


def test_ranks_can_run_again_after_an_error():
    ranks = Ranks(SimCommunicator(2))
    with pytest.raises(RankError):
        ranks.run(lambda rank: ranks.receive(1 - rank))
    assert ranks.run(lambda rank: ranks.meet(rank, swap, "x"))[1] == [(0, 0), (1, 1)]


def test_ranks_run_under_the_callers_replacements():
    class Double(Function):
        def forward(self, x):
            return 2 * x

    class Triple(Double):
        def forward(self, x):
            return 3 * x

    ranks = Ranks(SimCommunicator(2))
    with replacing(Double, Triple):
        assert ranks.run(lambda rank: float(Double.apply(Tensor(np.array(rank + 1.0))))) == [3, 6]
