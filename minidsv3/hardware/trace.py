"""Any timeline as a Chrome trace: a JSON file that Perfetto (ui.perfetto.dev) and chrome://tracing open.

A trace is a list of spans, each on a track: a process (a GPU, a rank) and a thread of it (a stream). Times are seconds
here and microseconds in the file ("complete" events, ``"ph": "X"``); names of processes and threads are metadata
events (``"ph": "M"``), in order of first use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Span(NamedTuple):
    """One bar: seconds from the start of the trace."""

    name: str
    start: float
    seconds: float
    process: str
    thread: str
    category: str = ""
    arguments: Mapping[str, Any] = {}


def spans_of_schedule(timeline: Any) -> list[Span]:
    """Spans of a pipeline timeline (`parallel.timeline.Timeline`): a process a rank; waiting stays empty."""
    found = []
    for rank, row in enumerate(timeline.schedule):
        for op, start, end in zip(row, timeline.start[rank], timeline.end[rank]):
            kind, direction, chunk, *backward = op
            arguments = {"dir": direction, "chunk": chunk}
            if backward:
                arguments |= {"backward dir": backward[0], "backward chunk": backward[1]}
            name = f"{kind} {chunk}" + (f" & {backward[1]}" if backward else "")
            found.append(Span(name, start, end - start, f"rank {rank}", "pipeline", kind, arguments))
    return found


def spans_of_streams(placed: Iterable[Any], process: str = "GPU") -> list[Span]:
    """Spans of ops on streams (`clock.Placed`): a thread a stream."""
    return [Span(p.op.name, p.start, p.end - p.start, process, p.op.stream, p.op.stream) for p in placed]


def chrome_trace(spans: Iterable[Span]) -> dict[str, Any]:
    """The trace as the object that the JSON file holds.

    Raises ValueError for a span that starts before 0, or whose time is negative or not finite.
    """
    processes: dict[str, int] = {}
    threads: dict[tuple[str, str], int] = {}
    events: list[dict[str, Any]] = []
    for span in spans:
        if not (0 <= span.start < math.inf and 0 <= span.seconds < math.inf):
            raise ValueError(f"span {span.name!r} from {span.start} s for {span.seconds} s is no time on a trace")
        pid = processes.setdefault(span.process, len(processes) + 1)
        tid = threads.setdefault((span.process, span.thread), len(threads) + 1)
        event = {"name": span.name, "cat": span.category or "span", "ph": "X", "ts": span.start * 1e6,
                 "dur": span.seconds * 1e6, "pid": pid, "tid": tid}  # fmt: skip
        events.append(event | ({"args": dict(span.arguments)} if span.arguments else {}))
    events.sort(key=lambda event: (event["ts"], event["tid"]))
    names = [{"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": process}}
             for process, pid in processes.items()]  # fmt: skip
    names += [{"name": "thread_name", "ph": "M", "pid": processes[process], "tid": tid, "args": {"name": thread}}
              for (process, thread), tid in threads.items()]  # fmt: skip
    return {"traceEvents": names + events, "displayTimeUnit": "ms"}


def write_trace(path: str | Path, spans: Iterable[Span]) -> Path:
    """Write a trace; a reader never sees half a file."""
    path = Path(path)
    text = json.dumps(chrome_trace(spans), allow_nan=False)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path
