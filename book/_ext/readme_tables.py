"""Fill the tables of README.md from `results/`: `make tables`, or `--check` to see whether they are up to date."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

from metatutor.evaluation import Evaluation
from metatutor.runs import read_evaluations, run_folders, task_of

ROOT = Path(__file__).resolve().parents[2]


def results_table(results: Path) -> str:
    """One row a recorded evaluation; those of a run follow each other."""
    rows = []
    for folder in run_folders(results):
        about = read_evaluations(folder)
        trained = f"{about['train_seconds'] / 60:.0f} min, {about['device']}" if about["train_seconds"] else "–"
        for record in about["evaluations"]:
            found = Evaluation.from_record(record)
            rows.append((f"`{record['name']}`", task_of(found), str(found), trained, f"{about['parameters']:,}"))
            trained = "as above"
    return tabulate(rows, ("evaluation", "task", "accuracy", "trained", "parameters"), "github", disable_numparse=True)


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


def filled(text: str, tables: dict[str, str]) -> str:
    """The text with each marked region holding its table."""
    for name, table in tables.items():
        region = f"<!-- {name} -->\n{table}\n<!-- /{name} -->" if table else f"<!-- {name} -->\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, new=region: new, text, flags=re.DOTALL)
    return text


def main() -> str | None:
    """Rewrite README.md; with `--check`, leave it as it is and return what is wrong with it."""
    readme, results = ROOT / "README.md", ROOT / "results"
    before = readme.read_text(encoding="utf-8")
    after = filled(before, {"results": results_table(results), "benchmarks": benchmark_table(results)})
    if "--check" in sys.argv:
        return None if before == after else "README.md does not show what results/ holds; run `make tables`"
    readme.write_text(after, encoding="utf-8")
    return None


if __name__ == "__main__":
    sys.exit(main())
