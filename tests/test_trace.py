"""Traces against the rules of the Chrome trace format that Perfetto reads."""

import json

import pytest

from minidsv3.hardware.chunks import Op, in_streams
from minidsv3.hardware.trace import Span, chrome_trace, spans_of_schedule, spans_of_streams, write_trace
from minidsv3.parallel.schedules import build
from minidsv3.parallel.timeline import timeline


def check_format(content):
    """Trace Event Format, JSON object form: complete events with times in microseconds, and names of their tracks."""
    assert isinstance(content["traceEvents"], list)
    assert content["displayTimeUnit"] in ("ms", "ns")
    named, ends = set(), {}
    for event in content["traceEvents"]:
        assert isinstance(event["name"], str) and event["ph"] in ("X", "M")
        assert type(event["pid"]) is int and type(event["tid"]) is int
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name") and isinstance(event["args"]["name"], str)
            named.add((event["name"], event["pid"], event["tid"]))
            continue
        assert isinstance(event["cat"], str) and event["ts"] >= 0 and event["dur"] >= 0
        track = event["pid"], event["tid"]
        assert ("process_name", event["pid"], 0) in named and ("thread_name", *track) in named
        assert event["ts"] >= ends.get(track, 0) - 1e-6, "events of a track overlap, or are not in order"
        ends[track] = event["ts"] + event["dur"]


def test_schedule_becomes_a_trace(tmp_path):
    times = timeline(build("dualpipe", 4, 8), {"F": 1, "B": 2, "Bi": 1, "W": 1, "FB": 2.5})
    path = write_trace(tmp_path / "trace.json", spans_of_schedule(times))
    content = json.loads(path.read_text(encoding="utf-8"))
    check_format(content)
    events = [e for e in content["traceEvents"] if e["ph"] == "X"]
    assert len(events) == sum(map(len, times.schedule))
    assert sum(e["dur"] for e in events) == pytest.approx(1e6 * sum(times.busy))
    assert max(e["ts"] + e["dur"] for e in events) == pytest.approx(1e6 * times.makespan)
    assert {e["args"]["name"] for e in content["traceEvents"] if e["name"] == "process_name"} == {
        f"rank {r}" for r in range(4)
    }
    assert list(tmp_path.iterdir()) == [path]


def test_streams_become_threads_of_one_process():
    placed = in_streams([Op("a", "compute", 2e-3), Op("m", "communication", 1e-3, ("a",))])
    content = chrome_trace(spans_of_streams(placed, "GPU 3"))
    check_format(content)
    assert [(e["name"], e["ts"], e["dur"]) for e in content["traceEvents"] if e["ph"] == "X"] == [
        ("a", 0.0, 2000.0), ("m", 2000.0, 1000.0)]  # fmt: skip


@pytest.mark.parametrize("start, seconds", [(-1, 1), (0, -1), (float("nan"), 1), (0, float("inf"))])
def test_times_that_are_none_are_refused(start, seconds):
    with pytest.raises(ValueError, match="'late'"):
        chrome_trace([Span("late", start, seconds, "p", "t")])
