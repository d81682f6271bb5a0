"""Checks of answers: right ones pass, the usual mistakes are called by their name, none of them raises."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from math import comb

import numpy as np
import pytest
import torch
from PIL import Image

from metatutor.baselines import NearestPixels
from metatutor.book import exercises
from metatutor.book.exercises import (
    Verdict,
    check_episode,
    check_episodes_needed,
    check_overlap,
    check_task_count,
    game,
)
from metatutor.episodes import ClassImages, Episode, EpisodeSampler, EpisodeSpec
from metatutor.learner import Learner

SPEC = EpisodeSpec(n_way=3, k_shot=2, n_query=2)
SOME = torch.tensor([0.2, 0.4, 0.6, 0.8])


def test_a_verdict_is_as_true_as_it_is_right() -> None:
    assert Verdict(True, "Yes.") and not Verdict(False, "No.")
    assert [repr(Verdict(right, "So.")) for right in (True, False)] == ["✓ So.", "✗ So."]


CHECKS: list[Callable[[object], Verdict]] = [
    lambda answer: check_task_count(answer, 20, 5),
    lambda answer: check_overlap(answer, 0.5, 20),
    lambda answer: check_episodes_needed(answer, SOME, 0.002),
    lambda answer: check_episode(answer, ClassImages(torch.zeros(3, 4, 1, 1, 1, dtype=torch.uint8), list("abc")), SPEC),
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("answer", [None, ...])
def test_no_answer_is_not_an_error(check: Callable[[object], Verdict], answer: object) -> None:
    assert not check(answer) and "No answer yet" in check(answer).why


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("answer", ["many", True, -1, 10**9, float("nan"), torch.ones(2)])
def test_nothing_that_somebody_types_raises(check: Callable[[object], Verdict], answer: object) -> None:
    assert not check(answer)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (comb(20, 5), ""),
        (torch.tensor(comb(20, 5)), ""),
        (1_860_480, "every order"),
        (20**5, "twice"),
        (4, "no class"),
        (7, "small"),
        (10**8, "large"),
    ],
)
def test_task_count(answer: object, says: str) -> None:
    verdict = check_task_count(answer, 20, 5)
    assert bool(verdict) == (says == "") and says in verdict.why


@pytest.mark.parametrize(
    ("answer", "says"), [(0.525, ""), (0.5251, ""), (0.55, "anyway"), (0.5, "honest"), (0.9, "large")]
)
def test_overlap(answer: float, says: str) -> None:
    verdict = check_overlap(answer, accuracy=0.5, n_drawings=20)
    assert bool(verdict) == (says == "") and says in verdict.why


def test_episodes_needed() -> None:
    needed = (1.96 * SOME.std().item() / 0.002) ** 2
    for answer in (needed, round(needed), int(needed) + 1):
        assert check_episodes_needed(answer, SOME, 0.002)
    mistakes = {needed**0.5: "square", needed / 1.96**2: "1.96", needed / 4: "twice", 4 * needed: "half"}
    for answer, says in mistakes.items():
        assert says in check_episodes_needed(answer, SOME, 0.002).why
    assert "small" in check_episodes_needed(100, SOME, 0.002).why
    assert "fewer" in check_episodes_needed(10**8, SOME, 0.002).why


@pytest.mark.parametrize("rotations", [False, True])
def test_what_the_sampler_draws_is_a_task(class_images: Callable[..., ClassImages], rotations: bool) -> None:
    classes = class_images(rotations=rotations)
    assert check_episode(EpisodeSampler(classes, SPEC).sample(4), classes, SPEC)


def untyped(episode: Episode, **fields: torch.Tensor) -> Episode:
    """What a reader can make, whose shapes nobody checks."""
    changed = replace(episode)
    for name, tensor in fields.items():
        object.__setattr__(changed, name, tensor)
    return changed


def by_class(episode: Episode) -> Episode:
    """One task with its support set in class order."""
    [order] = episode.support_labels.argsort()
    return replace(
        episode,
        support_images=episode.support_images[:, order],
        support_labels=episode.support_labels[:, order],
    )


def shifted(labels: torch.Tensor) -> torch.Tensor:
    return (labels + 1) % 3


FAULTS: dict[str, Callable[[Episode], Episode]] = {
    "support labels should be": lambda e: untyped(e, support_labels=e.support_labels * 0),
    "query labels should be": lambda e: untyped(e, query_labels=e.query_labels + 1),
    "should have labels": lambda e: replace(e, query_labels=None),
    "images and labels should be [task, support": lambda e: untyped(e, support_images=e.support_images[:, 1:]),
    "images and labels should be [task, query": lambda e: untyped(e, query_labels=e.query_labels[0]),
    "not an image of these": lambda e: replace(e, support_images=255 * e.support_images),
    "images of several classes": lambda e: replace(e, query_labels=shifted(e.query_labels)),
    "in the support set too": lambda e: replace(e, query_images=by_class(e).support_images),
    "appears twice": lambda e: replace(e, query_images=e.query_images[:, [0, 0, 2, 3, 4, 5]]),
    "the same class": lambda e: replace(
        by_class(e),
        support_images=by_class(e).support_images[:, [0, 1, 2, 3, 0, 1]],
        query_images=e.query_images[:, [0, 1, 2, 3, 0, 1]],
    ),
}


@pytest.mark.parametrize("says", FAULTS)
def test_a_fault_of_a_task_is_named(class_images: Callable[..., ClassImages], says: str) -> None:
    classes = class_images()
    verdict = check_episode(FAULTS[says](EpisodeSampler(classes, SPEC).sample(1)), classes, SPEC)
    assert not verdict and says in verdict.why


def test_a_game_holds_its_rounds_and_needs_no_network() -> None:
    images, labels = torch.rand(3, 5, 1, 28, 28), torch.arange(5).repeat(3, 1)
    html = game(Episode(images, labels, images, labels, n_way=5), (labels + 1) % 5, rival="a <rival>")
    found = re.search(r"const rounds = (\[.*\]);", html)
    assert found is not None
    rounds = json.loads(found.group(1))
    assert [len(one["support"]) for one in rounds] == [5, 5, 5]
    assert all(one["rival"] == (one["answer"] + 1) % 5 for one in rounds)
    assert all(one["query"] == one["support"][one["answer"]] for one in rounds)
    assert "a &lt;rival&gt;" in html and "<rival>" not in html
    assert "http" not in html and html.count("<img") == html.count(" alt=") == 6


def test_a_game_shows_coloured_images_in_their_colours() -> None:
    images, labels = torch.rand(1, 5, 3, 28, 28), torch.arange(5)[None]
    html = game(Episode(images, labels, images, labels, n_way=5), labels, rival="nobody")
    found = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]
    for data, image in zip(found, images[0], strict=False):
        with Image.open(io.BytesIO(data)) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).movedim(-1, 0) / 255
        assert torch.allclose(pixels, image, atol=0.002)
    assert len(found) == 6


def test_a_game_is_for_one_shot_tasks() -> None:
    images, labels = torch.rand(1, 6, 1, 28, 28), torch.arange(3).repeat_interleave(2)[None]
    with pytest.raises(ValueError, match="1-shot"):
        game(Episode(images, labels, images, labels, n_way=3), labels, rival="nobody")


def test_a_condition_is_asked_only_of_an_answer():
    def never(answer: object) -> bool:
        raise AssertionError

    for nothing in (..., (1, ...)):
        assert "No answer yet" in repr(exercises.check(nothing, never)) and not exercises.check(nothing, never)
    assert exercises.check(3, lambda n: n == 3)
    assert "TypeError" in repr(exercises.check("4", lambda n: n + 1)) and not exercises.check("4", lambda n: n + 1)
    assert "Not yet" in repr(exercises.check(4, lambda n: n == 3)) and not exercises.check(4, lambda n: n == 3)


def test_a_function_that_returns_nothing_is_no_answer_yet():
    for nothing, says in ((lambda: None, "No answer yet"), (lambda: 4, "Not yet")):
        verdict = exercises.check(nothing, lambda f: None if f() is None else f() == 3)
        assert says in repr(verdict) and not verdict


@pytest.mark.parametrize(
    ("answer", "says"), [(0.9999938558, ""), (0.5, "small"), (0.8807970780, "square"), (6.1442e-06, "minus")]
)
def test_prototype_probability(answer: float, says: str) -> None:
    numbers, classes = torch.tensor([1.0, 3.0, 6.0, 10.0]), torch.tensor([0, 0, 1, 1])
    verdict = exercises.check_prototype_probability(answer, numbers, classes, query=4.0)
    assert bool(verdict) == (says == "") and says in verdict.why


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((6, 12), ""),
        ((12, 12), "Prototypes: 12 keeps"),
        ((6, 6), "Matching: 6 keeps"),
        ((6, ...), "No answer"),
        (6, "two"),
    ],
)
def test_kept_numbers(answer: object, says: str) -> None:
    verdict = exercises.check_kept_numbers(answer, n_classes=3, k_shot=2, embedding_size=2)
    assert bool(verdict) == (says == "") and says in verdict.why


class QueryMean(Learner):
    """Nearest class to the mean of all query images."""

    def forward(self, episode: Episode) -> torch.Tensor:
        mean = episode.query_images.mean((1, 2, 3, 4), keepdim=True)[..., 0, 0, 0]
        return mean.expand(*episode.query_labels.shape, 1).repeat(1, 1, episode.n_way)


def test_mode_is_found_by_asking() -> None:
    labels = torch.arange(5)[None]
    images = (labels / 5)[:, :, None, None, None].expand(1, 5, 1, 28, 28)
    task = Episode(images, labels, images, labels, n_way=5)
    for learner, right in ((NearestPixels(), "inductive"), (QueryMean(), "transductive")):
        for answer in ("inductive", "transductive"):
            assert bool(exercises.check_mode(answer, learner, task)) == (answer == right)
    assert "No answer" in exercises.check_mode(..., NearestPixels(), task).why
    assert "should be" in exercises.check_mode("both", NearestPixels(), task).why


@pytest.mark.parametrize(
    ("answer", "says"), [(0.0625, ""), (0.25, "first-order"), (0.75, "Reptile"), (0.9, "large"), (..., "No answer")]
)
def test_meta_gradient_factor(answer: object, says: str) -> None:
    verdict = exercises.check_meta_gradient_factor(answer, inner_lr=0.5, inner_steps=2)
    assert bool(verdict) == (says == "") and says in verdict.why


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("pretraining", ""),
        ("MAML", "nowhere"),
        ("Reptile", "nowhere"),
        ("SGD", "One of"),
        (3, "A word"),
        (..., "No answer"),
    ],
)
def test_strong_spring(answer: object, says: str) -> None:
    verdict = exercises.check_strong_spring(answer)
    assert bool(verdict) == (says == "") and says in verdict.why
