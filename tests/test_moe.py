"""DeepSeekMoE: what is dispatched comes back, wherever tokens go."""

import numpy as np
import pytest
from reference_model import V2_ROUTING, Reference, odd_config, odd_model

from minidsv3.autograd import Tensor, backward, no_grad, trace
from minidsv3.model.moe import Gate, LocalTokenDispatcher, MoE
from minidsv3.ops.loss import cross_entropy
from minidsv3.ops.routing import select_experts
from minidsv3.ops.shape import reshape

RNG = np.random.default_rng(43)
X = RNG.standard_normal((2, 7, 14))
E, K = 12, 4


def moe_of(dtype=np.float64, select=select_experts, **changes):
    cfg = odd_config(**changes)
    moe = MoE(cfg, select=select)
    moe.init_weights(np.random.default_rng(3), dtype, std=0.3)
    return moe


def always(*experts):
    """A selection rule that sends every token to the same experts."""
    return lambda scores, bias, **rule: np.tile(np.array(experts, dtype=np.int64), (len(scores), 1))


def outputs(moe, x=X):
    with no_grad():
        y, routing = moe(Tensor(x))
    return y.data, routing


def routes(T=14, seed=0):
    rng = np.random.default_rng(seed)
    return np.sort(np.argsort(rng.random((T, E)), axis=1)[:, :K], axis=1)


@pytest.mark.parametrize("changes", [{}, V2_ROUTING, dict(n_shared_experts=0), dict(n_shared_experts=2)])
def test_moe_equals_the_equations_in_loops(changes):
    model = odd_model(**changes)
    reference, name = Reference(model), "model.layers.1.mlp"
    expected = [[reference.mixture(name, x) for x in row] for row in X]
    np.testing.assert_allclose(outputs(model.layers[1].mlp)[0], expected, rtol=1e-11, atol=1e-12)


def test_dispatch_then_combine_with_weights_of_one_kth_returns_the_tokens():
    dispatcher, x = LocalTokenDispatcher(E), X.reshape(14, 14)
    weight = Tensor(np.full((14, K), 1 / K))
    rows, handle = dispatcher.dispatch(Tensor(x), routes(), weight)
    np.testing.assert_allclose(dispatcher.combine(rows, handle).data, x, rtol=1e-15)


def test_dispatch_sorts_rows_by_expert_and_keeps_tokens_in_order():
    topk_idx = routes()
    rows, handle = LocalTokenDispatcher(E).dispatch(Tensor(X.reshape(14, 14)), topk_idx, Tensor(np.ones((14, K))))
    expected = [t for e in range(E) for t in range(14) if e in topk_idx[t]]
    assert handle.token_of_row.tolist() == expected
    np.testing.assert_array_equal(rows.data, X.reshape(14, 14)[expected])


def test_dispatch_counts_every_row_once():
    topk_idx = routes()
    _, handle = LocalTokenDispatcher(E).dispatch(Tensor(X.reshape(14, 14)), topk_idx, Tensor(np.ones((14, K))))
    assert handle.rows_per_expert.tolist() == [int((topk_idx == e).sum()) for e in range(E)]
    assert sorted(handle.row_of_slot.ravel().tolist()) == list(range(14 * K))


@pytest.mark.parametrize("n_experts", [256, 257, 300])
def test_dispatch_sorts_more_experts_than_a_byte_holds(n_experts):
    topk_idx = np.array([[0, n_experts - 1], [1, n_experts - 1], [0, 1]])
    _, handle = LocalTokenDispatcher(n_experts).dispatch(Tensor(X[0, :3]), topk_idx, Tensor(np.ones((3, 2))))
    assert handle.token_of_row.tolist() == [0, 2, 1, 2, 0, 1]


def test_no_tokens_pass_the_dispatcher():
    dispatcher = LocalTokenDispatcher(E)
    rows, handle = dispatcher.dispatch(Tensor(X[0, :0]), routes()[:0], Tensor(np.ones((0, K))))
    assert rows.shape == (0, 14) and dispatcher.combine(rows, handle).shape == (0, 14)


@pytest.mark.parametrize("experts", [(0, 1, 2, 3), (8, 9, 10, 11), (2, 5, 7, 11)])
def test_empty_experts_change_nothing(experts):
    """Whatever the weights of an expert that got no token, the output is the same to the bit."""
    moe = moe_of(select=always(*experts))
    before, _ = outputs(moe)
    for e in set(range(E)) - set(experts):
        moe.experts.gate_up.data[e] = np.nan
        moe.experts.down.data[e] = np.nan
    np.testing.assert_array_equal(outputs(moe)[0], before)


def test_empty_experts_get_a_zero_gradient():
    moe = moe_of(select=always(2, 5, 7, 11))
    y, _ = moe(Tensor(X, requires_grad=True))
    backward(cross_entropy(y, np.zeros((2, 7), dtype=np.int64)))
    reached = [e for e in range(E) if moe.experts.down.grad[e].any()]
    assert reached == [2, 5, 7, 11] and not moe.experts.gate_up.grad[[0, 1, 3]].any()


