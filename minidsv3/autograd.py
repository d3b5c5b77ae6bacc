"""Reverse-mode differentiation on a tape of coarse ops.

An op is a `Function`: `forward` and `backward` side by side, on plain ndarrays. `Function.apply` runs the forward,
and, when an input needs a gradient, remembers the op; `backward(loss)` walks the remembered ops from the newest to the
oldest and hands each the gradients of its outputs. That is the whole idea. The rest of this file is the four doors
that the other parts of the package use: `replacing` (swap one op for another), `observing` and `trace` (see every op
that runs), `deferred_weight_grads` (zero-bubble pipelines) and `Checkpoint` (recompute instead of keep).

Left out on purpose: broadcasting rules, double backward, an operator for every NumPy function. An op is the unit of
derivative, of precision, of saved memory, of time and of an exercise; a model needs about fifteen of them.

Rules for writing an op
    * positional inputs are differentiable, keywords are constants;
    * keep arrays only through `self.save(...)`: it is the complete list of what the backward pass needs;
    * never write into an input or into a `dy`; the engine never adds in place to a gradient that an op returned;
    * a weight gradient is returned as a function without arguments (a thunk): it is run at once, or later. As an
      `InPlaceThunk` it can be given the array that is to hold the gradient, which saves a copy;
    * an op whose output costs little says how to make it `again`, and linear layers behind it need not keep it.

State (recording, observers, replacements, deferral) is per thread: each worker of a data-parallel step runs its own
tape over shared parameters.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Thunk = Callable[[], Array]


class InPlaceThunk(NamedTuple):
    """A weight gradient to be computed: ``compute(out)`` writes into `out` and returns it; None: into a new array."""

    compute: Callable[[Array | None], Array]

    def __call__(self) -> Array:
        return self.compute(None)


class _Engine(threading.local):
    """Per-thread state; the only state of this package that outlives a call."""

    def __init__(self) -> None:
        self.recording = True
        self.ticks = itertools.count()
        self.replacements: list[tuple[type, type]] = []
        self.observers: list[Callable[[OpEvent], None]] = []
        self.deferred: DeferredGradients | None = None
        self.into: GradientBuffer | None = None
        self.scope: list[str] = []  # names of the modules whose forward is running


_engine = _Engine()


class Tensor:
    """An array and the op that made it.

    Attributes
    ----------
    data : ndarray
    grad : ndarray or None
        Gradient of a leaf after `backward`; None for everything an op made.
    """

    __slots__ = ("__weakref__", "_op", "_slot", "data", "grad", "requires_grad")

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        self.data: Array = np.asarray(data)
        self.grad: Array | None = None
        self.requires_grad = requires_grad
        self._op: Function | None = None
        self._slot = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def made_by(self) -> Function | None:
        """The op whose output this is; None for a leaf, and where nothing is recorded."""
        return self._op

    def __float__(self) -> float:
        return float(self.data)

    def __repr__(self) -> str:
        made_by = f" from {type(self._op).__name__}" if self._op else ""
        return f"{type(self).__name__}({self.shape}, {self.dtype}{made_by})"


class Parameter(Tensor):
    """A weight: a leaf with its own gradient buffer, into which gradients are added.

    Until `allocate` (or a checkpoint) fills it, it is a zero-stride view of one number: the real classes can be built
    at 671B shapes and counted. A parameter may hold several tensors of the checkpoint, stored adjacent so that one
    gemm serves them all: `parts` maps each name to its place, and `part(name)` is a view with the same interface.

    Parameters
    ----------
    shape : tuple of int
    parts : dict of str to index, optional
    """

    __slots__ = ("parts",)

    def __init__(self, shape: tuple[int, ...], parts: dict[str, Any] | None = None) -> None:
        super().__init__(np.broadcast_to(np.float32(0), shape), requires_grad=True)
        self.grad = self.data
        self.parts = parts

    @property
    def is_lazy(self) -> bool:
        """Whether no memory has been spent on it yet."""
        return not self.data.flags.writeable

    def allocate(self, dtype: Any) -> None:
        """Spend the memory: zeros for the weight; the gradient stays lazy until the first one arrives."""
        self.data = np.zeros(self.shape, dtype=dtype)
        self.grad = np.broadcast_to(self.data.dtype.type(0), self.shape)

    def zero_grad(self) -> None:
        if self.grad is not None and self.grad.flags.writeable:
            self.grad[...] = 0

    def part(self, name: str) -> ParameterPart:
        """The view that holds checkpoint tensor `name`."""
        assert self.parts is not None
        return ParameterPart(self, self.parts[name])


class ParameterPart(Parameter):
    """One checkpoint tensor inside a packed `Parameter`: reading and writing go to the whole."""

    __slots__ = ("_index", "_whole")

    def __init__(self, whole: Parameter, index: Any) -> None:
        self._whole, self._index = whole, index
        self.requires_grad, self._op, self._slot, self.parts = True, None, 0, None

    @property
    def data(self) -> Array:
        return self._whole.data[self._index]

    @data.setter
    def data(self, value: Array) -> None:
        self._whole.data[self._index] = value

    @property
    def grad(self) -> Array:
        assert self._whole.grad is not None
        return self._whole.grad[self._index]

    @grad.setter
    def grad(self, value: Array) -> None:
        assert self._whole.grad is not None
        self._whole.grad[self._index] = value


class GradientBuffer(dict[Parameter, Array]):
    """Where one worker's gradients go: an array for each parameter.

    The first gradient of a pass is written, later ones are added, so nothing has to be zeroed in between:
    `begin()`, any number of `backward(loss, into=buffer)`, `finish()`.
    """

    def __init__(self, arrays: dict[Parameter, Array]) -> None:
        super().__init__(arrays)
        self._touched: set[Parameter] = set()

    def begin(self) -> None:
        """Forget the last pass."""
        self._touched.clear()

    def fresh(self, parameter: Parameter) -> Array | None:
        """The array of `parameter` while nothing has been written to it in this pass."""
        return None if parameter in self._touched else self[parameter]

    def add(self, parameter: Parameter, dy: Array) -> None:
        """Add `dy`, unless it is the parameter's own array, filled by a thunk."""
        if parameter in self._touched:
            self[parameter] += dy
            return
        self._touched.add(parameter)
        if dy is not self[parameter]:
            self[parameter][...] = dy

    def finish(self) -> None:
        """Zero what no gradient reached."""
        for parameter in self.keys() - self._touched:
            self[parameter][...] = 0


