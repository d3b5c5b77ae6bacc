"""Pipeline schedules against instructions recorded from DualPipe's published code, against counts and closed forms.

tests/golden/dualpipe.json: control flow of deepseek-ai/DualPipe@3da1bbe, recorded with stubs for compute and messages.
"""

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from minidsv3.parallel.schedules import SCHEDULES, Schedule, as_schedule, build, needs, parts, peak_live, validate

GOLDEN = json.loads((Path(__file__).parent / "golden" / "dualpipe.json").read_text(encoding="utf-8"))["cases"]
EVERY_KIND = ("F", "B", "Bi", "W", "FB")


def legal_sizes(name, largest=9):
    for ranks in range(1, largest):
        for chunks in range(1, 3 * largest):
            if name == "dualpipe" and (ranks % 2 or chunks % 2):
                continue
            if name.startswith("dualpipe") and chunks < 2 * ranks:
                continue
            yield ranks, chunks


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["algorithm"])
def test_build_gives_the_recorded_instructions(case):
    schedule = build(case["algorithm"].lower(), case["pp_ranks"], case["num_chunks"])
    assert schedule == [[tuple(op) for op in row] for row in case["ops"]]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["algorithm"])
def test_peak_live_is_the_recorded_one(case):
    assert peak_live(case["ops"]) == case["peak_live_activation_chunks"]


def test_dualpipe_counts_at_the_size_of_v3():
    """Published code, PP16, 120 micro-batches: F 23-h (17 at h=7), FB 97+h (103), B 8 (9), Bi = W = 15-h."""
    schedule = build("dualpipe", 16, 120)
    for rank, row in enumerate(schedule):
        h = min(rank, 15 - rank)
        counts = Counter(op[0] for op in row)
        expected = {"F": 23 - h, "B": 8, "Bi": 15 - h, "W": 15 - h, "FB": 97 + h}
        if h == 7:
            expected.update(F=17, B=9, FB=103)
        assert counts == expected


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_legal_size_is_valid(name):
    for ranks, chunks in legal_sizes(name):
        schedule = build(name, ranks, chunks)
        validate(schedule)
        assert (schedule.ranks, schedule.chunks) == (ranks, chunks)


@pytest.mark.parametrize("name, most", [
    ("1f1b", lambda ranks, chunks: [min(ranks - r, chunks) for r in range(ranks)]),
    ("zb1p", lambda ranks, chunks: [min(ranks, chunks)] * ranks),
    ("dualpipe", lambda ranks, chunks: [ranks + 1] * ranks),
    ("dualpipev", lambda ranks, chunks: [2 * ranks + 1] * ranks),
])  # fmt: skip
def test_live_chunks_are_those_of_table_2(name, most):
    """PP for 1F1B and ZB1P (rank 0 of 1F1B; fewer behind), PP+1 for both DualPipes, PP counting stages."""
    for ranks, chunks in legal_sizes(name):
        assert peak_live(build(name, ranks, chunks)) == most(ranks, chunks), (ranks, chunks)


def test_one_forward_one_backward_written_out():
    F, B = (lambda c: ("F", 0, c)), (lambda c: ("B", 0, c))
    assert build("1f1b", 3, 4) == [
        [F(0), F(1), F(2), B(0), F(3), B(1), B(2), B(3)],
        [F(0), F(1), B(0), F(2), B(1), F(3), B(2), B(3)],
        [F(0), B(0), F(1), B(1), F(2), B(2), F(3), B(3)],
    ]


def test_zero_bubble_puts_off_the_weight_part_by_the_rank():
    row = build("zb1p", 4, 9)[2]
    for chunk in range(9 - 2):
        assert row.index(("W", 0, chunk)) == row.index(("Bi", 0, chunk + 2)) + 1


@pytest.mark.parametrize("name, ranks, chunks, rule", [
    ("dualpipe", 7, 20, "even"), ("dualpipe", 8, 21, "even"), ("dualpipe", 8, 14, "2 \\* ranks = 16"),
    ("dualpipev", 4, 7, "2 \\* ranks = 8"), ("1f1b", 0, 4, "ranks=0"), ("zb1p", 4, 0, "chunks=0"),
    ("1f1b", 2.0, 4, "ranks=2.0"), ("gpipe", 4, 8, "gpipe"),
])  # fmt: skip
def test_build_refuses_illegal_sizes_and_says_the_rule(name, ranks, chunks, rule):
    with pytest.raises(ValueError, match=rule):
        build(name, ranks, chunks)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_chunk_visits_the_stages_in_order_and_the_way_back_is_the_way_reversed(name):
    schedule = build(name, 4, 8)
    starts = [(r, d) for r in range(4) for d in schedule.directions if schedule.previous_stage(r, d) is None]
    assert len(starts) == (2 if name == "dualpipe" else 1)
    for place in starts:
        path = [place]
        while (ahead := schedule.next_stage(*path[-1])) is not None:
            assert schedule.previous_stage(*ahead) == path[-1]
            path.append(ahead)
        assert [schedule.stage_of(*place) for place in path] == list(range(schedule.stages))


