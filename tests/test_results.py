"""The recorded runs: their numbers stay, their weights reproduce them, and their histories are their own."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from metatutor.comparison import PUBLISHED
from metatutor.config import DataConfig, SinusoidsConfig
from metatutor.data import Splits
from metatutor.episodes import Episode
from metatutor.evaluation import Evaluation, scores
from metatutor.memory.stream import StreamLearner
from metatutor.runs import (
    VALIDATION_SEED,
    WEIGHTS_LIMIT,
    evaluate_run,
    load_run,
    read_evaluations,
    recorded_accuracy,
    results_folder,
    run_folders,
    run_names,
    study,
)

MOST_EPISODES, LEAST_EPISODES = 20, 4
SEEN = 0.03  # how far off a network must be to be found out, where so many tasks tell
RECORDED: dict[str, list[Any]] = json.loads((Path(__file__).parent / "recorded.json").read_text())
run_of = cache(load_run)  # when a test asks for it, so that collecting tests is quick
ANSWERS: dict[str, list[int]] = {row["name"]: row["right"] for row in study("comparison")}  # right ones, by task

each_run = pytest.mark.parametrize("name", run_names())


@cache
def splits_of(config: DataConfig | SinusoidsConfig) -> Splits:
    if config.source == "omniglot" and not os.environ.get("METATUTOR_DATA"):
        pytest.skip("set METATUTOR_DATA to a folder with the real Omniglot")
    return config.load()


# --- what is written down ---


def test_no_recorded_number_has_changed() -> None:
    """`recorded.json` holds every mean and its interval as they were when each evaluation had a folder of its own."""
    found = {name: recorded_accuracy(name) for name in RECORDED}
    assert {name: [evaluation.mean, evaluation.ci95] for name, evaluation in found.items()} == RECORDED
    assert len(RECORDED) == 73


def test_every_name_and_every_weight_is_there_once() -> None:
    folders = run_folders()
    assert sorted(r["name"] for f in folders for r in read_evaluations(f)["evaluations"]) == sorted(set(run_names()))
    weights = [path.read_bytes() for path in results_folder().glob("*/model.safetensors")]
    pretrained = 1  # both pretrained baselines learn the same classifier
    assert len(set(weights)) == len(weights) - pretrained
    assert sum(map(len, weights)) < 26e6 and max(map(len, weights)) <= WEIGHTS_LIMIT


@each_run
def test_every_recorded_run_is_whole(name: str) -> None:
    run = run_of(name)
    about, learner = run.evaluation, run.learner()
    assert run.test.stream == ("stream" in name)
    assert about["n_episodes"] >= (600 if run.config.regression else 1000)  # as many as the papers have
    assert about["parameters"] == sum(p.numel() for p in learner.parameters())
    assert about["device"] and about["torch"] and about["peak_memory_mib"] > 0
    assert (run.config.train is None) == (run.history == []) == (about["train_iterations"] == 0)
    assert not run.history or run.history[-1]["iteration"] == about["train_iterations"]
    if run.test.stream:
        assert len(about["accuracy_by_instance"]) == about["k_shot"]


@each_run
def test_the_validation_of_a_history_is_near_the_test_of_the_same_tasks(name: str) -> None:
    """Where an evaluation is of such tasks as the training was validated on, under the same arguments."""
    run = run_of(name)
    test, tasks = run.test, run.config.validation_spec
    alike = (test.n_way, test.k_shot, test.stream) == (tasks.n_way, tasks.k_shot, run.config.validation.stream)
    if run.history and not run.config.regression and alike and not test.learner and not test.network:
        mean = torch.tensor(recorded_accuracy(run.name).mean).mean().item()
        assert abs(run.history[-1]["validation_accuracy"] - mean) < 0.02


SEARCHES = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in results_folder().glob("search/*.json")}


def settings_of(run: str) -> dict[str, Any]:
    return json.loads((results_folder() / run / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(SEARCHES))
def test_settings_were_chosen_on_validation_classes(name: str) -> None:
    """What was tried stands there with accuracies on validation classes alone."""
    described = {"papers": {"run", "tasks_per_step", "warp"}}.get(name, {"n_way", "images_of_a_class", "in_turn"})
    for row in SEARCHES[name]["rows"]:
        assert set(row) == {"tried", "iterations", "validation", *described}
        assert row["validation"] and all(0 < accuracy < 1 for accuracy in row["validation"].values())


@pytest.mark.parametrize("name", ["recipe", "ceiling"])
def test_the_recipe_has_settings_that_were_tried(name: str) -> None:
    [run] = set(re.findall(r"`(omniglot-\S+)`", SEARCHES[name]["about"]))
    about = settings_of(run)
    n_images = about["k_shot"] + about["n_query"]
    chosen = (about["n_way"], n_images, about["learner"]["in_turn"], about["train"]["iterations"])
    settings = ("n_way", "images_of_a_class", "in_turn", "iterations")
    assert chosen in [tuple(row[setting] for setting in settings) for row in SEARCHES[name]["rows"]]


def test_what_was_tried_for_the_papers_is_compared_with_what_was_recorded() -> None:
    rows = SEARCHES["papers"]["rows"]
    recorded = {row["run"]: row for row in rows if row["tried"] == "as recorded"}
    assert recorded.keys() == {row["run"] for row in rows}
    for run, row in recorded.items():
        about = settings_of(run)
        used = (about["train"]["iterations"], about["train"]["tasks_per_step"], about["data"].get("warp", False))
        assert (row["iterations"], row["tasks_per_step"], row["warp"]) == used


# --- what the weights give ---


@each_run
def test_recorded_weights_give_the_recorded_accuracy(name: str) -> None:
    """On so many tasks as their interval wants, and task by task where that was recorded."""
    run = run_of(name)
    splits, recorded = splits_of(run.config.data), recorded_accuracy(run.name)
    waves = run.config.regression  # they cost little: all of them, so only rounding may differ
    wanted = MOST_EPISODES if run.name.endswith(PUBLISHED) else episodes_for(recorded)  # the former ask few queries
    n_episodes = recorded.n_episodes if waves else wanted
    found = evaluate_run(run.folder, replace(run.test, n_episodes=n_episodes), splits=splits)
    for field in ("n_way", "k_shot", "n_query", "seed", "split", "normalization", "transductive", "metric"):
        assert getattr(found, field) == getattr(recorded, field)
    if run.name in ANSWERS:
        right = found.values * recorded.n_way * recorded.n_query
        assert (right - torch.tensor(ANSWERS[run.name][:n_episodes])).abs().max() < 1.5  # rounding may turn one answer
    # Four standard errors of a mean over so few tasks.
    allowed = 1 / 4 if waves else 4 / 1.96 * (recorded.n_episodes / n_episodes) ** 0.5
    mean, expected, ci95 = (torch.tensor(x) for x in (found.mean, recorded.mean, recorded.ci95))
    assert ((mean - expected).abs() < allowed * ci95).all()


def episodes_for(recorded: Evaluation) -> int:
    """As many tasks as it takes to tell a mean from one that is `SEEN` away, within reason."""
    deviation = torch.tensor(recorded.ci95).max().item() / 1.96 * recorded.n_episodes**0.5
    return min(MOST_EPISODES, max(LEAST_EPISODES, round((4 * deviation / SEEN) ** 2)))


@pytest.mark.parametrize(
    ("name", "near"),
    [("omniglot-fomaml-5w1s", 0.012), ("omniglot-mann-15w-stream", 0.03), ("omniglot-metanet-5w1s", 0.01)],
)
def test_the_last_row_of_a_history_is_validated_as_the_configuration_says(name: str, near: float) -> None:
    """First-order MAML by its own steps, not the shorter ones of the test; MANN on longer streams than in training."""
    run = run_of(name)
    learner = replace(run.config).build(1)
    learner.load_state_dict(run.learner().state_dict())
    sampler = splits_of(run.config.data).validation.sampler(run.config.validation_spec, seed=VALIDATION_SEED)
    found = scores(learner, sampler, 100, stream=run.config.validation.stream).mean().item()
    assert found == pytest.approx(run.history[-1]["validation_accuracy"], abs=near)


# --- streams ---

each_stream = pytest.mark.parametrize("name", [name for name in run_names() if "stream" in name])


@each_stream
def test_first_instances_of_a_stream_are_guessed(name: str) -> None:
    """Who guesses among the labels not yet told is right with 1/n, 1/(n - 1), ..., 1; more is a leak."""
    recorded = run_of(name).evaluation
    n_way, first, ci95 = recorded["n_way"], recorded["accuracy_by_instance"][0], recorded["ci95_by_instance"][0]
    honest = sum(1 / (n_way - told) for told in range(n_way)) / n_way
    assert 1 / n_way - ci95 < first < honest
    if n_way == 5:
        assert first - ci95 < 0.37  # the paper's MANN: 36.4%


@each_stream
def test_a_recorded_network_never_knows_a_label_early(name: str) -> None:
    """Other labels from a picture on leave every answer up to that picture as it was, and change later ones."""
    run = run_of(name)
    learner, n_way = run.learner(), run.config.n_way
    assert isinstance(learner, StreamLearner) and learner.labels == "one-hot"
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 5 * n_way, 1, 28, 28, generator=generator)
    labels = torch.stack([torch.randperm(5 * n_way, generator=generator) % n_way for _ in range(4)])
    stream = Episode(images, labels, images[:, :n_way], labels[:, :n_way], n_way=n_way)
    with torch.no_grad():
        before = learner.stream_logits(stream)
        for picture in (0, n_way, 3 * n_way):
            others = labels.clone()
            others[:, picture:] = (labels[:, picture:] + 1) % n_way
            after = learner.stream_logits(replace(stream, support_labels=others))
            same = torch.isclose(after, before, rtol=1e-4, atol=1e-4).all(-1)
            assert same[:, : picture + 1].all() and not same[:, picture + 1].any()


def test_what_a_memory_adds_to_a_stream() -> None:
    mann, lstm, none = (RECORDED[f"omniglot-{method}-5w-stream"][0] for method in ("mann", "lstm", "feedforward"))
    assert all(mann[i] > lstm[i] + 0.05 > none[i] + 0.5 for i in range(1, 10))
