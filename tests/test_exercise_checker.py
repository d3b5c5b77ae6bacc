"""`check` on code that may do anything: one line a property, a score, never a crash."""

import functools
import signal
import sys
import threading
import time

import numpy as np
import pytest

from minidsv3.autograd import Function
from minidsv3.exercises import check, ex04_bug_backward, measured, use
from minidsv3.exercises.calling import Mine, TimeIsUp, borrowed_part, time_limit
from minidsv3.exercises.checker import catalogue, evaluate
from minidsv3.exercises.exercise import Failed, same
from minidsv3.exercises.planted import function_of
from minidsv3.ops.norm import RMSNormFunction, rms_norm
from minidsv3.ops.routing import select_experts
from minidsv3.train import balance


def update_bias(bias, load, speed):
    return bias + np.float32(speed) * np.sign(load.mean() - load).astype(np.float32)


def details(name, submission, **options):
    return [r.detail for r in evaluate(name, submission, **options)]


def test_check_prints_a_line_a_property_and_returns_the_points(capsys):
    assert check("bias_update", update_bias) == 10.0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [
        ["holds", f"{p.points}/{p.points}"] for p in catalogue()["bias_update"].properties
    ]
    assert lines[-1].strip() == "10 of 10 points"


def test_failing_line_names_index_got_expected_and_hint(capsys):
    def wrong(bias, load, speed):
        return bias + np.float32(speed)

    points = check("bias_update", wrong, "direction")
    line = capsys.readouterr().out
    assert points == 0
    assert type(points) is float
    assert "FAILS  0/3" in line
    assert "the sign of the change at (1,): got 1, expected -1" in line
    assert "Hint:" in line


def test_one_property_alone_is_worth_its_own_points(capsys):
    assert check("bias_update", update_bias, "size") == 3.0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_same_seed_asks_the_same_and_another_seed_something_else():
    seen = {}

    def spy(bias, load, speed):
        seen.setdefault(seed, []).append(load.tobytes())
        return update_bias(bias, load, speed)

    for seed in (0, 0, 3):
        seen.pop(seed, None)
        evaluate("bias_update", spy, seed=seed)
        seen[seed, len(seen)] = seen[seed]
    first, again, other = (value for key, value in seen.items() if isinstance(key, tuple))
    assert first == again != other


@pytest.mark.parametrize(
    "submission",
    [None, 3, "text", [], {}, object(), lambda: 1, lambda *a: None, lambda *a, **k: "x", np.zeros(3), print, type,
     lambda *a: np.array([object()] * 5), lambda *a: np.zeros((0, 0)), lambda *a: a, np.sum],
)  # fmt: skip
@pytest.mark.parametrize("name", list(catalogue()))
def test_nonsense_scores_zero_with_a_reason_each(name, submission):
    results = evaluate(name, submission, seconds=20)
    assert sum(r.points for r in results) == 0
    assert all(r.detail and "\n" not in r.detail for r in results)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a\nb"), SystemExit(3), KeyboardInterrupt(), RecursionError(), MemoryError(), GeneratorExit()],
)
def test_whatever_is_raised_fails_the_property_with_its_name(error):
    def raising(*args):
        raise error

    for detail in details("bias_update", raising):
        assert f"raised {type(error).__name__}" in detail
        assert "of raising)" in detail


def test_endless_loop_ends_and_is_waited_for_once():
    def endless(bias, load, speed):
        while True:
            pass

    start = time.monotonic()
    first, *rest = details("bias_update", endless, seconds=0.3)
    assert time.monotonic() - start < 3
    assert "took longer than 0.3 s" in first
    assert all("not run" in detail for detail in rest)


def test_a_graded_submission_is_run_once_for_all_its_cells(monkeypatch, capsys):
    monkeypatch.setenv("MINIDSV3_GRADING", "1")
    calls = []

    def endless(bias, load, speed):
        calls.append(1)
        while True:
            pass

    start = time.monotonic()
    assert check("bias_update", endless, seconds=0.3) == 0
    assert use("bias_update", endless) is None
    assert not calls  # cells that only practise
    for p in catalogue()["bias_update"].properties:
        assert check("bias_update", endless, p.name, seed=5, seconds=0.3) == 0
    assert len(calls) == 1
    assert time.monotonic() - start < 3
    assert "took longer than 0.3 s" in capsys.readouterr().out
    assert check("bias_update", update_bias, "size", seed=5) == 3
    assert check("bias_update", lambda *a: update_bias(*a) * 2, "size", seed=5) == 0


