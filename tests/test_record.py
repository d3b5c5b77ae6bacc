"""Looking inside: names, order and the table of a recorded forward pass."""

import numpy as np
import pytest
from reference_model import odd_model, odd_tokens

from minidsv3 import record
from minidsv3.autograd import backward

TOKENS, TARGETS = odd_tokens(), odd_tokens(seed=6)


@pytest.fixture(scope="module")
def model():
    return odd_model(np.float32)


@pytest.fixture(scope="module")
def recorded(model):
    with record() as r:
        model.logits(TOKENS)
    return r


def test_modules_have_their_released_names(recorded):
    names = [e.name for e in recorded if e.kind == "module"]
    assert {"model.embed_tokens", "model.layers.0.self_attn.kv_b_proj", "model.layers.1.mlp.gate", "lm_head"} <= set(
        names
    )


def test_ops_are_named_after_their_module(recorded):
    assert {"model.layers.0.self_attn:Attention", "model.layers.1.mlp.experts:GroupedLinear"} <= {
        e.name for e in recorded
    }


def test_every_module_that_runs_is_recorded_once_in_a_plain_forward(model, recorded):
    names = [e.name for e in recorded if e.kind == "module"]
    main = [n for n, _ in model.named_modules() if n and not n.startswith("model.layers.2")]
    assert sorted(names) == sorted([*main, "Transformer"])


def test_entries_stand_in_the_order_in_which_they_finished(recorded):
    names = [e.name for e in recorded]
    steps = [
        "model.embed_tokens", "model.layers.0.input_layernorm", "model.layers.0.self_attn.q_a_proj",
        "model.layers.0.self_attn:Attention", "model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.0",
        "model.layers.1.mlp.gate", "model.layers.1.mlp.experts", "model.layers.1.mlp", "model.norm", "lm_head",
    ]  # fmt: skip
    positions = [names.index(step) for step in steps]
    assert positions == sorted(positions)


def test_an_op_stands_before_its_module(recorded):
    names = [e.name for e in recorded]
    assert names.index("lm_head:Linear") == names.index("lm_head") - 1


def test_entry_holds_the_arrays_of_the_pass(model, recorded):
    entry = recorded["lm_head"]
    np.testing.assert_array_equal(entry.output, model.logits(TOKENS))
    np.testing.assert_array_equal(entry.inputs[0], recorded["model.norm"].output)
    assert entry.nbytes == 4 * 2 * 7 * 29


def test_gate_entry_holds_scores_experts_and_weights(recorded):
    scores, topk_idx, topk_weight = recorded["model.layers.1.mlp.gate"].outputs
    assert (scores.shape, topk_idx.dtype, topk_weight.shape) == ((14, 12), np.int64, (14, 4))
    np.testing.assert_allclose(topk_weight.sum(axis=1), 2.5, rtol=1e-6)


def test_unknown_name_is_a_key_error_with_near_names(recorded):
    with pytest.raises(KeyError, match=r"'mlp\.gate' did not run; did you mean one of \['model\.layers\.1\.mlp\.gate"):
        recorded["mlp.gate"]


def test_far_name_is_a_key_error_without_guesses(recorded):
    with pytest.raises(KeyError, match="'conv1' did not run") as error:
        recorded["conv1"]
    assert "mean" not in str(error.value)


def test_membership_is_by_name(recorded):
    assert "lm_head" in recorded and "model.layers.2" not in recorded


def test_table_has_a_line_for_every_entry(recorded):
    lines = recorded.table().splitlines()
    assert len(lines) == 1 + len(recorded) and lines[0].split() == ["name", "inputs", "outputs", "dtype", "bytes"]


def test_table_says_shapes_dtype_and_bytes(recorded):
    line = next(line for line in recorded.table().splitlines() if line.startswith("lm_head "))
    assert line.split() == ["lm_head", "2x7x14", "2x7x29", "float32", "1,624"]


@pytest.mark.parametrize("kind", ["module", "op"])
def test_table_may_show_one_kind(recorded, kind):
    assert len(recorded.table(kind).splitlines()) == 1 + sum(e.kind == kind for e in recorded)


def test_columns_of_the_table_are_aligned(recorded):
    lines = recorded.table().splitlines()
    assert len({len(line) for line in lines}) == 1


def test_scalars_are_called_so(model):
    with record() as r:
        model.loss(TOKENS, TARGETS)
    line = next(line for line in r.table().splitlines() if "CrossEntropy" in line)
    assert " scalar " in line


def test_nothing_is_recorded_when_it_is_off(model):
    with record() as r:
        pass
    model.logits(TOKENS)
    assert len(r) == 0 and len(r.table().splitlines()) == 1


def test_recording_ends_with_an_exception(model):
    with pytest.raises(ZeroDivisionError), record() as r:
        raise ZeroDivisionError
    model.logits(TOKENS)
    assert len(r) == 0


def test_recording_changes_no_bit(model, recorded):
    np.testing.assert_array_equal(recorded["lm_head"].output, model.logits(TOKENS))


def test_backward_is_not_recorded(model):
    with record() as r:
        loss = model.loss(TOKENS, TARGETS).total
        before = len(r)
        backward(loss)
    assert len(r) == before


def test_records_nest(model):
    with record() as outer:
        model.logits(TOKENS)
        with record() as inner:
            model.logits(TOKENS)
    assert len(outer) == 2 * len(inner) > 0


def test_mtp_module_is_recorded_under_its_released_name(model):
    with record() as r:
        model.mtp_logits(TOKENS)
    assert r["model.layers.2.eh_proj"].inputs[0].shape == (2, 6, 28) and "model.layers.2" in r


def test_tied_head_has_its_name():
    with record() as r:
        odd_model(tie_word_embeddings=True).logits(TOKENS)
    assert r["lm_head"].output.shape == (2, 7, 29)
