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
THEBE = '<script>const THEBE_JS_URL = "x"; const thebe_selector = ".thebe"</script>'


@pytest.fixture
def edition(tmp_path: Path) -> Path:
    """With a page of two icons, a page that searches, and the theme's files."""
    for name in ("styles/pydata-sphinx-theme.css", "scripts/fontawesome.js"):
        (tmp_path / "_static" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(THEME / name, tmp_path / "_static" / name)
    body = '<i class="fas fa-rocket"></i><i class="fab fa-github"></i><script src="../_static/doctools.js"></script>'
    (tmp_path / "page.html").write_text(f"<html>{ICONS}{SEARCH}{THEBE}{THEBE}{body}</html>")
    (tmp_path / "search.html").write_text(f"<html>{SEARCH}</html>")
    return tmp_path


@pytest.fixture
def with_fonts(edition: Path) -> Path:
    """The same, with the fonts of the icons, which take a second to pack."""
    shutil.copytree(THEME / "vendor/fontawesome/webfonts", edition / "_static/vendor/fontawesome/webfonts")
    return edition


def glyphs(edition: Path, name: str) -> set[int]:
    return set(TTFont(edition / f"_static/vendor/fontawesome/webfonts/{name}.woff2").getBestCmap() or ())


def test_icons_that_are_shown_and_those_of_the_theme_stay_and_the_others_go(with_fonts: Path) -> None:
    rocket, github, ghost = 0xF135, 0xF09B, 0xF6E2
    assert {rocket, ghost} <= glyphs(with_fonts, "fa-solid-900")
    lighter.lighten(with_fonts)
    assert rocket in glyphs(with_fonts, "fa-solid-900") and ghost not in glyphs(with_fonts, "fa-solid-900")
    assert github in glyphs(with_fonts, "fa-brands-400")
    assert (with_fonts / "_static/vendor/fontawesome/webfonts/fa-solid-900.woff2").stat().st_size < 10_000
    assert not (with_fonts / "_static/scripts/fontawesome.js").exists()
    of_theme = lighter.codes((with_fonts / "_static/styles/pydata-sphinx-theme.css").read_text(encoding="utf-8"), set())
    assert len(of_theme) > 10 and all(0xE000 <= code <= 0xF8FF for code in of_theme)
    assert of_theme <= set().union(*(glyphs(with_fonts, f"fa-{x}") for x in ("solid-900", "regular-400", "brands-400")))


def test_arguments_of_a_signature_are_lines_and_true_lists_stay_lists(edition: Path) -> None:
    true = "<dl>\n<dt>a</dt><dd>b</dd></dl>"
    signature = '<dt class="sig">f(<dl>\n<dd><em class="sig-param">x</em>,</dd>\n<dd>y,</dd>\n</dl>\n)</dt>'
    (edition / "page.html").write_text(true + signature)
    lighter.lighten(edition)
    page = (edition / "page.html").read_text()
    assert page.startswith(true) and page.count("<dd>") == 1 and page.count('<span class="mt-argument">') == 2


def test_pages_keep_their_other_scripts_and_the_search_its_index(edition: Path) -> None:
    lighter.lighten(edition)
    page = (edition / "page.html").read_text()
    assert "doctools.js" in page and "fontawesome.js" not in page and "searchindex.js" not in page
    assert "THEBE" not in page
    assert "searchindex.js" in (edition / "search.html").read_text()
