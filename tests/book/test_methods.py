"""The index of methods: complete, and read correctly from what it is read from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import methods
import pytest
from sources import ROOT

from metatutor import MAML, ImplicitMAML, NearestPixels, Reptile
from metatutor.config import known

PAPERS = {
    "finn2017": ("Finn", "2017"),
    "li2017": ("Li", "2017"),
    "snell2017": ("Snell", "2017"),
    "oord2016": ("van den Oord", "2016"),
}


def test_every_exported_method_has_an_entry_that_says_everything() -> None:
    entries = re.split(r"^\{py:class\}", methods.methods_index(ROOT), flags=re.MULTILINE)[1:]
    assert len(entries) == len(known("method"))
    for entry in entries:
        assert "*explained:* [" in entry and "*papers:* {cite:t}`" in entry
        assert re.search(r"\*code and tests:\* .*metatutor/.*, .*tests/test_", entry), entry


def test_every_recorded_run_stands_with_one_method() -> None:
    index = methods.methods_index(ROOT)
    runs = [path.parent.name for path in (ROOT / "results").glob("*/config.json")]
    assert sorted(run for run in runs if index.count(f"`{run}`") == 1) == sorted(runs)


@pytest.mark.parametrize(
    ("reference", "keys"),
    [
        ("Finn, Abbeel & Levine (2017), algorithm 2; Meta-SGD: Li et al. (2017).", ["finn2017", "li2017"]),
        ("The network is that of Finn et al. (2017), section 5.2.", ["finn2017"]),
        ("Unknown (2020), section 3, and Snell, Swersky & Zemel (2017), equation 8.", ["snell2017"]),
        ("dilations: van den Oord et al. (2016).", ["oord2016"]),
        ("Finn et al. (2016).", []),
    ],
)
def test_papers_are_found_by_first_author_and_year(reference: str, keys: list[str]) -> None:
    assert list(methods.papers(reference, PAPERS)) == keys


def notebook(folder: Path, name: str, *cells: tuple[str, str]) -> Path:
    (folder / "notebooks").mkdir(exist_ok=True)
    path = folder / "notebooks" / f"{name}.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": kind, "source": [text]} for kind, text in cells]}))
    return path


def test_the_chapter_has_the_name_of_the_folder_and_the_section_that_of_the_method(tmp_path: Path) -> None:
    cells = [
        ("code", "from metatutor import MAML, Reptile"),
        ("markdown", "# Title"),
        ("markdown", "## First, `by hand`: a + b?"),
        ("code", "MAML(Reptile)"),
        ("markdown", "Text.\n\n## Reptile: go on"),
    ]
    first = notebook(tmp_path, "01_concepts", ("markdown", "# Concepts"), ("code", "NearestPixels()"))
    chapter = notebook(tmp_path, "03_optimization", *cells)
    assert methods.chapter_of(MAML, tmp_path) == chapter
    assert methods.chapter_of(NearestPixels, tmp_path) == first
    assert methods.section_of(MAML, "maml", chapter)[1].anchor == "first-by-hand-a--b"
    assert methods.section_of(Reptile, "reptile", chapter)[1].heading == "Reptile: go on"
    assert methods.section_of(NearestPixels, "nearest-pixels", chapter)[1].heading == "Title"
    more = notebook(tmp_path, "03b_more", ("markdown", "# More"), ("markdown", "## Implicit MAML"))
    found, section = methods.section_of(ImplicitMAML, "implicit", chapter)
    assert (found, section.heading) == (more, "Implicit MAML")
    assert methods.chapter_of(ImplicitMAML, tmp_path) == chapter


def test_a_folder_without_a_chapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"MAML lies in metatutor/optimization/, but no notebook is named"):
        methods.chapter_of(MAML, tmp_path)
