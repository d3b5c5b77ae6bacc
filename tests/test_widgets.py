"""Controls appear where ipywidgets is installed; without it a lesson goes on."""

from types import SimpleNamespace

from minidsv3 import widgets


def test_explore_hands_function_and_controls_to_ipywidgets(monkeypatch):
    calls = []
    fake = SimpleNamespace(interact=lambda draw, **controls: calls.append((draw, controls)))
    monkeypatch.setattr(widgets, "ipywidgets", fake)

    def draw(layer, text):
        return layer, text

    assert widgets.explore(draw, layer=(0, 3, 1), text="abc") is None
    assert calls == [(draw, {"layer": (0, 3, 1), "text": "abc"})]


def test_explore_without_ipywidgets_says_how_to_get_them(monkeypatch, capsys):
    monkeypatch.setattr(widgets, "ipywidgets", None)
    widgets.explore(lambda layer: 1 / 0, layer=(0, 3, 1))
    assert "pip install ipywidgets" in capsys.readouterr().out
