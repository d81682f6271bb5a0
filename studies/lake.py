"""Lake's 20 one-shot runs: 20 characters of one alphabet, a drawing of each by one person, 20 by another to recognise.

    python studies/lake.py --train FOLDER

Every recorded learner that takes 20-way 1-shot tasks, beside the errors that were published. Most of them were trained
on characters of all alphabets, those of the test too. With a folder to work in, every method is also trained on the 30
background alphabets alone, as the test wants it: Prototypical Networks and the recipe for an hour or more on one core,
the others for five to twenty minutes, most of them less than the recorded runs. A folder with an evaluation is taken as
it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import tyro
from common import settings_of, write

from metatutor.config import DataConfig, RunConfig, TestConfig, load_config, parse_config
from metatutor.data.omniglot import one_shot_runs
from metatutor.episodes import Episode
from metatutor.learner import Learner
from metatutor.runs import load_learner, read_evaluations, run_folders, run_training, study

MAML, TEST = "omniglot-maml-20w1s", TestConfig(name="lake", n_way=20, k_shot=1)
BACKGROUND: dict[str, tuple[str, int, dict[str, Any]]] = {  # whose settings, how many iterations, and what is otherwise
    "prototypical": ("omniglot-prototypical-20w1s", 4000, {}),
    "maml": (MAML, 1500, {}),
    "relation": ("omniglot-relation-20w1s", 1500, {}),
    "matching": ("omniglot-matching-20w1s", 3000, {}),
    "siamese": ("omniglot-siamese-20w1s", 1500, {}),
    "r2d2": ("omniglot-r2d2-20w1s", 1500, {}),
    "protomaml": ("omniglot-protomaml-20w1s", 1200, {}),
    "anil": (MAML, 3400, {"learner": {"adapt": "head"}}),
    "metasgd": (MAML, 1500, {"learner": {"inner_lr": 0.4, "learned_lr": "parameter"}}),
    "maml-plusplus": (
        MAML,
        800,
        {"learner": {"inner_lr": 0.4, "inner_steps": 2, "learned_lr": "layer", "multi_step_iterations": 800}},
    ),
    "fomaml": (
        "omniglot-fomaml-5w1s",
        1500,
        {"n_query": 2, "train": {"tasks_per_step": 8}, "learner": {"compiled": False}},
    ),
    "boil": ("omniglot-boil-5w1s", 1000, {"n_query": 2, "train": {"tasks_per_step": 8}}),
    "imaml": ("omniglot-imaml-5w1s", 600, {"n_query": 2, "train": {"tasks_per_step": 4}}),
    "reptile": ("omniglot-reptile-5w10s", 1000, {"train": {"tasks_per_step": 8}}),
    "metalstm": ("omniglot-metalstm-5w1s", 400, {}),
    "snail": ("omniglot-snail-20w1s", 8000, {}),
    "metanet": ("omniglot-metanet-20w1s", 4000, {}),
    "mann": ("omniglot-mann-5w-stream", 4000, {"k_shot": 2, "learner": {"n_way": 20}}),
    "pretrained-cosine": ("omniglot-pretrained-cosine-5w1s", 1500, {"n_way": 5, "data": {"together": 0.0}}),
    "best": ("omniglot-best-60w1s", 6000, {"train": {"tasks_per_step": 3}}),
}
TESTS = {"best": replace(TEST, n_episodes=300, network={"shift": 4})}  # five passes an image, so fewer tasks


def background_config(method: str) -> RunConfig:
    """How a method is trained on the background alphabets: on tasks of 20 characters, drawings warped."""
    recorded, iterations, otherwise = BACKGROUND[method]
    settings: dict[str, Any] = settings_of(recorded) | {"n_way": 20}
    settings["data"] |= {"split": "lake", "together": 0.5, "warp": True}
    settings["train"] |= {"iterations": iterations}
    settings["validation"] |= {"n_episodes": 100}
    for key, value in otherwise.items():
        settings[key] = settings[key] | value if isinstance(value, dict) else value
    return parse_config(json.dumps(settings), method)


@cache
def drawings(data: Path | None, image_size: int) -> Episode:
    """The 20 runs in the size that a network takes."""
    return one_shot_runs(data, image_size=image_size)


def trials(learner: Learner, data: Path | None) -> list[int]:
    """How many of the 20 drawings of each run are named wrongly."""
    episode = drawings(data, getattr(getattr(learner, "network", None), "image_shape", (28,))[-1])
    with torch.no_grad():
        return (learner(episode).argmax(-1) != episode.query_labels).sum(1).tolist()


def recorded_runs(data: Path | None) -> Iterator[dict[str, Any]]:
    """Every recorded learner that takes 20-way tasks."""
    for folder in run_folders():
        config = load_config(folder)
        if isinstance(config.data, DataConfig) and config.data.source == "omniglot":
            learner = load_learner(folder, config)
            if learner.ways in (None, TEST.n_way):
                yield {"run": folder.name, "split": config.data.split, "wrong": trials(learner, data)}


def background_runs(methods: Iterable[str], folder: Path, data: Path | None) -> Iterator[dict[str, Any]]:
    """Methods, trained on the background alphabets; a training that was cut off goes on."""
    for method in methods:
        of_run, config, test = folder / method, background_config(method), TESTS.get(method, TEST)
        if not read_evaluations(of_run)["evaluations"]:
            run_training(config, of_run, [test], data=data, device="cpu", progress_bar=False)
        about, learner = read_evaluations(of_run), load_learner(of_run, config.tested(test))
        [record] = about["evaluations"]
        start, _, end = method.partition("-plus")
        name = f"omniglot-{start}-20w1s{'-plus' * bool(end)}{end}"
        row = {"run": name, "split": "lake", "wrong": trials(learner, data)}
        yield row | {"train_seconds": about["train_seconds"], "accuracy": record["accuracy"], "ci95": record["ci95"]}


def main(train: Path | None = None, data: Path | None = None, only: tuple[str, ...] = ()) -> None:
    """Answer all 400 trials with every learner, and write `results/studies/lake.json`.

    Args:
        train: a folder for the trainings on background alphabets, which take hours; None: their rows stay as they are.
        data: where Omniglot and `all_runs.zip` lie.
        only: methods to train, such as `maml`; the rows of others stay as they are. Default: all.

    Raises:
        ValueError: if one of them is unknown, or there is no folder to train in.
    """
    if only and train is None:
        raise ValueError("only names methods to train; give --train FOLDER")
    if unknown := set(only) - BACKGROUND.keys():
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}; choose among {', '.join(BACKGROUND)}")
    torch.set_num_threads(1)
    kept = [row for row in study("lake") if row["split"] == "lake"]
    rows: list[dict[str, Any]] = []
    for row in recorded_runs(data):
        rows.append(row)
        print(f"{row['run']}: {sum(row['wrong']) / 4:.1f}% wrong", flush=True)
    write("lake", rows + kept)
    for row in background_runs(only or BACKGROUND, train, data) if train else ():
        kept = [other for other in kept if other["run"] != row["run"]]
        rows.append(row)
        print(f"{row['run']}, background: {sum(row['wrong']) / 4:.1f}% wrong", flush=True)
        write("lake", rows + kept)


if __name__ == "__main__":
    tyro.cli(main)
