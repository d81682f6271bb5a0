"""Other tasks than those of training: more and fewer ways and shots, and unequal numbers of shots.

    python studies/ways.py

Learners that take any number of ways, with the weights of their 20-way 1-shot training, on test characters.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from common import write
from torch import Tensor

from metatutor.data import Omniglot
from metatutor.episodes import Episode, EpisodeSpec
from metatutor.evaluation import confidence95, evaluate
from metatutor.learner import Learner
from metatutor.runs import load_run

RUNS = ("siamese", "matching", "prototypical", "relation", "r2d2", "protomaml")
WAYS, SHOTS = (2, 5, 10, 20, 50, 100, 200), (1, 2, 5, 10, 15)


def uneven(episode: Episode, counts: list[int]) -> Episode:
    """Tasks that keep only so many of the support images of each class."""
    keep: list[Tensor] = []
    for labels in episode.support_labels:
        of_class = [(labels == c).nonzero()[:count, 0] for c, count in enumerate(counts)]
        keep.append(torch.cat(of_class).sort().values)
    index, row = torch.stack(keep), torch.arange(len(episode))[:, None]
    return replace(
        episode, support_images=episode.support_images[row, index], support_labels=episode.support_labels[row, index]
    )


@torch.no_grad()
def of_uneven(learner: Learner, episode: Episode) -> dict[str, Any]:
    """Accuracy, and how often the classes of one image and those of nine are answered."""
    answers = torch.cat([learner(task).argmax(-1) for task in episode])
    right = (answers == episode.query_labels).double().mean(1)
    return {
        "accuracy": right.mean().item(),
        "ci95": confidence95(right),
        "answered": [(answers == c).double().mean().item() for c in range(episode.n_way)],
    }


def main(data: Path | None = None, n_episodes: int = 150) -> None:
    """Evaluate everything, and write `results/studies/ways.json`.

    Args:
        data: where Omniglot lies.
        n_episodes: tasks of each evaluation; fewer where they have many ways.
    """
    torch.set_num_threads(1)
    classes = Omniglot.load(data).split().test
    rows = []
    shapes = [(n_way, 1) for n_way in WAYS] + [(20, k_shot) for k_shot in SHOTS[1:]]
    five = classes.sampler(EpisodeSpec(5, 9, 5), seed=3).sample(n_episodes)
    for name in RUNS:
        learner = load_run(f"omniglot-{name}-20w1s").learner()
        for n_way, k_shot in shapes:
            if name == "relation" and n_way > 100:
                continue  # every query image with every class: 200,000 pairs a task
            n = max(30, min(n_episodes, 2000 // n_way))
            found = evaluate(learner, classes, EpisodeSpec(n_way, k_shot, 5), n_episodes=n, tasks_per_batch=4)
            row = {"learner": name, "n_way": n_way, "k_shot": k_shot}
            rows.append(row | {"accuracy": found.accuracy, "ci95": found.ci95, "n_episodes": n})
            print(rows[-1], flush=True)
        for counts in ([5] * 5, [1, 3, 5, 7, 9]):
            rows.append({"learner": name, "counts": counts} | of_uneven(learner, uneven(five, counts)))
            print(rows[-1], flush=True)
    write("ways", rows)


if __name__ == "__main__":
    tyro.cli(main)
