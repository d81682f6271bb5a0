"""MANN's streams: the same weights on the characters that they were trained on, and on new ones.

    python studies/streams.py

Beside the paper's accuracies by instance: if training characters reach them and new ones do not, what is missing is
generalisation; if not even these do, it is training.
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro
from common import write

from metatutor.evaluation import evaluate
from metatutor.runs import load_run

RUN, KINDS = "omniglot-mann-5w-stream", ("train", "validation", "test")


def main(data: Path | None = None, n_episodes: int = 1000) -> None:
    """Answer streams of three kinds of classes, in some minutes, and write `results/studies/streams.json`.

    Args:
        data: where Omniglot lies.
        n_episodes: streams of each kind.
    """
    torch.set_num_threads(1)
    run = load_run(RUN)
    learner, spec, splits = run.learner(), run.config.test_spec(run.test), run.config.data.load(data)
    rows = []
    for kind in KINDS:
        found = evaluate(learner, getattr(splits, kind), spec, n_episodes=n_episodes, seed=7, stream=True)
        rows.append({"run": RUN, "kind": kind, "accuracy_by_instance": found.mean, "ci95_by_instance": found.ci95})
        print(rows[-1], flush=True)
    write("streams", rows)


if __name__ == "__main__":
    tyro.cli(main)
