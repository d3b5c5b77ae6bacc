"""Looking inside: every module and op of a forward pass, in the order in which they finished.

    with minidsv3.record() as r:
        model.logits(tokens)
    print(r.table())
    r["model.layers.1.mlp.gate"].outputs

Costs nothing when it is off. Recorded arrays are the model's own, not copies: look, do not write.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ..autograd import Array, OpEvent, observing


class Entry(NamedTuple):
    """One module or op that ran."""

    name: str  # of a module: its released name; of an op: the module's name, a colon, the op
    kind: str  # 'module' or 'op'
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]

    @property
    def output(self) -> Array:
        """The first output."""
        return self.outputs[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the outputs."""
        return sum(a.nbytes for a in self.outputs)


class Record:
    """What `record` collected: a sequence of entries, also reachable by name."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __contains__(self, name: str) -> bool:
        return any(entry.name == name for entry in self.entries)

    def __getitem__(self, name: str) -> Entry:
        """The first entry of this name; KeyError with near names."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        near = [entry.name for entry in self.entries if name in entry.name][:5]
        raise KeyError(f"{name!r} did not run" + (f"; did you mean one of {near}?" if near else ""))

    def table(self, kind: str | None = None) -> str:
        """Text table of name, input shapes, output shapes, dtype and bytes; `kind` keeps 'module' or 'op' only."""
        rows = [("name", "inputs", "outputs", "dtype", "bytes")]
        for e in self.entries:
            if kind in (None, e.kind):
                rows.append((e.name, _shapes(e.inputs), _shapes(e.outputs), str(e.output.dtype), f"{e.nbytes:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[4].rjust(12)]) for row in rows)


@contextmanager
def record() -> Iterator[Record]:
    """Record every module and op that runs in the block (this thread)."""
    result = Record()

    def observe(event: OpEvent) -> None:
        if event.phase == "backward":
            return
        module = event.phase == "module"
        name = event.op.name if module else f"{event.op._scope}:{type(event.op).__name__.removesuffix('Function')}"
        arrays = (tuple(t.data for t in tensors) for tensors in (event.inputs, event.outputs))
        result.entries.append(Entry(name or type(event.op).__name__, "module" if module else "op", *arrays))

    with observing(observe):
        yield result


def _shapes(arrays: tuple[Array, ...]) -> str:
    return " ".join("x".join(map(str, a.shape)) or "scalar" for a in arrays)
