"""Controls for a figure of a lesson, where ipywidgets is installed; without it the figure stands as it is.

A widget lives in a running notebook only: it survives neither export nor the page of a repository. So a lesson first
shows a static figure and then calls `explore` with the function that drew it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

ipywidgets: Any = None
with suppress(ImportError):  # it comes with the jupyter package, and is no dependency of ours
    ipywidgets = import_module("ipywidgets")


def explore(draw: Callable[..., Any], **controls: Any) -> None:
    """Draw again whenever a control is moved.

    Parameters
    ----------
    draw : function
        Takes the values of the controls by name and returns what is to be shown (a `plots.Picture`).
    **controls
        What ``ipywidgets.interactive`` takes: a range ``(lowest, highest, step)`` for a slider, a list for a menu,
        a bool for a check box, a str for a text field.
    """
    if ipywidgets is None:
        print("There would be controls here: pip install ipywidgets, and start the notebook again.")
        return
    ipywidgets.interact(draw, **controls)
