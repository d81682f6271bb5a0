"""Built pages lose what they do not use, and keep what they do."""

from __future__ import annotations

import shutil
from pathlib import Path

import lighter
import pydata_sphinx_theme
import pytest
from fontTools.ttLib import TTFont

THEME = Path(pydata_sphinx_theme.__file__).parent / "theme/pydata_sphinx_theme/static"
ICONS = '<script defer src="../_static/scripts/fontawesome.js?digest=1"></script>'
SEARCH = '<script src="../searchindex.js"></script>'


@pytest.fixture
def edition(tmp_path: Path) -> Path:
    """With a page of two icons, a page that searches, and the theme's files."""
    for name in ("styles/pydata-sphinx-theme.css", "scripts/fontawesome.js"):
        (tmp_path / "_static" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(THEME / name, tmp_path / "_static" / name)
    shutil.copytree(THEME / "vendor/fontawesome/webfonts", tmp_path / "_static/vendor/fontawesome/webfonts")
    body = '<i class="fas fa-rocket"></i><i class="fab fa-github"></i><script src="../_static/doctools.js"></script>'
    (tmp_path / "page.html").write_text(f"<html>{ICONS}{SEARCH}{body}</html>")
    (tmp_path / "search.html").write_text(f"<html>{SEARCH}</html>")
    return tmp_path


def glyphs(edition: Path, name: str) -> set[int]:
    return set(TTFont(edition / f"_static/vendor/fontawesome/webfonts/{name}.woff2").getBestCmap() or ())


def test_icons_that_are_shown_stay_and_the_others_go(edition: Path) -> None:
    rocket, github, ghost = 0xF135, 0xF09B, 0xF6E2
    assert {rocket, ghost} <= glyphs(edition, "fa-solid-900")
    lighter.lighten(edition)
    assert rocket in glyphs(edition, "fa-solid-900") and ghost not in glyphs(edition, "fa-solid-900")
    assert github in glyphs(edition, "fa-brands-400")
    assert (edition / "_static/vendor/fontawesome/webfonts/fa-solid-900.woff2").stat().st_size < 10_000
    assert not (edition / "_static/scripts/fontawesome.js").exists()


def test_what_the_theme_itself_draws_stays(edition: Path) -> None:
    others = lighter.codes((edition / "_static/styles/pydata-sphinx-theme.css").read_text(encoding="utf-8"), set())
    assert len(others) > 10 and all(0xE000 <= code <= 0xF8FF for code in others)
    lighter.lighten(edition)
    kept = set().union(*(glyphs(edition, f"fa-{name}") for name in ("solid-900", "regular-400", "brands-400")))
    assert others <= kept


def test_pages_keep_their_other_scripts_and_the_search_its_index(edition: Path) -> None:
    lighter.lighten(edition)
    page = (edition / "page.html").read_text()
    assert "doctools.js" in page and "fontawesome.js" not in page and "searchindex.js" not in page
    assert "searchindex.js" in (edition / "search.html").read_text()