def test_microbatches_of_dualpipe_are_cut_between_the_two_streams():
    schedule = build("dualpipe", 4, 10)
    assert sorted(schedule.microbatch_of(d, c) for d in (0, 1) for c in range(5)) == list(range(10))


@pytest.mark.parametrize("name", SCHEDULES)
def test_plain_lists_show_their_layout(name):
    schedule = build(name, 4, 8)
    plain = as_schedule([[list(op) for op in row] for row in schedule])
    assert plain == schedule
    assert (plain.stages, plain.directions) == (schedule.stages, schedule.directions)


def change(schedule, rank, edit):
    row = list(schedule[rank])
    edit(row)
    return Schedule(schedule.name, [row if r == rank else ops for r, ops in enumerate(schedule)])


def swap(row, first, second):
    a, b = row.index(first), row.index(second)
    row[a], row[b] = row[b], row[a]


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_validate_misses_no_dropped_and_no_doubled_instruction(name, kind):
    schedule = build(name, 4, 10)
    row, i = next(((r, row.index(op)) for r, row in enumerate(schedule) for op in row if op[0] == kind), (None, None))
    if row is None:
        assert kind in {"1f1b": ("Bi", "W", "FB"), "zb1p": ("B", "FB")}[name]
        return
    with pytest.raises(ValueError, match=r"lacks|before"):
        validate(change(schedule, row, lambda ops: ops.pop(i)))
    with pytest.raises(ValueError, match="twice"):
        validate(change(schedule, row, lambda ops: ops.append(ops[i])))


def test_validate_wants_the_weight_part_after_the_input_part():
    schedule = build("zb1p", 3, 5)
    with pytest.raises(ValueError, match=r"rank 0, \('W', 0, 1\): W stands before its Bi"):
        validate(change(schedule, 0, lambda ops: swap(ops, ("Bi", 0, 1), ("W", 0, 1))))


def test_validate_wants_the_backward_after_the_forward():
    schedule = build("1f1b", 3, 5)
    with pytest.raises(ValueError, match=r"rank 2, \('B', 0, 1\): B stands before its F"):
        validate(change(schedule, 2, lambda ops: swap(ops, ("F", 0, 1), ("B", 0, 1))))


def test_validate_finds_ranks_that_wait_for_each_other():
    """Rank 0 wants a gradient back before it has sent the chunk after it, which the last rank wants first."""
    F, B = (lambda c: ("F", 0, c)), (lambda c: ("B", 0, c))
    validate([[F(0), B(0), F(1), B(1)], [F(0), B(0), F(1), B(1)]])
    with pytest.raises(ValueError, match="deadlock"):
        validate([[F(0), B(0), F(1), B(1)], [F(0), F(1), B(0), B(1)]])


def test_validate_finds_a_deadlock_of_blocking_sends_only():
    """Rank 1 wants chunk 2 first; with one place in the channel rank 0 never gets so far."""
    F, B = (lambda c: ("F", 0, c)), (lambda c: ("B", 0, c))
    rows = [[F(0), F(1), F(2), B(2), B(1), B(0)], [F(2), F(1), F(0), B(2), B(1), B(0)]]
    with pytest.raises(ValueError, match="deadlock"):
        validate(rows)


@pytest.mark.parametrize("op", [("G", 0, 0), ("F", 0), ("FB", 0, 0), ("F", 0, -1), ("F", 0, 0.5), ()])
def test_validate_refuses_what_is_no_instruction(op):
    with pytest.raises(ValueError, match="rank 0"):
        validate([[op]])


def test_validate_refuses_a_direction_that_the_layout_lacks():
    with pytest.raises(ValueError, match="dir 1"):
        validate(Schedule("1f1b", [[("F", 1, 0), ("B", 1, 0)]]))


def test_parts_of_a_pair_are_a_forward_and_a_full_backward():
    assert parts(("FB", 0, 7, 1, 3)) == (("F", 0, 7), ("B", 1, 3))


def test_sixteen_ranks_and_120_chunks_take_less_than_a_second():
    begin = time.process_time()
    validate(build("dualpipe", 16, 120))
    assert time.process_time() - begin < 0.5  # takes 0.05 s


def test_needs_say_who_does_not_take_a_message():
    rows = build("1f1b", 2, 2)
    rows[1] = [op for op in rows[1] if op != ("F", 0, 1)]
    with pytest.raises(ValueError, match="nobody on rank 1 takes"):
        needs(rows, blocking_sends=True)
