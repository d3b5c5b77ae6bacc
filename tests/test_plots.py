"""Saving, alternative text and the shared look of figures."""

import csv
import subprocess
import sys
from itertools import pairwise

import matplotlib
import numpy as np
import pytest

from minidsv3 import plots


def drawn():
    figure, (ax,) = plots.new_figure()
    ax.plot([0, 1, 2], [3.0, 1.0, 2.0], label="x")
    ax.legend()
    plots.headline(ax, "It falls, then rises")
    return figure


def luminance(colour):
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_save_format_follows_extension(tmp_path, suffix, magic):
    plots.save(drawn(), tmp_path / f"a{suffix}", data=None, text="A sentence.")
    assert (tmp_path / f"a{suffix}").read_bytes().startswith(magic)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_save_same_figure_gives_same_bytes(tmp_path, suffix):
    for name in ("a", "b"):
        plots.save(drawn(), tmp_path / f"{name}{suffix}", data=None, text="A sentence.")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.csv"])
def test_save_other_extension_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"does not end in \.png, \.svg, \.pdf"):
        plots.save(drawn(), tmp_path / name, data=None, text="A sentence.")


def test_save_refusal_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="shape"):
        plots.save(drawn(), tmp_path / "a.png", data={"x": np.zeros((2, 3))}, text="A sentence.")
    assert list(tmp_path.iterdir()) == []


def test_save_without_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no alternative text"):
        plots.save(drawn(), tmp_path / "a.png", data=None, text=" ")


def test_save_returns_and_leaves_exactly_its_files(tmp_path):
    files = plots.save(drawn(), tmp_path / "deep" / "a.png", data={"x": [1]}, text="A sentence.")
    assert [file.name for file in files] == ["a.png", "a.csv", "a.txt"]
    assert sorted(files) == sorted((tmp_path / "deep").iterdir())


def test_save_data_keeps_columns_of_unequal_length(tmp_path):
    long, short = np.array([1, 2, 3], dtype=np.int64), np.array([0.1, 1 / 3])
    plots.save(drawn(), tmp_path / "a.png", data={"step": long, "loss, nats": short}, text="A sentence.")
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["step", "loss, nats"], ["1", "0.1"], ["2", repr(1 / 3)], ["3", ""]]


def test_save_text_is_utf8_with_one_final_newline(tmp_path):
    plots.save(drawn(), tmp_path / "a.svg", data=None, text="Loss ≤ 2.\n")
    assert (tmp_path / "a.txt").read_bytes() == "Loss ≤ 2.\n".encode()


def test_save_svg_carries_the_text(tmp_path):
    plots.save(drawn(), tmp_path / "a.svg", data=None, text="A sentence of its own.")
    assert "A sentence of its own." in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_save_replaces_an_older_figure(tmp_path):
    (tmp_path / "a.png").write_bytes(b"old")
    plots.save(drawn(), tmp_path / "a.png", data=None, text="A sentence.")
    assert (tmp_path / "a.png").read_bytes() != b"old"


def test_style_changes_no_global_setting():
    before = dict(matplotlib.rcParams)
    with plots.style():
        assert matplotlib.rcParams["axes.spines.top"] is False
    assert dict(matplotlib.rcParams) == before


def test_import_needs_no_pyplot():
    code = "import sys, minidsv3.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_new_figure_has_one_axes_for_each_panel():
    figure, axes = plots.new_figure(2, 3, panel=(2.0, 1.5))
    assert len(axes) == 6 and tuple(figure.get_size_inches()) == (6.0, 3.0)


def test_description_joins_what_is_described():
    _, axes = plots.new_figure(1, 3)
    plots.describe(axes[0], "One.")
    plots.describe(axes[2], "Three.")
    assert plots.description(*axes) == "One. Three."


def test_headline_breaks_into_lines_that_fit():
    figure, (ax,) = plots.new_figure(panel=(3.0, 2.0))
    plots.headline(ax, "a finding of many words " * 3)
    figure.draw_without_rendering()
    title = ax.get_title(loc="left")
    assert "\n" in title and " ".join(title.split()) == ("a finding of many words " * 3).strip()
    box = next(text for text in ax.get_children() if getattr(text, "get_text", str)() == title).get_window_extent()
    assert box.x1 <= figure.bbox.width


def test_look_repeats_no_style_for_thirty_two_series():
    looks = [(style["color"], style["linestyle"]) for style in (plots.look(n, 50) for n in range(32))]
    assert len(set(looks)) == 32


@pytest.mark.parametrize("points", [1, 2, 7, 500])
def test_look_marks_every_series(points):
    for index in range(9):
        offset, every = plots.look(index, points)["markevery"]
        assert 1 <= len(range(offset, points, every)) <= 16


def test_colours_neighbours_differ_in_grey():
    grey = [luminance(colour) for colour in plots.COLOURS]
    assert all(abs(a - b) > 0.03 for a, b in pairwise(grey))


def test_diverging_map_is_lightest_in_the_middle():
    grey = [luminance(plots.DIVERGING(value)) for value in np.linspace(0, 1, 21)]
    assert np.all(np.diff(grey[:11]) > 0) and np.all(np.diff(grey[10:]) < 0)


def test_diverging_map_ends_differ_in_grey():
    assert luminance(plots.DIVERGING(1.0)) - luminance(plots.DIVERGING(0.0)) > 0.1
