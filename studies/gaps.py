"""Where an accuracy stays below its paper's: the same weights on the classes they were trained on, and on new ones.

    python studies/gaps.py

For each recorded evaluation below the published number less its interval, under the paper's own rules where these were
recorded: accuracy on tasks of meta-training, meta-validation and meta-test classes. If the first reaches the paper's
number, what is missing is generalisation, or luck with the characters; if it does not, the method was not trained as
well as the paper's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import tyro
from common import write

from metatutor.comparison import PUBLISHED, Row, compared
from metatutor.config import TestConfig, load_config, parse_test
from metatutor.evaluation import evaluate
from metatutor.runs import load_learner, read_evaluations, run_folders, study

KINDS = ("train", "validation", "test")


def measured(row: Row, folder: Path, test: TestConfig, data: Path | None, n_queries: int) -> dict[str, Any]:
    """Accuracy of a run's weights on three kinds of classes, in 100 to 600 tasks."""
    config = load_config(folder)
    learner, spec = load_learner(folder, config.tested(test)), config.test_spec(test)
    splits: Any = config.data.load(data)
    n_episodes = min(600, max(100, n_queries // (spec.n_way * spec.n_query)))
    found: dict[str, Any] = {"name": row.name, "method": row.method, "n_episodes": n_episodes}
    found |= {"n_way": spec.n_way, "k_shot": spec.k_shot, "n_query": spec.n_query}
    for kind in KINDS:
        result = evaluate(learner, getattr(splits, kind), spec, n_episodes=n_episodes, seed=7)
        found[kind] = {"accuracy": result.accuracy, "ci95": result.ci95}
    return found


def main(data: Path | None = None, n_queries: int = 15_000, only: tuple[str, ...] = ()) -> None:
    """Evaluate on three kinds of classes, in half an hour on one core, and write `results/studies/gaps.json`.

    Args:
        data: where Omniglot lies.
        n_queries: about as many query images are asked in each measurement, in 100 to 600 tasks.
        only: names of evaluations to measure, such as `omniglot-maml-5w5s`; other rows stay as they are. Default: all.
    """
    torch.set_num_threads(1)
    tests = {
        test.name: (folder, test)
        for folder in run_folders()
        for test in map(parse_test, read_evaluations(folder)["evaluations"])
    }
    kept = {row["name"]: row for row in study("gaps")} if only else {}
    rows = []
    for row in (row for row in compared() if row.below_paper):
        if row.name not in kept or row.name in only:
            folder, test = tests.get(row.name + PUBLISHED) or tests[row.name]
            kept[row.name] = measured(row, folder, test, data, n_queries)
            print(kept[row.name], flush=True)
        rows.append(kept[row.name])
    write("gaps", rows)


if __name__ == "__main__":
    tyro.cli(main)
