"""The tape: the rules that an op and its users can rely on."""

import threading
import weakref

import numpy as np
import pytest
from reference_model import odd_model, odd_tokens

from minidsv3.autograd import (
    Checkpoint,
    Function,
    GradientBuffer,
    Parameter,
    Tensor,
    backward,
    deferred_weight_grads,
    engine_state,
    inherited,
    no_grad,
    observing,
    replacing,
    scope,
    trace,
)
from minidsv3.ops.linear import EmbeddingFunction, GroupedLinearFunction, grouped_linear, linear
from minidsv3.ops.norm import RMSNormFunction, rms_norm
from minidsv3.ops.plain import PlainRMSNorm
from minidsv3.ops.shape import add, concat_last, reshape, split_last
from minidsv3.ops.swiglu import swiglu


class Total(Function):
    """Sum of all elements, weighted by position so that a permuted gradient shows."""

    def forward(self, x):
        self._w = np.arange(1, x.size + 1, dtype=x.dtype).reshape(x.shape)
        self.save(x)
        return np.asarray((self._w * x).sum(), dtype=x.dtype)

    def backward(self, dy):
        assert self.saved
        return dy * self._w


class Pair(Function):
    """Two outputs, 2x and 3x."""

    def forward(self, x):
        return 2 * x, 3 * x

    def backward(self, d_two, d_three):
        return 2 * d_two + 3 * d_three


class Broken(Function):
    def forward(self, x):
        return x.copy()

    def backward(self, dy):
        raise ArithmeticError("no derivative")


class BrokenThunk(Broken):
    def backward(self, dy):
        def weight_gradient():
            raise ArithmeticError("no derivative")

        return weight_gradient


class WrongShape(Broken):
    def backward(self, dy):
        return lambda: dy[:1]


class Negated(RMSNormFunction):
    def forward(self, x, w, *, eps):
        return -super().forward(x, w, eps=eps)


def weight(array):
    p = Parameter(np.shape(array))
    p.allocate(np.float64)
    p.data[...] = array
    return p


def buffer_of(*parameters):
    """A buffer full of the last pass's numbers."""
    buffer = GradientBuffer({p: np.full(p.shape, 9.0, dtype=np.float64) for p in parameters})
    buffer.begin()
    return buffer


def weights_of(shape):
    return np.arange(1, np.prod(shape) + 1, dtype=np.float64).reshape(shape)


RNG = np.random.default_rng(7)
X, W = RNG.standard_normal((5, 4)), RNG.standard_normal((3, 4))


def graph_of_a_norm_and_a_linear():
    x, w, scale = Tensor(X, requires_grad=True), weight(W), weight(np.full(4, 1.5))
    return Total.apply(linear(rms_norm(x, scale, 1e-6), w)), x, w, scale


# ---------------------------------------------------------------------------------------------- accumulation


def test_gradient_of_a_tensor_used_twice_is_the_sum():
    x = Tensor(X, requires_grad=True)
    backward(add(Total.apply(x), Total.apply(add(x, x, weights=(1.0, 2.0)))))
    np.testing.assert_allclose(x.grad, 4 * weights_of(X.shape), rtol=1e-15)


def test_op_that_returns_one_array_twice_keeps_its_inputs_apart():
    """Adding in place to one of the two would change the other (AddFunction returns dy itself, twice)."""
    a, b = Tensor(X, requires_grad=True), Tensor(X, requires_grad=True)
    backward(add(Total.apply(a), Total.apply(add(a, b))))  # the pair comes first, the single one is added
    np.testing.assert_array_equal((a.grad, b.grad), (2 * weights_of(X.shape), weights_of(X.shape)))


def test_intermediate_gradient_is_never_added_to_in_place():
    x = Tensor(X, requires_grad=True)
    y = reshape(x, (4, 5))  # its gradient is a view of what a later op returned
    z = add(y, y)
    backward(add(Total.apply(z), Total.apply(y)))
    np.testing.assert_array_equal(x.grad, 3 * weights_of(X.shape))


def test_second_backward_adds_to_a_parameter():
    w = weight(W)
    for _ in range(2):
        backward(Total.apply(w))
    np.testing.assert_array_equal(w.grad, 2 * weights_of(W.shape))


def test_zero_grad_clears_the_buffer_in_place():
    w = weight(W)
    backward(Total.apply(w))
    buffer = w.grad
    w.zero_grad()
    assert w.grad is buffer and not buffer.any()


def test_parameter_gradient_does_not_alias_what_an_op_returned():
    a, b = weight(W), weight(W)
    backward(Total.apply(add(a, b)))  # both get the same dy
    a.grad += 1
    np.testing.assert_array_equal(b.grad, weights_of(W.shape))


