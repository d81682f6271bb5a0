"""Look over the built pages as a reader's browser would: `python book/_ext/check_pages.py _build/html`.

Fails if a picture has no alternative text, a link or file inside the book does not exist, a page loads something from
elsewhere, a formula could not be set, or asterisks are seen that should have made words bold. Sphinx checks the
references in the sources; this checks what came out, the pictures that notebooks drew included.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

NOT_PAGES = {"genindex.html", "search.html", "py-modindex.html"}
VERBATIM = {"code", "pre", "script", "style", "annotation"}


class Page(HTMLParser):
    """The ids, pictures and links of one HTML page, what it loads, and formulas and bold text that were not set."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.pictures: list[tuple[str, str | None]] = []
        self.loaded: list[str] = []
        self.unset: list[str] = []
        self.starred: list[str] = []
        self.verbatim = 0  # how deep inside code, scripts or the sources of formulas
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.verbatim += tag in VERBATIM
        for name in ("id", "name") if tag == "a" else ("id",):
            self.ids.add(attributes.get(name) or "")
        if tag == "img":
            self.pictures.append((attributes.get("src") or "", attributes.get("alt")))
        if tag == "svg" and attributes.get("role") == "img" and not attributes.get("aria-hidden"):
            self.pictures.append(("an inline drawing", attributes.get("aria-label")))
        fetched = attributes.get("rel") in ("stylesheet", "preload", "icon", "shortcut icon")
        if tag in ("script", "img", "iframe", "source") or (tag == "link" and fetched):
            self.loaded.append(attributes.get("src") or attributes.get("href") or "")
        if "katex-error" in (attributes.get("class") or ""):
            self.unset.append(attributes.get("title") or "")
        for name in ("href", "src"):
            if tag in ("a", "img", "script", "link") and attributes.get(name):
                self.targets.append(attributes[name] or "")

    def handle_endtag(self, tag: str) -> None:
        self.verbatim -= tag in VERBATIM

    def handle_data(self, data: str) -> None:
        if "**" in data and not self.verbatim:
            self.starred.append(data.strip()[:40])


def problems(folder: Path) -> list[str]:
    """Every fault of the pages in `folder`, one line each."""
    pages = {path.resolve(): Page(path) for path in sorted(folder.rglob("*.html")) if "_static" not in path.parts}
    found = []
    for path, page in pages.items():
        where = path.relative_to(folder.resolve())
        if path.name in NOT_PAGES or where.parts[0] == "_modules":
            continue
        for source, text in page.pictures:
            # a picture whose text is its own file name was given none: that is what a notebook's plot falls back to
            if not (text or "").strip() or (text or "").endswith((".png", ".svg", ".jpg", ".jpeg")):
                found.append(f"{where}: no alternative text for {source[:60]}")
        found += [f"{where}: loads {address} from elsewhere" for address in page.loaded if urlsplit(address).netloc]
        found += [f"{where}: a formula cannot be set: {reason}" for reason in page.unset]
        if path.name != "api.html":  # where ** stands before keyword arguments
            found += [f"{where}: should be bold: {text}" for text in page.starred]
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            linked = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            linked = linked / "index.html" if linked.is_dir() else linked
            if not linked.exists():
                found.append(f"{where}: no file for the link {target}")
            elif parts.fragment and linked in pages and unquote(parts.fragment) not in pages[linked].ids:
                found.append(f"{where}: no place on the page for the link {target}")
    return sorted(set(found))


def main(folder: str) -> int:
    """Print the faults; return the exit status."""
    if not Path(folder).is_dir():
        print(f"there is no folder {folder}; build the book first: make book", file=sys.stderr)
        return 1
    found = problems(Path(folder))
    sound = "every picture has a text, every link inside the book a target; nothing is loaded from elsewhere"
    print("\n".join(found) if found else sound)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
