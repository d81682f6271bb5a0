"""Tables of the pages on the recipe and on the papers; `readme_tables` fills them in."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from metatutor.comparison import SETTINGS, Row, compared
from metatutor.evaluation import ordinal
from metatutor.runs import published, published_streams, task_of

RECIPE = "omniglot-best"  # how the names of its evaluations begin
KINDS = ("5-way 1-shot", "20-way 1-shot")


def recipe_table(results: Path) -> str:
    """One row a kind of tasks: the recipe, the best of the other recorded runs, and the best of the papers."""
    by_setting: dict[tuple[int, int], list[Row]] = {setting: [] for setting in SETTINGS}
    for row in compared(results):
        by_setting[row.ours.n_way, row.ours.k_shot].append(row)
    rows = []
    for (n_way, k_shot), of_setting in by_setting.items():
        recipes = [row for row in of_setting if row.name.startswith(RECIPE)]
        others = [row for row in of_setting if row not in recipes and not row.ours.transductive]
        papers = [row for row in published() if (row["n_way"], row["k_shot"]) == (n_way, k_shot)]
        if recipes and others:
            (recipe,), other = recipes, max(others, key=lambda row: row.ours.accuracy)
            paper = max(papers, key=lambda row: row["accuracy"])
            ours, theirs = (_fine(row.ours.accuracy, row.ours.ci95) for row in (recipe, other))
            published_best = f"{100 * paper['accuracy']:.4g}, {paper['method']}"
            rows.append((f"{n_way}-way {k_shot}-shot", f"**{ours}**", f"{theirs}, {other.method}", published_best))
    head = ("tasks", "the recipe", "best of the other runs, one query at a time", "best of the papers")
    return tabulate(rows, head, "github", disable_numparse=True)


def ablation_table(results: Path) -> str:
    """One row an ingredient of the recipe: what is lost without it, task by task, after a short training."""
    if not (measured := rows_of(results / "studies/recipe.json")):
        return ""
    [whole] = [row for row in measured if not row["without"]]
    parts = sorted((row for row in measured if row["without"]), key=lambda row: row[KINDS[1]]["lost"])
    rows = [("*all of it, without shifts*", *(_fine(whole[k]["accuracy"], whole[k]["ci95"]) for k in KINDS))]
    rows += [(row["without"], *(_fine(row[k]["lost"], row[k]["lost_ci95"], "+") for k in KINDS)) for row in parts]
    return tabulate(rows, ("brought by", *KINDS), "github", disable_numparse=True)


def search_table(results: Path) -> str:
    """One row a setting that was tried for the recipe: accuracies on validation classes."""
    if not (tried := rows_of(results / "search/recipe.json")):
        return ""
    rows = []
    for row in tried:
        found = ", ".join(f"{100 * accuracy:.1f}% ({kind})" for kind, accuracy in row["validation"].items())
        rows.append((row["tried"], f"{row['n_way']} × {row['images_of_a_class']}", f"{row['iterations']:,}", found))
    head = ("tried", "classes × images", "iterations", "on validation classes")
    return tabulate(rows, head, "github", disable_numparse=True)


def ceiling_table(results: Path) -> str:
    """One row a change to the recipe that was tried when it stood: accuracies on validation classes, two decimals."""
    rows = [
        (row["tried"], f"{row['iterations']:,}", *(f"{100 * row['validation'][k]:.2f}" for k in KINDS))
        for row in rows_of(results / "search/ceiling.json")
    ]
    return tabulate(rows, ("changed", "iterations", *KINDS), "github", disable_numparse=True) if rows else ""


def known_table(results: Path) -> str:
    """The recipe trained without and with the characters that it is asked, as others drew them."""
    tried = rows_of(results / "search/known.json")
    rows = [(row["tried"], *(f"{100 * accuracy:.2f}" for accuracy in row["validation"].values())) for row in tried]
    return tabulate(rows, ("trained on", *tried[0]["validation"]), "github", disable_numparse=True) if rows else ""


def papers_table(results: Path) -> str:
    """One row a method: accuracies under its paper's rules, where recorded, and the published ones; bold if reached."""
    by_method: dict[str, dict[tuple[int, int], Row]] = {}
    for row in compared(results):
        if row.paper:
            by_method.setdefault(row.method, {})[row.ours.n_way, row.ours.k_shot] = row
    for row in _without_convolutions(results):
        by_method.setdefault(row.method, {})[row.ours.n_way, row.ours.k_shot] = row
    rows = []
    for method, of in by_method.items():
        cells = [_beside_paper(of[setting]) if setting in of else "–" for setting in SETTINGS]
        rows.append((method, *cells, _rules(list(of.values()))))
    head = ("method", *(f"{n_way}-way {k_shot}-shot" for n_way, k_shot in SETTINGS), "rules")
    return tabulate(rows, head, "github", disable_numparse=True)