def test_missing_output_gradient_is_zeros():
    x = Tensor(X, requires_grad=True)
    two, _unused = Pair.apply(x)
    backward(Total.apply(two))
    np.testing.assert_array_equal(x.grad, 2 * weights_of(X.shape))


def test_gradient_stops_at_inputs_that_need_none():
    constant = Tensor(X)
    backward(Total.apply(linear(constant, weight(W))))
    assert constant.grad is None


def test_intermediate_tensors_keep_no_gradient():
    y = linear(Tensor(X, requires_grad=True), weight(W))
    backward(Total.apply(y))
    assert y.grad is None


def test_backward_into_fills_the_given_buffers_only():
    loss, _, w, scale = graph_of_a_norm_and_a_linear()
    expected, *_, w2, scale2 = graph_of_a_norm_and_a_linear()
    backward(expected)
    into = buffer_of(w, scale)
    backward(loss, into)
    np.testing.assert_array_equal(into[w], w2.grad)
    np.testing.assert_array_equal(into[scale], scale2.grad)
    assert not w.grad.any() and not scale.grad.any()


def test_gradient_buffer_adds_within_a_pass_and_forgets_between_passes():
    w = weight(W)
    into = buffer_of(w)
    for _ in range(2):
        backward(Total.apply(w), into)
    np.testing.assert_array_equal(into[w], 2 * weights_of(W.shape))
    into.begin()
    backward(Total.apply(w), into)
    np.testing.assert_array_equal(into[w], weights_of(W.shape))


def test_gradient_buffer_does_not_alias_what_an_op_returned():
    a, b = weight(W), weight(W)
    into = buffer_of(a, b)
    backward(add(Total.apply(a), Total.apply(add(a, b))), into)
    np.testing.assert_array_equal((into[a], into[b]), (2 * weights_of(W.shape), weights_of(W.shape)))


def test_gradient_buffer_zeroes_what_no_gradient_reached():
    w, unused = weight(W), weight(W)
    into = buffer_of(w, unused)
    backward(Total.apply(w), into)
    into.finish()
    assert into[w].any() and not into[unused].any()


def test_gradient_buffer_fills_the_arrays_it_was_given():
    """They are views of one flat array, which the optimizer reads."""
    w, flat = weight(W), np.zeros(W.size)
    into = GradientBuffer({w: flat.reshape(W.shape)})
    into.begin()
    backward(Total.apply(w), into)
    np.testing.assert_array_equal(flat, weights_of(W.shape).ravel())


def test_zero_rows_pass_forward_and_backward():
    x, w, experts = Tensor(X[:0], requires_grad=True), weight(W), weight(RNG.standard_normal((2, 6, 3)))
    y = rms_norm(linear(x, w), weight(np.ones(3)), 1e-6)
    y = swiglu(grouped_linear(y, experts, np.array([0, 0])))
    backward(Total.apply(y))
    assert x.grad.shape == (0, 4) and not w.grad.any() and experts.grad.shape == (2, 6, 3)


def test_zero_tokens_give_the_embedding_a_zero_gradient():
    table = weight(W)
    backward(Total.apply(EmbeddingFunction.apply(table, tokens=np.empty((2, 0), dtype=np.int64))))
    assert not table.grad.any()


def test_split_and_concat_are_inverse_in_both_directions():
    x = Tensor(X, requires_grad=True)
    backward(Total.apply(concat_last(*split_last(x, (1, 3)))))
    np.testing.assert_array_equal(x.grad, weights_of(X.shape))


def test_newest_op_runs_first_in_backward():
    with trace() as records:
        loss, *_ = graph_of_a_norm_and_a_linear()
        backward(loss)
    forward = [r.name for r in records if r.phase == "forward"]
    assert [r.name for r in records if r.phase == "backward"] == forward[::-1]


# --------------------------------------------------------------------------------------------------- refusals


def test_backward_starts_from_one_number():
    with pytest.raises(ValueError, match=r"one number, got shape \(5, 3\)"):
        backward(linear(Tensor(X), weight(W)))


@pytest.mark.parametrize("make", [lambda: Tensor(np.ones(())), lambda: Total.apply(X)])
def test_backward_of_constants_is_refused(make):
    with pytest.raises(ValueError, match="nothing to differentiate"):
        backward(make())


@pytest.mark.parametrize(
    "last", [Total.apply, lambda x: add(Total.apply(x), Total.apply(x))], ids=["saving", "saving none"]
)
def test_backward_twice_is_refused(last):
    loss = last(weight(W))
    backward(loss)
    with pytest.raises(RuntimeError, match="backward was already run through this graph"):
        backward(loss)


