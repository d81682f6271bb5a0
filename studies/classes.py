"""Sample efficiency: accuracy on new characters against the number of characters that were trained on.

    python studies/classes.py

A Prototypical Network, MAML and an ordinary classifier compared by cosine, each trained on the first 25, 100, … of the
meta-training characters in a random order, two orders and seeds. Characters are turned into four classes each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import tyro
from common import write

from metatutor.backbones import ConvNet
from metatutor.baselines import PretrainedCosine
from metatutor.data import Omniglot
from metatutor.episodes import ClassImages, EpisodeSpec
from metatutor.evaluation import evaluate
from metatutor.learner import Learner
from metatutor.metric import Prototypical
from metatutor.optimization import MAML
from metatutor.training import TrainConfig, train

NUMBERS = (25, 100, 400, 1100)
TEST = EpisodeSpec(5, 1, 15)


def methods(n_classes: int) -> dict[str, tuple[Learner, EpisodeSpec, int, int]]:
    """Each method with its tasks of training, how many of them a step, and how many steps."""
    network: dict[str, Any] = {"filters": 32, "pooling": "max", "normalization": "group"}
    head = {"filters": 32, "zero_head": True}
    return {
        "prototypical": (Prototypical(ConvNet(**network)), EpisodeSpec(20, 1, 5), 2, 800),
        "maml": (MAML(ConvNet(5, **head), inner_lr=0.4, test_inner_steps=3), EpisodeSpec(5, 1, 5), 8, 1200),
        "pretrained-cosine": (PretrainedCosine(ConvNet(n_classes, **network)), EpisodeSpec(20, 1, 5), 2, 800),
    }


def subset(classes: ClassImages, n: int, seed: int) -> ClassImages:
    """So many of the characters, in all turns."""
    chosen = torch.randperm(len(classes.images), generator=torch.Generator().manual_seed(seed))[:n].sort().values
    return ClassImages(classes.images[chosen], [str(classes.names[i]) for i in chosen.tolist()], rotations=True)


def main(data: Path | None = None, seeds: int = 2, n_episodes: int = 300) -> None:
    """Train everything, and write `results/studies/classes.json`.

    Args:
        data: where Omniglot lies.
        seeds: how often each training is repeated, with other characters and other initial parameters.
        n_episodes: test tasks of each.
    """
    torch.set_num_threads(1)
    splits = Omniglot.load(data).split()
    rows = []
    for seed in range(seeds):
        for n in NUMBERS:
            classes = subset(splits.train, n, seed)
            torch.manual_seed(seed)
            for name, (learner, spec, tasks, iterations) in methods(len(classes)).items():
                config = TrainConfig(iterations=iterations, tasks_per_step=tasks, seed=seed)
                train(learner, classes, spec, config, device="cpu", progress_bar=False)
                new, seen = (evaluate(learner, c, TEST, n_episodes=n_episodes) for c in (splits.test, classes))
                row = {"learner": name, "n_characters": n, "seed": seed, "iterations": iterations}
                rows.append(row | {"accuracy": new.accuracy, "ci95": new.ci95, "accuracy_seen": seen.accuracy})
                print(rows[-1], flush=True)
                write("classes", rows)


if __name__ == "__main__":
    tyro.cli(main)
