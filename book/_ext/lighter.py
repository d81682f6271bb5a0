"""Built pages without what no page shows, scripts and fonts of icons and the index of the search, and mended lists."""

from __future__ import annotations

import re
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont

ICONS_BY_SCRIPT = re.compile(r"<script[^>]*scripts/fontawesome\.js[^>]*></script>\s*")  # the style sheet draws them too
ARGUMENTS = re.compile(
    r"<dl>\s*((?:<dd>(?:(?!</?d[dlt]\b).)*</dd>\s*)+)</dl>", re.DOTALL
)  # of a signature: a list without terms
THEBE = re.compile(r"<script>const THEBE_JS_URL = .*?</script>\s*")  # declared twice, and used by no page
SEARCH = re.compile(r'<script src="[^"]*(?:searchtools|language_data|searchindex)\.js[^"]*"></script>\s*')
OF_AN_ICON = re.compile(r'((?:\.fa-[\w-]+:before,?)+)\{content:"\\([0-9a-f]+)"\}')
ESCAPED, PRIVATE = re.compile(r"\\([ef][0-9a-f]{3})\b"), re.compile("[\ue000-\uf8ff]")  # where fonts keep icons


def lighten(edition: Path) -> None:
    """Take from a built edition what its pages do not use; they look as before."""
    shown: set[str] = set()
    for path in sorted(edition.rglob("*.html")):
        page = ICONS_BY_SCRIPT.sub("", path.read_text(encoding="utf-8"))
        page = ARGUMENTS.sub(lambda found: _as_lines(found[1]), page)
        page = page.replace('role="list" class="citation-list"', 'class="citation-list"')  # its entries are no items
        page = THEBE.sub("", page)
        if path.name != "search.html":
            page = SEARCH.sub("", page)
        shown.update(re.findall(r"\bfa-([\w-]+)", page))
        path.write_text(page, encoding="utf-8")
    static = edition / "_static"
    (static / "scripts/fontawesome.js").unlink(missing_ok=True)
    wanted = codes("".join(path.read_text(encoding="utf-8") for path in sorted(static.rglob("*.css"))), shown)
    for font in sorted((static / "vendor/fontawesome/webfonts").glob("*.woff2")):
        _keep_glyphs(font, wanted)


def _as_lines(arguments: str) -> str:
    """What Sphinx writes as a list of definitions of nothing, over which screen readers stumble."""
    lines = arguments.replace("<dd>", '<span class="mt-argument">').replace("</dd>", "</span>")
    return f"<span>{lines}</span>"


def codes(styles: str, shown: set[str]) -> set[int]:
    """Character codes of the named icons, and of those that other rules draw, as they are or escaped."""
    named = {name: code for names, code in OF_AN_ICON.findall(styles) for name in re.findall(r"fa-([\w-]+)", names)}
    others = OF_AN_ICON.sub("", styles)
    found = {named[name] for name in shown & named.keys()} | set(ESCAPED.findall(others))
    return {int(code, 16) for code in found} | {ord(character) for character in PRIVATE.findall(others)}


def _keep_glyphs(font: Path, wanted: set[int]) -> None:
    made = TTFont(font)
    options = subset.Options(flavor="woff2", ignore_missing_unicodes=True, notdef_outline=True)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=wanted)
    subsetter.subset(made)
    made.flavor = "woff2"
    made.save(font)
