"""``exercises``: list them, check a file, build the notebooks or a course's own, grade it, train with what has passed.

exercises list
exercises check mine/ex02_rms_norm.ipynb
exercises run-mine mine/ --figure mine.png
exercises build                       the student notebooks of notebooks/exercises, from their sources
exercises build --check               only say whether they are what the sources give
exercises build --course-seed 71...   a course's own variant in --out, for nbgrader
exercises autograde ex12_router       nbgrader's autograde on all cores, in a course's folder
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..exercises import classroom
from ..exercises.checker import catalogue, check, evaluate, exercise_of
from ..exercises.exercise import KINDS
from ..exercises.handed_in import Solution, read_folder, read_solutions
from ..exercises.sources import FOLDER, build, build_course, write
from ..exercises.training import STEPS, parts_of, train
from .tables import text_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``exercises``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="number, name, kind, lesson, points, minutes")
    one = actions.add_parser("check", help="check the solutions of a notebook or Python file")
    one.add_argument("file", type=Path)
    one.add_argument("--seed", type=int, default=0, help="of the sizes and numbers that are tried (default 0)")
    mine = actions.add_parser("run-mine", help="train nano with every solution of a folder that passes")
    mine.add_argument("folder", type=Path)
    mine.add_argument("--steps", type=int, default=STEPS)
    mine.add_argument("--figure", type=Path, help="the loss curve beside the package's: .png, .svg or .pdf")
    make = actions.add_parser("build", help="write the student notebooks, or a course's variant")
    make.add_argument("--out", type=Path, help="folder to write to (default: notebooks/exercises)")
    make.add_argument("--course-seed", type=int, metavar="S", help="draw a course's own variant from a long number")
    grade = actions.add_parser("autograde", help="nbgrader autograde on all cores; run it in a course's folder")
    grade.add_argument("assignment", help="for example ex12_router")
    grade.add_argument("--course", type=Path, default=Path(), help="the course's folder (default: this one)")
    grade.add_argument("--workers", type=int, metavar="N", help="processes at a time (default: one for each core)")
    grade.add_argument("--force", action="store_true", help="grade again who has been graded")
    make.add_argument("--check", action="store_true", help="write nothing; fail if a notebook is not up to date")


def run(args: argparse.Namespace) -> int:
    """Do the action."""
    actions = {"list": _list, "check": _check, "run-mine": _run_mine, "build": _build, "autograde": _autograde}
    return actions[args.action](args)


def _list(args: argparse.Namespace) -> int:
    rows = [
        [f"{e.number:02d}", name, KINDS[e.kind], f"{e.lesson:02d}", str(e.points), str(e.minutes), e.title]
        for name, e in catalogue().items()
    ]
    print(text_table(["", "name", "kind", "lesson", "points", "minutes", "what"], rows, left=7))
    return 0


def _check(args: argparse.Namespace) -> int:
    solutions, troubles = read_solutions(args.file)
    _report(troubles)
    if not solutions:
        raise ValueError(f'{args.file} has no check("name", solution) whose solution could be read')
    missing = 0.0
    for _, name, submission, variant in solutions:
        points = check(name, submission, seed=args.seed, variant=variant)
        missing += exercise_of(name).points - points
    return 0 if missing == 0 else 1


def _run_mine(args: argparse.Namespace) -> int:
    if args.steps < 1:
        raise ValueError(f"--steps {args.steps} is not positive")
    solutions, troubles = read_folder(args.folder)
    _report(troubles)
    inside: dict[str, object] = {}
    for solution in solutions:
        verdict = _verdict(solution)
        print(f"  {solution.name:20s} {verdict}")
        if verdict == "inside":
            inside[solution.name] = solution.submission
    if not inside:
        raise ValueError(f"no solution in {args.folder} passes and has a place in a training step")
    parts = parts_of(inside.items())
    own, ours = train(parts, args.steps), train(parts.package(), args.steps)
    for step, (a, b) in enumerate(zip(own, ours), start=1):
        if step in (1, len(own)) or step % 5 == 0:
            print(f"  step {step:4d}   yours {a:.4f}   the package {b:.4f}")
    gap = abs(own - ours).max()
    print(f"{args.steps} steps of nano with {len(inside)} of your solutions, largest difference {gap:.1e}")
    if args.figure:
        from ..exercises.figures import save_losses

        print("wrote", ", ".join(str(path) for path in save_losses(args.figure, own, ours, list(inside))))
    return 0


def _verdict(solution: Solution) -> str:
    results = evaluate(solution.name, solution.submission, variant=solution.variant)
    failed = [r.property.name for r in results if r.detail]
    if failed:
        return f"left out: fails {', '.join(failed)}"
    return "inside" if exercise_of(solution.name).enter else "passes; it has no place in a training step"


def _build(args: argparse.Namespace) -> int:
    if args.course_seed is None:
        files = build(args.out or FOLDER)
        if args.check:
            stale = [p for p, text in files.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
            strangers = sorted(set((args.out or FOLDER).glob("*.ipynb")) - set(files))
            for path in [*stale, *strangers]:
                print(f"{path.name} is not what its source gives", file=sys.stderr)
            return 1 if stale or strangers else 0
        write(files)
    else:
        if args.out is None or args.check:
            raise ValueError("a course is written to a folder of its own: give --out DIR, and no --check")
        files = build_course(args.out, args.course_seed)
        write(files, FOLDER / "nbgrader_config.py")
    print(f"wrote {len(files)} notebooks to {args.out or FOLDER}")
    return 0


def _autograde(args: argparse.Namespace) -> int:
    return classroom.autograde(args.course, args.assignment, args.workers, args.force)


def _report(troubles: list[str]) -> None:
    for trouble in troubles:
        print(trouble, file=sys.stderr)
