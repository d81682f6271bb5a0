"""The papers' numbers are complete: the table of the protocols, in percent, and nothing else."""

from __future__ import annotations

import re

import pytest
from sources import ROOT, bibliography_keys

from metatutor.comparison import METHODS
from metatutor.runs import published, published_streams

# 5-way 1-shot, 5-way 5-shot, 20-way 1-shot, 20-way 5-shot
TABLE = """
| baseline CNN, cosine | 80.0 | 95.0 | 69.5 | 89.1 | vinyals2016matching |
| baseline CNN, softmax + fine-tuning | 86.0 | 97.6 | 72.9 | 92.3 | vinyals2016matching |
| MANN, no convolutions | 82.8 | 94.9 | – | – | santoro2016meta |
| Siamese, fine-tuned | 97.3 | 98.4 | 88.1 | 97.0 | vinyals2016matching |
| Matching Networks | 98.1 | 98.9 | 93.8 | 98.5 | vinyals2016matching |
| Prototypical Networks | 98.8 | 99.7 | 96.0 | 98.9 | snell2017prototypical |
| Relation Network | 99.6 ± .2 | 99.8 ± .1 | 97.6 ± .2 | 99.1 ± .1 | sung2018learning |
| MAML, no convolutions | 89.7 ± 1.1 | 97.5 ± .6 | – | – | finn2017model |
| MAML | 98.7 ± .4 | 99.9 ± .1 | 95.8 ± .3 | 98.9 ± .2 | finn2017model |
| first-order MAML | 98.3 ± .5 | 99.2 ± .2 | 89.4 ± .5 | 97.9 ± .1 | nichol2018first |
| Reptile | 95.39 ± .09 | 98.90 ± .10 | 88.14 ± .15 | 96.65 ± .33 | nichol2018first |
| Reptile, transductive | 97.68 ± .04 | 99.48 ± .06 | 89.43 ± .14 | 97.12 ± .32 | nichol2018first |
| ANIL | – | – | 96.2 ± .5 | 98.0 ± .3 | raghu2020rapid |
| Meta-SGD | 99.53 ± .26 | 99.93 ± .09 | – | – | li2017metasgd |
| MAML++ | 99.47 | 99.93 | 97.65 | 99.33 | antoniou2019how |
| iMAML, Hessian-free | 99.50 ± .26 | 99.74 ± .11 | 96.18 ± .36 | 99.14 ± .1 | rajeswaran2019meta |
| Meta Networks | 98.95 | – | 97.0 | – | munkhdalai2017meta |
| Meta Networks, standard split | – | – | 95.92 | – | munkhdalai2017meta |
| SNAIL | 99.07 ± .16 | 99.78 ± .09 | 97.64 ± .30 | 99.36 ± .18 | mishra2018simple |
"""
SHAPES = ((5, 1), (5, 5), (20, 1), (20, 5))
ROWS = published()
# 5 classes; 1st, 2nd, 3rd, 4th, 5th, 10th instance
STREAM_TABLE = """
| MANN | 36.4 | 82.8 | 91.0 | 92.6 | 94.9 | 98.1 |
| humans | 34.5 | 57.3 | 70.1 | 71.8 | 81.4 | 92.4 |
"""
INSTANCES = (1, 2, 3, 4, 5, 10)
STREAM_ROWS = published_streams()


def expected() -> dict[tuple[str, int, int], tuple[float, float | None, str]]:
    """Method, ways and shots to percent, interval and source."""
    cells = {}
    for line in TABLE.strip().splitlines():
        method, *values, source = (cell.strip() for cell in line.strip("|").split("|"))
        for shape, value in zip(SHAPES, values, strict=True):
            if value != "–":
                accuracy, _, interval = value.partition(" ± ")
                cells[method, *shape] = (float(accuracy), float(interval) if interval else None, source)
    return cells


def test_every_cell_of_the_table_is_published_once_and_nothing_else() -> None:
    found = {(row["method"], row["n_way"], row["k_shot"]): row for row in ROWS}
    assert len(found) == len(ROWS)
    in_percent = {
        key: (round(100 * row["accuracy"], 3), row["ci95"] and round(100 * row["ci95"], 3), row["source"])
        for key, row in found.items()
    }
    assert in_percent == expected()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['method']}-{row['n_way']}w{row['k_shot']}s")
def test_a_row_says_where_it_comes_from_and_under_which_rules(row: dict) -> None:
    assert set(row) == {"method", "n_way", "k_shot", "accuracy", "ci95", "source", "protocol"}
    assert row["source"] in bibliography_keys((ROOT / "book/references.bib").read_text(encoding="utf-8"))
    assert re.search(r"\w", row["protocol"])


def test_every_method_of_the_table_is_on_the_page_against_the_papers() -> None:
    """MANN by instance, in a table of its own; Meta Networks on the standard split, which others can repeat."""
    page = (ROOT / "book/published.md").read_text(encoding="utf-8")
    [table] = re.findall(r"<!-- papers -->(.*)<!-- /papers -->", page, re.DOTALL)
    shown = set(re.findall(r"^\| (\S.*?) +\|", table, re.MULTILINE))
    names: dict[str, str] = {paper: ours for ours, paper in METHODS.values() if paper}
    names["Meta Networks"] = "Meta Networks"
    assert {names.get(method, method) for method in {str(row["method"]) for row in ROWS}} - shown == {
        "MANN, no convolutions"
    }
    assert "<!-- streams -->\n|" in page


def test_every_accuracy_by_instance_is_published_once_and_nothing_else() -> None:
    table = {}
    for line in STREAM_TABLE.strip().splitlines():
        method, *values = (cell.strip() for cell in line.strip("|").split("|"))
        table |= {(method, 5, i): float(value) for i, value in zip(INSTANCES, values, strict=True)}
    found = {(r["method"], r["n_way"], r["instance"]): round(100 * r["accuracy"], 3) for r in STREAM_ROWS}
    assert len(found) == len(STREAM_ROWS)
    assert found == table


@pytest.mark.parametrize("row", STREAM_ROWS, ids=lambda row: f"{row['method']}-{row['instance']}")
def test_a_row_by_instance_says_where_it_comes_from_and_under_which_rules(row: dict) -> None:
    assert set(row) == {"method", "n_way", "instance", "accuracy", "source", "protocol"}
    assert row["source"] in bibliography_keys((ROOT / "book/references.bib").read_text(encoding="utf-8"))
    assert "stream" in row["protocol"]


def test_the_two_files_agree_on_mann() -> None:
    by_instance = {row["instance"]: row["accuracy"] for row in STREAM_ROWS if row["method"] == "MANN"}
    shots = {row["k_shot"]: row["accuracy"] for row in ROWS if row["method"] == "MANN, no convolutions"}
    assert shots == {1: by_instance[2], 5: by_instance[5]}


def test_the_numbers_of_the_article_are_not_what_it_says_they_are() -> None:
    by_cell = {(row["method"], row["n_way"], row["k_shot"]): row["accuracy"] for row in ROWS}
    assert by_cell["MAML", 20, 1] == 0.958 and by_cell["MAML", 5, 1] == 0.987
    assert by_cell["MANN, no convolutions", 5, 1] == 0.828
