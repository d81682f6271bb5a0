"""What each ingredient of the recipe brings: all of them, and all but one, after the same short training.

    python studies/recipe.py

The recipe is the recorded run `omniglot-best-60w1s`. Each training here has as many iterations as the others, far fewer
than that run, and is measured on the same meta-test tasks, so that differences are taken task by task.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from common import settings_of, write
from torch import Tensor

from metatutor.backbones import ResNet
from metatutor.config import RunConfig, parse_config
from metatutor.data import Splits
from metatutor.data.warp import warp
from metatutor.episodes import EpisodeSpec
from metatutor.evaluation import confidence95, scores
from metatutor.learner import Learner
from metatutor.training import train

RECIPE = "omniglot-best-60w1s"
SHIFT = 4  # pixels, as the recorded evaluations have it
SHAPES = {"5-way 1-shot": EpisodeSpec(5, 1, 15), "20-way 1-shot": EpisodeSpec(20, 1, 5)}
COARSE = {"data": {"image_size": 28}, "network": {"image_size": 28, "unshuffle": 1}}
CONV_4 = {"kind": "conv-net", "filters": 64, "pooling": "max", "normalization": "group"}
ONE = {"learner": {"parts": 1}, "network": {"members": 1, "widths": [48, 128, 160]}}  # of about as many weights
WITHOUT: dict[str, dict[str, Any]] = {  # an ingredient, and the recipe without it
    "": {},
    "every image in turn": {"learner": {"in_turn": False}},
    "60 ways": {"n_way": 20, "train": {"tasks_per_step": 3}},
    "residual networks, 84 × 84 pixels": COARSE | {"network": CONV_4, "learner": {"parts": 1}},
    "two networks": ONE,
    "84 × 84 pixels": COARSE,
    "warps": {"data": {"warp": False}},
    "six images of a class": {"n_query": 3},
    "weight decay": {"train": {"optimizer": "adam", "weight_decay": 0.0}},
    "bfloat16": {"train": {"precision": None}},
}


def changed(settings: dict[str, Any], change: dict[str, Any], iterations: int) -> RunConfig:
    """The recipe with other settings, and a training of so many iterations."""
    settings = json.loads(json.dumps(settings))
    for part, values in change.items():
        replaced = not isinstance(values, dict) or "kind" in values
        settings[part] = values if replaced else settings[part] | values
    settings["train"] |= {"iterations": iterations, "log_every": iterations}
    return parse_config(json.dumps(settings))


def trained(config: RunConfig, splits: Splits) -> tuple[Learner, float]:
    """A learner after its training, and how many seconds that took."""
    torch.manual_seed(0)
    learner = config.build(0)
    transform = warp if getattr(config.data, "warp", False) else None
    assert config.train is not None
    begun = time.perf_counter()
    train(learner, splits.train, config.train_spec, config.train, transform=transform, device="cpu", progress_bar=False)
    return learner.eval(), time.perf_counter() - begun


def measured(learner: Learner, splits: Splits, n_episodes: int) -> dict[str, Tensor]:
    """Accuracy on every task, by kind of task."""
    samplers = {name: splits.test.sampler(spec, seed=5) for name, spec in SHAPES.items()}
    return {name: scores(learner, sampler, n_episodes, tasks_per_batch=4) for name, sampler in samplers.items()}


def shifted(learner: Learner) -> Learner:
    """The same weights, with embeddings that are averaged over shifts of an image."""
    moved = copy.deepcopy(learner)
    assert isinstance(moved.network, ResNet)
    moved.network.shift = SHIFT
    return moved


def row(what: str, seconds: float, values: dict[str, Tensor], of_recipe: dict[str, Tensor]) -> dict[str, Any]:
    """Accuracies, and what is lost against the recipe, each with its interval."""
    found: dict[str, Any] = {"without": what, "seconds": round(seconds, 1)}
    for name, tasks in values.items():
        lost = of_recipe[name] - tasks
        found[name] = {"accuracy": tasks.mean().item(), "ci95": confidence95(tasks)}
        found[name] |= {"lost": lost.mean().item(), "lost_ci95": confidence95(lost) if what else 0.0}
    return found


def main(data: Path | None = None, iterations: int = 500, n_episodes: int = 200) -> None:
    """Train and evaluate everything, in an hour or more on one core, and write `results/studies/recipe.json`.

    Args:
        data: where Omniglot lies.
        iterations: of each training.
        n_episodes: tasks of each measurement.
    """
    torch.set_num_threads(1)
    settings = settings_of(RECIPE)
    rows, of_recipe = [], {}
    for what, change in WITHOUT.items():
        config = changed(settings, change, iterations)
        splits = config.data.load(data)
        learner, seconds = trained(config, splits)
        values = measured(learner, splits, n_episodes)
        if not what:  # the same weights, embeddings averaged over shifts
            rows.append(row("shifts at test", seconds, values, measured(shifted(learner), splits, n_episodes)))
            of_recipe = values
        rows.append(row(what, seconds, values, of_recipe))
        print(rows[-1], flush=True)
        write("recipe", [row | {"iterations": iterations, "n_episodes": n_episodes} for row in rows])


if __name__ == "__main__":
    tyro.cli(main)
