"""Calling a student's code so that whatever it does becomes one clear line.

It gets copies of the arrays and may not change them; exceptions, wrong types and time-outs become `Failed`; what it
prints is not shown, or a thousand calls would bury the answer. While it runs, a profile function watches whether code
of this package runs inside it: handing in the package's own implementation, or a wrapper of it, is `Borrowed`. That is
a watch for the honest and the hurried, not a wall: code in this process can in the end do anything, which is why a
class is graded under another user (TEACHING.md).

A time limit is a thread that, when time is up, interrupts the main thread again and again until the block is left: a
handler for the interrupt, installed for the block, raises there, and tells it from a Ctrl-C. Time is counted in ticks:
a machine that sleeps uses none. Off the main thread no code can be interrupted, and there is no limit.
"""

from __future__ import annotations

import _thread
import dis
import io
import signal
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import Any

import numpy as np

from ..autograd import Function
from .exercise import Failed

PACKAGE = __package__.split(".")[0]
ENGINE = tuple(
    f"{PACKAGE}.{name}"
    for name in ("autograd.", "config.", "gradcheck.", "plots.", "exercises.calling.", "exercises.planted.Finding")
)
TICK = 0.05  # seconds


class Borrowed(BaseException):
    """The work is, wraps or imports the package's own implementation; no `except Exception` stops it."""


class _Nowhere(io.TextIOBase):
    """Takes what is printed and keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)


class TimeIsUp(BaseException):
    """Raised in the main thread when a time limit is over."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeIsUp` in the block when it takes longer (in the main thread; see the module's text)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    up, left = threading.Event(), threading.Event()

    def interrupted(number: int, frame: Any) -> None:
        if not up.is_set():
            raise KeyboardInterrupt
        if not left.is_set():
            raise TimeIsUp

    def watch() -> None:
        waited = 0.0
        while not left.wait(min(TICK, seconds)):
            waited += TICK
            if waited >= seconds:
                up.set()
                _interrupt_main()

    previous, thread = signal.signal(signal.SIGINT, interrupted), threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        while thread.is_alive():
            try:
                left.set()
                thread.join()
            except TimeIsUp:  # it came while the block was being left
                continue
        signal.signal(signal.SIGINT, previous)


def _interrupt_main() -> None:
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:  # wakes a sleeping call too; not on Windows
        signal.pthread_kill(main, signal.SIGINT)
    else:
        _thread.interrupt_main()


class Mine:
    """A student's submission; calling it calls the student's function.

    Parameters
    ----------
    submission : whatever was handed in
    allowed : names of modules of the package, besides the engine, that it may use
    """

    def __init__(self, submission: Any, allowed: tuple[str, ...] = ()) -> None:
        self.submission = submission
        self._allowed = (*ENGINE, *allowed)

    def __call__(self, *args: Any, **constants: Any) -> Any:
        if not callable(self.submission):
            raise Failed(f"the submission is a {type(self.submission).__name__}, expected a function")
        return self.run(self.submission, *args, **constants)

    def part(self, name: str) -> Mine:
        """One function of a submission that is a dict or an object with several."""
        whole = self.submission
        found = whole.get(name) if isinstance(whole, dict) else getattr(whole, name, None)
        if found is None:
            raise Failed(f"{name!r} is missing")
        return Mine(found, self._allowed)

    def run(self, f: Callable[..., Any], *args: Any, **constants: Any) -> Any:
        """``f(*args, **constants)`` on copies of the arrays, watched."""
        copies, keywords = [_copied(a) for a in args], {name: _copied(a) for name, a in constants.items()}
        borrowed: list[str] = []
        with _watching(borrowed, self._allowed):
            try:
                result = f(*copies, **keywords)
                error = None
            except (TimeIsUp, Failed):
                raise
            except NotImplementedError:
                error = "not written yet (NotImplementedError)"
            except BaseException as raised:  # SystemExit too
                if isinstance(raised, KeyboardInterrupt) and not _own(raised):
                    raise
                error = f"raised {_described(raised)}"
        if borrowed:
            raise Borrowed(borrowed[0])
        if error:
            raise Failed(error)
        named = [(f"argument {i}", a, b) for i, (a, b) in enumerate(zip(args, copies))]
        for name, before, after in named + [(name, a, keywords[name]) for name, a in constants.items()]:
            if isinstance(before, np.ndarray) and not _equal(before, after):
                raise Failed(f"{name} was changed in place: compute a new array")
        if _name_in(result, self._allowed):
            raise Borrowed(_name_in(result, self._allowed))
        return result

    def forward(self, *arrays: np.ndarray, **constants: Any) -> tuple[Function, Any]:
        """A fresh op of the submitted class and what its forward returns."""
        cls = self.submission
        if not (isinstance(cls, type) and issubclass(cls, Function)):
            raise Failed(f"the submission is {cls!r}, expected a class derived from autograd.Function")
        op = self.run(cls)
        op._needs = (True,) * len(arrays)
        return op, self.run(op.forward, *arrays, **constants)

    def backward(self, op: Function, *dys: np.ndarray) -> tuple[Any, ...]:
        """What the op's backward returns, as a tuple, thunks run."""
        dxs = self.run(op.backward, *dys)
        dxs = dxs if isinstance(dxs, tuple) else (dxs,)
        return tuple(self.run(dx) if callable(dx) else dx for dx in dxs)