def _without_convolutions(results: Path) -> list[Row]:
    """What `studies/no_convolutions.py` measured on test characters, beside the paper; the rest is MAML's own row."""
    method, mamls = "MAML, no convolutions", {row.name: row for row in compared(results)}
    papers = {row["k_shot"]: row for row in published() if row["method"] == method}
    rows = []
    for row in rows_of(results / "studies/no_convolutions.json"):
        maml = mamls[f"omniglot-maml-5w{row['k_shot']}s"]
        found = replace(maml.as_published or maml.ours, mean=row["accuracy"], ci95=row["ci95"])
        rows.append(replace(maml, method=method, as_published=found, paper=papers[row["k_shot"]]))
    return rows


def _beside_paper(row: Row) -> str:
    assert row.paper
    found = str(row.as_published or row.ours)[:-1]
    return _whole(f"{found if row.below_paper else f'**{found}**'} ({row.papers_cell[:-1]})")


def _whole(cell: str) -> str:
    """The cell, unbroken around its signs."""
    return re.sub(" ([±×]) ", "\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}", cell)


def _rules(rows: list[Row]) -> str:
    """What was done as in the paper and not as in the rest of this book."""
    pairs = [(row.ours, row.as_published) for row in rows if row.as_published]
    if not pairs:
        return "as in this book"
    characters = any(ours.split != theirs.split for ours, theirs in pairs)
    return "the paper's characters" if characters else "the paper's number of queries"


def gaps_table(results: Path) -> str:
    """One row a result below its paper's: the same weights on three kinds of classes; bold if the paper is reached."""
    measured, rows = {row["name"]: row for row in rows_of(results / "studies/gaps.json")}, []
    for row in (row for row in compared(results) if row.below_paper and measured):
        kinds, cells = measured[row.name], []
        for kind in ("train", "validation", "test"):
            found = replace(row.ours, mean=kinds[kind]["accuracy"], ci95=kinds[kind]["ci95"])
            cell = str(found).removesuffix("%")
            cells.append(cell if replace(row, ours=found, as_published=None).below_paper else f"**{cell}**")
        rows.append((row.method, task_of(row.ours), row.papers_cell.removesuffix("%"), *cells))
    head = ("method", "tasks", "the paper", "training characters", "validation characters", "test characters")
    return tabulate(rows, head, "github", disable_numparse=True)


def closing_table(results: Path) -> str:
    """One row a setting that was tried for a result below its paper's: accuracies on validation classes."""
    methods = {row.name: row.method for row in compared(results)}  # of runs named like one of their evaluations
    kinds, rows = ("5-way 1-shot", "5-way 5-shot", "20-way 1-shot"), []
    for row in rows_of(results / "search/papers.json"):
        found = (f"{100 * row['validation'][kind]:.1f}" if kind in row["validation"] else "–" for kind in kinds)
        work = _whole(f"{row['iterations']:,} × {row['tasks_per_step']}")
        rows.append((methods[row["run"]], row["tried"], work, *found))
    head = ("method", "training", "iterations × tasks", *kinds)
    return tabulate(rows, head, "github", disable_numparse=True) if rows else ""


def streams_table(results: Path) -> str:
    """MANN's accuracy by instance, the paper's and ours on three kinds of characters; bold if the paper is reached."""
    if not (measured := rows_of(results / "studies/streams.json")):
        return ""
    paper = {row["instance"]: row["accuracy"] for row in published_streams() if row["method"] == "MANN"}
    rows = [("the paper", *(f"{100 * accuracy:.1f}" for accuracy in paper.values()))]
    for row in measured:
        cells = []
        for instance, of_paper in paper.items():
            mean, ci95 = (row[f"{name}_by_instance"][instance - 1] for name in ("accuracy", "ci95"))
            cell = _whole(f"{100 * mean:.1f} ± {100 * ci95:.1f}")
            cells.append(f"**{cell}**" if mean >= of_paper else cell)
        rows.append((f"{'training' if row['kind'] == 'train' else row['kind']} characters", *cells))
    head = ("accuracy at the", *map(ordinal, paper))
    return tabulate(rows, head, "github", disable_numparse=True)


def splits_table(results: Path) -> str:
    """One row a split: the same training and test on other characters."""
    if not (measured := rows_of(results / "studies/splits.json")):
        return ""
    rows = [(_split(row["split"]), *(_fine(row[k]["accuracy"], row[k]["ci95"]) for k in KINDS)) for row in measured]
    return tabulate(rows, ("test characters", *KINDS), "github", disable_numparse=True)


def _split(name: str) -> str:
    return f"random, seed {name.removeprefix('random-')}" if name.startswith("random-") else "Matching Networks' paper"


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What a study or a search recorded; nothing if it was not run."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def _fine(value: float, ci95: Any, sign: str = "") -> str:
    """With two decimals, for small differences."""
    return f"{100 * value:{sign}.2f} ± {100 * ci95:.2f}".replace("-", "−")