def test_one_expert_may_get_every_token():
    moe = moe_of(
        select=always(6), num_experts_per_tok=1, n_shared_experts=0, norm_topk_prob=False, routed_scaling_factor=1.0
    )
    y, routing = outputs(moe)
    assert routing.load().tolist() == [0] * 6 + [14] + [0] * 5
    gate, up = np.split(X @ moe.experts.gate_up.data[6].T, 2, axis=-1)
    alone = (gate / (1 + np.exp(-gate)) * up) @ moe.experts.down.data[6].T
    score = 1 / (1 + np.exp(-X @ moe.gate.weight.data[6]))
    np.testing.assert_allclose(y, score[..., None] * alone, rtol=1e-12, atol=1e-14)


def test_load_counts_tokens_per_expert():
    _, routing = outputs(moe_of())
    assert routing.load().tolist() == [int((routing.topk_idx == e).sum()) for e in range(E)]
    assert routing.load().sum() == 14 * K


def test_shared_experts_see_every_token_unweighted():
    """With routed experts silenced, what is left is the shared FFN."""
    moe = moe_of()
    moe.experts.down.data[...] = 0
    with no_grad():
        alone = moe.shared_experts(Tensor(X)).data
    np.testing.assert_allclose(outputs(moe)[0], alone, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shared_experts_are_one_ffn_of_their_joint_width(count):
    assert moe_of(n_shared_experts=count).shared_experts.down_proj.weight.shape == (14, count * 11)


def test_without_shared_experts_there_are_no_weights_for_them():
    assert not [name for name, _ in moe_of(n_shared_experts=0).named_parameters() if "shared" in name]


def test_experts_are_listed_one_by_one_in_their_order():
    names = [name for name, _ in moe_of().experts.named_parameters()]
    assert names[:4] == ["0.gate_proj.weight", "0.up_proj.weight", "1.gate_proj.weight", "1.up_proj.weight"]
    assert names[24:26] == ["0.down_proj.weight", "1.down_proj.weight"] and len(names) == 36


def test_listed_expert_is_a_view_of_the_packed_array():
    experts = moe_of().experts
    parts = dict(experts.named_parameters())
    parts["5.up_proj.weight"].data[...] = 7
    assert (experts.gate_up.data[5, 11:] == 7).all() and not (experts.gate_up.data[5, :11] == 7).any()
    assert parts["5.down_proj.weight"].data.base is experts.down.data


def test_moe_does_not_depend_on_the_order_of_tokens():
    """Nothing is dropped and tokens do not meet: permuting tokens permutes outputs."""
    moe, order = moe_of(), RNG.permutation(7)
    np.testing.assert_allclose(outputs(moe, X[:, order])[0], outputs(moe)[0][:, order], rtol=1e-12, atol=1e-14)


def test_experts_run_as_one_grouped_op_over_sorted_rows():
    """Pitfall 23: no masked pass over all tokens for each expert."""
    with trace() as records:
        outputs(moe_of())
    grouped = [r for r in records if r.name == "GroupedLinearFunction"]
    assert [r.shapes[0] for r in grouped] == [(14 * K, 14), (14 * K, 11)]
    assert sum(r.flops for r in grouped) == 2 * 14 * K * 3 * 14 * 11


def test_gate_asks_the_given_rule_with_the_configs_groups():
    seen = {}

    def rule(scores, bias, **constants):
        seen.update(constants, shape=scores.shape, bias=bias)
        return select_experts(scores, bias, **constants)

    outputs(moe_of(select=rule))
    bias = seen.pop("bias")
    assert seen == dict(top_k=4, n_group=4, topk_group=2, method="noaux_tc", shape=(14, 12)) and not bias.any()


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_v2_gate_has_no_bias(method):
    gate = Gate(odd_config(topk_method=method, scoring_func="softmax"))
    assert gate.e_score_correction_bias is None and not list(gate.named_buffers())


def test_bias_moves_tokens_without_touching_scores():
    moe = moe_of()
    _, before = outputs(moe)
    moe.gate.e_score_correction_bias[:3] = 5  # the first group, beyond any sigmoid
    _, after = outputs(moe)
    np.testing.assert_array_equal(after.scores.data, before.scores.data)
    assert (after.load()[:3] == 14).all() and not (before.load()[:3] == 14).all()


def test_gate_gets_gradients_through_the_weights():
    moe = moe_of()
    y, _ = moe(Tensor(X))
    backward(cross_entropy(reshape(y, (14, 14)), np.arange(14)))
    assert (np.abs(moe.gate.weight.grad).max(axis=1) > 0).sum() == np.count_nonzero(outputs(moe)[1].load())
