"""A training step on ranks: the numbers of a plain step, whatever computes them, and the same files."""

import json

import numpy as np
import pytest
from small_runs import batch, digests, lines, model_config, new_model, train_config, write_text

from minidsv3.autograd import Parameter, backward
from minidsv3.commands import main
from minidsv3.config import ModelConfig, replace_settings
from minidsv3.generation.load import load_run
from minidsv3.model.moe import LocalTokenDispatcher
from minidsv3.model.transformer import Transformer
from minidsv3.parallel.comm import SimCommunicator
from minidsv3.parallel.dispatcher import AllToAllTokenDispatcher
from minidsv3.parallel.ledger import Ledgered, read_ledger_csv
from minidsv3.parallel.ranks import Ranks
from minidsv3.parallel.wire import EXACT, NORMAL
from minidsv3.train import trainer as module
from minidsv3.train.optim import FlatParameters
from minidsv3.train.spread import Alone, OnRanks
from minidsv3.train.step import cut, train_step
from minidsv3.train.trainer import Trainer


def on_ranks(R, E, gpus_per_node=None, wire=EXACT, workers=1):
    ranks = Ranks(Ledgered(SimCommunicator(R, gpus_per_node)), workers)
    return OnRanks(ranks, AllToAllTokenDispatcher(ranks, E, wire, alone=LocalTokenDispatcher(E)), {"ranks": R})


class Steps:
    """A model and its optimizer, spread or not."""

    def __init__(self, spread, cfg, config, dtype=np.float32):
        self.spread, self.cfg = spread, cfg
        self.model = Transformer(config, dispatcher=spread.dispatcher)
        self.model.init_weights(np.random.default_rng(0), dtype)
        self.optimizer, self.gradients = spread.prepare(self.model, cfg)

    def step(self, step=1):
        shards = cut(*batch(self.cfg.batch_size, self.cfg.seq_len, seed=step), self.cfg.shards)
        run, add_up = self.spread.step_run(map), self.spread.add_up
        return train_step(self.model, self.optimizer, self.gradients, shards, self.cfg, step, run, add_up)

    def gradient(self):
        """The summed gradient of every tensor, under its name."""
        total = self.spread.total if isinstance(self.spread, OnRanks) else self.gradients[0].data
        views = self.optimizer.flat.views(total)
        found = {}
        for name, child in self.model.named_modules():
            found |= {
                f"{name}.{key}": views[value] for key, value in vars(child).items() if isinstance(value, Parameter)
            }
        return found

    def weights(self):
        return {name: p.data.copy() for name, p in self.model.named_parameters()}


NANO_64 = dict(n_routed_experts=64, num_experts_per_tok=4, n_group=8, topk_group=4)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-6), (np.float64, 1e-12)])
@pytest.mark.parametrize("R, gpus", [(1, 1), (2, 1), (8, 4), (64, 8)])
def test_loss_and_every_gradient_are_those_of_a_plain_step(R, gpus, dtype, tolerance):
    if R == 64:
        config = replace_settings(ModelConfig.preset("nano"), train_config(), NANO_64)[0]
        cfg = train_config(shards=64, batch_size=64, seq_len=8)
    else:
        config, cfg = model_config(), train_config(shards=R, batch_size=8)
    spread = Steps(on_ranks(R, config.n_routed_experts, gpus), cfg, config, dtype)
    plain = Transformer(config)
    plain.init_weights(np.random.default_rng(0), dtype)
    into = FlatParameters(plain).new_gradient().into
    into.begin()
    losses = []
    for shard in cut(*batch(cfg.batch_size, cfg.seq_len, seed=1), R):  # one after the other, all into one buffer
        losses.append(plain.loss(*shard, mtp_weight=0.3, balance_weight=cfg.balance_weight))
        backward(losses[-1].total, into)
    got = spread.step()
    for name, values in zip(("loss", "main_loss", "mtp_loss", "balance_loss"), zip(*(one[:4] for one in losses))):
        assert getattr(got, name) == pytest.approx(np.mean([float(v) for v in values]), rel=tolerance), name
    np.testing.assert_array_equal(got.expert_load, sum(one.expert_load for one in losses))
    ours = spread.gradient()
    norms = []
    for p, gradient in into.items():
        name = next(f"{m.name}.{key}" for _, m in plain.named_modules() for key, value in vars(m).items() if value is p)
        error = np.linalg.norm(ours[name] - gradient) / np.linalg.norm(gradient)
        norms.append(np.linalg.norm(gradient))
        assert error <= tolerance, (name, error)
    assert got.grad_norm == pytest.approx(np.linalg.norm(norms) / R, rel=tolerance)


@pytest.mark.parametrize("wire", [EXACT, NORMAL])
def test_number_of_workers_changes_no_bit(wire):
    results = []
    for workers in (1, 2):
        cfg = train_config(shards=4, batch_size=8)
        steps = Steps(on_ranks(4, 8, 2, wire, workers), cfg, model_config())
        for step in (1, 2, 3):
            result = steps.step(step)
        results.append((result[:6], steps.weights()))
    assert results[0][0] == results[1][0]
    for name, weight in results[0][1].items():
        np.testing.assert_array_equal(results[1][1][name], weight, err_msg=name)