def test_backward_frees_what_was_saved():
    loss, *_ = graph_of_a_norm_and_a_linear()
    op = loss._op
    backward(loss)
    assert op._saved is None and op._sources == ()


def test_arrays_that_no_op_saved_are_freed_during_the_forward_pass():
    """A sum is needed by nobody's backward: it must not live on in the tape as somebody's input."""
    y = add(linear(Tensor(X), weight(W)), linear(Tensor(X), weight(W)))
    freed = weakref.ref(y.data)
    y = add(y, y)  # the first sum has no name any more
    assert freed() is None
    backward(Total.apply(y))


def test_no_grad_keeps_nothing():
    with no_grad():
        y = linear(Tensor(X), weight(W))
    assert y._op is None and not y.requires_grad


def test_no_grad_ends_with_an_exception():
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert linear(Tensor(X), weight(W)).requires_grad


@pytest.mark.parametrize("op", [Broken, BrokenThunk])
@pytest.mark.parametrize("observed", [False, True])
def test_exception_in_a_backward_names_op_and_module(op, observed):
    with scope("model.layers.1.mlp"):
        loss = Total.apply(op.apply(weight(W)))
    with pytest.raises(ArithmeticError) as error:
        if observed:
            with trace():
                backward(loss)
        else:
            backward(loss)
    assert f"in the backward of {op.__name__}, made by model.layers.1.mlp" in error.value.__notes__


def test_exception_in_a_deferred_weight_gradient_names_op_and_module():
    with scope("lm_head"):
        loss = Total.apply(BrokenThunk.apply(weight(W)))
    with deferred_weight_grads() as waiting:
        backward(loss)
    with pytest.raises(ArithmeticError) as error:
        waiting.run()
    assert "in the backward of BrokenThunk, made by lm_head" in error.value.__notes__


@pytest.mark.parametrize("deferred", [False, True])
def test_gradient_of_the_wrong_shape_is_refused(deferred):
    with scope("lm_head"):
        loss = Total.apply(WrongShape.apply(weight(W)))
    with pytest.raises(
        TypeError, match=r"WrongShape.backward \(made by lm_head\): gradient is \(1, 4\) .*expected \(3, 4\)"
    ):
        if deferred:
            with deferred_weight_grads() as waiting:
                backward(loss)
            waiting.run()
        else:
            backward(loss)


def test_wrong_number_of_gradients_is_refused():
    class OneOfTwo(RMSNormFunction):
        def backward(self, dy):
            return super().backward(dy)[:1]

    loss = Total.apply(OneOfTwo.apply(Tensor(X, requires_grad=True), weight(np.ones(4)), eps=1e-6))
    with pytest.raises(TypeError, match="returned 1 gradients for 2 inputs"):
        backward(loss)


# ------------------------------------------------------------------------------------------ deferred gradients


