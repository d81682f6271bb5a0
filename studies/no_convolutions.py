"""MAML without convolutions, the fully connected network of its paper: beside the published 89.7% and 97.5%.

    python studies/no_convolutions.py

The recorded run of MAML on 5-way 1-shot tasks with another network and 12,000 iterations, tested with as many query
images of a class as there are support images, as in the paper.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import tyro
from common import settings_of, write

from metatutor.config import TestConfig, parse_config
from metatutor.evaluation import evaluate
from metatutor.runs import load_learner, run_training

TRAINED_AS = "omniglot-maml-5w1s"
NETWORK = {"kind": "mlp", "n_inputs": 784, "hidden": [256, 128, 64, 64], "normalization": "batch"}
TESTS: dict[int, tuple[int, dict[str, Any]]] = {
    1: (3000, {}),
    5: (1000, {"test_inner_steps": 10}),
}  # by shots: tasks, and arguments of the learner


def main(train: Path | None = None, data: Path | None = None, iterations: int = 12_000) -> None:
    """Train for a quarter of an hour on one core, and write `results/studies/no_convolutions.json`.

    Args:
        train: a folder for the training, where one that was cut off goes on; None: a temporary one.
        data: where Omniglot lies.
        iterations: of the training.
    """
    torch.set_num_threads(1)
    train = train or Path(mkdtemp())
    settings = settings_of(TRAINED_AS) | {"network": NETWORK}
    settings["train"] |= {"iterations": iterations}
    config = parse_config(json.dumps(settings), "no_convolutions")
    run_training(config, train, data=data, device="cpu", progress_bar=False)
    splits, rows = config.data.load(data), []
    for k_shot, (n_episodes, learner_arguments) in TESTS.items():
        test = TestConfig(n_way=5, k_shot=k_shot, n_query=k_shot, learner=learner_arguments)
        learner, spec = load_learner(train, config.tested(test)), config.test_spec(test)
        found = evaluate(learner, splits.test, spec, n_episodes=n_episodes, seed=7)
        tasks = {"n_way": 5, "k_shot": k_shot, "n_query": k_shot, "n_episodes": n_episodes}
        rows.append(tasks | {"accuracy": found.accuracy, "ci95": found.ci95})
        print(rows[-1], flush=True)
    write("no_convolutions", rows)


if __name__ == "__main__":
    tyro.cli(main)
