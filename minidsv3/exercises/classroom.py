"""Autograding a class on all cores: several ``nbgrader autograde`` at a time, each over students of its own.

nbgrader starts one kernel after the other, and most of a student's time is that start, or waiting for a loop to be
stopped. So the students are dealt into small packs, a few for each worker (whoever has the hanging ones takes fewer
packs), and each pack is one nbgrader process that leaves out everybody else. All write to the same gradebook; SQLite
makes them wait for each other for the milliseconds that takes. A last nbgrader, alone, grades who was left over (a
locked gradebook, say) and passes over everybody else: its verdict is the command's.

What is graded, and how, stays nbgrader's; this only says who goes when. A thread for each process, no fork.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACKS = 4  # a worker


def autograde(course: Path, assignment: str, workers: int | None = None, force: bool = False) -> int:
    """Grade what all students handed in for one assignment, e.g. 'ex12_router'.

    Parameters
    ----------
    course : folder with nbgrader_config.py and submitted/STUDENT/ASSIGNMENT
    workers : nbgrader processes at a time; as many as there are cores by default
    force : grade again who has been graded

    Returns
    -------
    int
        0, or what nbgrader returned when it could not grade everybody.

    Raises
    ------
    ValueError
        No course, nothing handed in, no worker.
    """
    if not (course / "nbgrader_config.py").is_file():
        raise ValueError(f"{course} is no course: it has no nbgrader_config.py (exercises build --course-seed)")
    students = sorted(path.parent.name for path in (course / "submitted").glob(f"*/{assignment}"))
    if not students:
        raise ValueError(f"nobody handed in {assignment!r}: {course / 'submitted'} has no STUDENT/{assignment}")
    workers = workers if workers is not None else os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"workers={workers} is not positive")

    def grade(pack: Sequence[str]) -> None:
        others = ",".join(s for s in students if s not in pack)
        _nbgrader(course, assignment, f"--CourseDirectory.student_id_exclude={others}", *["--force"] * force)
        print(f"done with {', '.join(pack)}", flush=True)

    size = -(-len(students) // (workers * PACKS))
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(grade, [students[i : i + size] for i in range(0, len(students), size)]))
    last = _nbgrader(course, assignment)
    if last.returncode:
        errors = [line for line in last.stderr.splitlines() if "| ERROR]" in line]
        print("\n".join(errors) or last.stderr, file=sys.stderr)  # without errors of its own: nbgrader did not start
    return last.returncode


def _nbgrader(course: Path, assignment: str, *options: str) -> subprocess.CompletedProcess[str]:
    """One ``nbgrader autograde``; what it starts is found beside this interpreter, activated or not."""
    scripts = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")
    return subprocess.run(
        [sys.executable, "-m", "nbgrader", "autograde", assignment, *options],
        cwd=course, env=os.environ | {"PATH": scripts}, capture_output=True, text=True, encoding="utf-8",
        errors="replace", check=False,
    )  # fmt: skip
