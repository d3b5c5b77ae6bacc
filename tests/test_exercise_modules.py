"""The correct text of every find-the-bug module does what the package does."""

import importlib

import numpy as np
import pytest

from minidsv3.autograd import Tensor
from minidsv3.exercises.checker import catalogue
from minidsv3.exercises.planted import function_of, planted
from minidsv3.generation.speculative import _verify
from minidsv3.ops.linear import LinearFunction
from minidsv3.ops.loss import SequenceBalanceLossFunction
from minidsv3.ops.norm import rms_norm
from minidsv3.ops.rope import rope, softmax_scale
from minidsv3.ops.routing import GateScoreFunction, gate_scores, gate_weights, select_experts
from minidsv3.ops.shape import concat_last

MODULES = {
    name: importlib.import_module(f"minidsv3.exercises.ex{e.number:02d}_{name}")
    for name, e in catalogue().items()
    if e.kind == "B"
}
SEEDS = (3, 4, 5)


def cases(name):
    """Results of the correct text beside their inputs."""
    module = MODULES[name]
    function = function_of(module.CORRECT)
    for seed in SEEDS:
        for inputs in module.cases(np.random.default_rng(seed)):
            yield function(**inputs), inputs


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_softmax_backward_is_that_of_the_ops():
    for (dx, dw), c in cases("bug_backward"):
        score, linear = GateScoreFunction(), LinearFunction()
        score._needs = linear._needs = (True, True)
        score._softmax = True
        score.save(c["p"])
        linear.forward(c["x"], c["w"])
        expected_dx, thunk = linear.backward(score.backward(c["dp"]))
        close(dx, expected_dx)
        close(dw, thunk())


def test_yarn_scores_are_those_of_the_rope_op():
    for weights, c in cases("bug_yarn_scale"):
        S, d = c["q"].shape
        rotation = np.exp(1j * np.arange(S)[:, None] * c["frequencies"])
        q, k = (rope(Tensor(a[None, :, None]), rotation).data[0, :, 0] for a in (c["q"], c["k"]))
        scores = softmax_scale(d, {"factor": c["factor"], "mscale_all_dim": 1.0}) * (k @ q[-1])
        expected = np.exp(scores - scores.max())
        close(weights, expected / expected.sum())


def test_cache_entries_are_normed_latent_and_turned_key():
    for entries, c in cases("bug_latent_cache"):
        S = len(c["x"])
        latent = rms_norm(Tensor(c["x"] @ c["w_latent"].T), Tensor(c["norm"]), 1e-6)
        key = (c["x"] @ c["w_rope"].T)[None, :, None]
        rotation = np.exp(1j * np.arange(c["start"], c["start"] + S)[:, None] * c["frequencies"])
        turned = rope(Tensor(key), rotation).data[0, :, 0]
        close(entries, concat_last(latent, Tensor(turned)).data)


def test_gate_is_that_of_the_package():
    for (topk_idx, weights), c in cases("bug_gate_bias"):
        scores = gate_scores(Tensor(c["logits"]), "sigmoid")
        expected = select_experts(scores.data, c["bias"], top_k=c["top_k"], n_group=1, topk_group=1, method="noaux_tc")
        np.testing.assert_array_equal(topk_idx, expected)
        close(weights, gate_weights(scores, topk_idx, c["top_k"] > 0, 1.0).data)


def test_group_limited_experts_are_those_of_the_package():
    for topk_idx, c in cases("bug_group_mask"):
        options = {name: c[name] for name in ("top_k", "n_group", "topk_group")}
        no_bias = np.zeros(c["choice"].shape[1])
        np.testing.assert_array_equal(topk_idx, select_experts(c["choice"], no_bias, method="noaux_tc", **options))


def test_balance_loss_is_that_of_the_op():
    for loss, c in cases("bug_balance_loss"):
        B, S, E = c["scores"].shape
        op = SequenceBalanceLossFunction()
        expected = op.forward(c["scores"].reshape(B * S, E), topk_idx=c["topk_idx"].reshape(B * S, -1), batch=B)
        close(loss, expected)


def test_mtp_batch_joins_and_predicts_the_right_tokens():
    for (inputs, targets), c in cases("bug_mtp_index"):
        B, n = c["tokens"].shape
        D = c["h"].shape[2]
        assert inputs.shape == (B, n - 2, 2 * D)
        for b, i in np.ndindex(B, n - 2):
            one = Tensor(np.ones(D))
            seen = rms_norm(Tensor(c["table"][c["tokens"][b, i + 1]]), one, 1e-6).data
            hidden = rms_norm(Tensor(c["h"][b, i]), one, 1e-6).data
            close(inputs[b, i], np.concatenate([seen, hidden]))
            assert targets[b, i] == c["tokens"][b, i + 2]


class Draws:
    """A generator whose draws are known."""

    def __init__(self, u, v):
        self.u, self.v = u, v

    def random(self):
        return self.u

    def choice(self, n, p):
        return int(np.searchsorted(np.cumsum(p), self.v, side="right"))


def test_verification_is_that_of_speculative_decoding():
    for (token, accepted), c in cases("bug_speculative"):
        logits = np.log(np.stack([c["p"], c["p"]]))
        sampler = (1.0, 1.0, Draws(c["u"], c["v"]))
        kept, expected = _verify(logits, [c["draft"]], [c["q"]], sampler)
        assert accepted == (kept == 1)
        assert token == (c["draft"] if accepted else expected)


def test_blocks_are_read_back_within_half_a_step():
    for out, c in cases("bug_scales"):
        block, w = c["block"], c["w"]
        for a, b in np.ndindex(*(-(-n // block) for n in w.shape)):
            part = np.s_[a * block : (a + 1) * block, b * block : (b + 1) * block]
            amax = max(np.abs(w[part]).max(), 1e-4)
            scale = 2.0 ** np.ceil(np.log2(amax / 448))
            assert scale / 2 < amax / 448 <= scale
            close(out[part] / scale, np.rint(w[part] / scale))
            assert np.abs(out[part] - w[part]).max() <= scale / 2


@pytest.mark.parametrize("name", MODULES)
def test_every_bug_shows_and_is_one_line(name):
    module = MODULES[name]
    right = module.CORRECT.splitlines()
    assert len(module.BUGS) >= 3
    for bug in module.BUGS:
        wrong = planted(module.CORRECT, bug).splitlines()
        assert sum(a != b for a, b in zip(right, wrong)) == 1
        assert bug.source


def test_a_bug_that_replaces_no_line_is_refused():
    module = MODULES["bug_gate_bias"]
    with pytest.raises(ValueError, match="stands 0 times"):
        planted(module.CORRECT, module.BUGS[0]._replace(right="    nothing"))
