"""The look over the built pages finds what it is there to find."""

from __future__ import annotations

from pathlib import Path

import check_pages
import pytest
from sphinxcontrib import katex

GOOD = '<h1 id="top">A</h1><a href="#top">up</a><a href="https://example.org/x">out</a><img src="a.png" alt="A line.">'


def built(folder: Path, body: str) -> list[str]:
    (folder / "a.png").write_bytes(b"")
    (folder / "page.html").write_text(f"<html><body>{body}</body></html>")
    return check_pages.problems(folder)


def test_a_sound_page_passes(tmp_path: Path) -> None:
    assert built(tmp_path, GOOD) == built(tmp_path, GOOD + "<pre><code>f(**x)</code></pre>") == []


@pytest.mark.parametrize(
    "body",
    [
        '<img src="a.png">',
        '<img src="a.png" alt="_images/a.png">',
        '<svg role="img"></svg>',
        '<a href="missing.html">x</a>',
        '<a href="#missing">x</a>',
        '<script src="missing.js"></script>',
        '<script src="https://example.org/x.js"></script>',
        '<link rel="stylesheet" href="//example.org/x.css">',
        '<span class="katex-error" title="no such command">x</span>',
        "<p>**关系网络：**需要更久的训练</p>",
    ],
)
def test_a_fault_is_found(tmp_path: Path, body: str) -> None:
    assert len(built(tmp_path, GOOD + body)) == 1


def test_there_must_be_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_pages.main(str(tmp_path / "nowhere")) == 1
    assert "make book" in capsys.readouterr().err


def test_the_styles_of_formulas_are_of_the_version_that_sets_them() -> None:
    styles = Path(check_pages.__file__).parents[1] / "_static/katex/katex.min.css"
    assert f'"{katex.katex_version}"' in styles.read_text(encoding="utf-8")
