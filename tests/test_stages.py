"""A Transformer in stages computes what it computes whole, under every schedule."""

import numpy as np
import pytest

from minidsv3.autograd import backward
from minidsv3.config import ModelConfig
from minidsv3.model.stages import cut, layers_of_stage
from minidsv3.model.transformer import Transformer
from minidsv3.parallel.comm import SimCommunicator
from minidsv3.parallel.ledger import Ledgered
from minidsv3.parallel.pipeline import GroupedDispatcher, run
from minidsv3.parallel.ranks import Ranks
from minidsv3.parallel.schedules import build

B, S = 2, 9


def nano(**changes):
    model = Transformer(ModelConfig.preset("nano", **changes) if changes else ModelConfig.preset("nano"))
    model.init_weights(np.random.default_rng(0), np.float64)
    return model


def data(chunks):
    rng = np.random.default_rng(1)
    return [tuple(rng.integers(0, 257, (B, S)) for _ in range(2)) for _ in range(chunks)]


@pytest.mark.parametrize(
    "name, ranks, chunks", [("1f1b", 4, 5), ("zb1p", 3, 4), ("dualpipe", 4, 8), ("dualpipev", 2, 5)]
)
def test_gradients_of_every_weight_are_those_of_the_whole_model(name, ranks, chunks):
    model, batches, schedule = nano(), data(chunks), build(name, ranks, chunks)
    losses = []
    for tokens, targets in batches:
        loss = model.loss(tokens, targets, mtp_weight=0.25, balance_weight=0.01).total
        losses.append(float(loss))
        backward(loss)
    expected = {name: p.grad.copy() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.zero_grad()
    stages = cut(model, schedule.stages, mtp_weight=0.25, balance_weight=0.01)
    result = run(schedule, stages, [(tokens, targets, tokens) for tokens, targets in batches])
    assert result.losses == losses
    for weight, p in model.named_parameters():
        if name == "dualpipe" or weight == "model.embed_tokens.weight":  # sums of two copies; of two stages
            assert np.linalg.norm(p.grad - expected[weight]) <= 1e-12 * np.linalg.norm(expected[weight]), weight
        else:
            assert np.array_equal(p.grad, expected[weight]), weight


def test_every_layer_is_on_one_stage_and_sizes_differ_by_one():
    for layers, stages in ((61, 16), (4, 4), (7, 3), (5, 1)):
        cuts = layers_of_stage(layers, stages)
        assert [i for piece in cuts for i in piece] == list(range(layers))
        assert max(map(len, cuts)) - min(map(len, cuts)) <= 1


def test_stages_share_the_weights_of_the_model_and_list_each_once():
    model = nano()
    found = [p for stage in cut(model, 4) for p in stage.parameters()]
    assert set(map(id, found)) == set(map(id, model.parameters()))
    assert len(found) == len(list(model.parameters())) + 1  # the embedding serves the first stage and the MTP module


@pytest.mark.parametrize("stages", [0, 5])
def test_stages_without_a_layer_are_refused(stages):
    with pytest.raises(ValueError, match="num_hidden_layers=4"):
        cut(nano(), stages)


@pytest.mark.parametrize("name, chunks", [("1f1b", 3), ("dualpipe", 8)])
def test_pipeline_of_four_with_experts_on_four_ranks_each_trains_as_the_whole_model(name, chunks):
    """PP 4 x EP 4: sixteen ranks, each with its stage, its quarter of the experts and its own micro-batches."""
    ranks = Ranks(Ledgered(SimCommunicator(16, gpus_per_node=4)))
    plain, spread = nano(), Transformer(ModelConfig.preset("nano"), dispatcher=GroupedDispatcher(ranks, 16, 4))
    spread.init_weights(np.random.default_rng(0), np.float64)
    losses, batches = [], data(4 * chunks)
    for tokens, targets in batches:
        loss = plain.loss(tokens, targets).total
        losses.append(float(loss))
        backward(loss)
    result = run(build(name, 4, chunks), cut(spread, 4), [(x, y, x) for x, y in batches], ranks, replicas=4)
    assert result.losses == pytest.approx(losses, rel=1e-12)
    assert max(result.peak_live) == {"1f1b": 3, "dualpipe": 5}[name]  # 1F1B: no more chunks than there are
    for (weight, got), (_, want) in zip(spread.named_parameters(), plain.named_parameters()):
        assert np.linalg.norm(got.grad - want.grad) <= 1e-12 * np.linalg.norm(want.grad), weight
    assert ranks.comm.ledger.total_bytes("dispatch") > 0
    assert ranks.comm.ledger.total_bytes("dispatch", "InfiniBand") == 0  # a group is a node
    assert ranks.comm.ledger.total_bytes("pipeline activations", "NVLink") == 0