def test_recomputation_changes_no_bit():
    weights = []
    for recompute in (False, True):
        steps = Steps(on_ranks(4, 8, 2), train_config(shards=4, recompute=recompute), model_config())
        steps.step()
        weights.append(steps.weights())
    for name, weight in weights[0].items():
        np.testing.assert_array_equal(weights[1][name], weight, err_msg=name)


def test_biases_move_by_the_load_of_the_whole_batch():
    config, cfg = model_config(), train_config(shards=4)
    plain, spread = Steps(Alone(), cfg, config), Steps(on_ranks(4, 8, 2), cfg, config)
    plain.step(), spread.step()
    for (name, ours), (_, expected) in zip(spread.model.named_buffers(), plain.model.named_buffers()):
        np.testing.assert_array_equal(ours, expected, err_msg=name)
        assert np.abs(expected).max() > 0


def test_shared_gradients_travel_and_expert_gradients_do_not():
    R = 4
    steps = Steps(on_ranks(R, 8, 2), train_config(shards=R), model_config())
    steps.step()
    ledger = steps.spread.comm.ledger
    shared = sum(p.data.size for name, p in steps.model.named_parameters() if ".mlp.experts." not in name)
    for operation in ("gradients", "weights"):  # a reduce-scatter, and later an all-gather
        crossing = ledger.total_bytes(operation) - ledger.total_bytes(operation, "local")
        assert crossing == (R - 1) * shared * 4


def test_every_number_of_the_optimizer_has_one_owner():
    spread = on_ranks(4, 8, 2)
    steps = Steps(spread, train_config(shards=4), model_config())
    owners = np.zeros(steps.optimizer.flat.data.size, dtype=int)
    for rank in range(4):
        for a, b in spread._owned_by(rank):
            owners[a:b] += 1
    assert (owners == 1).all()


def test_shards_must_be_one_a_rank():
    with pytest.raises(ValueError, match="shards=2 is not ranks=4"):
        on_ranks(4, 8).prepare(new_model(), train_config(shards=2))


@pytest.fixture
def text(tmp_path):
    return str(write_text(tmp_path / "text.txt"))


def train(out, text, R=None, stop_at=None, changes=None, **options):
    """Train the small run, up to step `stop_at` if given."""
    cfg = train_config(data=text, shards=R or 2, **(changes or {}))
    t = Trainer(
        model_config(), cfg, out, report=lambda said: None, progress=False, spread=on_ranks(R, 8, 1) if R else None,
        on_step=lambda t, step: setattr(t, "_stop", step == stop_at), **options,
    )  # fmt: skip
    assert t.run() == (stop_at is None)
    return t


def test_files_of_a_run_are_the_same_whatever_the_ranks(tmp_path, text, monkeypatch):
    monkeypatch.setattr(module, "sgemm_gflops", lambda workers: 100.0)
    for R in (None, 2, 4):
        train(tmp_path / f"{R}", text, R)
    names = [set(digests(tmp_path / f"{R}")) for R in (None, 2, 4)]
    assert names[0] == names[1] == names[2]
    metrics = [lines(tmp_path / f"{R}" / "metrics.jsonl") for R in (None, 2, 4)]
    for plain, two, four in zip(*metrics):  # two shards of two sequences, and four of one: equal but for rounding
        assert two["loss"] == pytest.approx(plain["loss"], rel=1e-5) == pytest.approx(four["loss"], rel=1e-4)


@pytest.mark.parametrize("first, then", [(4, 2), (2, None), (None, 4)])
def test_run_resumes_with_another_number_of_ranks(tmp_path, text, monkeypatch, first, then):
    monkeypatch.setattr(module, "sgemm_gflops", lambda workers: 100.0)
    train(tmp_path / "run", text, first, stop_at=4)
    t = train(tmp_path / "run", text, then, resume=True)
    assert t.step == 6 and [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 7))


def test_run_on_ranks_resumes_to_the_same_bits(tmp_path, text, monkeypatch):
    monkeypatch.setattr(module, "sgemm_gflops", lambda workers: 100.0)
    train(tmp_path / "whole", text, 4, changes=dict(moments_dtype="bfloat16"))
    train(tmp_path / "parts", text, 4, stop_at=3, changes=dict(moments_dtype="bfloat16"))
    train(tmp_path / "parts", text, 4, changes=dict(moments_dtype="bfloat16"), resume=True)
    assert digests(tmp_path / "whole" / "final") == digests(tmp_path / "parts" / "final")


def test_command_trains_on_ranks_and_leaves_the_ledger(tmp_path, text, capsys):
    arguments = ["train", "--preset", "nano", "--data", text, "--out", str(tmp_path / "run"), "--steps", "2", "--quiet",
                 "--ranks", "4", "--gpus-per-node", "2", "--wire", "normal", "--trace-routing", "1",
                 "--set", "seq_len=16", "batch_size=4", "eval_every=1"]  # fmt: skip
    assert main(arguments) == 0
    assert "done:" in capsys.readouterr().out
    rows = read_ledger_csv(tmp_path / "run" / "ledger.csv")
    assert {"dispatch", "combine", "dispatch backward", "combine backward", "gradients", "weights"} <= {
        row.operation for row in rows
    }
    described = json.loads((tmp_path / "run" / "train.json").read_text(encoding="utf-8"))
    assert described["ranks"] == {"ranks": 4, "gpus_per_node": 2, "comm": "sim", "wire": "normal"}
    assert described["train"]["shards"] == 4
    assert load_run(tmp_path / "run").model.config.hidden_size == 64
