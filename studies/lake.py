"""Lake's 20 one-shot runs: 20 characters of one alphabet, a drawing of each by one person, 20 by another to recognise.

    python studies/lake.py

Every recorded learner that takes 20-way 1-shot tasks, beside the errors that were published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import tyro
from common import write

from metatutor.config import DataConfig, load_config
from metatutor.data.omniglot import one_shot_runs
from metatutor.runs import load_learner, run_folders


@torch.no_grad()
def main(data: Path | None = None) -> None:
    """Answer all 400 trials with every learner, and write `results/studies/lake.json`.

    Args:
        data: where Omniglot and `all_runs.zip` lie.
    """
    torch.set_num_threads(1)
    episode = one_shot_runs(data)
    rows: list[dict[str, Any]] = []
    for folder in run_folders():
        config = load_config(folder)
        if not isinstance(config.data, DataConfig) or config.data.source != "omniglot":
            continue
        learner = load_learner(folder, config)
        if learner.ways not in (None, episode.n_way):
            continue
        wrong = (learner(episode).argmax(-1) != episode.query_labels).sum(1).tolist()
        rows.append({"run": folder.name, "split": config.data.split, "wrong": wrong})
        print(f"{folder.name}: {sum(wrong) / 4:.1f}% wrong", flush=True)
    write("lake", rows)


if __name__ == "__main__":
    tyro.cli(main)