class Function:
    """One op. Subclasses define `forward` and `backward`; callers use `apply`."""

    _saved: tuple[Array, ...] | None = ()
    _needs: tuple[bool, ...] = ()
    _sources: tuple[Source, ...] = ()  # where each input came from
    _outputs: tuple[tuple[tuple[int, ...], np.dtype], ...] = ()
    _order = 0
    _scope = ""
    flops = 0  # of the forward pass, set by ops that contain gemms; a multiply-add counts two

    forward: Callable[..., Any]  # (*arrays, **constants) -> array or tuple of arrays
    backward: Callable[..., Any]  # (*dys) -> gradient, thunk or None for each positional input

    def save(self, *arrays: Array) -> None:
        """Keep `arrays` for the backward pass (under `no_grad` nothing is kept)."""
        self._saved = arrays if True in self._needs else ()

    @property
    def saved(self) -> tuple[Array, ...]:
        if self._saved is None:
            raise RuntimeError(f"{type(self).__name__}: backward was already run through this graph")
        return self._saved

    def needs(self, index: int) -> bool:
        """Whether the gradient of positional input `index` is wanted."""
        return bool(self._needs) and self._needs[index]

    def again(self) -> Thunk | None:
        """A function that makes the output once more, for less than a gemm, from what is saved; None: there is none.

        A linear layer that has the output for its input then need not keep it (V3 report, section 3.2.3).
        """
        return None

    @classmethod
    def apply(cls, *inputs: Any, **constants: Any) -> Any:
        """Run the op. The one choke point: replacement, recording and observation all happen here."""
        if not _engine.recording and not _engine.observers:  # decoding: nothing to remember, nobody to tell
            op = (_replacement(cls) if _engine.replacements else cls)()
            result = op.forward(*[x.data if isinstance(x, Tensor) else x for x in inputs], **constants)
            return tuple(map(Tensor, result)) if isinstance(result, tuple) else Tensor(result)
        observed, recording = bool(_engine.observers), _engine.recording
        tensors = tuple([x if isinstance(x, Tensor) else Tensor(x) for x in inputs])
        op = (_replacement(cls) if _engine.replacements else cls)()
        op._needs = tuple([recording and t.requires_grad for t in tensors])
        op._scope = _engine.scope[-1] if _engine.scope else ""
        start = time.perf_counter() if observed else 0.0
        results = op.forward(*[t.data for t in tensors], **constants)
        outputs = tuple([Tensor(r) for r in results]) if isinstance(results, tuple) else (Tensor(results),)
        if True in op._needs:
            # Not the input Tensors: they would keep arrays alive that no backward asked for.
            op._sources = tuple([t if t._op is None else (t._op, t._slot) for t in tensors])
            op._order = next(_engine.ticks)
            op._outputs = tuple([(t.data.shape, t.data.dtype) for t in outputs])
            for slot, tensor in enumerate(outputs):
                tensor.requires_grad, tensor._op, tensor._slot = tensor.data.dtype.kind == "f", op, slot
        if observed:
            _notify(OpEvent("forward", op, tensors, outputs, time.perf_counter() - start))
        return outputs if isinstance(results, tuple) else outputs[0]


