"""Where an accuracy stays below its paper's: the same weights on the classes they were trained on, and on new ones.

    python studies/gaps.py

For each recorded evaluation below the published number less its interval, under the paper's own rules where these were
recorded: accuracy on tasks of meta-training, meta-validation and meta-test classes. If the first reaches the paper's
number, what is missing is generalisation, or luck with the characters; if it is clearly below, the training was not as
good as the paper's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import tyro
from common import write

from metatutor.comparison import PUBLISHED, Row, compared
from metatutor.evaluation import evaluate
from metatutor.runs import load_run, study

KINDS = ("train", "validation", "test")


def measured(row: Row, data: Path | None, n_queries: int) -> dict[str, Any]:
    """Accuracy of a run's weights on three kinds of classes, in 100 to 600 tasks of each."""
    run = load_run(row.name + PUBLISHED if row.as_published else row.name)
    learner, spec, splits = run.learner(), run.config.test_spec(run.test), run.config.data.load(data)
    n_episodes = min(600, max(100, n_queries // (spec.n_way * spec.n_query)))
    found: dict[str, Any] = {"name": row.name, "method": row.method, "n_episodes": n_episodes}
    found |= {"n_way": spec.n_way, "k_shot": spec.k_shot, "n_query": spec.n_query}
    for kind in KINDS:
        result = evaluate(learner, getattr(splits, kind), spec, n_episodes=n_episodes, seed=7)
        found[kind] = {"accuracy": result.accuracy, "ci95": result.ci95}
    return found


def main(data: Path | None = None, n_queries: int = 15_000, only: tuple[str, ...] = ()) -> None:
    """Evaluate on three kinds of classes, in an hour on one core, and write `results/studies/gaps.json`.

    Args:
        data: where Omniglot lies.
        n_queries: query images wanted of each kind of classes; there are at least 100 tasks and at most 600.
        only: names of evaluations to measure, such as `omniglot-maml-5w5s`, and what was not recorded yet; other rows
            stay as they are. Default: all.

    Raises:
        ValueError: if one of these names is not that of an evaluation below its paper.
    """
    torch.set_num_threads(1)
    below = {row.name: row for row in compared() if row.below_paper}
    if unknown := set(only) - below.keys():
        raise ValueError(f"not below a paper: {', '.join(sorted(unknown))}; choose among {', '.join(below)}")
    rows = {row["name"]: row for row in study("gaps")} if only else {}
    for name, row in below.items():
        if name in only or name not in rows:
            rows[name] = measured(row, data, n_queries)
            print(rows[name], flush=True)
    write("gaps", [rows[name] for name in below])


if __name__ == "__main__":
    tyro.cli(main)