def model_gradients(deferred, **changes):
    model = odd_model(np.float32, **changes)
    loss = model.loss(odd_tokens(), odd_tokens(seed=6)).total
    if deferred:
        with deferred_weight_grads() as waiting:
            backward(loss)
        waiting.run()
    else:
        backward(loss)
    return {name: p.grad.copy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_deferred_weight_gradients_have_the_same_bits(tied):
    at_once, later = (model_gradients(deferred, tie_word_embeddings=tied) for deferred in (False, True))
    assert all(np.array_equal(at_once[name], later[name]) for name in at_once)


def test_deferred_weight_gradients_wait_until_they_are_run():
    loss, x, w, scale = graph_of_a_norm_and_a_linear()
    with deferred_weight_grads() as waiting:
        backward(loss)
    assert len(waiting) == 2 and x.grad.any() and not w.grad.any()
    waiting.run()
    assert len(waiting) == 0 and w.grad.any() and scale.grad.any()


def test_deferred_weight_gradients_remember_the_buffers_they_belong_to():
    loss, _, w, scale = graph_of_a_norm_and_a_linear()
    into = buffer_of(w, scale)
    with deferred_weight_grads() as waiting:
        backward(loss, into)
    waiting.run()
    assert not np.any(into[w] == 9) and not np.any(into[scale] == 9) and not w.grad.any()


def test_deferral_ends_with_its_block():
    with pytest.raises(KeyError), deferred_weight_grads():
        raise KeyError
    loss, _, w, _ = graph_of_a_norm_and_a_linear()
    backward(loss)
    assert w.grad.any()


# ----------------------------------------------------------------------------------------------- replacement


def norm_of_x():
    return rms_norm(Tensor(X), Tensor(np.ones(4)), 1e-6).data


def test_replacing_puts_another_op_in_its_place():
    with replacing(RMSNormFunction, Negated):
        inside = norm_of_x()
    np.testing.assert_array_equal(inside, -norm_of_x())


def test_replacing_does_not_reach_the_replacement_itself():
    with replacing(RMSNormFunction, Negated), replacing(Negated, PlainRMSNorm):
        np.testing.assert_array_equal(norm_of_x(), -RMSNormFunction().forward(X, np.ones(4), eps=1e-6))


def test_innermost_replacement_wins():
    with replacing(RMSNormFunction, PlainRMSNorm), replacing(RMSNormFunction, Negated):
        assert (norm_of_x() * X < 0).all()


def test_replacement_is_restored_after_an_exception():
    expected = norm_of_x()
    with pytest.raises(KeyError), replacing(RMSNormFunction, Negated):
        raise KeyError
    np.testing.assert_array_equal(norm_of_x(), expected)


@pytest.mark.parametrize("pair", [(RMSNormFunction, rms_norm), (norm_of_x, Negated), (Negated(), Negated)])
def test_replacing_takes_two_function_classes(pair):
    with pytest.raises(TypeError, match="replacing takes two Function classes"), replacing(*pair):
        pass


# ------------------------------------------------------------------------------------------ observing, tracing


def test_trace_names_ops_shapes_and_modules():
    with trace() as records, scope("lm_head"):
        linear(Tensor(X), weight(W))
    assert [(r.phase, r.name, r.scope, r.shapes) for r in records] == [
        ("forward", "LinearFunction", "lm_head", ((5, 4), (3, 4)))
    ]


def test_trace_counts_saved_bytes():
    with trace() as records:
        linear(Tensor(X), weight(W))
    assert records[0].saved_bytes == 8 * (5 * 4 + 3 * 4)  # x for dw, w for dx


def test_trace_counts_no_saved_bytes_without_a_tape():
    with trace() as records, no_grad():
        linear(Tensor(X), weight(W))
    assert records[0].saved_bytes == 0


def test_trace_counts_gemm_flops_and_twice_in_backward():
    with trace() as records:
        backward(Total.apply(linear(Tensor(X, requires_grad=True), weight(W))))
    flops = {r.phase: r.flops for r in records if r.name == "LinearFunction"}
    assert flops == {"forward": 2 * 5 * 4 * 3, "backward": 2 * 2 * 5 * 4 * 3}


def test_trace_counts_only_the_rows_that_experts_have():
    with trace() as records:
        GroupedLinearFunction.apply(X, RNG.standard_normal((2, 3, 4)), rows_per_expert=np.array([5, 0]))
    assert records[0].flops == 2 * 5 * 4 * 3


def test_traced_backward_gives_the_same_bits():
    loss, _, w, _ = graph_of_a_norm_and_a_linear()
    with trace():
        backward(loss)
    plain, _, w2, _ = graph_of_a_norm_and_a_linear()
    backward(plain)
    np.testing.assert_array_equal(w.grad, w2.grad)


def test_trace_leaves_deferred_gradients_deferred():
    loss, _, w, _ = graph_of_a_norm_and_a_linear()
    with trace(), deferred_weight_grads() as waiting:
        backward(loss)
    assert len(waiting) == 2 and not w.grad.any()


def test_observer_sees_op_inputs_and_outputs():
    events = []
    with observing(events.append):
        y = linear(Tensor(X), weight(W))
    assert events[0].phase == "forward" and events[0].outputs == (y,) and events[0].seconds >= 0


def test_observer_leaves_after_an_exception():
    events = []
    with pytest.raises(KeyError), observing(events.append):
        raise KeyError
    linear(Tensor(X), weight(W))
    assert not events


# ------------------------------------------------------------------------------------------------ checkpoint


def checkpointed(recompute):
    x, w, scale = Tensor(X, requires_grad=True), weight(W), weight(np.full(4, 1.5))

    def run(x):
        return linear(rms_norm(x, scale, 1e-6), w)

    loss = Total.apply(Checkpoint.apply(x, run=run) if recompute else run(x))
    return loss, x, w, scale


def test_checkpoint_equals_keeping_to_the_bit():
    for kept, again in zip(checkpointed(False), checkpointed(True), strict=True):
        if kept._op is not None:
            assert float(kept) == float(again)
            backward(kept)
            backward(again)
        else:
            np.testing.assert_array_equal(kept.grad, again.grad)


def test_checkpoint_keeps_only_its_inputs():
    loss, x, *_ = checkpointed(True)
    assert [a is x.data for a in loss._op._sources[0][0].saved] == [True]


def test_checkpoint_passes_zeros_for_an_input_that_is_not_used():
    x, unused = Tensor(X, requires_grad=True), Tensor(W, requires_grad=True)
    backward(Total.apply(Checkpoint.apply(x, unused, run=lambda x, _: add(x, x))))
    assert unused.grad.shape == W.shape and not unused.grad.any()


def test_checkpoint_of_a_tuple_takes_a_gradient_of_one_part():
    x = Tensor(X, requires_grad=True)
    _, three = Checkpoint.apply(x, run=Pair.apply)
    backward(Total.apply(three))
    np.testing.assert_array_equal(x.grad, 3 * weights_of(X.shape))


def test_checkpoints_nest():
    x, w = Tensor(X, requires_grad=True), weight(W)

    def inner(x):
        return Checkpoint.apply(x, run=lambda x: linear(x, w))

    backward(Total.apply(Checkpoint.apply(x, run=inner)))
    np.testing.assert_allclose(x.grad, weights_of((5, 3)) @ W, rtol=1e-14)


def test_checkpoint_recomputes_under_no_grad_too():
    loss, x, *_ = checkpointed(True)
    with no_grad():
        backward(loss)
    assert x.grad.any()


def test_checkpoint_recomputes_in_the_name_of_its_module():
    with trace() as records:
        with scope("model.layers.0"):
            loss, *_ = checkpointed(True)
        backward(loss)
    assert {r.scope for r in records if r.name == "LinearFunction"} == {"model.layers.0"}


# ---------------------------------------------------------------------------------------------------- threads


def in_a_thread(work):
    result = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    thread.join()
    return result[0]


@pytest.mark.parametrize("state", ["no_grad", "replacing", "observing", "deferring", "scope"])
def test_state_of_one_thread_does_not_reach_another(state):
    expected = norm_of_x()
    events = []

    def work():
        w = weight(W)
        y = linear(Tensor(X), w)
        backward(Total.apply(y))
        return y.requires_grad, w.grad.any(), np.array_equal(norm_of_x(), expected), y._op._scope

    blocks = {
        "no_grad": no_grad(),
        "replacing": replacing(RMSNormFunction, Negated),
        "observing": observing(events.append),
        "deferring": deferred_weight_grads(),
        "scope": scope("here"),
    }
    with blocks[state]:
        assert in_a_thread(work) == (True, True, True, "")
    assert not events


def test_a_worker_may_inherit_replacements_and_observers():
    expected, events = -norm_of_x(), []

    def work(state):
        with inherited(state):
            return norm_of_x()

    with replacing(RMSNormFunction, Negated), observing(events.append):
        state = engine_state()
        np.testing.assert_array_equal(in_a_thread(lambda: work(state)), expected)
    assert len(events) == 1


def test_two_threads_share_parameters_and_keep_their_gradients_apart():
    w = weight(W)
    buffers = [buffer_of(w) for _ in range(2)]
    together = threading.Barrier(2)

    def work(i):
        for _ in range(20):
            together.wait()
            backward(Total.apply(add(w, w, weights=(float(i), 1.0))), buffers[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal([b[w] for b in buffers], [20 * weights_of(W.shape), 40 * weights_of(W.shape)])
    assert not w.grad.any()


# ------------------------------------------------------------------------------------------------- parameters


def test_lazy_parameter_costs_one_number():
    p = Parameter((7168, 18432))
    assert p.is_lazy and p.data.strides == (0, 0) and p.grad.strides == (0, 0)


def test_allocated_parameter_is_not_lazy_and_its_gradient_is_until_it_comes():
    p = weight(W)
    assert not p.is_lazy and p.grad.strides == (0, 0) and p.grad.shape == W.shape


def test_part_of_a_packed_parameter_is_a_view_of_weight_and_gradient():
    whole = Parameter((6, 4), {"gate": slice(0, 2), "up": slice(2, 6)})
    whole.allocate(np.float64)
    whole.part("up").data[...] = 1
    backward(Total.apply(whole))
    np.testing.assert_array_equal(whole.data, np.repeat([0.0, 1.0], (2, 4))[:, None] * np.ones(4))
    np.testing.assert_array_equal(whole.part("up").grad, weights_of((6, 4))[2:])


def test_part_of_a_lazy_parameter_has_its_shape():
    assert Parameter((6, 4), {"gate": slice(0, 2)}).part("gate").shape == (2, 4)


def test_tensor_says_what_made_it():
    assert repr(linear(Tensor(X), weight(W))) == "Tensor((5, 3), float64 from LinearFunction)"