Source = Tensor | tuple[Function, int]  # a leaf, or an output of an op


def backward(loss: Tensor, into: GradientBuffer | None = None) -> None:
    """Add the gradient of `loss` to every parameter it depends on.

    Parameters
    ----------
    loss : Tensor of one element
    into : GradientBuffer, optional
        Where to add instead of `parameter.grad`: a data-parallel worker passes its own.

    Raises
    ------
    ValueError
        `loss` has more than one element, or nothing it was made from needs a gradient.
    """
    if loss.data.size != 1:
        raise ValueError(f"backward starts from one number, got shape {loss.shape}")
    if loss._op is None:
        raise ValueError("nothing to differentiate: the loss was made under no_grad or from constants")
    previous, _engine.into = _engine.into, into
    try:
        _propagate((loss,), (np.ones_like(loss.data),))
    finally:
        _engine.into = previous


def _propagate(tensors: tuple[Tensor, ...], dys: tuple[Array | None, ...]) -> None:
    """Newest op first, so that every rank that runs the same program meets in the same order."""
    pending: dict[Function, list[Array | None]] = {}
    queue: list[tuple[int, Function]] = []

    def add(source: Source, dy: Array) -> None:
        if isinstance(source, Tensor):
            _add_to_leaf(source, dy)
            return
        op, slot = source
        if op not in pending:
            pending[op] = [None] * len(op._outputs)
            heapq.heappush(queue, (-op._order, op))
        before = pending[op][slot]
        pending[op][slot] = dy if before is None else before + dy

    for tensor, dy in zip(tensors, dys):
        if dy is not None:
            add(tensor if tensor._op is None else (tensor._op, tensor._slot), dy)
    while queue:
        _, op = heapq.heappop(queue)
        output_dys = [np.zeros(*spec) if dy is None else dy for dy, spec in zip(pending.pop(op), op._outputs)]
        try:
            for source, needed, dx in zip(op._sources, op._needs, _run_backward(op, output_dys)):
                if not needed:
                    continue
                if _engine.deferred is not None and callable(dx) and isinstance(source, Parameter):
                    _engine.deferred.append(source, partial(_deferred, op, source, dx), _engine.into)
                else:
                    add(source, _checked(op, source, dx))
        except Exception as error:
            _note(error, op)
            raise
        op._saved, op._sources = None, ()  # frees the activations as the walk goes


def _run_backward(op: Function, dys: list[Array]) -> tuple[Any, ...]:
    start = time.perf_counter() if _engine.observers else 0.0
    if op._saved is None:
        raise RuntimeError(f"{type(op).__name__}: backward was already run through this graph")
    dxs = op.backward(*dys)
    dxs = dxs if isinstance(dxs, tuple) else (dxs,)
    if len(dxs) != len(op._needs):
        raise TypeError(f"{type(op).__name__}.backward returned {len(dxs)} gradients for {len(op._needs)} inputs")
    if _engine.observers:
        if _engine.deferred is None:  # the time of a weight gradient belongs to its op
            dxs = tuple(dx() if callable(dx) else dx for dx in dxs)
        inputs = tuple(Tensor(dy) for dy in dys)
        outputs = tuple(Tensor(dx) for dx in dxs if isinstance(dx, np.ndarray))
        _notify(OpEvent("backward", op, inputs, outputs, time.perf_counter() - start))
    return dxs