@contextmanager
def _watching(borrowed: list[str], allowed: tuple[str, ...]) -> Iterator[None]:
    """Note every function of the package, outside `allowed`, that runs in the block; NumPy's warnings are quiet."""

    def see(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and not borrowed:
            module = frame.f_globals.get("__name__", "")
            name = f"{module}.{frame.f_code.co_name}"
            if _is_ours(module) and not name.startswith(allowed):
                borrowed.append(name)

    previous = sys.getprofile()
    sys.setprofile(see)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"), redirect_stdout(_Nowhere()):
            warnings.simplefilter("ignore")
            yield
    finally:
        if sys.getprofile() is not see:
            borrowed.append("code out of sight: the profile function was replaced")
        sys.setprofile(previous)


def given(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as it is handed to a student's code: what runs inside it is ours, and not looked at."""

    def inner(*args: Any, **constants: Any) -> Any:
        watcher = sys.getprofile()
        sys.setprofile(None)
        try:
            return function(*args, **constants)
        finally:
            sys.setprofile(watcher)

    return inner


def borrowed_part(submission: Any, allowed: tuple[str, ...] = ()) -> str | None:
    """Name of the first part of the package that a submission is, wraps, refers to or imports; None if there is none.

    Looks through classes, functions (defaults, closures, the globals and imports their code names), partials, bound
    methods, attributes and containers, as far as they are the student's own.
    """
    allowed = (*ENGINE, *allowed)
    waiting, seen = [submission], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if name := _name_in(value, allowed):
            return name
        waiting.extend(_inside(value, allowed))
    return None


def _name_in(value: Any, allowed: tuple[str, ...]) -> str:
    """'module.name' if `value` is a module, class, function or object of the package outside `allowed`; else ''."""
    if isinstance(value, types.ModuleType):
        module, name = value.__name__, ""
    elif isinstance(value, type | types.FunctionType):
        module, name = value.__module__ or "", f".{value.__qualname__}"
    else:
        module, name = type(value).__module__ or "", f".{type(value).__qualname__}"
    return module + name if _is_ours(module) and not f"{module}{name or '.'}".startswith(allowed) else ""


def _is_ours(module: str) -> bool:
    return module == PACKAGE or module.startswith(f"{PACKAGE}.")


def _inside(value: Any, allowed: tuple[str, ...]) -> list[Any]:
    """What a value of the student's refers to."""
    if isinstance(value, list | tuple | set):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, staticmethod | classmethod):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget, value.fset]
    if isinstance(value, types.FunctionType):
        if _is_ours(value.__module__ or ""):
            return []
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        wrapped = getattr(value, "__wrapped__", None)
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), wrapped,
                *_named_by(value.__code__, value.__globals__)]  # fmt: skip
    if isinstance(value, type):
        theirs = value.__module__ not in sys.stdlib_module_names and not value.__module__.startswith(("numpy", PACKAGE))
        return [*value.__bases__, *vars(value).values()] if theirs and value is not object else []
    if isinstance(value, types.ModuleType | np.ndarray | np.generic) or not hasattr(value, "__dict__"):
        return []
    return [type(value), *vars(value).values()]


def _named_by(code: types.CodeType, scope: dict[str, Any]) -> list[Any]:
    """Globals that a function's code loads, and modules of ours that it imports."""
    found: list[Any] = []
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval in scope:
            found.append(scope[step.argval])
        elif step.opname == "IMPORT_NAME" and _is_ours(step.argval) and step.argval != PACKAGE:
            found.append(sys.modules.get(step.argval) or types.ModuleType(step.argval))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found.extend(_named_by(constant, scope))
    return found


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _copied(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(_copied(v) for v in value)
    if type(value) is dict:
        return {key: _copied(v) for key, v in value.items()}
    return value


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _own(error: BaseException) -> bool:
    """Whether the student's code raised it itself: its last frame is then no handler of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].name != "interrupted"


def _described(error: BaseException) -> str:
    """Type, text and line of an exception, in one line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    where = f" (line {frames[-1].lineno} of {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{where}"
