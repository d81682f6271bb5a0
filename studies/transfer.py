"""Meta-learning against transfer learning: accuracy over shots, on pictures nearer to and farther from the training's.

    python studies/transfer.py --pictures-in DIR

Recorded learners, all trained on Omniglot's meta-training characters, answer 5-way tasks of other kinds of pictures.
Fine-tuning takes as many steps as are best on validation characters with so many shots.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import tyro
from common import pictures, write

from metatutor.data import Omniglot
from metatutor.episodes import EpisodeSpec
from metatutor.evaluation import evaluate
from metatutor.learner import Learner
from metatutor.runs import load_run

RUNS = ("prototypical-5w1s", "matching-5w1s", "r2d2-5w1s", "protomaml-5w1s", "maml-5w5s", "anil-5w5s")
BASELINES = ("pretrained-cosine-5w1s", "scratch-5w1s", "nearest-pixels-5w1s")
SHOTS, STEPS, N_WAY, N_QUERY = (1, 2, 5, 10, 15), (5, 20, 50, 100), 5, 5


def best_finetuning(validation: Any, k_shot: int) -> tuple[Learner, int]:
    """Fine-tuning of the pretrained network, with the number of steps that validation characters ask for."""
    pretrained = load_run("omniglot-pretrained-finetuned-5w1s").learner()
    learners = {steps: pretrained.with_arguments(steps=steps) for steps in STEPS}
    spec = EpisodeSpec(N_WAY, k_shot, N_QUERY)
    found = {s: evaluate(learner, validation, spec, n_episodes=60).accuracy for s, learner in learners.items()}
    best = max(found, key=lambda steps: found[steps])
    return learners[best], best


def main(pictures_in: Path | None = None, data: Path | None = None, n_episodes: int = 150) -> None:
    """Evaluate everything, and write `results/studies/transfer.json`.

    Args:
        pictures_in: the folder of the data sets of photographs and silhouettes.
        data: where Omniglot lies.
        n_episodes: tasks of each evaluation.
    """
    torch.set_num_threads(1)
    validation = Omniglot.load(data).split().validation
    kinds = pictures(pictures_in, data)
    fixed = {name: load_run(f"omniglot-{name}").learner() for name in (*RUNS, *BASELINES)}
    rows = []
    for k_shot in SHOTS:
        finetuned, steps = best_finetuning(validation, k_shot)
        for kind, classes in kinds.items():
            counts = classes.counts if classes.counts is not None else torch.tensor([classes.images.shape[1]])
            n_way = min(N_WAY, len(classes))
            if int(counts.min()) < k_shot + N_QUERY:
                continue
            for name, learner in (fixed | {f"pretrained-finetuned, {steps} steps": finetuned}).items():
                if learner.ways not in (None, n_way):
                    continue
                spec = EpisodeSpec(n_way, k_shot, N_QUERY)
                found = evaluate(learner, classes, spec, n_episodes=n_episodes)
                rows.append(
                    {"learner": name, "pictures": kind, "n_way": n_way, "k_shot": k_shot}
                    | {"accuracy": found.accuracy, "ci95": found.ci95, "transductive": found.transductive}
                )
                print(kind, k_shot, name, found, flush=True)
    write("transfer", rows)


if __name__ == "__main__":
    tyro.cli(main)
