"""Every recorded learner on the same tasks: paired accuracies, time for a task, and how much is transduction.

    python studies/comparison.py

For each recorded evaluation of classification tasks: how many query images of each of the first tasks were answered
rightly (evaluations of one shape share their tasks, so that these can be compared in pairs), and how long an answer
takes. For each whose network normalises by the batch, the same weights where each query image is normalised by the
support set, and where a task asks one image of each class.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from common import write

from metatutor.allocator import keep_freed_memory_once
from metatutor.config import DataConfig, RunConfig, TestConfig, load_config, parse_test
from metatutor.data import Omniglot
from metatutor.evaluation import evaluate
from metatutor.runs import load_learner, read_evaluations, run_folders

FEWEST = 60  # tasks of an evaluation


def right_answers(folder: Path, config: RunConfig, test: TestConfig, splits: Any, n_episodes: int) -> list[int]:
    """How many query images of each task are answered rightly."""
    learner, spec = load_learner(folder, config.tested(test)), config.test_spec(test)
    n_episodes = min(n_episodes, test.n_episodes)
    found = evaluate(learner, getattr(splits, test.split), spec, n_episodes=n_episodes, seed=test.seed)
    return (found.values * spec.n_way * spec.n_query).round().int().tolist()


@torch.no_grad()
def milliseconds_a_task(learner: Any, sampler: Any, tasks: int, rounds: int) -> float:
    """The median time for a task, in parts of so many side by side, on one thread."""
    times = []
    for episode in [sampler.sample(tasks) for _ in range(rounds)]:
        start = time.perf_counter()
        learner(episode)
        times.append((time.perf_counter() - start) / tasks)
    return 1000 * statistics.median(times)


def rows_of(folder: Path, data: Path | None, n_episodes: int, seconds: float) -> list[dict[str, Any]]:
    """One row an evaluation of a run."""
    config, about = load_config(folder), read_evaluations(folder)
    if not isinstance(config.data, DataConfig) or config.data.source != "omniglot":
        return []
    splits: Any = config.data.load(data)
    rows = []
    for record in about["evaluations"]:
        test = parse_test(record)
        if "accuracy" not in record:
            continue
        learner = load_learner(folder, config.tested(test))
        sampler = getattr(splits, test.split).sampler(config.test_spec(test), seed=1)
        alone = milliseconds_a_task(learner, sampler, 1, rounds=7)
        n_tasks = max(FEWEST, min(n_episodes, round(1000 * seconds / alone)))
        row = {
            "name": test.name,
            "n_way": record["n_way"],
            "k_shot": record["k_shot"],
            "n_query": record["n_query"],
            "right": right_answers(folder, config, test, splits, n_tasks),
            "ms_alone": alone,
            "ms_of_32": milliseconds_a_task(learner, sampler, 32, rounds=1),
        }
        if learner.normalization == "batch":
            by_support = replace(test, network=test.network | {"normalization": "support"})
            one_each = replace(test, n_query=1)
            row["right_by_support"] = right_answers(folder, config, by_support, splits, n_tasks)
            row["right_one_each"] = right_answers(folder, config, one_each, splits, n_tasks)
        rows.append(row)
        print(test.name, f"{sum(row['right']) / len(row['right']):.1f}", f"{row['ms_alone']:.0f} ms", flush=True)
    return rows


def main(data: Path | None = None, n_episodes: int = 400, seconds: float = 10.0) -> None:
    """Evaluate every recorded run, and write `results/studies/comparison.json`.

    Args:
        data: where Omniglot lies.
        n_episodes: tasks of each evaluation; the first of them are the same whatever their number.
        seconds: about as long an evaluation may take; slow methods get fewer tasks.
    """
    keep_freed_memory_once()
    torch.set_num_threads(1)
    Omniglot.load(data)  # or an error now
    rows = []
    for folder in run_folders():
        rows += rows_of(folder, data, n_episodes, seconds)
    write("comparison", rows)


if __name__ == "__main__":
    tyro.cli(main)
