"""Every published number that can be computed, beside ours.

`data/published` holds what the papers print (`published`), `paper_rows` says which function computes each row, and
here the two are put beside each other. A row is

    exact                     ours has all the printed digits
    within                    ours is off by no more than the tolerance that the row states, with its reason
    'published value does not follow from its inputs'
                              and the reason: a slip in print, another formula, or what is wrong with ours
    stated, not computable    listed, so that nobody misses it
    not built yet             a capability of the package that the row needs is not there; never faked

Every input can be changed (`Inputs`): a shape of a model, a step time, a port count. Then ours and the verdict move.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ..config import ModelConfig
from .dense import MODELS, AnyConfig, load_config
from .published import Table, published_tables, quantum_of

EXACT, WITHIN = "exact", "within"
DOES_NOT_FOLLOW = "published value does not follow from its inputs"
STATED, NOT_BUILT = "stated, not computable", "not built yet"


class Ours(NamedTuple):
    """A value, and the function that computed it."""

    value: float
    computed_by: str


def by(function: Callable[..., Any], *args: Any, scale: float = 1, **kwargs: Any) -> Ours:
    """``function(*args, **kwargs) / scale`` under the function's own name."""
    value = function(*args, **kwargs)
    name = f"{function.__module__.removeprefix('minidsv3.')}.{function.__qualname__}"
    return Ours(value if scale == 1 else value / scale, name)


class PaperRow(NamedTuple):
    """One line of the comparison; None where there is nothing to say."""

    paper: str
    table: str
    row: str
    published: float | None
    ours: float | None
    difference: float | None
    unit: str
    tolerance: float | None
    verdict: str
    computed_by: str | None
    reason: str


@dataclasses.dataclass
class Inputs:
    """All that the rows are computed from: the models' shapes, and what each table takes as given."""

    models: dict[str, AnyConfig]
    tables: dict[str, dict[str, Any]]

    @classmethod
    def published(cls) -> Inputs:
        """As published."""
        tables = {name: dict(table.inputs) for name, table in published_tables().items()}
        return cls({name: load_config(name, None) for name in MODELS}, tables)

    def change(self, name: str, value: Any) -> None:
        """Replace one input: ``deepseek-v3.kv_lora_rank`` or ``insights-4.step_seconds_mpft``.

        Raises ValueError for a name that is none, naming those there are.
        """
        owner, _, key = name.rpartition(".")
        if owner in self.models:
            config = self.models[owner]
            if key not in {field.name for field in dataclasses.fields(config)}:
                raise ValueError(f"{name!r}: {owner} has no {key!r}")
            self.models[owner] = dataclasses.replace(config, **{key: value})
        elif key in self.tables.get(owner, {}):
            self.tables[owner][key] = value
        else:
            known = ", ".join(self.tables[owner]) if owner in self.tables else ", ".join([*self.models, *self.tables])
            raise ValueError(
                f"{name!r} is no input; {owner + ' has' if owner in self.tables else 'there are'}: {known}"
            )


def evaluate(tables: list[str] | None = None, inputs: Inputs | None = None) -> list[PaperRow]:
    """All rows of these tables, or of all.

    Raises
    ------
    ValueError
        A table that is not there, or inputs that a function refuses.
    """
    from . import predictions  # noqa: F401 (registers its rows)
    from .paper_rows import ROWS

    known, inputs = published_tables(), inputs or Inputs.published()
    for name in tables or ():
        if name not in known:
            raise ValueError(f"table {name!r} is not one of {', '.join(known)}")
    found = []
    for name in tables or known:
        ours, missing = _computed(ROWS.get(name, []), inputs, name)
        found += [_row(name, known[name], entry, ours.get(entry["row"]), missing) for entry in known[name].rows]
        strangers = ours.keys() - {entry["row"] for entry in known[name].rows}
        assert not strangers, f"{name} computes rows that are not published: {strangers}"
    return found


def _computed(
    functions: list[Callable[..., dict[str, Ours]]], inputs: Inputs, name: str
) -> tuple[dict[str, Ours], str]:
    """Ours by row, and the modules of the package that were looked for and are not there."""
    ours: dict[str, Ours] = {}
    missing = []
    for function in functions:
        try:
            ours |= function(inputs.models, inputs.tables[name])
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("minidsv3."):
                raise
            missing.append(str(error.name))
    return ours, ", ".join(missing)


def _row(name: str, table: Table, entry: dict[str, Any], ours: Ours | None, missing: str) -> PaperRow:
    published = entry["published"]
    printed = published if published is None or isinstance(published, int) else float(published)
    value = None if ours is None else ours.value
    tolerance = None if printed is None else float(entry.get("tolerance", quantum_of(entry) / 2))
    difference = None if value is None or printed is None else value - printed
    if entry.get("stated"):
        verdict, reason = STATED, entry.get("note", "")
    elif ours is None:
        needs = missing or entry.get("needs")
        assert needs, f"{name}, {entry['row']!r}: no function computes it, and it is not marked as stated"
        verdict, reason = NOT_BUILT, f"needs {needs}"
    else:
        verdict, reason = judge(ours.value, entry)
    return PaperRow(
        table.paper, name, entry["row"], printed, value, difference, entry["unit"], tolerance, verdict,
        ours.computed_by if ours else None, reason,
    )  # fmt: skip


def judge(ours: float, entry: dict[str, Any]) -> tuple[str, str]:
    """(verdict, reason) of a computed value against a published row."""
    printed, quantum, note = float(entry["published"]), quantum_of(entry), entry.get("note", "")
    if entry.get("rounding") == "truncated":
        same = math.floor(ours / quantum) * quantum == printed
    else:
        same = abs(ours - printed) <= quantum / 2 * (1 + 1e-9)
    if same:
        return EXACT, note
    off = abs(ours - printed)
    if "tolerance" in entry and off <= float(entry["tolerance"]):
        return WITHIN, note
    allowed = float(entry.get("tolerance", quantum / 2))
    return DOES_NOT_FOLLOW, entry.get("misprint", f"ours differs by {off:.4g}, more than {allowed:.4g}")


def summary(rows: list[PaperRow]) -> dict[str, int]:
    """Rows of each verdict."""
    verdicts = (EXACT, WITHIN, DOES_NOT_FOLLOW, STATED, NOT_BUILT)
    return {verdict: sum(row.verdict == verdict for row in rows) for verdict in verdicts}


def v3(models: dict[str, AnyConfig]) -> ModelConfig:
    """The model that most rows are about."""
    config = models["deepseek-v3"]
    assert isinstance(config, ModelConfig)
    return config