def _note(error: Exception, op: Function) -> None:
    """Let the error say, once, which op of which module it came from."""
    note = f"in the backward of {type(op).__name__}, made by {op._scope or 'no module'}"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def _deferred(op: Function, parameter: Parameter, thunk: Thunk) -> Array:
    """A weight gradient that had waited."""
    try:
        return _checked(op, parameter, thunk)
    except Exception as error:
        _note(error, op)
        raise


def _checked(op: Function, source: Source, dx: Any) -> Array:
    """The gradient `dx` of what came from `source` (a thunk is run); TypeError unless shape and dtype are its own."""
    if isinstance(dx, InPlaceThunk) and isinstance(source, Parameter) and _engine.into is not None:
        dx = dx.compute(_engine.into.fresh(source))
    elif callable(dx):
        dx = dx()
    shape, dtype = (source.shape, source.dtype) if isinstance(source, Tensor) else source[0]._outputs[source[1]]
    if not isinstance(dx, np.ndarray) or dx.shape != shape or dx.dtype != dtype:
        got = f"{dx.shape} {dx.dtype}" if isinstance(dx, np.ndarray) else repr(dx)
        raise TypeError(
            f"{type(op).__name__}.backward (made by {op._scope or 'no module'}): gradient is {got}, "
            f"expected {shape} {dtype}"
        )
    return dx


def _add_to_leaf(tensor: Tensor, dy: Array) -> None:
    if not isinstance(tensor, Parameter):
        tensor.grad = dy if tensor.grad is None else tensor.grad + dy
    elif _engine.into is not None:
        _engine.into.add(tensor, dy)
    elif tensor.grad is None or not tensor.grad.flags.writeable:
        tensor.grad = dy.copy()
    else:
        tensor.grad += dy


class DeferredGradients:
    """Weight gradients that wait: the W of zero-bubble schedules. `run()` computes them, oldest first."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Parameter, Thunk, GradientBuffer | None]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def append(self, parameter: Parameter, thunk: Thunk, into: GradientBuffer | None) -> None:
        self._waiting.append((parameter, thunk, into))

    def run(self) -> None:
        """Compute and add all that wait, in the order in which the backward pass met them."""
        waiting, self._waiting = self._waiting, []
        for parameter, thunk, into in waiting:
            previous, _engine.into = _engine.into, into
            try:
                _add_to_leaf(parameter, thunk())
            finally:
                _engine.into = previous


class Checkpoint(Function):
    """Activation recomputation: keep the inputs of `run`, and run it again when its gradient is asked for.

    ``Checkpoint.apply(x, run=layer)`` equals ``layer(x)`` to the bit, gradients included; `run` takes and returns
    Tensors, and must compute the same when called twice. One of the inputs must need a gradient: the weights that
    `run` closes over are not seen here.
    """

    def forward(self, *arrays: Array, run: Callable[..., Any]) -> Any:
        self.save(*arrays)
        self._run = run
        with no_grad():
            outputs = run(*(Tensor(a) for a in arrays))
        return tuple(t.data for t in outputs) if isinstance(outputs, tuple) else outputs.data

    def backward(self, *dys: Array) -> tuple[Any, ...]:
        inputs = tuple(Tensor(a, requires_grad=needed) for a, needed in zip(self.saved, self._needs))
        with scope(self._scope), _recording(True):
            outputs = self._run(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        _propagate(outputs, tuple(dy if t._op else None for t, dy in zip(outputs, dys)))
        return tuple(np.zeros_like(t.data) if t.grad is None else t.grad for t in inputs)


class OpEvent(NamedTuple):
    """What an observer sees: one forward or backward call of one op, or the end of a module's forward."""

    phase: str  # 'forward', 'backward' or 'module'
    op: Any  # the Function, or the Module
    inputs: tuple[Tensor, ...]  # of a backward: the output gradients
    outputs: tuple[Tensor, ...]  # of a backward: the input gradients
    seconds: float


