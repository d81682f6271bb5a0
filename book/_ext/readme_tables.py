"""Fill the tables of README.md from `results/`: `make tables`, or `--check` to see whether they are up to date."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def results_table(results: Path) -> str:
    """One row a recorded run: name, task, accuracy, training."""
    rows = ["| run | task | accuracy | trained | parameters |", "|---|---|---|---|---|"]
    for path in sorted(results.glob("*/evaluation.json")):
        about = json.loads(path.read_text())
        trained = f"{about['train_seconds'] / 60:.0f} min, {about['device']}" if about["train_seconds"] else "–"
        if "mse_by_step" in about:
            steps, mse, ci95 = len(about["mse_by_step"]) - 1, about["mse_by_step"][-1], about["ci95_by_step"][-1]
            task, found = f"sine waves, {about['k_shot']} points", f"MSE {mse:.2f} ± {ci95:.2f} after {steps} steps"
        elif "accuracy_by_instance" in about:
            task, found = f"{about['n_way']}-way stream, {about['k_shot']} images a class", by_instance(about)
        else:
            task = f"{about['n_way']}-way {about['k_shot']}-shot"
            found = f"{100 * about['accuracy']:.1f} ± {100 * about['ci95']:.1f}%"
        rows.append(f"| `{path.parent.name}` | {task} | {found} | {trained} | {about['parameters']:,} |")
    return "\n".join(rows)


def by_instance(about: dict[str, Any]) -> str:
    """The accuracies on the second, fifth and last image of a class in a stream, with their intervals."""
    measured = list(zip(about["accuracy_by_instance"], about["ci95_by_instance"], strict=True))
    shown = sorted({instance for instance in (2, 5, len(measured)) if instance <= len(measured)})
    named = {1: "1st", 2: "2nd", 3: "3rd"}
    cells = ((named.get(instance, f"{instance}th"), *measured[instance - 1]) for instance in shown)
    return ", ".join(f"{name} {100 * accuracy:.1f} ± {100 * ci95:.1f}%" for name, accuracy, ci95 in cells)


def benchmark_table(results: Path) -> str:
    """One row a setting: how many times our step's time each peer needs."""
    path = results / "benchmarks" / "maml_step.json"
    if not path.exists():
        return ""
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    peers = list(
        dict.fromkeys(row["implementation"] for row in rows if not row["implementation"].startswith("metatutor"))
    )
    table = [f"| setting | metatutor | {' | '.join(peers)} |", "|---" * (len(peers) + 2) + "|"]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        of = {row["implementation"]: row for row in rows if row["setting"] == setting}
        ours = of["metatutor"]["milliseconds"]
        cells = (f"{of[peer]['milliseconds'] / ours:.1f}×" if peer in of else "–" for peer in peers)
        table.append(f"| {setting} | 1 ({ours:.0f} ms) | {' | '.join(cells)} |")
    return "\n".join(table)


def filled(text: str, tables: dict[str, str]) -> str:
    """The text with each marked region holding its table."""
    for name, table in tables.items():
        region = f"<!-- {name} -->\n{table}\n<!-- /{name} -->" if table else f"<!-- {name} -->\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, new=region: new, text, flags=re.DOTALL)
    return text


def main() -> str | None:
    """Rewrite README.md; with `--check`, leave it as it is and return what is wrong with it."""
    readme, results = ROOT / "README.md", ROOT / "results"
    before = readme.read_text()
    after = filled(before, {"results": results_table(results), "benchmarks": benchmark_table(results)})
    if "--check" in sys.argv:
        return None if before == after else "README.md does not show what results/ holds; run `make tables`"
    readme.write_text(after)
    return None


if __name__ == "__main__":
    sys.exit(main())
