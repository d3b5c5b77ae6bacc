"""Every lesson runs from top to bottom, offline and in its fast mode; and the committed file is fit to be read.

The run is a process of its own with a home, a cache and a working directory that are empty, so it can lean on nothing
of this machine, and what event loops and sockets have to say stays out of the warnings of this suite.
"""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

from minidsv3 import plots

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SECONDS = 45  # in fast mode
BYTES = 600_000
LINES = 45  # of a code cell: a screen
NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody answers
RUN = """
import sys, time
import nbformat
from nbclient import NotebookClient

notebook, start = nbformat.read(sys.argv[1], as_version=4), time.monotonic()
NotebookClient(notebook, timeout=600, kernel_name="python3", coalesce_streams=True).execute()
notebook.metadata["seconds"] = time.monotonic() - start
nbformat.write(notebook, sys.argv[2])
"""
PATHS = re.compile(r"(?<![\w.:/])/(?:work|home|root|tmp|Users|mnt|opt|usr)/|\b[A-Za-z]:\\\\?\w")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell["outputs"]]


def pictures(notebook):
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


def texts(notebook):
    """All sources and outputs but the pixels of the images."""
    for cell in notebook["cells"]:
        yield "".join(cell["source"])
    for output in outputs(notebook):
        yield "".join(output.get("text", ""))
        for kind, value in output.get("data", {}).items():
            if not kind.startswith("image/"):
                yield "".join(value) if isinstance(value, list) else str(value)


def complaints(notebook):
    """Warnings and whatever went to stderr."""
    wrong = [o for o in outputs(notebook) if o.get("name") == "stderr" or o["output_type"] == "error"]
    return wrong + [text for text in texts(notebook) if re.search(r"\w+Warning\b", text)]


def alone(folder):
    """Environment of a machine without network, home or cache."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "IPYTHON", "PYTHONWARN", "MINIDSV3"))}
    home = folder / "home"
    home.mkdir()
    env |= {"MINIDSV3_FAST": "1", "MINIDSV3_HOME": str(home / "cache"), "HOME": str(home), "USERPROFILE": str(home)}
    env |= {"IPYTHONDIR": str(home / "ipython"), "JUPYTER_RUNTIME_DIR": str(home / "runtime")}
    env |= {"MPLCONFIGDIR": matplotlib.get_cachedir()}  # its font list, else each run would build one
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        env |= {name: NOWHERE, name.upper(): NOWHERE}
    return env | {"no_proxy": "", "NO_PROXY": ""}


@pytest.mark.slow
@each_notebook
def test_notebook_runs_offline_from_top_to_bottom_in_fast_mode(path, tmp_path):
    done, room = tmp_path / "done.ipynb", tmp_path / "room"
    room.mkdir()
    command = [sys.executable, "-c", RUN, str(path), str(done)]
    result = subprocess.run(
        command, cwd=room, env=alone(tmp_path), capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    assert result.returncode == 0, result.stderr[-6000:]
    notebook = read(done)
    assert complaints(notebook) == []
    assert len(pictures(notebook)) == len(pictures(read(path)))
    assert list(room.iterdir()) == []  # a lesson leaves nothing behind
    assert notebook["metadata"]["seconds"] <= SECONDS


@each_notebook
def test_notebook_was_run_in_order_and_has_outputs(path):
    cells = code_cells(read(path))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell["outputs"] for cell in cells)


@each_notebook
def test_notebook_is_small(path):
    assert path.stat().st_size <= BYTES


@each_notebook
def test_notebook_has_no_absolute_path(path):
    found = [text[max(0, m.start() - 30) : m.end() + 30] for text in texts(read(path)) for m in PATHS.finditer(text)]
    assert found == []


@each_notebook
def test_notebook_shows_no_warning(path):
    assert complaints(read(path)) == []


@each_notebook
def test_notebook_begins_with_title_and_objectives(path):
    first = "".join(read(path)["cells"][0]["source"])
    assert first.startswith(f"# {path.name[:2]} · ")
    for word in ("paper", "before this", "time", "Objectives"):
        assert f"**{word}" in first


@each_notebook
def test_notebook_has_three_figures_with_alternative_text(path):
    shown = pictures(read(path))
    assert len(shown) >= 3
    for output in shown:
        assert len(output["metadata"]["image/png"]["alt"]) > 30


@each_notebook
def test_notebook_cells_fit_a_screen(path):
    for cell in code_cells(read(path)):
        source = "".join(cell["source"])
        assert source.count("\n") < LINES, source[:200]


def test_picture_shows_png_with_alternative_text():
    figure, (ax,) = plots.new_figure(1, 1, panel=(2.0, 1.0))
    plots.describe(ax, "An empty plot.")
    figure.colorbar(ax.imshow([[0.0, 1.0]]), ax=ax)
    data, metadata = plots.Picture(figure, dpi=80)._repr_mimebundle_()
    png = base64.b64decode(data["image/png"])
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20]) == 160  # 2 inches wide
    assert data["text/plain"] == metadata["image/png"]["alt"] == "An empty plot."


def test_picture_without_text_is_refused():
    figure, _ = plots.new_figure()
    with pytest.raises(ValueError, match="alternative text"):
        plots.Picture(figure)
