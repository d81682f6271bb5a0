"""Fill the tables of README.md and of the book: `make tables`, or `--check` to see whether they are up to date."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from methods import methods_index
from tabulate import tabulate

from metatutor.comparison import SETTINGS, Row, compared, summary
from metatutor.evaluation import Evaluation
from metatutor.runs import published, read_evaluations, run_folders, task_of

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("installs", "imports", "works")
RECIPE = "omniglot-best"  # how the names of its evaluations begin
FAILURES = {"installs": "does not install", "imports": "cannot be imported", "works": "fails"}


def summary_table(results: Path) -> str:
    """One row a method: its accuracies, the papers' in brackets."""
    head = ("method", *(f"{n_way}-way {k_shot}-shot" for n_way, k_shot in SETTINGS))
    return tabulate(summary(results), head, "github", disable_numparse=True)


def runs_table(results: Path) -> str:
    """One row a recorded evaluation; those of a run follow each other."""
    rows = []
    for folder in run_folders(results):
        about = read_evaluations(folder)
        elsewhere = about["device"].removeprefix("cpu, ").removeprefix("1 thread")
        trained = ", ".join(filter(None, (_minutes(about["train_seconds"]), elsewhere)))
        about_training = (trained if about["train_seconds"] else "–", f"{about['parameters']:,}")
        for record in about["evaluations"]:
            found = Evaluation.from_record(record)
            rows.append((f"`{record['name']}`", task_of(found), _accuracy(found), *about_training))
            about_training = ("as above", "")
    return tabulate(rows, ("evaluation", "task", "accuracy", "trained", "parameters"), "github", disable_numparse=True)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds > 30 else "under 1 min"


def _accuracy(found: Evaluation) -> str:
    """As it is printed, but without the intervals of a stream's instances, for which a page is too narrow."""
    return re.sub(r" ± [\d.]+%(?=,|$)", "", str(found)) + "%" if "," in str(found) else str(found)


def benchmark_table(results: Path) -> str:
    """One row a setting: how many times our step's time each peer needs."""
    path = results / "benchmarks" / "maml_step.json"
    if not path.exists():
        return ""
    measured: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    peers = dict.fromkeys(m["implementation"] for m in measured if not m["implementation"].startswith("metatutor"))
    rows = []
    for setting in dict.fromkeys(m["setting"] for m in measured):
        of = {m["implementation"]: m["milliseconds"] for m in measured if m["setting"] == setting}
        ours = of["metatutor"]
        cells = [f"{of[peer] / ours:.1f}×" if peer in of else "–" for peer in peers]
        rows.append((setting, f"1 ({ours:.0f} ms)", *cells))
    return tabulate(rows, ("setting", "metatutor", *peers), "github", disable_numparse=True)


def tools_table(results: Path) -> str:
    """One row a package, of what `studies/tools.py` found; what went wrong stands below."""
    if not (measured := _rows_of(results / "studies/tools.json")):
        return ""
    rows, troubles = [], []
    for tool in measured:
        works = next((FAILURES[step] for step in STEPS if not tool[step]), "works")
        newer = f" (newest: {tool['newest']})" if tool["newest"] != tool["version"] else ""
        month = (tool["released"] or "–")[:7].replace("-", "\N{NON-BREAKING HYPHEN}")
        rows.append((f"`{tool['package']}`", works, f"{tool['version']}{newer}", month))
        if tool["error"]:
            troubles.append(f"- `{tool['package']}`: `{tool['error'].replace('`', chr(39))}`")
    table = tabulate(rows, ("package", "today", "version", "released"), "github", disable_numparse=True)
    said = {(tool["date"], tool["python"], tool["torch"]) for tool in measured}
    told = "; ".join(f"{date}: Python {python}, PyTorch {torch}" for date, python, torch in sorted(said))
    return "\n\n".join(
        [table, f"Measured on {told}.", *(["What went wrong:", "\n".join(troubles)] if troubles else [])]
    )


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
    if not (measured := _rows_of(results / "studies/recipe.json")):
        return ""
    kinds = ("5-way 1-shot", "20-way 1-shot")
    [whole] = [row for row in measured if not row["without"]]
    parts = sorted((row for row in measured if row["without"]), key=lambda row: row[kinds[1]]["lost"])
    rows = [("*all of it, without shifts*", *(_fine(whole[k]["accuracy"], whole[k]["ci95"]) for k in kinds))]
    rows += [(row["without"], *(_fine(row[k]["lost"], row[k]["lost_ci95"], "+") for k in kinds)) for row in parts]
    return tabulate(rows, ("brought by", *kinds), "github", disable_numparse=True)


def search_table(results: Path) -> str:
    """One row a setting that was tried for the recipe: accuracies on validation classes."""
    if not (tried := _rows_of(results / "search/recipe.json")):
        return ""
    rows = []
    for row in tried:
        found = ", ".join(f"{100 * accuracy:.1f}% ({kind})" for kind, accuracy in row["validation"].items())
        rows.append((row["tried"], f"{row['n_way']} × {row['images_of_a_class']}", f"{row['iterations']:,}", found))
    head = ("tried", "classes × images", "iterations", "on validation classes")
    return tabulate(rows, head, "github", disable_numparse=True)


