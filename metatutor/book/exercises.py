"""What a chapter asks of its reader: a game to play, and friendly checks of answers.

A check never raises: it says what it thinks of an answer, and counts as true only if the answer is right. So an
exercise that has not been done yet still runs, and a solution can be asserted.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from html import escape
from math import ceil, comb, perm
from typing import Any

import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from metatutor.book.figures.images import to_show
from metatutor.book.figures.shown import Shown, identity, widget
from metatutor.episodes import ClassImages, Episode, EpisodeSpec
from metatutor.learner import Learner


@dataclass(frozen=True)
class Verdict:
    """What a check thinks of an answer.

    Args:
        right: whether the answer is right; the verdict is true if it is.
        why: one sentence for the reader.

    Example:
        >>> Verdict(True, "5 classes, as it should be.")
        ✓ 5 classes, as it should be.
    """

    right: bool
    why: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return f"{'✓' if self.right else '✗'} {self.why}"


_NOTHING_YET = "No answer yet: replace the dots and run the cell again."


# --- answers that are a number ---


def check_task_count(answer: object, n_classes: int, n_way: int) -> Verdict:
    """Judge the number of sets of `n_way` classes that can be drawn from `n_classes`.

    Args:
        answer: the reader's number.
        n_classes: classes of a split.
        n_way: classes in a task.

    Returns:
        A verdict that recognises the usual mistakes.

    Example:
        >>> check_task_count(120, n_classes=6, n_way=3)
        ✗ 120 counts every order of the labels as a task of its own; here only which classes take part matters.
    """
    mistakes: dict[float, str] = {
        perm(n_classes, n_way): "counts every order of the labels as a task of its own; here only which classes take "
        "part matters.",
        n_classes**n_way: "lets a class take part twice; the classes of a task are distinct.",
        n_classes // n_way: "is how many tasks share no class; tasks may share some of their classes.",
    }
    return _number(answer, comb(n_classes, n_way), mistakes)


def check_overlap(answer: object, accuracy: float, n_drawings: int) -> Verdict:
    """Judge the accuracy that nearest pixels seems to reach with one shot if support and query are drawn independently.

    Args:
        answer: the reader's accuracy, 0–1.
        accuracy: the honest one.
        n_drawings: drawings of each class.

    Returns:
        A verdict; within half a thousandth is right.

    Example:
        >>> check_overlap(0.525, accuracy=0.5, n_drawings=20)
        ✓ 0.525 it is.
    """
    mistakes = {
        accuracy + 1 / n_drawings: "counts every query image that is a support image as a gain, but some of them would "
        "have been answered correctly anyway.",
        accuracy: "is the honest accuracy; a query image that is also in the support set is always answered correctly.",
    }
    return _number(answer, accuracy + (1 - accuracy) / n_drawings, mistakes, within=5e-4)


def check_episodes_needed(answer: object, accuracies: Float[Tensor, " task"], half_width: float) -> Verdict:
    """Judge a number of tasks that is said to be enough for a 95% interval of ± `half_width`.

    Args:
        answer: the reader's number of tasks.
        accuracies: one per task, 0–1, to estimate the standard deviation from.
        half_width: half the width of the interval, 0–1.

    Returns:
        A verdict; one task more or less is right.

    Example:
        >>> check_episodes_needed(40, torch.tensor([0.2, 0.8]), half_width=0.1)
        ✗ 40 is too small: with so few tasks the interval is wider than asked.
    """
    deviation = accuracies.std(correction=1).item()
    mistakes: dict[float, str] = {
        ceil(1.96 * deviation / half_width): "lacks the square: the interval shrinks with the square root of n.",
        ceil((deviation / half_width) ** 2): "leaves the 1.96 out.",
        ceil((1.96 * deviation / (2 * half_width)) ** 2): "gives an interval that is twice as wide.",
        ceil((1.96 * deviation / (half_width / 2)) ** 2): "gives an interval that is half as wide.",
    }
    needed = (1.96 * deviation / half_width) ** 2
    too = ("is too small: with so few tasks the interval is wider than asked.", "is enough, but so are fewer tasks.")
    return _number(answer, needed, mistakes, within=1, too=too)


def check_prototype_probability(
    answer: object, support: Float[Tensor, " support"], labels: Int64[Tensor, " support"], query: float
) -> Verdict:
    """Judge the probability that a Prototypical Network gives to class 0, for embeddings of one number.

    Args:
        answer: the reader's probability, 0–1.
        support: embeddings of the support images.
        labels: their classes.
        query: embedding of the query image.

    Returns:
        A verdict; within a millionth is right.

    Example:
        >>> check_prototype_probability(0.5, torch.tensor([1.0, 4.0]), torch.tensor([0, 1]), query=2.0)
        ✗ 0.5 is too small.
    """
    prototypes = torch.stack([support[labels == c].double().mean() for c in range(int(labels.max()) + 1)])
    distances = (query - prototypes).abs()
    right, unsquared, upside_down = ((-d).softmax(0)[0].item() for d in (distances**2, distances, -(distances**2)))
    mistakes = {
        unsquared: "is what you get without the square of the distances.",
        upside_down: "gives the far prototype the larger share; mind the minus.",
    }
    return _number(answer, right, mistakes, within=1e-6)


def check_meta_gradient_factor(answer: object, inner_lr: float, inner_steps: int) -> Verdict:
    """Judge MAML's gradient as a fraction of pretraining's, for the loss `(w - a)^2 / 2` on support and query.

    Args:
        answer: the reader's factor.
        inner_lr: rate of the inner steps.
        inner_steps: how many.

    Returns:
        A verdict; within a thousandth is right.

    Example:
        >>> check_meta_gradient_factor(0.0625, inner_lr=0.5, inner_steps=2)
        ✓ 0.0625 it is.
    """
    left = (1 - inner_lr) ** inner_steps
    mistakes = {
        left: "is first-order MAML's: it forgets that the steps pass on only a part of any change at the start.",
        1 - left: "is Reptile's: how far the steps lead.",
    }
    return _number(answer, left**2, mistakes, within=1e-3)


def check_strong_spring(answer: object) -> Verdict:
    """Judge what implicit MAML becomes if nothing can move away from the initial parameters.

    Args:
        answer: `"MAML"`, `"pretraining"` or `"Reptile"`.

    Example:
        >>> check_strong_spring("Reptile")
        ✗ Reptile looks where the steps lead; held by such a spring, they lead nowhere.
    """
    if answer == "pretraining":
        return Verdict(True, "Nothing moves, so the loss after adaptation is the loss before it.")
    mistakes = {
        ...: _NOTHING_YET,
        "MAML": "MAML lets the steps go where they like; held by such a spring, they lead nowhere.",
        "Reptile": "Reptile looks where the steps lead; held by such a spring, they lead nowhere.",
    }
    known = isinstance(answer, str) or answer is ...
    return Verdict(False, mistakes.get(answer, "One of the three words, please.") if known else "A word, please.")


def check_kept_numbers(answer: object, n_classes: int, k_shot: int, embedding_size: int) -> Verdict:
    """Judge how many numbers must be kept from the support images: with prototypes, and with Matching Networks.

    Args:
        answer: the reader's pair of numbers.
        n_classes: classes met.
        k_shot: images of each.
        embedding_size: numbers in an embedding.

    Returns:
        A verdict that names the one that is wrong.

    Example:
        >>> check_kept_numbers((6, 6), n_classes=3, k_shot=2, embedding_size=2)
        ✗ Matching: 6 keeps one vector a class, but every support image votes.
    """
    if not isinstance(answer, tuple) or len(answer) != 2:
        return Verdict(False, "The answer should be two numbers.")
    one_each, all_kept = n_classes * embedding_size, n_classes * k_shot * embedding_size
    averaged: dict[float, str] = {all_kept: "keeps every image, but only the mean of a class is needed later."}
    voted: dict[float, str] = {one_each: "keeps one vector a class, but every support image votes."}
    for name, part, right, mistakes in (
        ("Prototypes", answer[0], one_each, averaged),
        ("Matching", answer[1], all_kept, voted),
    ):
        verdict = _number(part, right, mistakes)
        if not verdict:
            return verdict if part is ... else Verdict(False, f"{name}: {verdict.why}")
    return Verdict(True, f"{one_each:,} against {all_kept:,}.")


def check_mode(answer: object, learner: Learner, task: Episode) -> Verdict:
    """Judge whether a learner is `"inductive"` or `"transductive"`, by giving it one query image alone.

    Args:
        answer: the reader's word.
        learner: what the word is about.
        task: with more than one query image.

    Returns:
        A verdict with the largest change of a logit as evidence, if the word is right.

    Example:
        >>> from metatutor.baselines import NearestPixels
        >>> images, labels = torch.rand(1, 5, 1, 28, 28), torch.arange(5)[None]
        >>> check_mode("inductive", NearestPixels(), Episode(images, labels, images, labels, n_way=5))
        ✓ Right: asked alone, the first query image gets logits that differ by 0.000.
    """
    if answer is ...:
        return Verdict(False, _NOTHING_YET)
    if answer not in ("inductive", "transductive"):
        return Verdict(False, 'The answer should be "inductive" or "transductive".')
    alone = replace(task, query_images=task.query_images[:, :1], query_labels=task.query_labels[:, :1])
    with torch.no_grad():
        change = (learner(alone) - learner(task)[:, :1]).abs().max().item()
    if (answer == "transductive") != (change > 1e-3):
        return Verdict(False, "Ask the first query image alone, then with the others, and compare the logits.")
    return Verdict(True, f"Right: asked alone, the first query image gets logits that differ by {change:.3f}.")


def _number(
    answer: object,
    right: float,
    mistakes: Mapping[float, str],
    within: float = 0.0,
    too: tuple[str, str] = ("is too small.", "is too large."),
) -> Verdict:
    if answer is None or answer is ...:
        return Verdict(False, _NOTHING_YET)
    if isinstance(answer, Tensor) and answer.numel() == 1:
        answer = answer.item()
    if not isinstance(answer, int | float) or isinstance(answer, bool):
        return Verdict(False, f"The answer should be a number, not {type(answer).__name__}.")
    if abs(answer - right) <= within:
        return Verdict(True, f"{answer:,} it is." if isinstance(answer, int) else f"{answer:,.4g} it is.")
    for mistake, what in mistakes.items():
        if abs(answer - mistake) <= within:
            return Verdict(False, f"{answer:,.6g} {what}")
    return Verdict(False, f"{answer:,.6g} {too[answer > right]}")


def check(answer: Any, right: Callable[[Any], object]) -> Verdict:
    """Judge an answer by a condition.

    Args:
        answer: the reader's; `...` while there is none.
        right: what must hold for it; None if the answer is a function that returns nothing yet.

    Returns:
        A verdict that gives nothing away; if the condition cannot even be tried on the answer, it names the error.

    Example:
        >>> check(2, lambda n: n**2 == 4)
        ✓ Right.
        >>> check("two", lambda n: n**2 == 4)
        ✗ Not yet: TypeError: unsupported operand type(s) for ** or pow(): 'str' and 'int'
        >>> check(..., lambda n: n**2 == 4)
        ✗ No answer yet: replace the dots and run the cell again.
    """
    if answer is ... or (isinstance(answer, tuple) and any(part is ... for part in answer)):
        return Verdict(False, _NOTHING_YET)
    try:
        holds = right(answer)
    except Exception as error:  # noqa: BLE001 - an answer may raise anything
        return Verdict(False, f"Not yet: {type(error).__name__}: {error}")
    if holds is None:
        return Verdict(False, _NOTHING_YET)
    return Verdict(True, "Right.") if holds else Verdict(False, "Not yet. Open the hint, and try again.")


# --- answers that are a task ---


def check_episode(episode: object, classes: ClassImages, spec: EpisodeSpec) -> Verdict:
    """Judge whether a task has this shape, drawn from these classes, with no image in both support and query.

    Args:
        episode: what the reader's sampler drew.
        classes: where its images should come from.
        spec: the shape it should have.

    Returns:
        A verdict that names the first thing that is wrong.

    Example:
        >>> classes = ClassImages(torch.arange(6 * 4, dtype=torch.uint8).view(6, 4, 1, 1, 1), list("abcdef"))
        >>> from metatutor import EpisodeSampler
        >>> spec = EpisodeSpec(n_way=3, k_shot=1, n_query=2)
        >>> check_episode(EpisodeSampler(classes, spec).sample(2), classes, spec)
        ✓ 2 tasks: 3 distinct classes each, 1 support and 2 query images a class, none in both.
    """
    if episode is None or episode is ...:
        return Verdict(False, _NOTHING_YET)
    if not isinstance(episode, Episode):
        return Verdict(False, f"The answer should be an Episode, not {type(episode).__name__}.")
    for name in ("support", "query"):
        images, labels = getattr(episode, f"{name}_images"), getattr(episode, f"{name}_labels")
        if labels is None:
            return Verdict(False, f"The {name} images should have labels.")
        if (images.ndim, labels.ndim) != (5, 2) or images.shape[:2] != labels.shape:
            shapes = f"{list(images.shape)} and {list(labels.shape)}"
            want = f"[task, {name}, channel, height, width] and [task, {name}]"
            return Verdict(False, f"The {name} images and labels should be {want}, but are {shapes}.")
    find = _finder(classes)
    for i in range(len(episode)):
        if wrong := _wrong(episode.task(i), find, spec):
            return Verdict(False, f"Task {i}: {wrong}.")
    return Verdict(
        True,
        f"{len(episode)} task{'s' if len(episode) > 1 else ''}: {spec.n_way} distinct classes each, "
        f"{spec.k_shot} support and {spec.n_query} query images a class, none in both.",
    )


def _wrong(task: Episode, find: Callable[[Tensor], tuple[int, int] | None], spec: EpisodeSpec) -> str:
    """The first thing that is wrong with a task, or nothing."""
    sets = {
        "support": (task.support_images[0], task.support_labels[0].tolist(), spec.k_shot),
        "query": (task.query_images[0], task.query_labels[0].tolist(), spec.n_query),
    }
    found: dict[str, list[tuple[int, int] | None]] = {}
    pairs = set()
    for name, (images, labels, each) in sets.items():
        if sorted(labels) != sorted(list(range(spec.n_way)) * each):
            return f"the {name} labels should be 0 to {spec.n_way - 1}, each {each} times, but are {labels}"
        found[name] = [find(image) for image in images]
        if None in found[name]:
            return f"{name} image {found[name].index(None)} is not an image of these classes, with pixels from 0 to 1"
        pairs |= {(label, place[0]) for label, place in zip(labels, found[name], strict=True) if place}
    if len(pairs) > spec.n_way:
        return "one label stands for images of several classes"
    if len({of for _, of in pairs}) < spec.n_way:
        return "two labels stand for the same class"
    if both := set(found["support"]) & set(found["query"]):
        return f"query image {min(found['query'].index(place) for place in both)} is in the support set too"
    twice = any(len(set(places)) < len(places) for places in found.values())
    return "an image appears twice" if twice else ""


def _finder(classes: ClassImages) -> Callable[[Tensor], tuple[int, int] | None]:
    """Finds the class and drawing of an image; None if it belongs to none of the classes."""
    n_drawings = classes.images.shape[1]
    pixels = classes.images.cpu().flatten(0, 1).numpy()
    places = {image.tobytes(): divmod(i, n_drawings) for i, image in enumerate(pixels)}

    def find(image: Tensor) -> tuple[int, int] | None:
        drawn = image.mul(255).round().to(torch.uint8).cpu()
        for turn in range(4 if classes.rotations else 1):
            if place := places.get(drawn.rot90(-turn, (-2, -1)).numpy().tobytes()):
                of, drawing = place
                return (4 * of + turn, drawing) if classes.rotations else place
        return None

    return find


# --- a game ---


def game(episode: Episode, guesses: Int64[Tensor, "task query"], *, rival: str, seed: int = 0) -> Shown:
    """Make a game: which of the support images is the query image; the score is kept against a rival and guessing.

    Args:
        episode: one round per task, with one query image of it; 1-shot.
        guesses: the rival's labels of the query images.
        rival: its name.
        seed: which query image of each task.

    Returns:
        HTML with its script and images, which needs no kernel and no network.

    Raises:
        ValueError: if there is more than one support image of a class.
    """
    if episode.support_images.shape[1] != episode.n_way:
        raise ValueError(f"the game is for 1-shot tasks, got {episode.support_images.shape[1]} support images")
    n_tasks, n_query = episode.query_labels.shape
    chosen = torch.randint(n_query, (n_tasks,), generator=torch.Generator().manual_seed(seed)).tolist()
    rounds: list[dict[str, Any]] = []
    for task, query in enumerate(chosen):
        places = episode.support_labels[task].tolist()
        rounds.append(
            {
                "support": [_data_uri(image) for image in episode.support_images[task]],
                "query": _data_uri(episode.query_images[task, query]),
                "answer": places.index(int(episode.query_labels[task, query])),
                "rival": places.index(int(guesses[task, query])),
            }
        )
    cards = "".join(
        f'<button type="button" disabled><img src="{picture}" alt="character {i}" width="56" height="56"></button>'
        for i, picture in enumerate(rounds[0]["support"], 1)
    )
    text = json.dumps(rounds, separators=(",", ":"))
    fill = {"cards": cards, "query": rounds[0]["query"], "ways": episode.n_way, "rival": escape(rival)}
    return widget("game", id=identity("game", text), state=text, **fill)


def _data_uri(image: Float[Tensor, "channel h w"]) -> str:
    """A picture inside its own address: in its colours, or in black ink on white paper."""
    shown = to_show(image).mul(255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(shown) if shown.ndim == 3 else Image.fromarray(255 - shown).quantize(16)
    with io.BytesIO() as file:
        picture.save(file, format="PNG", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
