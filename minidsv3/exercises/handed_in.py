"""What a file hands in: its cells are run, and each ``check("name", thing)`` in it names a solution.

For the command line, which checks a notebook or a percent-format file without Jupyter, and for ``run-mine``, which
collects the solutions of a whole folder. Statements that only check, train or show are not run; a cell that raises is
reported and passed over, as Jupyter would. The student's code runs in this process.
"""

from __future__ import annotations

import ast
import json
import linecache
import re
from pathlib import Path
from typing import Any, NamedTuple

from .calling import Mine
from .exercise import Failed
from .sources import read_percent

SHOWS = ("check", "use")


class Solution(NamedTuple):
    """One thing that a file hands in."""

    path: Path
    name: str  # of the exercise
    submission: Any
    variant: Any


def code_cells(path: Path) -> list[str]:
    """Sources of a file's code cells: a notebook's, or a Python file's in percent format (or whole).

    ValueError for what is neither.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        try:
            cells = json.loads(text)["cells"]
            return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a notebook: {error}") from None
    if path.suffix != ".py":
        raise ValueError(f"{path} is neither .ipynb nor .py")
    return [c.source for c in read_percent(text) if c.kind == "code"] or [text]


def read_solutions(path: Path) -> tuple[list[Solution], list[str]]:
    """Solutions of one file, in order, and what went wrong on the way (one line each)."""
    scope: dict[str, Any] = {"__name__": "__exercise__"}
    calls: list[ast.Call] = []
    troubles: list[str] = []
    runner = Mine(None, ("minidsv3",))
    for number, source in enumerate(code_cells(path), start=1):
        source = re.sub(r"^[ \t]*[%!].*$", "", source, flags=re.M)  # Jupyter's own commands
        filename = f"{path.name}, cell {number}"
        try:
            tree = ast.parse(source, filename)
        except SyntaxError as error:
            troubles.append(f"{filename}: line {error.lineno}: {error.msg}")
            continue
        showing = [s for s in tree.body if _shows(s)]
        for statement in showing:
            calls += [
                n for n in ast.walk(statement) if isinstance(n, ast.Call) and _name(n) == "check" and len(n.args) == 2
            ]
        tree.body = [s for s in tree.body if s not in showing]
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        code = compile(tree, filename, "exec")
        try:
            runner.run(lambda code=code: exec(code, scope))
        except Failed as failure:
            troubles.append(f"{filename}: {failure}")
    solutions: dict[str, Solution] = {}
    for call in calls:
        try:
            name, submission = (eval(ast.unparse(argument), scope) for argument in call.args)
            variants = [eval(ast.unparse(k.value), scope) for k in call.keywords if k.arg == "variant"]
        except Exception as error:
            troubles.append(f"{path.name}: {ast.unparse(call)}: {type(error).__name__}: {error}")
            continue
        solutions[str(name)] = Solution(path, str(name), submission, variants[0] if variants else None)
    return list(solutions.values()), troubles


def read_folder(folder: Path) -> tuple[list[Solution], list[str]]:
    """Solutions of all notebooks and Python files of a folder, in order of their names."""
    paths = sorted(p for p in folder.iterdir() if p.suffix in (".ipynb", ".py")) if folder.is_dir() else []
    if not paths:
        raise ValueError(f"{folder} has no notebooks and no Python files")
    solutions: list[Solution] = []
    troubles: list[str] = []
    for path in paths:
        found, wrong = read_solutions(path)
        solutions += found
        troubles += wrong
    return solutions, troubles


def _shows(statement: ast.stmt) -> bool:
    """Whether a statement only checks, trains or shows a name."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Name):
        return True
    return any(isinstance(node, ast.Call) and _name(node) in SHOWS for node in ast.walk(statement))


def _name(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
