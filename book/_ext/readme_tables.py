"""Fill the tables of README.md and of the book: `make tables`, or `--check` to see whether they are up to date."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import research_tables as research
from methods import methods_index
from research_tables import rows_of
from tabulate import tabulate

from metatutor.comparison import SETTINGS, summary
from metatutor.evaluation import Evaluation
from metatutor.runs import read_evaluations, run_folders, task_of

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("installs", "imports", "works")
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
    if not (measured := rows_of(results / "studies/tools.json")):
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
            "recipe": research.recipe_table(results),
            "ablation": research.ablation_table(results),
            "search": research.search_table(results),
            "ceiling": research.ceiling_table(results),
            "known": research.known_table(results),
        },
        root / "book/published.md": {
            "papers": research.papers_table(results),
            "gaps": research.gaps_table(results),
            "closing": research.closing_table(results),
            "streams": research.streams_table(results),
            "splits": research.splits_table(results),
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
