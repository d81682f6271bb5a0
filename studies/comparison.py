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
from metatutor.comparison import PUBLISHED
from metatutor.config import DataConfig, RunConfig, TestConfig, load_config, parse_test
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


def evaluations(data: Path | None) -> list[tuple[Path, RunConfig, TestConfig, Any]]:
    """Every recorded evaluation of classification tasks of Omniglot: folder, configuration, test and classes."""
    found = []
    for folder in run_folders():
        config = load_config(folder)
        if isinstance(config.data, DataConfig) and config.data.source == "omniglot":
            splits = config.data.load(data)
            records = read_evaluations(folder)["evaluations"]
            tests = [parse_test(record) for record in records if "accuracy" in record]
            found += [(folder, config, test, splits) for test in tests if not test.name.endswith(PUBLISHED)]
    return found


def timed(folder: Path, config: RunConfig, test: TestConfig, splits: Any) -> dict[str, Any]:
    """What an evaluation is of, and how long it takes a task."""
    learner, spec = load_learner(folder, config.tested(test)), config.test_spec(test)
    sampler = getattr(splits, test.split).sampler(spec, seed=1)
    alone = milliseconds_a_task(learner, sampler, 1, rounds=7)
    of_32 = milliseconds_a_task(learner, sampler, 32, rounds=1)
    about = {"name": test.name, "n_way": spec.n_way, "k_shot": spec.k_shot, "n_query": spec.n_query}
    return about | {"ms_alone": alone, "ms_of_32": of_32, "batch": learner.normalization == "batch"}


def main(data: Path | None = None, n_episodes: int = 400, seconds: float = 25.0) -> None:
    """Evaluate every recorded run, and write `results/studies/comparison.json`.

    Times come first, all in one go, so that they can be compared if the machine does nothing else for some minutes.

    Args:
        data: where Omniglot lies.
        n_episodes: tasks of each evaluation; the first of them are the same whatever their number.
        seconds: about as long an evaluation may take; slow methods get fewer tasks.
    """
    keep_freed_memory_once()
    torch.set_num_threads(1)
    every, rows = evaluations(data), []
    for one in every:
        rows.append(timed(*one))
        print(rows[-1]["name"], f"{rows[-1]['ms_alone']:.0f} ms", flush=True)
    for (folder, config, test, splits), row in zip(every, rows, strict=True):
        n_tasks = max(FEWEST, min(n_episodes, round(1000 * seconds / row["ms_of_32"])))
        row["right"] = right_answers(folder, config, test, splits, n_tasks)
        if row.pop("batch"):
            by_support = replace(test, network=test.network | {"normalization": "support"})
            one_each = replace(test, n_query=1)
            row["right_by_support"] = right_answers(folder, config, by_support, splits, n_tasks)
            row["right_one_each"] = right_answers(folder, config, one_each, splits, n_tasks)
        print(row["name"], len(row["right"]), f"{sum(row['right']) / len(row['right']):.1f}", flush=True)
    write("comparison", rows)


if __name__ == "__main__":
    tyro.cli(main)
