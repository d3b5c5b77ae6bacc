"""Communicators: what goes where, that nothing is shared, and that sums have one order."""

import numpy as np
import pytest
from many_ranks import uneven_parts

from minidsv3.parallel.comm import Parts, RankError, SimCommunicator, piece_bounds
from minidsv3.parallel.ledger import Ledgered

RNG = np.random.default_rng(5)


@pytest.mark.parametrize("R", [1, 2, 5, 8])
def test_all_to_all_brings_part_d_of_rank_s_to_part_s_of_rank_d(R):
    send = uneven_parts(R)
    received = SimCommunicator(R).all_to_all_v(send, "x")
    for d in range(R):
        expected = [row for s in range(R) for row in send[s].rows.tolist() if row[0] == 100 * s + d]
        assert received[d].rows.tolist() == expected
        assert received[d].counts.tolist() == [send[s].counts[d] for s in range(R)]


def test_received_arrays_are_nobody_elses():
    send = {r: Parts(np.ones((4, 2), dtype=np.float32), np.array([2, 2])) for r in range(2)}
    comm = SimCommunicator(2)
    comm.all_to_all_v(send, "x")[0].rows[:] = 5
    assert all((p.rows == 1).all() for p in send.values())
    gathered = comm.all_gather({0: np.zeros(3), 1: np.ones(2)}, "x")
    with pytest.raises(ValueError, match="read-only"):
        gathered[0][1][:] = 3
    value = {0: np.arange(4.0), 1: np.zeros(4)}
    got = comm.broadcast(value, 0, "x")
    value[0][:] = 9
    assert got[1].tolist() == [0, 1, 2, 3] and not got[1].flags.writeable


@pytest.mark.parametrize("counts, said", [([3, 0], "3, 0"), ([1, 0], "1, 0"), ([4, -2], "4, -2"), ([2], r"\[2\]")])
def test_sizes_that_do_not_fit_name_rank_and_operation(counts, said):
    send = {r: Parts(np.zeros((2, 5)), np.array([1, 1])) for r in range(2)}
    send[1] = Parts(np.zeros((2, 5)), np.array(counts))
    with pytest.raises(RankError, match=f"rank 1 sent sizes .*{said}.* for 2 rows in dispatch"):
        SimCommunicator(2).all_to_all_v(send, "dispatch")


@pytest.mark.parametrize("R, shape", [(1, (3, 4)), (3, (2, 5)), (5, (3,)), (8, (7, 2, 3))])
def test_all_reduce_adds_in_rank_order(R, shape):
    """Float32 sums depend on their order: only the one from rank 0 to rank R - 1 passes."""
    values = {r: (RNG.standard_normal(shape) * 10.0 ** RNG.integers(-3, 4)).astype(np.float32) for r in range(R)}
    expected = values[0].copy()
    for r in range(1, R):
        expected += values[r]
    for result in SimCommunicator(R).all_reduce(values, "x").values():
        np.testing.assert_array_equal(result, expected)
        assert result.dtype == np.float32


def test_reduce_scatter_gives_each_rank_its_piece():
    values = {r: np.arange(11, dtype=np.int64) * 10**r for r in range(3)}
    pieces = SimCommunicator(3).reduce_scatter(values, "x")
    assert np.concatenate([pieces[r] for r in range(3)]).tolist() == [111 * i for i in range(11)]
    assert [len(pieces[r]) for r in range(3)] == np.diff(piece_bounds(11, 3)).tolist() == [3, 4, 4]


def test_all_gather_takes_arrays_of_different_lengths():
    values = {r: np.full((r, 2), r, dtype=np.uint8) for r in range(4)}
    gathered = SimCommunicator(4).all_gather(values, "x")
    assert [a.tolist() for a in gathered[2]] == [values[r].tolist() for r in range(4)]


def test_split_numbers_each_group_from_0_and_remembers_the_global_ranks():
    comm = Ledgered(SimCommunicator(6, 2))
    groups = comm.split([0, 1, 1, 0, 1, 0])
    assert [list(g.members) for g in groups] == [[0, 3, 5], [1, 2, 4]]
    total = groups[1].all_reduce({i: np.array([float(r)]) for i, r in enumerate((1, 2, 4))}, "sum")
    assert total[0] == 7
    sent = {(row.source, row.destination) for row in comm.ledger.rows()}
    assert sent <= {(s, d) for s in (1, 2, 4) for d in (1, 2, 4)} and (1, 4) in sent


def test_messages_between_two_ranks_keep_their_order_and_their_tag():
    comm = SimCommunicator(3)
    for i in range(3):
        comm.send(np.array([i]), 2, 0, tag=4, operation="x")
    comm.send(np.array([9]), 2, 0, tag=5, operation="x")
    assert comm.receive(2, 1, 4, "x") is None
    assert [int(comm.receive(2, 0, 4, "x")[0]) for _ in range(3)] == [0, 1, 2]
    assert comm.receive(2, 0, 4, "x") is None and int(comm.receive(2, 0, 5, "x")[0]) == 9


def test_a_sent_array_can_be_written_over():
    comm, array = SimCommunicator(2), np.ones(3)
    comm.send(array, 0, 1, 0, "x")
    array[:] = 0
    assert comm.receive(0, 1, 0, "x").tolist() == [1, 1, 1]


@pytest.mark.parametrize("ranks, gpus, said", [
    (6, 4, "ranks=6 is not a multiple of gpus_per_node=4"), (0, 1, "ranks=0"), (4, -1, "gpus_per_node=-1"),
])  # fmt: skip
def test_ranks_fill_whole_nodes(ranks, gpus, said):
    with pytest.raises(ValueError, match=said):
        SimCommunicator(ranks, gpus)