def papers_table(results: Path) -> str:
    """One row a method: accuracies under its paper's rules, where recorded, and the published ones; bold if reached."""
    by_method: dict[str, dict[tuple[int, int], Row]] = {}
    for row in compared(results):
        if row.paper:
            by_method.setdefault(row.method, {})[row.ours.n_way, row.ours.k_shot] = row
    rows = []
    for method, of in by_method.items():
        cells = [_beside_paper(of[setting]) if setting in of else "–" for setting in SETTINGS]
        rows.append((method, *cells, _rules(list(of.values()))))
    head = ("method", *(f"{n_way}-way {k_shot}-shot" for n_way, k_shot in SETTINGS), "rules")
    return tabulate(rows, head, "github", disable_numparse=True)


def _beside_paper(row: Row) -> str:
    assert row.paper
    found = str(row.as_published or row.ours)[:-1]
    cell = f"{found if row.below_paper else f'**{found}**'} ({row.papers_cell[:-1]})"
    return cell.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


def _rules(rows: list[Row]) -> str:
    """What was done as in the paper and not as in the rest of this book."""
    pairs = [(row.ours, row.as_published) for row in rows if row.as_published]
    if not pairs:
        return "as in this book"
    characters = any(ours.split != theirs.split for ours, theirs in pairs)
    return "the paper's characters" if characters else "the paper's number of queries"


def gaps_table(results: Path) -> str:
    """One row a result below its paper's: the same weights on three kinds of classes; bold if the paper is reached."""
    measured, rows = {row["name"]: row for row in _rows_of(results / "studies/gaps.json")}, []
    for row in (row for row in compared(results) if row.below_paper and measured):
        kinds, cells = measured[row.name], []
        for kind in ("train", "validation", "test"):
            found = replace(row.ours, mean=kinds[kind]["accuracy"], ci95=kinds[kind]["ci95"])
            cell = str(found).removesuffix("%")
            cells.append(cell if replace(row, ours=found, as_published=None).below_paper else f"**{cell}**")
        rows.append((row.method, task_of(row.ours), row.papers_cell.removesuffix("%"), *cells))
    head = ("method", "tasks", "the paper", "training characters", "validation characters", "test characters")
    return tabulate(rows, head, "github", disable_numparse=True)


def splits_table(results: Path) -> str:
    """One row a split: the same training and test on other characters."""
    if not (measured := _rows_of(results / "studies/splits.json")):
        return ""
    kinds = ("5-way 1-shot", "20-way 1-shot")
    rows = [(_split(row["split"]), *(_fine(row[k]["accuracy"], row[k]["ci95"]) for k in kinds)) for row in measured]
    return tabulate(rows, ("test characters", *kinds), "github", disable_numparse=True)


def _split(name: str) -> str:
    return f"random, seed {name.removeprefix('random-')}" if name.startswith("random-") else "Matching Networks' paper"


def _rows_of(path: Path) -> list[dict[str, Any]]:
    """What a study or a search recorded; nothing if it was not run."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def _fine(value: float, ci95: Any, sign: str = "") -> str:
    """With two decimals, for small differences."""
    return f"{100 * value:{sign}.2f} ± {100 * ci95:.2f}".replace("-", "−")


def filled(text: str, tables: dict[str, str]) -> str:
    """The text with each marked region holding its table."""
    for name, table in tables.items():
        region = f"<!-- {name} -->\n{table}\n<!-- /{name} -->" if table else f"<!-- {name} -->\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, new=region: new, text, flags=re.DOTALL)
    return text


def pages(root: Path) -> dict[Path, dict[str, str]]:
    """The files that have tables to fill, and the tables."""
    results = root / "results"
    return {
        root / "README.md": {"results": summary_table(results), "benchmarks": benchmark_table(results)},
        root / "book/runs.md": {"runs": runs_table(results)},
        root / "book/tools.md": {"tools": tools_table(results)},
        root / "book/recipe.md": {
            "recipe": recipe_table(results),
            "ablation": ablation_table(results),
            "search": search_table(results),
        },
        root / "book/published.md": {
            "papers": papers_table(results),
            "gaps": gaps_table(results),
            "splits": splits_table(results),
        },
        root / "book/methods.md": {"methods": methods_index(root)},
    }


def main() -> str | None:
    """Rewrite the files; with `--check`, leave them as they are and return what is wrong with them."""
    stale = []
    for path, tables in pages(ROOT).items():
        before = path.read_text(encoding="utf-8")
        after = filled(before, tables)
        if before != after:
            stale.append(path.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv:
                path.write_text(after, encoding="utf-8")
    return f"out of date: {', '.join(stale)}; run `make tables`" if stale and "--check" in sys.argv else None


if __name__ == "__main__":
    sys.exit(main())
