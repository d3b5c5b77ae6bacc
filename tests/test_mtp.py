"""Multi-token prediction: the index table, what a module may see, and whose weights it uses."""

import numpy as np
import pytest
from reference_model import ODD, Reference, odd_model, odd_tokens

from minidsv3.autograd import backward
from minidsv3.model.record import record

B, S = 2, 8
# A changed token may go to other experts; the experts' gemms then have other numbers of rows and round differently.
ROUNDING = 1e-12
TOKENS, TARGETS = odd_tokens(B, S), odd_tokens(B, S, seed=6)


def changed_at(position):
    tokens = TOKENS.copy()
    tokens[:, position] = (tokens[:, position] + 1) % ODD["vocab_size"]
    return tokens


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_mtp_equals_the_equations_in_loops(depths):
    """Pitfalls 10 and 11: sequential modules over [enorm(embedding); hnorm(h)], h after the final norm."""
    model = odd_model(num_nextn_predict_layers=depths)
    for got, expected in zip(model.mtp_logits(TOKENS), Reference(model).mtp_logits(TOKENS), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-10)  # up to five layers in another order of sums


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_depth_k_predicts_s_minus_k_positions(depths):
    shapes = [a.shape for a in odd_model(num_nextn_predict_layers=depths).mtp_logits(TOKENS)]
    assert shapes == [(B, S - k, ODD["vocab_size"]) for k in range(1, depths + 1)]


