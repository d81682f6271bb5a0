"""How much an accuracy depends on which characters were held out: the same training on five random splits and one more.

    python studies/splits.py

A Conv-4 as Prototypical Networks, with every image of a class as the support image in turn, is trained on the split of
every recorded run, on four other random ones, and on the one that Matching Networks' authors published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import tyro
from common import settings_of, write
from recipe import SHAPES, changed, measured, trained

from metatutor.evaluation import confidence95

TRAINED_AS = "omniglot-prototypical-20w1s"
SPLITS: tuple[dict[str, Any], ...] = (*({"seed": seed} for seed in range(5)), {"split": "vinyals"})


def main(data: Path | None = None, iterations: int = 500, n_episodes: int = 400) -> None:
    """Train and evaluate on every split, in a quarter of an hour on one core, and write `results/studies/splits.json`.

    Args:
        data: where Omniglot lies.
        iterations: of each training.
        n_episodes: tasks of each measurement.
    """
    torch.set_num_threads(1)
    settings, rows = settings_of(TRAINED_AS), []
    for of_data in SPLITS:
        change = {"learner": {"in_turn": True}, "train": {"precision": "bfloat16"}, "data": of_data}
        config = changed(settings, change, iterations)
        splits: Any = config.data.load(data)
        learner, _ = trained(config, splits)
        row: dict[str, Any] = {"split": splits.id, "iterations": iterations, "n_episodes": n_episodes}
        for name, tasks in measured(learner, splits, n_episodes).items():
            row[name] = {"accuracy": tasks.mean().item(), "ci95": confidence95(tasks), "n_query": SHAPES[name].n_query}
        rows.append(row)
        print(row, flush=True)
    write("splits", rows)


if __name__ == "__main__":
    tyro.cli(main)
