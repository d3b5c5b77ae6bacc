"""Faults on ranks: one clear error everywhere, no deadlock, and a run that goes on from its last checkpoint."""

import numpy as np
import pytest
from small_runs import digests, model_config, train_config, write_text

from minidsv3.commands import main
from minidsv3.model.moe import LocalTokenDispatcher
from minidsv3.parallel.comm import Parts, RankError, SimCommunicator
from minidsv3.parallel.dispatcher import AllToAllTokenDispatcher
from minidsv3.parallel.faults import Fault, Faulty
from minidsv3.parallel.ledger import Ledgered
from minidsv3.parallel.ranks import Ranks
from minidsv3.train import trainer as module
from minidsv3.train.checkpoint import checkpoints
from minidsv3.train.spread import OnRanks
from minidsv3.train.trainer import Trainer

R = 3
CALLS = {
    "all to all": lambda c: c.all_to_all_v({r: Parts(np.zeros((3, 2)), np.ones(3, dtype=int)) for r in range(R)}, "op"),
    "all gather": lambda c: c.all_gather({r: np.zeros(2) for r in range(R)}, "op"),
    "broadcast": lambda c: c.broadcast(dict.fromkeys(range(R), np.zeros(2)), 1, "op"),
    "all reduce": lambda c: c.all_reduce({r: np.zeros(5) for r in range(R)}, "op"),
    "send": lambda c: c.send(np.zeros(2), 0, 2, 0, "op"),
}
SAID = {
    "dies": "rank 2 died in op",
    "hangs": "rank 2 did not come to op within 7 s",
    "corrupts": "rank 2 sent .* in op",
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", SAID)
def test_fault_at_any_collective_names_rank_and_operation(kind, call):
    comm = Faulty(Ledgered(SimCommunicator(R)), [Fault(kind, 2, call=1)], timeout=7)
    with pytest.raises(RankError, match=SAID[kind]):
        CALLS[call](comm)


def test_fault_at_a_barrier():
    with pytest.raises(RankError, match="rank 0 died in barrier"):
        Faulty(SimCommunicator(R), [Fault("dies", 0)]).barrier()


def test_fault_strikes_at_its_call_of_its_operation():
    comm = Faulty(SimCommunicator(R), [Fault("corrupts", 1, call=2, operation="b")])
    values = {r: np.zeros(2) for r in range(R)}
    for operation in ("a", "b", "a", "a"):
        comm.all_gather(values, operation)
    with pytest.raises(RankError, match="rank 1"):
        comm.all_gather(values, "b")
    comm.all_gather(values, "b")  # a corrupted message was one message


def test_a_dead_rank_stays_away():
    comm = Faulty(SimCommunicator(R), [Fault("dies", 1)])
    for operation in ("dispatch", "combine"):
        with pytest.raises(RankError, match="rank 1 died in dispatch"):
            comm.all_gather({r: np.zeros(2) for r in range(R)}, operation)


@pytest.mark.parametrize("kind", ["dies", "hangs", "corrupts"])
def test_every_survivor_raises_the_same_error(kind):
    ranks, told = Ranks(Faulty(SimCommunicator(R), [Fault(kind, 1, call=2, operation="op")])), {}

    def program(rank):
        try:
            for _ in range(3):
                ranks.meet(None, lambda values: CALLS["all to all"](ranks.comm), "op")
        except RankError as error:
            told[rank] = str(error)
            raise

    with pytest.raises(RankError, match=r"rank 1 .* op"):
        ranks.run(program)
    assert len(told) == R and len(set(told.values())) == 1


def test_straggler_adds_seconds_and_changes_no_number():
    results = []
    for faults in ([], [Fault("straggles", 1, operation="op", seconds=0.25), Fault("straggles", 1, 2, "op", 0.5)]):
        ledgered = Ledgered(SimCommunicator(R))
        comm = Faulty(ledgered, faults)
        values = {r: np.full(4, 1.5 * r, dtype=np.float32) for r in range(R)}
        sums = [comm.all_reduce(values, "op")[0].tolist() for _ in range(2)]
        traffic = [row for row in ledgered.ledger.rows() if row.messages]
        late = [(row.source, row.operation, row.seconds) for row in ledgered.ledger.rows() if row.seconds]
        results.append((sums, traffic))
    assert results[0] == results[1] and late == [(1, "op", 0.75)]


@pytest.mark.parametrize("text, said", [
    ("sleeps:1:2", "kind='sleeps'"), ("dies:1", "KIND:RANK:CALL"), ("dies:x:1", "KIND:RANK:CALL"),
    ("dies:-1:1", "rank=-1"), ("dies:1:0", "call=0"),
])  # fmt: skip
def test_text_that_is_no_fault_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        Fault.parse(text)


def test_text_of_a_fault():
    assert Fault.parse("straggles:3:2:dispatch:0.5") == Fault("straggles", 3, 2, "dispatch", 0.5)
    assert Fault.parse("dies:0:7") == Fault("dies", 0, 7)


def spread(R, faults=()):
    ranks = Ranks(Faulty(Ledgered(SimCommunicator(R, 2)), faults))
    return OnRanks(ranks, AllToAllTokenDispatcher(ranks, 8, alone=LocalTokenDispatcher(8)), {"ranks": R})


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A function that trains in one folder."""
    monkeypatch.setattr(module, "sgemm_gflops", lambda workers: 100.0)
    text = str(write_text(tmp_path / "text.txt"))

    def run(R, faults=(), **options):
        cfg = train_config(data=text, shards=R)
        said = []
        t = Trainer(
            model_config(),
            cfg,
            tmp_path / "run",
            report=said.append,
            progress=False,
            spread=spread(R, faults),
            **options,
        )
        return t.run(), said

    return run


def test_run_resumes_on_fewer_ranks_after_a_death(trained, tmp_path):
    with pytest.raises(ValueError, match=r"rank 3 died in gradients; the last good checkpoint is .*step_00000004"):
        trained(4, [Fault("dies", 3, call=5, operation="gradients")])
    before = digests(checkpoints(tmp_path / "run" / "checkpoints")[-1])
    done, said = trained(2, resume=True)
    assert done and "resuming after step 4 of 6" in said
    assert "shards=2 instead of 4: equal but for rounding" in said
    assert digests(tmp_path / "run" / "checkpoints" / "step_00000004") == before
    assert (tmp_path / "run" / "final" / "config.json").exists()


def test_command_ends_with_one_line_and_status_2(tmp_path, capsys):
    text = write_text(tmp_path / "text.txt")
    arguments = ["train", "--preset", "nano", "--data", str(text), "--out", str(tmp_path / "run"), "--steps", "2",
                 "--quiet", "--ranks", "4", "--gpus-per-node", "2", "--fault", "hangs:2:1:combine", "--timeout", "3",
                 "--set", "seq_len=16", "batch_size=4"]  # fmt: skip
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "rank 2 did not come to combine within 3 s; there is no checkpoint yet" in said
    assert said.count("\n") == 1 and "Traceback" not in said