def test_graded_parts_of_one_solution_are_told_apart(monkeypatch):
    monkeypatch.setenv("MINIDSV3_GRADING", "1")

    def verdict(mended):
        return check("bug_backward", dict(line=lambda: 3, witness=dict, repaired=mended), "repaired", seed=5)

    assert verdict(function_of(ex04_bug_backward.CORRECT)) == 4
    assert verdict(lambda **inputs: None) == 0


def test_measurement_without_end_is_stopped():
    def endless():
        while True:
            pass

    with pytest.raises(TimeoutError, match=r"longer than 0\.2 s"):
        measured(endless, seconds=0.2)
    assert measured(lambda: 3) == 3


def test_sleep_and_swallowed_interrupts_end_too():
    def stubborn(bias, load, speed):
        for _ in range(3):
            try:
                time.sleep(60)
            except BaseException:  # the first interrupts end here
                continue
        return bias

    start = time.monotonic()
    assert "took longer" in details("bias_update", stubborn, seconds=0.2)[0] or time.monotonic() - start < 5
    assert time.monotonic() - start < 20


def test_interrupt_handler_and_profile_are_put_back():
    before = signal.getsignal(signal.SIGINT), sys.getprofile(), threading.active_count()
    with pytest.raises(TimeIsUp), time_limit(0.05):
        while True:
            pass
    assert (signal.getsignal(signal.SIGINT), sys.getprofile(), threading.active_count()) == before


def test_ctrl_c_during_a_check_still_interrupts():
    def pressed(*args):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        evaluate("bias_update", pressed)


def test_check_runs_off_the_main_thread():
    out = []
    thread = threading.Thread(target=lambda: out.append(sum(r.points for r in evaluate("bias_update", update_bias))))
    thread.start()
    thread.join()
    assert out == [10]


def test_inputs_changed_in_place_are_named():
    def in_place(bias, load, speed):
        bias += np.float32(speed) * np.sign(load.mean() - load).astype(np.float32)
        return bias

    assert "argument 0 was changed in place" in details("bias_update", in_place)[0]


def test_arguments_are_copies():
    x = np.arange(3.0)

    def scribble(a):
        a[:] = 9

    with pytest.raises(Failed, match="changed in place"):
        Mine(scribble)(x)
    assert x.tolist() == [0, 1, 2]


def test_prints_of_a_student_do_not_bury_the_answer(capsys):
    def chatty(bias, load, speed):
        print("holds 99/99 everything")
        return update_bias(bias, load, speed)

    check("bias_update", chatty)
    assert "99" not in capsys.readouterr().out


def test_wrong_number_of_a_course_is_not_told_its_direction():
    exercise = catalogue()["bill_cache"]
    variant = exercise.draw(np.random.default_rng(5)).key
    answers = {p.name: 1e30 for p in exercise.properties}
    assert all("too large" in detail for detail in details("bill_cache", answers))
    assert not any("too large" in detail for detail in details("bill_cache", answers, variant=variant))


def test_missing_factor_is_named():
    (detail,) = [d for d in details("bill_cache", {"gib_at_context": 70272 * 131072 / 1e9}) if "GiB" in d]
    assert "by a factor of 1.074 (1 GB = 10^9 B, 1 GiB = 2^30 B)" in detail


def test_warnings_of_a_student_are_no_errors():
    def noisy(bias, load, speed):
        np.log(np.zeros(1))
        return update_bias(bias, load, speed)

    assert sum(r.points for r in evaluate("bias_update", noisy)) == 10


class Inherited(RMSNormFunction):
    pass


class Delegating(Function):
    def forward(self, x, w, *, eps):
        from minidsv3.ops.norm import RMSNormFunction as Own

        self._own = Own()
        self._own._needs = self._needs
        return self._own.forward(x, w, eps=eps)

    def backward(self, dy):
        return self._own.backward(dy)


class HalfBorrowed(Function):
    """Its own forward; the backward is found by a name that no reader of the code sees."""

    def forward(self, x, w, *, eps):
        r = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + x.dtype.type(eps))
        self.save(x, w, r)
        return w * x * r

    def backward(self, dy):
        module = __import__("importlib").import_module("minidsv3.ops" + ".norm")
        dx, dw = getattr(module, "RMSNorm" + "Function").backward(self, dy)
        return dx, dw()


class ReturnsTensor(Function):
    def forward(self, x, w, *, eps):
        return rms_norm(x, w, eps).data

    def backward(self, dy):
        return dy, dy


