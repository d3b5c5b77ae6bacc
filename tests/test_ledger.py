"""The ledger: what it counts of which link, and its file."""

import numpy as np
import pytest
from many_ranks import uneven_parts

from minidsv3.parallel.comm import Parts, SimCommunicator
from minidsv3.parallel.ledger import Ledgered, LedgerRow, read_ledger_csv

RNG = np.random.default_rng(5)


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
    comm.all_to_all_v(uneven_parts(4), "dispatch")
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
    comm.all_to_all_v(uneven_parts(3), "a")
    comm.ledger.add_seconds("a", 1, 2.0)
    assert list(comm.gathered().rows()) == list(comm.ledger.rows())
    comm.ledger.clear()
    assert not list(comm.ledger.rows())
