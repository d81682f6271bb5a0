"""Every page of the built book in a browser, in both languages: what `make pages` runs, after `make book`.

Nothing is loaded from elsewhere, with scripts and without; formulas are set; a page weighs little, fits its window, and
has no serious fault that axe-core finds, in light and in dark mode. `check_pages.py` looks at files; this looks at
what a reader's browser makes of them.
"""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import axe_playwright_python
import pytest
from browser import BROWSER, Window, window
from sources import ROOT

SITE = ROOT / "_build/html"
PAGES = sorted(
    p for name in ("en", "zh") for part in ("book", "notebooks") for p in (SITE / name / part).glob("*.html")
)
HEAVY, LANDING = 1_500_000, 400_000  # bytes of everything that a page loads, texts packed as servers send them
RAW_TEX = re.compile(r"\\[(\[]|\\(?:begin|end|frac|mathcal|mathrm|theta|nabla|sum|text|lVert)\b|\$\$")
AXE = Path(axe_playwright_python.__file__).parent / "axe.min.js"
VISIBLE = """(() => { const copy = document.querySelector('article').cloneNode(true);
    for (const e of copy.querySelectorAll('pre, code, script, style, annotation, .katex')) e.remove();
    return copy.textContent })()"""
TOO_WIDE = """[...document.querySelectorAll('article *')].filter((e) => {
    const box = e.getBoundingClientRect(), cut = e.closest('div.math');
    return cut && box.width && box.left < cut.getBoundingClientRect().left - 1 && !e.closest('.katex-mathml')
        && getComputedStyle(e.closest('.katex-display') || cut).overflowX === 'visible'}).length"""

FITS = "document.documentElement.scrollWidth <= window.innerWidth"

pytestmark = [
    pytest.mark.skipif(not BROWSER, reason="pages are not looked at: there is no Chromium or Chrome"),
    pytest.mark.skipif(not PAGES, reason="needs the built book: make book"),
]
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(SITE).with_suffix("").as_posix())


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Window]:
    """One browser for all pages."""
    with window(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def outside(browser: Window) -> list[str]:
    """Addresses that the page has asked for and that are not its own files."""
    return [url for url in browser.requests if urlsplit(url).scheme not in ("file", "data", "blob")]


def weight(browser: Window) -> int:
    """Bytes of all files that the page has loaded; gzip makes small what can be made smaller."""
    files = {unquote(urlsplit(url).path) for url in browser.requests if url.startswith("file:")}
    contents = [Path(file).read_bytes() for file in files if Path(file).is_file()]
    return sum(min(len(content), len(gzip.compress(content, 6))) for content in contents)


def serious(browser: Window, theme: str, only: str = "") -> list[str]:
    """What axe-core, or one rule of it, finds serious or critical, with the first place of each."""
    plain = "* {transition: none !important} .katex-html, [class*=table], pre {background-image: none !important}"
    browser.run(  # colours at once, not on their way, and no shadow that axe-core cannot see through
        f"document.head.append(Object.assign(document.createElement('style'), {{textContent: '{plain}'}})); 0"
    )
    browser.run(f"document.documentElement.dataset.theme = '{theme}'")
    browser.run(AXE.read_text(encoding="utf-8") + "; 0")
    browser.run("[...document.querySelectorAll('dl.py')].slice(10).forEach((entry) => entry.remove())")  # as the first
    options = {"resultTypes": ["violations"]} | ({"runOnly": [only]} if only else {})
    script = f"axe.run(document, {json.dumps(options)}).then((found) => JSON.stringify(found.violations))"
    found: list[dict[str, Any]] = json.loads(browser.run(script))
    of_all = [v for v in found if v["impact"] in ("serious", "critical")]
    return [f"{v['id']} ({len(v['nodes'])}×): {v['nodes'][0]['html'][:150]}" for v in of_all]


@each_page
def test_a_page_is_whole_light_and_loads_nothing_from_elsewhere(browser: Window, path: Path) -> None:
    browser.open(path, 1280)
    assert outside(browser) == []
    assert not RAW_TEX.search(browser.run(VISIBLE))
    assert weight(browser) <= (LANDING if path.name == "index.html" else HEAVY)
    assert browser.run(FITS) and browser.run(TOO_WIDE) == 0
    assert serious(browser, "light") == []
    assert serious(browser, "dark", "color-contrast") == []


@each_page
def test_a_page_fits_a_phone(browser: Window, path: Path) -> None:
    browser.open(path, 390, touch=True)
    assert browser.run(FITS)
    assert browser.run(TOO_WIDE) == 0, "a formula is cut"


@pytest.mark.parametrize(
    ("edition", "query", "found"),
    [
        ("en", "conjugate gradient", "notebooks/03c_other_ways.html"),
        ("zh", "元学习", "notebooks/01_concepts.html"),
        ("zh", "原型网络", "notebooks/02_metric.html"),
        ("zh", "隐式MAML的共轭梯度", "notebooks/03c_other_ways.html"),
    ],
)
def test_the_search_finds_a_page(browser: Window, edition: str, query: str, found: str) -> None:
    browser.call("Page.navigate", url=f"{(SITE / edition / 'search.html').as_uri()}?q={quote(query)}")
    browser.wait_for(f"[...document.querySelectorAll('#search-results li a')].some((a) => a.href.includes('{found}'))")


@each_page
def test_without_scripts_formulas_are_set_and_nothing_is_asked_for(browser: Window, path: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.requests.clear()
        browser.call("Page.navigate", url=path.as_uri())
        there = f"{path.as_uri()} complete"
        for _ in range(300):  # without scripts a page has no clock to wait by
            if browser.run("`${location.href} ${document.readyState}`") == there:
                break
            time.sleep(0.1)
        assert browser.run("`${location.href} ${document.readyState}`") == there
        assert outside(browser) == []
        assert not RAW_TEX.search(browser.run(VISIBLE))
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
