"""Times of schedules against the recorded ones, a tick-by-tick simulation, and the formulas where they hold."""

import json
import random
from pathlib import Path

import pytest

from minidsv3.parallel.schedules import SCHEDULES, bubble, build, parts
from minidsv3.parallel.timeline import timeline

GOLDEN = json.loads((Path(__file__).parent / "golden" / "dualpipe.json").read_text(encoding="utf-8"))["cases"]
RECORDED = [(case, times) for case in GOLDEN for times in case["time"]]
UNIT = {"F": 1, "B": 2, "Bi": 1, "W": 1, "FB": 3}


@pytest.mark.parametrize("blocking", [False, True], ids=["data-driven", "blocking sends"])
@pytest.mark.parametrize("case, times", RECORDED, ids=[f"{c['algorithm']}-FB{t['FB']}" for c, t in RECORDED])
def test_timeline_is_the_recorded_one(case, times, blocking):
    schedule = build(case["algorithm"].lower(), case["pp_ranks"], case["num_chunks"])
    result = timeline(schedule, times, blocking_sends=blocking)
    assert (result.makespan, result.idle) == (times["makespan"], times["idle"])
    assert result.start == times.get("start_times", result.start)
    assert result.peak_live == case["peak_live_activation_chunks"]


def by_ticks(schedule, durations):
    """Start times from a clock that ticks: at each tick every free rank begins its next instruction if it can."""
    at = [0] * schedule.ranks
    free = [0] * schedule.ranks
    start = [[] for _ in schedule]
    done = {}  # (F or B, stage, micro-batch) -> end
    tick = 0
    while any(i < len(row) for i, row in zip(at, schedule)):
        for rank, row in enumerate(schedule):
            if at[rank] == len(row) or free[rank] > tick:
                continue
            op = row[at[rank]]
            inputs, outputs = [], []
            for kind, direction, chunk in parts(op):
                stage, batch = schedule.stage_of(rank, direction), schedule.microbatch_of(direction, chunk)
                if kind == "F":
                    inputs += [("F", stage - 1, batch)] if stage else []
                    outputs.append(("F", stage, batch))
                elif kind != "W":
                    inputs += [("B", stage + 1, batch)] if stage < schedule.stages - 1 else []
                    outputs.append(("B", stage, batch))
            if all(done.get(key, tick + 1) <= tick for key in inputs):
                start[rank].append(tick)
                free[rank] = tick + durations[op[0]]
                done.update(dict.fromkeys(outputs, free[rank]))
                at[rank] += 1
        tick += 1
    return start


@pytest.mark.parametrize("name, ranks, chunks", [
    ("1f1b", 5, 7), ("1f1b", 4, 3), ("zb1p", 5, 8), ("dualpipe", 6, 14), ("dualpipe", 2, 6), ("dualpipev", 3, 7),
    ("dualpipev", 1, 2),
])  # fmt: skip
@pytest.mark.parametrize("durations", [UNIT, {"F": 3, "B": 7, "Bi": 5, "W": 2, "FB": 8}], ids=["unit", "uneven"])
def test_timeline_equals_a_ticking_clock(name, ranks, chunks, durations):
    schedule = build(name, ranks, chunks)
    assert timeline(schedule, durations).start == by_ticks(schedule, durations)


def random_times(rng, hold):
    """Whole-number durations in which `hold(F, Bi, W)` is true; the pair is as long as its parts, or overlaps."""
    while True:
        F, Bi, W = (rng.randint(1, 9) for _ in range(3))
        if hold(F, Bi, W):
            return {"F": F, "B": Bi + W, "Bi": Bi, "W": W, "FB": rng.randint(max(F, Bi + W), F + Bi + W)}


@pytest.mark.parametrize("name, hold, ranks_of", [
    ("1f1b", lambda F, Bi, W: True, lambda ranks: range(ranks)),
    ("zb1p", lambda F, Bi, W: min(F, Bi) >= W, lambda ranks: range(ranks)),
    ("dualpipe", lambda F, Bi, W: F == Bi >= W, lambda ranks: (ranks // 2 - 1, ranks // 2)),
    ("dualpipev", lambda F, Bi, W: F == Bi >= W, lambda ranks: (ranks - 1,)),
], ids=["1f1b any", "zb1p W<=F,Bi", "dualpipe F=Bi>=W", "dualpipev F=Bi>=W"])  # fmt: skip
def test_bubble_is_the_formula_of_table_2_where_it_holds(name, hold, ranks_of):
    rng = random.Random(5)
    for _ in range(40):
        ranks = 2 * rng.randint(1, 5)
        chunks = 2 * rng.randint(ranks, 3 * ranks)
        t = random_times(rng, hold)
        result = timeline(build(name, ranks, chunks), t)
        expected = bubble(name, ranks, t["F"], t["B"], t["W"], t["FB"])
        assert [result.idle[r] for r in ranks_of(ranks)] == [expected] * len(ranks_of(ranks)), (ranks, chunks, t)


def test_bubble_of_dualpipe_misses_outside_its_regime():
    """F 10, Bi 13, W 6 on 8 ranks: 72 by the clock, 81 by the formula."""
    t = {"F": 10, "B": 19, "Bi": 13, "W": 6, "FB": 26}
    assert max(timeline(build("dualpipe", 8, 20), t).idle) == 72
    assert bubble("dualpipe", 8, 10, 19, 6, 26) == 81


@pytest.mark.parametrize("name", SCHEDULES)
def test_idle_and_busy_make_up_the_makespan(name):
    result = timeline(build(name, 4, 9 if name != "dualpipe" else 12), UNIT)
    assert [a + b for a, b in zip(result.busy, result.idle)] == [result.makespan] * 4
    assert all(b >= a for times in zip(result.start, result.end) for a, b in zip(*times))


def test_hop_delays_every_message_between_ranks_and_none_inside():
    t = {"F": 4, "B": 6}
    assert timeline(build("1f1b", 3, 1), t, hop=0.5).makespan == 3 * (4 + 6) + 4 * 0.5
    folded = timeline(build("dualpipev", 1, 2), UNIT, hop=100)  # one rank sends nothing
    assert folded.makespan == timeline(build("dualpipev", 1, 2), UNIT).makespan


def test_durations_may_depend_on_the_rank():
    """Stage 1 twice as slow: it sets the pace."""
    result = timeline(build("1f1b", 2, 6), lambda rank, op: (1 + rank) * UNIT[op[0]])
    assert result.makespan == 1 + 6 * 2 * (1 + 2) + 2


@pytest.mark.parametrize("durations, rule", [
    ({"F": 1}, "no 'B'"), ({"F": 1, "B": -2}, "-2"), ({"F": float("nan"), "B": 1}, "nan"),
])  # fmt: skip
def test_timeline_refuses_durations_that_are_none(durations, rule):
    with pytest.raises(ValueError, match=rule):
        timeline(build("1f1b", 2, 3), durations)
