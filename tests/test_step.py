"""One training step: who computes a shard never changes a bit, and the mathematics is that of the loss's gradient."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from small_runs import Stepping, batch, model_config, train_config

from minidsv3.autograd import backward, observing
from minidsv3.ops.plain import using_plain_ops
from minidsv3.train import step as step_module
from minidsv3.train.balance import update_bias
from minidsv3.train.machine import worker_pool
from minidsv3.train.schedule import learning_rate
from minidsv3.train.step import NonFiniteError, cut, gates, train_step


def bits(s):
    """Every number that a step leaves behind."""
    biases = b"".join(gate.e_score_correction_bias.tobytes() for gate in gates(s.model))
    return s.flat.data.tobytes() + s.optimizer.exp_avg.tobytes() + s.optimizer.exp_avg_sq.tobytes() + biases


def after(cfg, steps=3, workers=1, config=None, dtype=np.float32):
    """The state and the results after some steps."""
    s = Stepping(cfg, config, dtype)
    with worker_pool(workers) as run:
        results = [train_step(*s.arguments(t), run) for t in range(1, steps + 1)]
    return s, results


def losses(results):
    return [value for result in results for value in result[:6]]


def expected_gradient(s, step=1):
    """Mean over the shards of the plain gradient, float64 sums: {parameter: array}."""
    total = {p: np.zeros(p.shape) for p in s.model.parameters()}
    shards = s.arguments(step)[3]
    for shard in shards:
        flat = s.flat.new_gradient()
        flat.into.begin()
        backward(s.model.loss(*shard, mtp_weight=0.3, balance_weight=s.cfg.balance_weight).total, flat.into)
        flat.into.finish()
        for p, g in flat.into.items():
            total[p] += g / len(shards)
    return total


@pytest.mark.parametrize("shards", [2, 4])
def test_train_step_workers_change_no_bit_of_the_weights(shards):
    cfg = train_config(shards=shards)
    assert bits(after(cfg, workers=1)[0]) == bits(after(cfg, workers=2)[0])


def test_train_step_workers_change_no_bit_of_the_losses():
    cfg = train_config()
    assert losses(after(cfg, workers=1)[1]) == losses(after(cfg, workers=2)[1])


def test_train_step_same_seed_same_bits():
    assert bits(after(train_config())[0]) == bits(after(train_config())[0])


def test_train_step_order_in_which_shards_are_computed_changes_no_bit():
    def backwards(function, items):
        items = list(items)
        done = {i: function(item) for i, item in reversed(list(enumerate(items)))}
        return [done[i] for i in range(len(items))]

    one, other = Stepping(train_config(shards=4)), Stepping(train_config(shards=4))
    train_step(*one.arguments())
    train_step(*other.arguments(), backwards)
    assert bits(one) == bits(other)


def test_train_step_sums_shards_in_their_order(monkeypatch):
    s = Stepping(train_config(shards=4))
    handed = []
    monkeypatch.setattr(step_module, "sum_gradients", lambda g, run: handed.append(g) or 1.0)
    train_step(*s.arguments())
    assert [id(array) for array in handed[0]] == [id(gradient.data) for gradient in s.gradients]


def test_train_step_gradient_is_the_mean_over_shards(monkeypatch):
    s = Stepping(train_config(grad_clip=1e9), dtype=np.float64)
    expected = expected_gradient(s)
    seen = {}
    monkeypatch.setattr(s.optimizer, "step", lambda g, step, lr, scale, run: seen.update(gradient=g * scale))
    train_step(*s.arguments())
    for p, view in s.flat.views(seen["gradient"]).items():
        np.testing.assert_allclose(view, expected[p], rtol=1e-10, atol=1e-14)  # float64, sums in another order


def test_train_step_gradient_norm_is_that_of_the_mean():
    s = Stepping(train_config(), dtype=np.float64)
    norm = math.sqrt(sum(float((g**2).sum()) for g in expected_gradient(s).values()))
    assert train_step(*s.arguments()).grad_norm == pytest.approx(norm, rel=1e-10)  # float64, sums in another order


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_train_step_gradient_accumulation_equals_the_whole_batch(shards):
    """Cutting the batch changes only the rounding: every shard has as many valid targets."""
    whole, cut_up = (
        after(train_config(shards=n), steps=1, dtype=np.float64, config=model_config())[0].flat.data
        for n in (1, shards)
    )
    # Adam's first step is lr * sign(gradient): a gradient at rounding level may differ more than rounding
    np.testing.assert_allclose(whole, cut_up, atol=1e-6 * learning_rate(train_config(), 1))


@pytest.mark.parametrize("grad_clip", [0.01, 1e9])
def test_train_step_clips_the_norm(monkeypatch, grad_clip):
    s = Stepping(train_config(grad_clip=grad_clip))
    seen = {}
    monkeypatch.setattr(s.optimizer, "step", lambda g, step, lr, scale, run: seen.update(g=g, scale=scale))
    result = train_step(*s.arguments())
    norm = float(np.linalg.norm(seen["g"].astype(np.float64) * seen["scale"]))
    assert norm == pytest.approx(min(grad_clip, result.grad_norm), rel=1e-5)  # float32 sums over 1e4 numbers


def test_train_step_reports_the_learning_rate_that_it_used(monkeypatch):
    s = Stepping(train_config())
    used = []
    monkeypatch.setattr(s.optimizer, "step", lambda g, step, lr, scale, run: used.append((step, lr)))
    result = train_step(*s.arguments(step=2))
    assert used == [(2, result.lr)] and result.lr == learning_rate(s.cfg, 2)


def test_train_step_total_loss_is_the_weighted_sum():
    result = after(train_config(mtp_weight=0.7, mtp_phases=[["constant", 1.0, 1.0]], balance_weight=0.01), 1)[1][0]
    expected = result.main_loss + 0.7 * result.mtp_loss + 0.01 * result.balance_loss
    assert result.loss == pytest.approx(expected, rel=1e-6)  # float32 sum of three numbers


def test_train_step_losses_are_those_of_the_weights_before_it():
    s = Stepping(train_config())
    means = np.mean([[float(x) for x in s.model.loss(*shard)[1:4]] for shard in s.arguments()[3]], axis=0)
    result = train_step(*s.arguments())
    assert [result.main_loss, result.mtp_loss, result.balance_loss] == pytest.approx(means.tolist(), rel=1e-12)


def test_train_step_load_counts_the_whole_batch():
    result = after(train_config(), 1)[1][0]
    cfg, config = train_config(), model_config()
    tokens = cfg.batch_size * cfg.seq_len
    in_mtp = cfg.batch_size * (cfg.seq_len - 1)
    expected = [tokens * config.num_experts_per_tok, in_mtp * config.num_experts_per_tok]
    assert result.expert_load.sum(axis=1).tolist() == expected


def test_train_step_moves_the_bias_by_the_whole_batchs_load():
    s, (result,) = after(train_config(bias_update_speed=0.25), 1)
    for gate, load in zip(gates(s.model), result.expert_load):
        expected = np.zeros(len(load), dtype=np.float32)
        update_bias(expected, load, 0.25)
        np.testing.assert_array_equal(gate.e_score_correction_bias, expected)


def test_train_step_moves_the_bias_after_the_forward_pass():
    """A bias that decides everything changes the load of the next step, not of this one."""
    slow, fast = (after(train_config(bias_update_speed=speed), 2)[1] for speed in (0.0, 50.0))
    assert slow[0].expert_load.tolist() == fast[0].expert_load.tolist()
    assert slow[1].expert_load.tolist() != fast[1].expert_load.tolist()


def test_train_step_without_balance_bias_works():
    config = model_config(topk_method="group_limited_greedy", scoring_func="softmax", model_type="deepseek_v2")
    s = after(train_config(), 1, config=config)[0]
    assert all(gate.e_score_correction_bias is None for gate in gates(s.model))


def test_train_step_without_experts_has_no_load():
    config = model_config(first_k_dense_replace=2, num_nextn_predict_layers=0)
    assert after(train_config(), 1, config=config)[1][0].expert_load.shape == (0, config.n_routed_experts)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_train_step_not_finite_changes_nothing(bad):
    s = Stepping(train_config())
    train_step(*s.arguments(1))
    s.model.layers[0].mlp.down_proj.weight.data[1, 2] = bad
    before = bits(s)
    with pytest.raises(NonFiniteError, match=r"^step 2: loss nan"):
        train_step(*s.arguments(2))
    assert bits(s) == before


def test_train_step_not_finite_gradient_alone_changes_nothing(monkeypatch):
    s = Stepping(train_config())
    before = bits(s)
    monkeypatch.setattr(step_module, "sum_gradients", lambda gradients, run: math.inf)
    with pytest.raises(NonFiniteError, match="gradient norm inf"):
        train_step(*s.arguments())
    assert bits(s) == before


def test_train_step_goes_on_after_the_cause_is_mended():
    s, untouched = Stepping(train_config()), Stepping(train_config())
    weight = s.model.norm.weight.data
    weight[0] = np.nan
    with pytest.raises(NonFiniteError):
        train_step(*s.arguments())
    weight[0] = 1.0
    train_step(*s.arguments())
    train_step(*untouched.arguments())
    assert bits(s) == bits(untouched)


def test_train_step_recomputation_changes_no_bit():
    (kept, a), (again, b) = after(train_config()), after(train_config(recompute=True))
    assert bits(kept) == bits(again) and losses(a) == losses(b)


def test_train_step_with_plain_ops_is_equal_within_rounding():
    fast, fast_results = after(train_config(), 1, dtype=np.float64)
    with using_plain_ops():
        plain, plain_results = after(train_config(), 1, dtype=np.float64)
    assert losses(fast_results) == pytest.approx(losses(plain_results), rel=1e-10)  # float64 rounding
    np.testing.assert_allclose(plain.optimizer.exp_avg, fast.optimizer.exp_avg, rtol=1e-6, atol=1e-12)


def test_train_step_workers_use_the_callers_plain_ops():
    cfg = train_config()
    with using_plain_ops():
        assert bits(after(cfg, workers=1)[0]) == bits(after(cfg, workers=2)[0])


def test_train_step_is_float32_everywhere():
    s, found = Stepping(train_config()), []

    def look(event):
        found.extend((event.phase, type(event.op).__name__, str(t.dtype)) for t in (*event.inputs, *event.outputs)
                     if t.dtype.kind == "f" and t.dtype != np.float32)  # fmt: skip

    with observing(look):
        train_step(*s.arguments())
    assert found == []
    assert {a.dtype for a in (s.flat.data, s.gradients[0].data, s.optimizer.exp_avg)} == {np.dtype(np.float32)}


def test_train_step_learns():
    s = Stepping(train_config(learning_rate=0.01, warmup_steps=0, steps=100))
    first, *_, last = (train_step(*s.arguments(t, seed=1)[:-1], t) for t in range(1, 31))
    assert last.main_loss < 0.7 * first.main_loss  # the same batch over and over: it is learnt by heart


def test_train_step_an_exception_in_a_worker_comes_through():
    s = Stepping(train_config())
    arguments = list(s.arguments())
    arguments[3] = [(tokens, targets[:, 1:]) for tokens, targets in arguments[3]]
    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="targets have shape"):
        train_step(*arguments, pool.map)


def test_cut_keeps_the_order_of_the_batch():
    tokens, targets = batch(6, 5)
    shards = cut(tokens, targets, 3)
    assert [part[0].shape for part in shards] == [(2, 5)] * 3
    np.testing.assert_array_equal(np.concatenate([part[0] for part in shards]), tokens)
    np.testing.assert_array_equal(np.concatenate([part[1] for part in shards]), targets)


def test_gates_are_in_the_order_of_the_layers():
    s = Stepping(train_config(), model_config(num_hidden_layers=3, num_nextn_predict_layers=2))
    assert [gate.name for gate in gates(s.model)] == [f"model.layers.{i}.mlp.gate" for i in (1, 2, 3, 4)]
