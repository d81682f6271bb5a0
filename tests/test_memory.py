"""What all memory-based methods keep, whatever their memory: each is asked the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metatutor.backbones import ConvNet, Pixels
from metatutor.episodes import ClassImages, Episode, EpisodeSpec
from metatutor.evaluation import evaluate
from metatutor.memory import MANN, SNAIL, FeedForward, MetaNet, PlainLSTM
from metatutor.memory.base import MemoryLearner
from metatutor.memory.stream import StreamLearner
from metatutor.training import TrainConfig, train
from tests.tasks import Always, close

Episodes = Callable[..., Episode]
Build = Callable[..., MemoryLearner]
METHODS: dict[str, Build] = {
    "mann": partial(MANN, hidden_size=8, slots=5, width=4, heads=2),
    "mann, letters": partial(MANN, hidden_size=8, slots=5, width=4, heads=2, labels="letters"),
    "plain_lstm": partial(PlainLSTM, hidden_size=8),
    "feed_forward": partial(FeedForward, hidden_size=8),
    "metanet": partial(MetaNet, hidden_size=6, generator_size=4, n_gradients=3),
    "snail": partial(SNAIL, max_shot=2, embedding=6, filters=4, attention=(4, 4, 4)),
}
every_method = pytest.mark.parametrize("name", METHODS)


def small() -> ConvNet:
    return ConvNet(filters=4, n_blocks=2, image_size=8, normalization="group")


def learner(name: str, *, n_way: int = 3, **more: Any) -> MemoryLearner:
    torch.manual_seed(3)
    return METHODS[name](small(), n_way=n_way, **more).double().eval()


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


# --- an episode goes in, logits come out ----------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize(("n_way", "k_shot"), [(2, 1), (5, 3)])
def test_any_way_it_was_made_for_and_any_shot(name: str, n_way: int, k_shot: int, random_episode: Episodes):
    method, episode = learner(name, n_way=n_way), random_episode(2, n_way, k_shot)
    logits = method(episode)
    assert logits.shape == (2, 2 * n_way, n_way)
    assert logits.isfinite().all()
    expected = F.cross_entropy(logits.flatten(0, 1), episode.query_labels.flatten())
    if isinstance(method, StreamLearner):  # trained on the stream, so fine-tuned on the queries
        assert close(method.finetune_loss(episode), expected)
    else:
        assert close(method.meta_loss(episode), expected)


# --- who may know what ----------------------------------------------------------------------------------------------


@every_method
def test_support_labels_are_read(name: str, random_episode: Episodes):
    """Of every image but, by the methods without a long memory, one: the last label comes with the query image."""
    method, episode = learner(name), random_episode(1)
    for image in range(6):
        labels = episode.support_labels.clone()
        labels[:, image] = (labels[:, image] + 1) % 3
        remembers = name != "feed_forward" or image == 5
        assert close(method(replace(episode, support_labels=labels)), method(episode)) != remembers


@every_method
@pytest.mark.parametrize("steps", [0, 1])
def test_tasks_of_other_ways_are_refused(name: str, steps: int, random_episode: Episodes):
    method, episode = learner(name, finetune_steps=steps), random_episode(n_way=2)
    for ask in (method, method.meta_loss):
        with pytest.raises(ValueError, match=exactly("the episode has n_way = 2 but this learner was made for 3")):
            ask(episode)


# --- gradients ------------------------------------------------------------------------------------------------------


@every_method
def test_what_has_a_gradient(name: str, random_episode: Episodes):
    """Everything, with few exceptions that have reasons."""
    method = learner(name)
    method.meta_loss(random_episode(4)).backward()
    without = {n for n, p in method.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-13}
    expected: set[str] = set()
    if name == "metanet":
        expected = {"key.last"}  # it makes gradients only, and they are taken as numbers
    if name == "snail":
        # what a key's bias adds to the likenesses of an item is the same for all it sees: softmax takes it away
        expected = {f"blocks.{i}.key.bias" for i in (0, 2, 4)}
    assert without == expected
    none = {n for n, p in method.named_parameters() if p.grad is None}
    assert none == ({"key.last"} if name == "metanet" else set())


@every_method
def test_learns_one_episode_by_heart(name: str, random_episode: Episodes):
    episode, method = random_episode(1, k_shot=1, n_query=1), learner(name)
    config = TrainConfig(iterations=60, tasks_per_step=1, outer_lr=0.03, warmup=0)
    train(method, Always(episode), EpisodeSpec(3, 1, 1), config, progress_bar=False, device="cpu")
    assert method.meta_loss(episode) < 0.1
    if isinstance(method, StreamLearner):
        assert torch.equal(method.stream_answers(episode), episode.support_labels)
    else:
        assert torch.equal(method(episode).argmax(-1), episode.query_labels)


@every_method
def test_same_seed_same_run_bit_for_bit(name: str, class_images: Callable[..., ClassImages]):
    def run(seed: int) -> tuple[dict[str, Tensor], list[float]]:
        torch.manual_seed(seed)
        method = METHODS[name](small(), n_way=3)
        config = TrainConfig(iterations=3, tasks_per_step=2, warmup=0, log_every=1, seed=seed)
        history = train(method, class_images(), EpisodeSpec(3, 2, 2), config, progress_bar=False, device="cpu")
        return method.state_dict(), [row["meta_loss"] for row in history]

    (one, losses), (same, same_losses), (_, other_losses) = run(0), run(0), run(1)
    assert losses == same_losses != other_losses
    assert all(torch.equal(one[n], same[n]) for n in one)


# --- what is told is what is answered -------------------------------------------------------------------------------


def halves() -> ClassImages:
    """Two classes that are easy to tell apart: ink on the left, ink on the right."""
    ink = torch.zeros(2, 8, 1, 4, 4)
    ink[0, ..., :2] = 200
    ink[1, ..., 2:] = 200
    noise = torch.randint(0, 56, ink.shape, generator=torch.Generator().manual_seed(0))
    return ClassImages((ink + noise).to(torch.uint8), ["left", "right"])


@pytest.mark.parametrize(
    ("build", "iterations"),
    [
        (partial(PlainLSTM, hidden_size=32), 80),
        (partial(FeedForward, hidden_size=16), 80),
        (partial(MetaNet, hidden_size=16, generator_size=8), 20),
        (partial(SNAIL, embedding=16, filters=8, attention=(8, 8)), 30),
    ],
    ids=["plain_lstm", "feed_forward", "metanet", "snail"],
)
def test_it_answers_by_the_labels_it_was_told(build: Build, iterations: int):
    """Labels shuffled among the support images leave chance; so nothing but them tells which class has which number.

    In training too the numbers are random in each task. Without a memory there is only chance. (Of MANN: test_stream.)
    """
    torch.manual_seed(0)
    method, spec = build(Pixels(4), n_way=2), EpisodeSpec(2, 3, 1)
    config = TrainConfig(iterations=iterations, tasks_per_step=16, outer_lr=0.03, warmup=0)
    train(method, halves(), spec, config, progress_bar=False, device="cpu")
    episode = halves().sampler(spec, seed=1).sample(400)
    order = torch.rand(400, 6, generator=torch.Generator().manual_seed(0)).argsort(1)
    shuffled = replace(episode, support_labels=episode.support_labels.gather(1, order))
    swapped = replace(episode, support_labels=1 - episode.support_labels)
    with torch.no_grad():
        true, chance, wrong = (
            (method(asked).argmax(-1) == episode.query_labels).double().mean().item()
            for asked in (episode, shuffled, swapped)
        )
    assert 0.4 < chance < 0.6
    if build.func is FeedForward:  # pyright: ignore[reportFunctionMemberAccess]
        assert 0.4 < true < 0.6
    else:
        assert true > 0.9
        assert wrong < 0.1


# --- arguments ------------------------------------------------------------------------------------------------------

CLASSES: dict[str, type[MemoryLearner]] = {
    "mann": MANN,
    "plain_lstm": PlainLSTM,
    "feed_forward": FeedForward,
    "metanet": MetaNet,
    "snail": SNAIL,
}
FINE_TUNING = {"finetune_steps": 8, "finetune_lr": 0.25}
CONTROL = {"n_way": 3, "hidden_size": 7, "labels": "letters", **FINE_TUNING}
CHANGED: dict[str, dict[str, Any]] = {
    "mann": {**CONTROL, "slots": 9, "width": 6, "heads": 2, "usage_decay": 0.5, "sharpen": False},
    "plain_lstm": CONTROL,
    "feed_forward": CONTROL,
    "metanet": {"n_way": 3, "hidden_size": 7, "generator_size": 9, "n_gradients": 2, **FINE_TUNING},
    "snail": {"n_way": 3, "max_shot": 4, "embedding": 7, "filters": 9, "attention": (2, 5), **FINE_TUNING},
}


@pytest.mark.parametrize("method", CLASSES)
def test_every_argument_arrives(method: str, random_episode: Episodes):
    """Each at its own place: no two numbers are equal, and none is a default."""
    changed, defaults = CHANGED[method], CLASSES[method](small()).arguments
    assert changed.keys() == defaults.keys()
    assert all(value != defaults[name] for name, value in changed.items())
    network = small()
    made = CLASSES[method](network, **changed)
    assert made.arguments == changed
    assert made.network is network
    assert (made.n_way, made.ways, made.finetune_steps, made.finetune_lr) == (3, 3, 8, 0.25)
    assert made.double()(random_episode(1)).shape == (1, 6, 3)


def test_sizes_are_what_they_were_asked_to_be():
    made: Any = [CLASSES[method](small(), **changed) for method, changed in CHANGED.items()]
    mann, plain, forward, metanet, snail = made
    size, code = made[0].embedding_size, 25  # five letters of five
    assert mann.start(2).matrix.shape == (2, 9, 6) and mann.start(2).read.shape == (2, 2, 6)
    assert mann.enter.weight.shape == (4 * 7, size + code) and mann.control.out_features == 2 * (6 + 1)
    assert plain.enter.weight.shape == (4 * 7, size + code) and plain.out.weight.shape == (code, 7)
    assert forward.hidden.weight.shape == (7, size + code) and forward.out.weight.shape == (code, 7)
    assert metanet.base.first.shape == metanet.key.first.shape == (7, size)
    assert metanet.base.last.shape == metanet.key.last.shape == (3, 7)
    assert metanet.make_base[0].weight.shape == (9, 2) and metanet.watch.hidden_size == 9
    assert snail.reduce.weight.shape == (7, size)
    assert [snail.blocks[i].key.weight.shape for i in (0, 2)] == [(2, 7 + 3), (5, 7 + 3 + 2 + 4 * 9)]
    assert len(snail.blocks[1].here) == 4  # 3-way 4-shot and a query image: 13 places
    assert all(layer.out_features == 2 * 9 for layer in snail.blocks[1].here)


SHARED: list[tuple[dict[str, Any], str]] = [
    ({"n_way": 0}, "n_way must be a positive integer, got 0"),
    ({"finetune_steps": -1}, "finetune_steps must not be negative, got -1"),
    ({"finetune_lr": 0.0}, "finetune_lr must be positive, got 0.0"),
    ({"finetune_lr": float("nan")}, "finetune_lr must be positive, got nan"),
]
HIDDEN = ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0")
LABELS = ({"labels": "words"}, "labels must be 'one-hot' or 'letters', got 'words'")
MISTAKES: dict[str, list[tuple[dict[str, Any], str]]] = {
    "mann": [
        *SHARED,
        HIDDEN,
        LABELS,
        ({"slots": 0}, "slots must be a positive integer, got 0"),
        ({"width": -1}, "width must be a positive integer, got -1"),
        ({"heads": 0}, "heads must be a positive integer, got 0"),
        ({"heads": 5, "slots": 4}, "heads = 5 exceeds slots = 4: each head needs a slot to write to"),
        ({"usage_decay": 1.01}, "usage_decay must be from 0 to 1, got 1.01"),
        ({"usage_decay": -0.1}, "usage_decay must be from 0 to 1, got -0.1"),
        ({"usage_decay": float("nan")}, "usage_decay must be from 0 to 1, got nan"),
    ],
    "plain_lstm": [*SHARED, HIDDEN, LABELS],
    "feed_forward": [*SHARED, HIDDEN, LABELS],
    "metanet": [
        *SHARED,
        HIDDEN,
        ({"generator_size": 0}, "generator_size must be a positive integer, got 0"),
        ({"n_gradients": 0}, "n_gradients must be a positive integer, got 0"),
    ],
    "snail": [
        *SHARED,
        ({"max_shot": 0}, "max_shot must be a positive integer, got 0"),
        ({"embedding": 0}, "embedding must be a positive integer, got 0"),
        ({"filters": 0}, "filters must be a positive integer, got 0"),
        ({"attention": (4, 0)}, "attention[1] must be a positive integer, got 0"),
        ({"attention": ()}, "attention must name the size of at least one block"),
    ],
}


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("method", "options", "message"),
    [(method, *mistake) for method, mistakes in MISTAKES.items() for mistake in mistakes],
)
def test_mistakes_are_named(method: str, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=exactly(message)):
        CLASSES[method](small(), **options)


@every_method
def test_only_streams_are_evaluated_as_streams(name: str, class_images: Callable[..., ClassImages]):
    method, spec = METHODS[name](small(), n_way=3), EpisodeSpec(3, 2, 1)
    assert method.reads_streams == (name not in ("metanet", "snail"))
    if method.reads_streams:
        found = evaluate(method, class_images(), spec, n_episodes=4, stream=True)
        assert found.metric == "accuracy_by_instance" and isinstance(found.mean, list) and len(found.mean) == 2
    else:
        with pytest.raises(ValueError, match=f"{type(method).__name__} answers no streams; leave stream out"):
            evaluate(method, class_images(), spec, n_episodes=4, stream=True)
