"""Methods side by side: every recorded evaluation has its place, every published number its own row."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from metatutor import runs
from metatutor.cli import main
from metatutor.comparison import METHODS, PUBLISHED, SETTINGS, compared, summary

ROWS = compared()


def test_every_evaluation_of_plain_tasks_is_a_method_or_a_variant_told_apart() -> None:
    """What `METHODS` leaves out is a variant of what it has: fine-tuned, trained otherwise."""
    shapes = "|".join(f"{n_way}w{k_shot}s" for n_way, k_shot in SETTINGS)
    names = {name.removesuffix(PUBLISHED) for name in runs.run_names()}
    named = [re.fullmatch(rf"omniglot-(.+)-({shapes})(-.+)?", name) for name in names]
    parts = {(found[1], found[3] or "") for found in named if found}
    assert {(start, "") for start, _ in parts} <= {(start, "") for start, _ in METHODS}
    assert {row.name for row in ROWS} <= set(runs.run_names())
    others = {end for start, end in parts if (start, end) not in METHODS}
    assert others == {"-article", "-finetuned", "-learned-head", "-quick", "-scale10", "-trained-5s"}


def test_numbers_are_the_recorded_and_the_published() -> None:
    row = next(row for row in ROWS if row.name == "omniglot-maml-5w1s")
    assert (row.method, row.papers_cell, row.parameters) == ("MAML", "98.7 ± 0.4%", 112965)
    assert row.ours == runs.recorded_accuracy("omniglot-maml-5w1s")
    for row in ROWS:
        assert row.paper is None or (row.paper["n_way"], row.paper["k_shot"]) == (row.ours.n_way, row.ours.k_shot)
    without = next(row for row in ROWS if row.method == "Nearest pixels")
    assert (without.papers_cell, without.as_published_cell, without.train_seconds) == ("–", "–", 0)


def test_the_papers_rules_are_told_beside_what_came_of_them() -> None:
    under = {row.name: row for row in ROWS if row.as_published}
    found = runs.recorded_accuracy(f"omniglot-maml-5w1s{PUBLISHED}")
    assert under["omniglot-maml-5w1s"].as_published_cell == f"{found} (1 query a class)"
    assert under["omniglot-maml-5w5s"].as_published_cell.endswith("% (5 queries a class)")
    for row in under.values():
        found = row.as_published
        assert found and (found.n_way, found.k_shot) == (row.ours.n_way, row.ours.k_shot)
        assert (found.n_query, found.split) != (row.ours.n_query, row.ours.split)


@pytest.mark.parametrize(
    ("paper", "ci95", "ours", "below"),
    [
        (0.987, 0.004, 0.9826, False),  # 98.3 with one digit, as the paper has
        (0.987, 0.004, 0.9824, True),
        (0.9953, 0.0026, 0.9927, False),
        (0.9953, 0.0026, 0.9926, True),
        (0.96, None, 0.9595, False),
        (0.96, None, 0.9594, True),
    ],
)
def test_below_the_paper_is_below_its_interval(paper: float, ci95: float | None, ours: float, below: bool) -> None:
    row = next(row for row in ROWS if row.name == "omniglot-maml-5w1s")
    row = replace(row, paper={"accuracy": paper, "ci95": ci95})
    low, found = replace(row.ours, mean=0.5), replace(row.ours, mean=ours)
    assert replace(row, ours=low, as_published=found).below_paper == below  # by the paper's rules, where recorded
    assert replace(row, ours=found, as_published=None).below_paper == below
    assert not replace(row, ours=low, as_published=None, paper=None).below_paper


def test_every_name_of_a_published_method_is_one() -> None:
    assert {paper for _, paper in METHODS.values() if paper} <= {row["method"] for row in runs.published()}


def test_a_summary_has_one_row_a_method() -> None:
    rows = summary()
    assert len({row[0] for row in rows}) == len(rows) and {len(row) for row in rows} == {1 + len(SETTINGS)}
    [maml] = [row for row in rows if row[0] == "MAML"]
    assert re.fullmatch(r"98\.\d ± 0\.\d \(98\.7\)", maml[1])


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    main(["results", "--n-way", "20", "--k-shot", "1"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{2,}", head)[:5] == ["method", "task", "ours", "under the paper's rules", "paper"]
    assert len(lines) == len([row for row in ROWS if (row.ours.n_way, row.ours.k_shot) == (20, 1)])
    assert all("20-way 1-shot" in line for line in lines)


def test_tasks_that_nobody_recorded_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["results", "--n-way", "7"])
    assert ended.value.code == 2 and "no recorded results" in capsys.readouterr().err