class OpRecord(NamedTuple):
    """One line of a `trace`."""

    phase: str
    name: str
    scope: str
    shapes: tuple[tuple[int, ...], ...]
    saved_bytes: int
    flops: int
    seconds: float


@contextmanager
def trace() -> Iterator[list[OpRecord]]:
    """Collect name, shapes, saved bytes, FLOPs and seconds of every op that runs in the block (this thread).

    FLOPs count gemms only; the backward of a gemm is two of the same size.
    """
    records: list[OpRecord] = []

    def observe(event: OpEvent) -> None:
        if event.phase == "module":
            return
        op, forward = event.op, event.phase == "forward"
        records.append(
            OpRecord(
                event.phase,
                type(op).__name__,
                op._scope,
                tuple(t.shape for t in event.inputs),
                sum(a.nbytes for a in op._saved or ()) if forward else 0,
                op.flops if forward else 2 * op.flops,
                event.seconds,
            )
        )

    with observing(observe):
        yield records


def call_module(module: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``module.forward(...)`` under the module's name; observers see phase 'module', the module in place of the op."""
    _engine.scope.append(name)
    try:
        outputs = module.forward(*args, **kwargs)
        if _engine.observers:
            results = outputs if isinstance(outputs, tuple) else (outputs,)
            _notify(OpEvent("module", module, _tensors(args), _tensors(results), 0.0))
        return outputs
    finally:
        _engine.scope.pop()


def _tensors(values: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The arrays among `values`, as Tensors."""
    return tuple(v if isinstance(v, Tensor) else Tensor(v) for v in values if isinstance(v, Tensor | np.ndarray))


def _notify(event: OpEvent) -> None:
    for observer in tuple(_engine.observers):
        observer(event)


def _replacement(cls: type[Function]) -> type[Function]:
    for old, new in reversed(_engine.replacements):
        if old is cls:
            return new
    return cls


@contextmanager
def observing(observer: Callable[[OpEvent], None]) -> Iterator[None]:
    """Call `observer` after every op of this thread."""
    _engine.observers.append(observer)
    try:
        yield
    finally:
        _engine.observers.remove(observer)


def is_replaced(op: type[Function]) -> bool:
    """Whether another op runs in place of `op` (`replacing`)."""
    return _replacement(op) is not op


@contextmanager
def replacing(old: type[Function], new: type[Function]) -> Iterator[None]:
    """Use op `new` wherever the model asks for `old`: plain forms, exercises and ablations come in by this door."""
    for cls in (old, new):
        if not (isinstance(cls, type) and issubclass(cls, Function)):
            raise TypeError(f"replacing takes two Function classes, got {cls!r}")
    _engine.replacements.append((old, new))
    try:
        yield
    finally:
        _engine.replacements.remove((old, new))


@contextmanager
def _recording(value: bool) -> Iterator[None]:
    previous, _engine.recording = _engine.recording, value
    try:
        yield
    finally:
        _engine.recording = previous


@contextmanager
def no_grad() -> Iterator[None]:
    """Run forwards without remembering them."""
    with _recording(False):
        yield


@contextmanager
def deferred_weight_grads() -> Iterator[DeferredGradients]:
    """Let backward passes in the block leave weight gradients undone; the caller runs them later."""
    previous, _engine.deferred = _engine.deferred, DeferredGradients()
    try:
        yield _engine.deferred
    finally:
        _engine.deferred = previous


@contextmanager
def scope(name: str) -> Iterator[None]:
    """Name the module whose forward is running; ops and errors carry the name."""
    _engine.scope.append(name)
    try:
        yield
    finally:
        _engine.scope.pop()


def engine_state() -> tuple[list[tuple[type, type]], list[Callable[[OpEvent], None]]]:
    """Replacements and observers of this thread, for a worker that is to run under the same ones."""
    return list(_engine.replacements), list(_engine.observers)


@contextmanager
def inherited(state: tuple[list[tuple[type, type]], list[Callable[[OpEvent], None]]]) -> Iterator[None]:
    """Run the block under another thread's replacements and observers (see `engine_state`)."""
    previous = _engine.replacements, _engine.observers
    _engine.replacements, _engine.observers = list(state[0]), list(state[1])
    try:
        yield
    finally:
        _engine.replacements, _engine.observers = previous