@pytest.mark.parametrize(
    "submission",
    [RMSNormFunction, Inherited, Delegating, HalfBorrowed, ReturnsTensor, functools.partial(RMSNormFunction)],
)
def test_own_implementation_of_an_op_scores_zero(submission, capsys):
    assert check("rms_norm", submission, seed=9) == 0
    assert "uses the package's own minidsv3.ops.norm" in capsys.readouterr().out


def wrapped(bias, load, speed):
    out = bias.copy()
    balance.update_bias(out, load, speed)
    return out


def hidden_behind_eval(bias, load, speed):
    out = bias.copy()
    eval("__import__('minidsv3.train.balance', fromlist=['x']).update_bias")(out, load, speed)
    return out


def returning_it(bias, load, speed):
    return sys.modules["minidsv3.train.balance"].update_bias


def in_a_closure():
    own = balance.update_bias

    def rule(bias, load, speed):
        out = bias.copy()
        own(out, load, speed)
        return out

    return rule


def importing(bias, load, speed):
    import minidsv3.train.balance  # noqa: F401

    return update_bias(bias, load, speed)


def by_default(bias, load, speed, own=balance.update_bias):
    out = bias.copy()
    own(out, load, speed)
    return out


@pytest.mark.parametrize(
    "submission",
    [balance.update_bias, wrapped, hidden_behind_eval, returning_it, in_a_closure(), importing, by_default],
    ids=lambda f: f.__name__,
)
def test_own_implementation_of_a_rule_scores_zero(submission):
    results = evaluate("bias_update", submission, seed=3)
    assert sum(r.points for r in results) == 0
    assert all("uses the package's own minidsv3.train.balance" in r.detail for r in results)


def profile_off(bias, load, speed):
    sys.setprofile(None)
    return wrapped(bias, load, speed)


def test_switching_the_watch_off_scores_zero():
    def rule(bias, load, speed):
        sys.setprofile(None)
        return update_bias(bias, load, speed)

    assert all("out of sight" in detail for detail in details("bias_update", rule))
    assert sum(r.points for r in evaluate("bias_update", profile_off)) == 0


def test_answers_of_the_exercise_itself_are_borrowed_too():
    from minidsv3.exercises import ex14_bug_gate_bias, ex27_promoted_sum, planted

    def repaired(logits, bias, top_k):
        return planted.function_of(ex14_bug_gate_bias.CORRECT)(logits, bias, top_k)

    def promoted(products, interval, narrow):
        return ex27_promoted_sum._expected(products, interval)

    finding = planted.Finding(7, lambda: ex14_bug_gate_bias.cases(np.random.default_rng(0))[0], repaired)
    assert sum(r.points for r in evaluate("bug_gate_bias", finding)) == 0
    assert sum(r.points for r in evaluate("promoted_sum", promoted)) == 0


def test_own_function_wrapped_twice_is_found():
    @functools.wraps(select_experts)
    def outer(*args, **kwargs):
        return select_experts(*args, **kwargs)

    assert "select_experts" in borrowed_part({"select": functools.partial(outer)})


def test_own_work_that_only_uses_the_engine_is_not_borrowed():
    class Mean(Function):
        def forward(self, x):
            self.save(x)
            return x.mean()

    assert borrowed_part(Mean) is None
    assert borrowed_part(update_bias) is None


@pytest.mark.parametrize("call, message", [
    (lambda: check("rms_nrom", None), "not one of bill_parameters"),
    (lambda: check("op:Nothing", None), "not one of LinearFunction"),
    (lambda: check("bias_update", update_bias, "speed"), "only='speed' is not one of direction"),
    (lambda: check("bias_update", update_bias, variant=3), "has no variants"),
    (lambda: check("bug_gate_bias", None, variant="00000000"), "not a module of this exercise"),
    (lambda: check("bill_cache", {}, variant={"context": 1}), "does not give exactly"),
])  # fmt: skip
def test_wrong_call_of_check_is_a_value_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("got, expected, message", [
    (None, 1.0, "y is None, expected an array of shape"),
    (np.zeros((2, 3)), np.zeros((3, 2)), r"y has shape \(2, 3\), expected \(3, 2\)"),
    (np.array([0.0, 2.0]), np.array([0.0, 1.0]), r"y at \(1,\): got 2, expected 1"),
    (np.array([0.0, np.nan]), np.array([0.0, 1.0]), r"y at \(1,\): got nan"),
    (np.array([0.5]), np.array([1], dtype=np.int64), "dtype float64, expected integers"),
    ("1", 1.0, "y is a str"),
])  # fmt: skip
def test_same_says_what_differs_and_where(got, expected, message):
    with pytest.raises(Failed, match=message):
        same("y", got, expected)
