"""Recorded weights reproduce the recorded accuracy, on the first of the recorded tasks."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache

import pytest
import torch
from metatutor.recording import DataConfig, SinusoidsConfig, evaluate_learner, load_run, run_names

from metatutor.data import Splits
from metatutor.episodes import Episode
from metatutor.evaluation import ByInstance, Evaluation, Regression
from metatutor.memory.stream import StreamLearner

N_EPISODES = 20


@cache
def splits_of(config: DataConfig | SinusoidsConfig) -> Splits:
    if config.source == "omniglot" and not os.environ.get("METATUTOR_DATA"):
        pytest.skip("set METATUTOR_DATA to a folder with the real Omniglot")
    return config.load()


@pytest.mark.parametrize("name", run_names())
def test_recorded_weights_give_the_recorded_accuracy(name: str):
    run = load_run(name)
    splits = splits_of(run.config.data)
    recorded = run.evaluation
    if run.config.regression:  # waves cost little: all of them, so only rounding may differ
        again = evaluate_learner(run.learner(), splits, run.config)
        assert isinstance(again, Regression)
        curves = zip(again.mse_by_step, recorded["mse_by_step"], recorded["ci95_by_step"], strict=True)
        assert all(abs(mse - expected) < ci95 / 4 for mse, expected, ci95 in curves)
        return
    found = evaluate_learner(run.learner(), splits, run.config, n_episodes=N_EPISODES)
    for field in ("n_way", "k_shot", "seed", "split", "normalization", "transductive"):
        assert getattr(found, field) == recorded[field]
    # Four standard errors of a mean over so few tasks. A wrong network is off by far more.
    errors = 4 / 1.96 * (recorded["n_episodes"] / N_EPISODES) ** 0.5
    if run.config.evaluation.stream:
        assert isinstance(found, ByInstance)
        instances = (found.accuracy_by_instance, recorded["accuracy_by_instance"], recorded["ci95_by_instance"])
        measured = list(zip(*instances, strict=True))
    else:
        assert isinstance(found, Evaluation) and found.n_query == recorded["n_query"]
        measured = [(found.accuracy, recorded["accuracy"], recorded["ci95"])]
    assert all(abs(again - expected) < errors * ci95 for again, expected, ci95 in measured)


STREAMS = [name for name in run_names() if load_run(name).config.evaluation.stream]


@pytest.mark.parametrize("name", STREAMS)
def test_first_instances_of_a_stream_are_guessed(name: str) -> None:
    """Who guesses among the labels not yet told is right with 1/n, 1/(n - 1), ..., 1; more is a leak."""
    recorded = load_run(name).evaluation
    n_way, first, ci95 = recorded["n_way"], recorded["accuracy_by_instance"][0], recorded["ci95_by_instance"][0]
    honest = sum(1 / (n_way - told) for told in range(n_way)) / n_way
    assert 1 / n_way - ci95 < first < honest
    if n_way == 5:
        assert first - ci95 < 0.37  # the paper's MANN: 36.4%


@pytest.mark.parametrize("name", STREAMS)
def test_a_recorded_network_never_knows_a_label_early(name: str) -> None:
    """Other labels from a picture on leave every answer up to that picture as it was, and change later ones."""
    run = load_run(name)
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
    mann, lstm, none = (
        load_run(f"omniglot-{method}-5w-stream").evaluation["accuracy_by_instance"]
        for method in ("mann", "lstm", "feedforward")
    )
    assert all(mann[i] > lstm[i] + 0.05 > none[i] + 0.5 for i in range(1, 10))
