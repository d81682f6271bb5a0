"""Percentages in prose are numbers that somebody recorded or published; tables are filled by `make tables`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from metatutor import runs
from metatutor.evaluation import confidence95

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("book/*.md")), *sorted(ROOT.glob("notebooks/*.ipynb"))]
# By definition: an interval's level, guessing among five, a half-width to be reached, and how often one who remembers
# which of five classes have been is right on the first drawing of a class.
DEFINED = {"95", "20", "0.2", "45.7"}


def prose(page: Path) -> str:
    """The Markdown of a page or notebook, without code and without what is filled from results/."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def fractions() -> Iterator[float]:
    """Every accuracy, error and half-width that results/ holds."""
    rows = [*runs.published(), *runs.published_streams(), *runs.published_lake()]
    for folder in runs.run_folders():
        rows += runs.read_evaluations(folder)["evaluations"]
    for row in rows:
        for key in ("accuracy", "ci95", "error", "accuracy_by_instance", "ci95_by_instance"):
            value = row.get(key)
            yield from value if isinstance(value, list) else [] if value is None else [value]
    for row in (row for row in runs.study("lake") if row["split"] == "lake"):
        wrong = torch.tensor(row["wrong"], dtype=torch.float64) / 20
        yield from (wrong.mean().item(), confidence95(wrong))


KNOWN = {f"{100 * fraction:.{digits}f}" for fraction in fractions() for digits in (0, 1)} | DEFINED


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_percentage_in_prose_is_recorded_published_or_defined(page: Path) -> None:
    found = re.findall(r"(?<![\d.])(\d+(?:\.\d+)?)(?: ± (\d+(?:\.\d+)?))?\s?%", prose(page))
    assert [number for pair in found for number in pair if number and number not in KNOWN] == []


def test_the_check_sees_a_number_that_nobody_measured(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "It reaches 12.3 ± 0.7% (here).\n```\n45.6%\n```\n<!-- t -->\n78.9%\n<!-- /t -->\n", encoding="utf-8"
    )
    assert re.findall(r"[\d.]+%", prose(page)) == ["0.7%"]
    assert "12.3" not in KNOWN
