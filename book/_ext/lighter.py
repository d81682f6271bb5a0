"""Built pages without what no page shows: scripts and fonts of icons, the index of the search."""

from __future__ import annotations

import re
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont

ICONS_BY_SCRIPT = re.compile(r"<script[^>]*scripts/fontawesome\.js[^>]*></script>\s*")  # the style sheet draws them too
SEARCH = re.compile(r'<script src="[^"]*(?:searchtools|language_data|searchindex)\.js[^"]*"></script>\s*')
OF_AN_ICON = re.compile(r'((?:\.fa-[\w-]+:before,?)+)\{content:"\\([0-9a-f]+)"\}')
ANYWHERE = re.compile(r"\\([ef][0-9a-f]{3})\b")


def lighten(edition: Path) -> None:
    """Take from a built edition what its pages do not use; they look as before."""
    shown: set[str] = set()
    for path in sorted(edition.rglob("*.html")):
        page = ICONS_BY_SCRIPT.sub("", path.read_text(encoding="utf-8"))
        if path.name != "search.html":
            page = SEARCH.sub("", page)
        shown.update(re.findall(r"\bfa-([\w-]+)", page))
        path.write_text(page, encoding="utf-8")
    static = edition / "_static"
    (static / "scripts/fontawesome.js").unlink(missing_ok=True)
    wanted = codes(static / "styles/pydata-sphinx-theme.css", shown)
    for font in sorted((static / "vendor/fontawesome/webfonts").glob("*.woff2")):
        _keep_glyphs(font, wanted)


def codes(style_sheet: Path, shown: set[str]) -> set[int]:
    """Character codes of the named icons, and of those that other rules of the style sheet draw."""
    text = style_sheet.read_text(encoding="utf-8")
    named = {
        name: int(code, 16) for names, code in OF_AN_ICON.findall(text) for name in re.findall(r"fa-([\w-]+)", names)
    }
    others = {int(code, 16) for code in ANYWHERE.findall(OF_AN_ICON.sub("", text))}
    return {named[name] for name in shown & named.keys()} | others


def _keep_glyphs(font: Path, wanted: set[int]) -> None:
    made = TTFont(font)
    options = subset.Options(flavor="woff2", ignore_missing_unicodes=True, notdef_outline=True)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=wanted)
    subsetter.subset(made)
    made.flavor = "woff2"
    made.save(font)
