"""What all figures share: colours, a style, alternative text, and saving.

The drawing functions stand in the ``figures.py`` of each room; they take arrays and an `ax` and return the `ax`.
This file gives them what must look alike everywhere:

* the Okabe-Ito colours (Okabe and Ito 2008), which readers with any colour vision tell apart, with a marker and a
  hatch beside each colour, because a figure is also printed in grey;
* `new_figure`, which builds on ``matplotlib.figure.Figure`` directly: no display, no pyplot, no list of open figures;
* `headline` for a title that states the finding, and `describe` / `description` for one sentence of alternative text,
  kept on the axes that it describes;
* `Picture`, which shows a figure and its text in a notebook;
* `save`, which writes the figure, its data (``NAME.csv``) and its text (``NAME.txt``) beside each other. The same
  figure gives the same bytes on every day: no date and no random identifier is written.

Importing this file changes no setting of matplotlib; the style holds inside ``with style():`` only.
"""

from __future__ import annotations

import base64
import csv
import io
import textwrap
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

# Okabe-Ito, in an order in which neighbours differ in lightness too; yellow, weak on white, comes last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "++", "--")
LINES = ("-", "--", "-.", ":")
GREY = "#8C8C8C"
# Below the centre goes to a dark blue, above it to a lighter vermillion: in grey the two sides differ in depth.
DIVERGING = LinearSegmentedColormap.from_list(
    "blue_vermillion", ["#00395A", "#0072B2", "#9CCBE6", "#F7F7F7", "#F6C49B", "#E98B44", "#D55E00"]
)

STYLE: Any = {  # Any: the stubs of matplotlib changed the type of its keys between versions
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
}
_TITLE_CHARACTERS_PER_INCH = 10  # of bold DejaVu Sans at axes.titlesize, measured
_FORMATS = {
    ".png": ("Description", {"Software": None}),
    ".svg": ("Description", {"Date": None, "Creator": None}),
    ".pdf": ("Subject", {"CreationDate": None, "Creator": None, "Producer": None}),
}


def style() -> AbstractContextManager[None]:
    """The settings of all our figures, for the length of a ``with`` block."""
    return matplotlib.rc_context(STYLE)


def new_figure(
    rows: int = 1, columns: int = 1, *, panel: tuple[float, float] = (6.6, 4.0)
) -> tuple[Figure, list[Axes]]:
    """An empty figure in our style and its axes, row by row.

    Parameters
    ----------
    rows, columns : int
        Panels of the grid.
    panel : (float, float)
        Width and height of one panel in inches.

    Returns
    -------
    figure : Figure
        Needs no display and stands in no global list of figures.
    axes : list of Axes
        ``rows * columns`` of them.
    """
    with style():
        figure = Figure(figsize=(panel[0] * columns, panel[1] * rows), layout="constrained")
        return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def colour(index: int) -> str:
    """The colour of series `index`; after the last one it begins again."""
    return COLOURS[index % len(COLOURS)]


def look(index: int, points: int) -> dict[str, Any]:
    """Colour, line and some eight markers along a series of `points` values, as keywords of ``Axes.plot``."""
    every = max(1, points // 8)
    offset = (index * every // 4) % every  # markers of neighbouring series do not hide each other
    line = LINES[index // len(COLOURS) % len(LINES)]
    marker = MARKERS[index % len(MARKERS)]
    return {"color": colour(index), "linestyle": line, "marker": marker, "markevery": (offset, every)}


def headline(ax: Axes, finding: str) -> Axes:
    """Set `finding` as the title of `ax`, broken into lines that fit its width."""
    inches = ax.bbox.width / ax.figure.dpi
    ax.set_title(textwrap.fill(finding, max(16, int(inches * _TITLE_CHARACTERS_PER_INCH))), loc="left")
    return ax


def describe(ax: Axes, sentence: str) -> Axes:
    """Keep `sentence` as the alternative text of `ax` (it is the artist's label, which is drawn nowhere)."""
    ax.set_label(sentence)
    return ax


def description(*axes: Axes) -> str:
    """The alternative text of these axes, one sentence each; axes without one, and colour bars, are passed over."""
    return " ".join(text for ax in axes if (text := str(ax.get_label())) not in ("", "<colorbar>"))


class Picture:
    """A figure for a notebook: as the last value of a cell it is shown as PNG with its alternative text.

    A plain Figure is shown only after ``%matplotlib inline``, and without the text. The PNG has 256 colours, a third
    of the bytes, since a notebook is committed with its figures.
    """

    def __init__(self, figure: Figure, *, text: str | None = None, dpi: int = 80) -> None:
        self.text = text or description(*figure.axes)
        if not self.text.strip():
            raise ValueError("the figure has no alternative text: describe its axes, or give text")
        content = io.BytesIO()
        with Image.open(io.BytesIO(_rendered(figure, ".png", self.text, dpi))) as image:
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
        self._png = base64.b64encode(content.getvalue()).decode("ascii")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, str], dict[str, Any]]:
        return {"image/png": self._png, "text/plain": self.text}, {"image/png": {"alt": self.text}}


def save(
    figure: Figure,
    path: str | Path,
    *,
    data: Mapping[str, Any] | None,
    text: str,
    dpi: int = 120,
) -> list[Path]:
    """Write a figure, the data it shows and its alternative text; a reader never sees half a file.

    Parameters
    ----------
    figure : Figure
        Left as it is.
    path : str or Path
        ``NAME.png``, ``NAME.svg`` or ``NAME.pdf``; its folder is made if it is not there.
    data : mapping of str to array, or None
        Columns of ``NAME.csv``, one axis each; lengths may differ (short columns end in empty cells).
    text : str
        Alternative text for ``NAME.txt``, also kept inside the figure's file.
    dpi : int
        Dots per inch of a PNG.

    Returns
    -------
    list of Path
        The files written, the figure first.

    Raises
    ------
    ValueError
        Another extension, a column that has not one axis, or an empty `text`.
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"{path} does not end in {', '.join(_FORMATS)}: choose one of these formats")
    if not text.strip():
        raise ValueError(f"{path} has no alternative text: say in one sentence what it shows")
    files = {path: _rendered(figure, path.suffix.lower(), text, dpi)}
    if data is not None:
        files[path.with_suffix(".csv")] = _csv_text(data).encode("utf-8")
    files[path.with_suffix(".txt")] = (text.strip() + "\n").encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, content in files.items():
        _replace(target, content)
    return list(files)


def _rendered(figure: Figure, suffix: str, text: str, dpi: int) -> bytes:
    """The bytes of the figure's file, without date and with identifiers that do not depend on the process."""
    text_key, silent = _FORMATS[suffix]
    content = io.BytesIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "minidsv3"}):
        figure.savefig(content, format=suffix[1:], dpi=dpi, metadata={text_key: text.strip(), **silent})
    return content.getvalue()


def _csv_text(data: Mapping[str, Any]) -> str:
    columns = {name: np.asarray(values) for name, values in data.items()}
    for name, values in columns.items():
        if values.ndim != 1:
            raise ValueError(f"column {name!r} has shape {values.shape}: a column of the data has one axis")
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(columns)
    rows: Iterable[tuple[Any, ...]] = zip_longest(*(values.tolist() for values in columns.values()), fillvalue="")
    writer.writerows(rows)  # tolist gives Python numbers, whose text is exact
    return content.getvalue()


def _replace(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename over it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
