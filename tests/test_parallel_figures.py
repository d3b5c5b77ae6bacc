"""Figures of expert parallelism say what their data says."""

import numpy as np
import pytest

from minidsv3.parallel.comm import Parts, SimCommunicator
from minidsv3.parallel.figures import load_of_gpus, node_limits, traffic_matrix
from minidsv3.parallel.ledger import Ledgered
from minidsv3.plots import description, new_figure


@pytest.fixture
def ax():
    return new_figure()[1][0]


def test_traffic_matrix_counts_the_partners_of_a_gpu(ax):
    nbytes = np.zeros((6, 6), dtype=np.int64)
    for s in range(6):
        for d in range(6):
            if s // 3 == d // 3 or s % 3 == d % 3:
                nbytes[s, d] = 2_500_000
    assert traffic_matrix(ax, nbytes) is ax
    assert ax.get_title(loc="left").replace("\n", " ").startswith("A GPU exchanges rows with 3 of the 5 others")
    assert "The busiest pair sends 2.5 MB" in description(ax)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("to rank", "from rank")


def test_traffic_matrix_of_everybody_with_everybody(ax):
    comm = Ledgered(SimCommunicator(3))
    comm.all_to_all_v({r: Parts(np.zeros((3, 4)), np.ones(3, dtype=int)) for r in range(3)}, "x")
    assert "all 2 others" in traffic_matrix(ax, comm.ledger.bytes_of_pair("x")).get_title(loc="left")


def test_load_states_the_peaks_over_the_mean(ax):
    load_of_gpus(ax, np.array([8.0, 2.0, 1.0, 1.0]), np.array([3.0, 3.0, 3.0, 3.0]))
    assert "from 2.67 to 1.00 times the mean load" in description(ax)
    busiest_first = ax.lines[0].get_ydata()
    assert (np.diff(busiest_first) <= 0).all() and busiest_first.mean() == pytest.approx(1)


def test_node_limits_states_the_number_without_a_limit(ax):
    node_limits(ax, np.arange(1, 5), np.array([1.0, 1.9, 2.5, 2.75]), np.array([2.0, 3.0, 3.5, 3.6]))
    assert "2.75 nodes, with M = 2 to 1.90" in description(ax)