@pytest.mark.parametrize("depths, k, i", [(d, k, i) for d in (1, 2, 3) for k in range(1, d + 1) for i in (0, 2)])
def test_module_cannot_see_the_token_it_predicts(depths, k, i):
    """Pitfall 9: depth k at position i predicts token i+k+1, and changing that token must change nothing there."""
    model = odd_model(num_nextn_predict_layers=depths)
    before, after = (model.mtp_logits(tokens)[k - 1][:, i] for tokens in (TOKENS, changed_at(i + k + 1)))
    np.testing.assert_allclose(before, after, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("depths, k, i", [(d, k, i) for d in (1, 2, 3) for k in range(1, d + 1) for i in (0, 2)])
def test_module_sees_the_token_before_the_one_it_predicts(depths, k, i):
    model = odd_model(num_nextn_predict_layers=depths)
    before, after = (model.mtp_logits(tokens)[k - 1][:, i] for tokens in (TOKENS, changed_at(i + k)))
    assert (np.abs(before - after).max(axis=-1) > 1e-6).all()


def test_index_table_of_the_documentation():
    """Position i of module k is computed from tokens 0..i+k and nothing else, for every i and k."""
    model, depths = odd_model(num_nextn_predict_layers=2), 2
    base = model.mtp_logits(TOKENS)
    for t in range(S):
        other = model.mtp_logits(changed_at(t))
        for k in range(1, depths + 1):
            moved = [bool(np.abs(base[k - 1][:, i] - other[k - 1][:, i]).max() > ROUNDING) for i in range(S - k)]
            assert moved == [t <= i + k for i in range(S - k)]


def test_later_module_continues_its_predecessor():
    """Pitfall 11: sequential, not parallel heads: the first module's projection moves the second's logits."""
    model = odd_model(num_nextn_predict_layers=2)
    before = model.mtp_logits(TOKENS)[1]
    model.mtp[0].eh_proj.weight.data *= 1.5
    assert abs(model.mtp_logits(TOKENS)[1] - before).max() > 1e-3


def test_projection_reads_the_embedding_first():
    """Pitfall 10: with the first half of eh_proj at zero, the new token is not seen any more."""
    model = odd_model()
    model.mtp[0].eh_proj.weight.data[:, : ODD["hidden_size"]] = 0
    last = S - 2
    before, after = (model.mtp_logits(tokens)[0][:, last] for tokens in (TOKENS, changed_at(S - 1)))
    np.testing.assert_allclose(before, after, rtol=0, atol=ROUNDING)


def test_hidden_state_is_taken_after_the_final_norm():
    """Pitfall 10: the final norm's weight reaches the MTP logits also when hnorm makes lengths equal."""
    model = odd_model()
    with record() as r:
        model.mtp_logits(TOKENS)
    np.testing.assert_array_equal(r["model.layers.2.hnorm"].inputs[0], r["model.norm"].output[:, : S - 1])


def loss_gradients(**weights):
    model = odd_model()
    backward(model.loss(TOKENS, TARGETS, balance_weight=0.0, **weights).total)
    return model.embed_tokens.weight.grad.copy(), model.lm_head.weight.grad.copy()


def test_embedding_and_head_get_gradients_from_main_model_and_mtp():
    """The gradient is linear in lambda: both parts are there, and they differ."""
    without, half, full = (loss_gradients(mtp_weight=w) for w in (0.0, 0.5, 1.0))
    for zero, middle, one in zip(without, half, full):
        assert abs(one - zero).max() > 1e-4
        np.testing.assert_allclose(middle, (zero + one) / 2, rtol=1e-10, atol=1e-13)


def test_mtp_has_no_embedding_and_head_of_its_own():
    names = [name for name, _ in odd_model().named_parameters()]
    assert not [n for n in names if n.startswith("model.layers.2.") and ("embed" in n or "shared_head.head" in n)]


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_loss_is_the_mean_over_depths_of_what_the_logits_say(depths):
    """By hand: depth k at position i is scored on targets[i + k], the token after tokens_in[i + k]."""
    model = odd_model(num_nextn_predict_layers=depths)
    by_depth = []
    for k, logits in enumerate(model.mtp_logits(TOKENS), start=1):
        log_p = log_softmax(logits)
        by_depth.append(np.mean([-log_p[b, i, TARGETS[b, i + k]] for b in range(B) for i in range(S - k)]))
    assert float(model.loss(TOKENS, TARGETS).mtp) == pytest.approx(np.mean(by_depth), rel=1e-12)


def test_loss_of_a_text_scores_the_token_k_plus_1_ahead():
    """With targets that are the shifted text, depth k at i is scored on text[i + k + 1]."""
    text = odd_tokens(B, S + 1)
    model = odd_model(num_nextn_predict_layers=2)
    by_depth = []
    for k, logits in enumerate(model.mtp_logits(text[:, :-1]), start=1):
        log_p = log_softmax(logits)
        by_depth.append(np.mean([-log_p[b, i, text[b, i + k + 1]] for b in range(B) for i in range(S - k)]))
    assert float(model.loss(text[:, :-1], text[:, 1:]).mtp) == pytest.approx(np.mean(by_depth), rel=1e-12)


def test_ignored_target_is_ignored_at_every_depth():
    model, targets = odd_model(num_nextn_predict_layers=2), TARGETS.copy()
    targets[:, 5] = -100
    by_depth = []
    for k, logits in enumerate(model.mtp_logits(TOKENS), start=1):
        log_p = log_softmax(logits)
        by_depth.append(
            np.mean([-log_p[b, i, targets[b, i + k]] for b in range(B) for i in range(S - k) if i + k != 5])
        )
    assert float(model.loss(TOKENS, targets).mtp) == pytest.approx(np.mean(by_depth), rel=1e-12)


def test_total_is_main_plus_lambda_mtp_plus_alpha_balance():
    losses = odd_model().loss(TOKENS, TARGETS, mtp_weight=0.3, balance_weight=0.01)
    expected = float(losses.main) + 0.3 * float(losses.mtp) + 0.01 * float(losses.balance)
    assert float(losses.total) == pytest.approx(expected, rel=1e-14)


def test_no_mtp_modules_give_a_zero_loss_and_no_logits():
    model = odd_model(num_nextn_predict_layers=0)
    assert float(model.loss(TOKENS, TARGETS).mtp) == 0 and model.mtp_logits(TOKENS) == []


def test_sequence_too_short_for_its_depths_is_refused():
    model = odd_model(num_nextn_predict_layers=3)
    with pytest.raises(ValueError, match="sequences of 3 leave depth 3 of MTP nothing to predict"):
        model.mtp_logits(TOKENS[:, :3])


def test_main_logits_do_not_depend_on_mtp_modules():
    model = odd_model()
    before = model.logits(TOKENS)
    for _, parameter in model.mtp[0].named_parameters():
        parameter.data[...] = 0
    np.testing.assert_array_equal(model.logits(TOKENS), before)
