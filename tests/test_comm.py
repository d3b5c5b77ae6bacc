"""Communicators: what goes where, that nothing is shared, that sums have one order, and what the ledger says."""

import numpy as np
import pytest

from minidsv3.parallel.comm import (
    Ledgered,
    LedgerRow,
    Parts,
    RankError,
    SimCommunicator,
    piece_bounds,
    read_ledger_csv,
)

RNG = np.random.default_rng(5)


def uneven(R, width=3, seed=0):
    """Parts of every rank, of different sizes, some empty; each row says where it comes from and goes to."""
    rng = np.random.default_rng(seed)
    send = {}
    for s in range(R):
        counts = rng.integers(0, 4, R)
        rows = [[100 * s + d, n, 7] for d in range(R) for n in range(counts[d])]
        send[s] = Parts(np.array(rows, dtype=np.int32).reshape(-1, width), counts)
    return send


@pytest.mark.parametrize("R", [1, 2, 5, 8])
def test_all_to_all_brings_part_d_of_rank_s_to_part_s_of_rank_d(R):
    send = uneven(R)
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


def test_ledger_adds_the_bytes_of_the_arrays_by_link():
    comm = Ledgered(SimCommunicator(4, 2))
    send = {r: Parts(RNG.standard_normal((10, 6)).astype(np.float32), np.array([1, 2, 3, 4])) for r in range(4)}
    comm.all_to_all_v(send, "a")
    row = 6 * 4
    assert comm.ledger.bytes_of_pair("a").tolist() == [[row, 2 * row, 3 * row, 4 * row]] * 4
    assert comm.ledger.total_bytes("a", "local") == (1 + 2 + 3 + 4) * row
    assert comm.ledger.total_bytes("a", "NVLink") == (2 + 1 + 4 + 3) * row
    assert comm.ledger.total_bytes("a", "InfiniBand") == (3 + 4 + 3 + 4 + 1 + 2 + 1 + 2) * row
    assert comm.ledger.total_bytes() == sum(p.rows.nbytes for p in send.values())
    assert comm.ledger.total_messages("a") == 16


def test_ledger_sees_a_dropped_row():
    """Bytes come from the array that is sent: one row less, one row's bytes less."""
    totals = []
    for rows in (9, 8):
        comm = Ledgered(SimCommunicator(2))
        send = {0: Parts(np.zeros((rows, 7), dtype=np.uint16), np.array([2, rows - 2])),
                1: Parts(np.zeros((0, 7), dtype=np.uint16), np.array([0, 0]))}  # fmt: skip
        comm.all_to_all_v(send, "dispatch")
        totals.append(comm.ledger.total_bytes("dispatch"))
    assert totals[0] - totals[1] == 14


def test_ledger_counts_every_row_of_low_latency_messages():
    comm = Ledgered(SimCommunicator(2))
    send = {r: Parts(np.zeros((5, 2), dtype=np.uint8), np.array([2, 3])) for r in range(2)}
    comm.all_to_all_v(send, "a", row_messages=True)
    assert comm.ledger.total_messages("a") == 10


def test_all_reduce_moves_what_a_ring_moves():
    """Reduce-scatter and all-gather: each rank sends 2 (R - 1) / R of the array, and keeps its own piece."""
    R, comm = 4, Ledgered(SimCommunicator(4, 2))
    comm.all_reduce({r: np.zeros(24, dtype=np.float32) for r in range(R)}, "gradients")
    crossing = comm.ledger.total_bytes("gradients") - comm.ledger.total_bytes("gradients", "local")
    assert crossing == R * 2 * (R - 1) * 96 // R


def test_broadcast_and_gather_count_each_receiver():
    comm = Ledgered(SimCommunicator(3))
    comm.broadcast(dict.fromkeys(range(3), np.zeros(5)), 1, "b")
    comm.all_gather({r: np.zeros(r + 1) for r in range(3)}, "g")
    assert comm.ledger.bytes_of_pair("b").tolist() == [[0, 0, 0], [40, 0, 40], [0, 0, 0]]
    assert comm.ledger.bytes_of_pair("g").tolist() == [[0, 8, 8], [16, 0, 16], [24, 24, 0]]


def test_ledger_csv_holds_every_row(tmp_path):
    comm = Ledgered(SimCommunicator(4, 2))
    comm.all_to_all_v(uneven(4), "dispatch")
    comm.send(np.zeros(3), 0, 3, 0, "stage")
    comm.ledger.add_seconds("dispatch", 2, 0.125)
    comm.ledger.write_csv(tmp_path / "ledger.csv")
    rows = read_ledger_csv(tmp_path / "ledger.csv")
    assert rows == list(comm.ledger.rows())
    assert rows[-2] == LedgerRow("stage", 0, 3, "InfiniBand", 1, 24)
    assert rows[-1] == LedgerRow("dispatch", 2, 2, "local", 0, 0, 0.125)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("text, said", [
    ("a,b\n", "does not begin with the columns"), ("", "does not begin"),
    ("operation,source,destination,link,messages,bytes,seconds\nx,0,1,NVLink,1\n", "line 2"),
    ("operation,source,destination,link,messages,bytes,seconds\nx,0,one,NVLink,1,2,0\n", "line 2"),
])  # fmt: skip
def test_a_file_that_is_no_ledger_is_refused(tmp_path, text, said):
    (tmp_path / "l.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        read_ledger_csv(tmp_path / "l.csv")


def test_gathered_ledger_is_the_ledger_when_one_process_hosts_all():
    comm = Ledgered(SimCommunicator(3))
    comm.all_to_all_v(uneven(3), "a")
    comm.ledger.add_seconds("a", 1, 2.0)
    assert list(comm.gathered().rows()) == list(comm.ledger.rows())
    comm.ledger.clear()
    assert not list(comm.ledger.rows())
