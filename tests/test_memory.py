"""What all memory-based methods keep, whatever their memory: each is asked the same."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metatutor import learner as learner_module
from metatutor.backbones import ConvNet, Embedding, Normalization, Pixels
from metatutor.episodes import ClassImages, Episode, EpisodeSpec, StreamSampler
from metatutor.memory import (
    MANN,
    SNAIL,
    FeedForward,
    FeedForwardConfig,
    MANNConfig,
    MetaNet,
    MetaNetConfig,
    PlainLSTM,
    PlainLSTMConfig,
    SNAILConfig,
    stream,
)
from metatutor.memory.base import MemoryLearner
from metatutor.memory.stream import StreamLearner
from metatutor.training import TrainConfig, train

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
CONFIGS = {
    "mann": (MANN, MANNConfig),
    "plain_lstm": (PlainLSTM, PlainLSTMConfig),
    "feed_forward": (FeedForward, FeedForwardConfig),
    "metanet": (MetaNet, MetaNetConfig),
    "snail": (SNAIL, SNAILConfig),
}
STREAMS = ("mann", "mann, letters", "plain_lstm", "feed_forward")  # which name every image by itself
every_method = pytest.mark.parametrize("name", METHODS)
every_method_of_sets = pytest.mark.parametrize("name", [name for name in METHODS if name not in STREAMS])
every_config = pytest.mark.parametrize("method", CONFIGS)


def policies(*of_sets: Normalization) -> pytest.MarkDecorator:
    """Every method with the policy that suits it, and methods that are no streams with others."""
    others = [(name, policy) for name in METHODS if name not in STREAMS for policy in of_sets]
    return pytest.mark.parametrize(("name", "normalization"), [(name, "group") for name in METHODS] + others)


def small(normalization: Normalization = "group") -> ConvNet:
    return ConvNet(filters=4, n_blocks=2, image_size=8, normalization=normalization)


def learner(name: str, normalization: Normalization = "group", *, n_way: int = 3, **more: Any) -> MemoryLearner:
    torch.manual_seed(3)
    return METHODS[name](small(normalization), n_way=n_way, **more).double().eval()


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-9, atol=1e-9)


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


@policies("batch", "support")
def test_a_batch_of_tasks_is_the_tasks_one_by_one(name: str, normalization: Normalization, random_episode: Episodes):
    method, tasks = learner(name, normalization), random_episode(3)
    alone = [tasks.task(i) for i in range(3)]
    assert close(method(tasks), torch.cat([method(task) for task in alone]))
    assert close(method.meta_loss(tasks), torch.stack([method.meta_loss(task) for task in alone]).mean())


@policies("batch", "support")
def test_tasks_side_by_side_are_tasks_in_turn(
    name: str, normalization: Normalization, random_episode: Episodes, monkeypatch: pytest.MonkeyPatch
):
    """What a GPU does, and what a CPU does."""
    method, tasks = learner(name, normalization), random_episode(3)
    in_turn, loss = method(tasks), method.meta_loss(tasks)
    side_by_side = partial(learner_module.each_task, side_by_side=True)
    monkeypatch.setattr(learner_module, "each_task", side_by_side)
    monkeypatch.setattr(stream, "each_task", side_by_side)
    assert close(method(tasks), in_turn)
    assert close(method.meta_loss(tasks), loss)


# --- who may know what ----------------------------------------------------------------------------------------------


@every_method
def test_permuting_queries_permutes_logits(name: str, random_episode: Episodes):
    method, episode = learner(name), random_episode()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = replace(
        episode, query_images=episode.query_images[:, order], query_labels=episode.query_labels[:, order]
    )
    assert close(method(permuted), method(episode)[:, order])


@policies("support")
@pytest.mark.parametrize("query", [0, 3, 5])
def test_a_query_never_changes_anothers_logits(
    name: str, normalization: Normalization, query: int, random_episode: Episodes
):
    method, episode = learner(name, normalization), random_episode()
    assert not method.transductive
    images = episode.query_images.clone()
    images[:, query] = 1 - images[:, query]
    after, before = method(replace(episode, query_images=images)), method(episode)
    others = [i for i in range(6) if i != query]
    assert close(after[:, others], before[:, others])
    assert not close(after[:, query], before[:, query])


@every_method_of_sets
def test_with_batch_normalization_it_does(name: str, random_episode: Episodes):
    method, episode = learner(name, "batch"), random_episode()
    assert method.transductive
    images = episode.query_images.clone()
    images[:, 0] = images[:, 0] ** 3
    assert not close(method(replace(episode, query_images=images))[:, 1:], method(episode)[:, 1:])


@every_method
@pytest.mark.parametrize("steps", [0, 2])
def test_query_labels_are_not_read(name: str, steps: int, random_episode: Episodes):
    method, episode = learner(name, finetune_steps=steps), random_episode(2)
    garbage = replace(episode, query_labels=torch.full_like(episode.query_labels, -(10**6)))
    assert torch.equal(method(garbage), method(episode))


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


class Always:
    """The same tasks every time."""

    def __init__(self, episode: Episode) -> None:
        self.episode, self.generator = episode, torch.Generator()

    def sample(self, n_tasks: int) -> Episode:
        return self.episode


@every_method
def test_learns_one_episode_by_heart(name: str, random_episode: Episodes):
    episode, method = random_episode(1, k_shot=1, n_query=1), learner(name)
    config = TrainConfig(iterations=60, tasks_per_step=1, outer_lr=0.03, warmup=0)
    train(method, Always(episode), config, progress_bar=False, device="cpu")
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
        sampler = method.sampler(class_images(), EpisodeSpec(3, 2, 2), seed=seed)
        config = TrainConfig(iterations=3, tasks_per_step=2, warmup=0, log_every=1)
        history = train(method, sampler, config, progress_bar=False, device="cpu")
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
        (partial(MANN, hidden_size=32, slots=4, width=8, heads=1), 130),
        (partial(PlainLSTM, hidden_size=32), 130),
        (partial(FeedForward, hidden_size=16), 130),
        (partial(MetaNet, hidden_size=16, generator_size=8), 20),
        (partial(SNAIL, embedding=16, filters=8, attention=(8, 8)), 30),
    ],
    ids=list(CONFIGS),
)
def test_it_answers_by_the_labels_it_was_told(build: Build, iterations: int):
    """Labels shuffled among the support images leave chance; so nothing but them tells which class has which number.

    In training too the numbers are random in each task. Without a memory there is only chance.
    """
    torch.manual_seed(0)
    method, spec = build(Pixels(4), n_way=2), EpisodeSpec(2, 3, 1)
    config = TrainConfig(iterations=iterations, tasks_per_step=16, outer_lr=0.02, warmup=0)
    train(method, method.sampler(halves(), spec), config, progress_bar=False, device="cpu")
    episode = method.test_sampler(halves(), spec, seed=1).sample(400)
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


# --- fine-tuning ----------------------------------------------------------------------------------------------------


@every_method
def test_finetuning_by_hand(name: str, random_episode: Episodes):
    """Each task on its own copy: the mean cross-entropy of the support images, asked about themselves."""
    method, tasks = learner(name, finetune_steps=3, finetune_lr=0.1), random_episode(2)
    plain, expected = learner(name), []
    for task in (tasks.task(0), tasks.task(1)):
        own = deepcopy(plain)
        for _ in range(3):
            asked = replace(task, query_images=task.support_images, query_labels=task.support_labels)
            loss = F.cross_entropy(own(asked)[0], task.support_labels[0])
            parameters = list(own.parameters())
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            with torch.no_grad():
                for p, g in zip(parameters, gradients, strict=True):
                    p -= 0.1 * g
        expected.append(own(task))
    assert close(method(tasks), torch.cat(expected))
    with torch.no_grad():
        assert close(method(tasks), torch.cat(expected))
    assert not close(method(tasks), plain(tasks))
    assert all(torch.equal(p, q) for p, q in zip(method.parameters(), plain.parameters(), strict=True))


@every_method
def test_no_steps_and_training_are_not_finetuned(name: str, random_episode: Episodes):
    method, tasks = learner(name, finetune_steps=3), random_episode(2)
    plain = method.answer(tasks)
    assert not close(method(tasks), plain)
    assert torch.equal(learner(name, finetune_steps=0)(tasks), plain)
    assert torch.equal(method.train()(tasks), plain)
    assert torch.equal(method.meta_loss(tasks), learner(name).meta_loss(tasks))
    assert torch.equal(method.eval().meta_loss(tasks), learner(name).meta_loss(tasks))


# --- samplers -------------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("which", ["sampler", "test_sampler"])
def test_support_images_come_in_random_order(name: str, which: str, class_images: Callable[..., ClassImages]):
    """The same tasks as anywhere else; sorted by class, the order alone would give the labels away."""
    classes, spec = class_images(), EpisodeSpec(3, 3, 2)
    sampler = getattr(learner(name), which)(classes, spec, seed=5)
    assert type(sampler) is StreamSampler
    episode, same = sampler.sample(50), StreamSampler(classes, spec, seed=5).sample(50)
    other = getattr(learner(name), which)(classes, spec, seed=6).sample(50)
    assert torch.equal(episode.support_images, same.support_images)
    assert torch.equal(episode.support_labels, same.support_labels)
    assert not torch.equal(episode.support_labels, other.support_labels)
    assert torch.equal(episode.support_labels.sort().values, torch.arange(3).repeat_interleave(3).expand(50, -1))
    assert len(episode.support_labels.unique(dim=0)) > 40


# --- arguments ------------------------------------------------------------------------------------------------------

CHANGED: list[Any] = [
    MANNConfig("mann", 3, 7, 9, 6, 2, 0.5, False, "letters", 8, 0.25),
    PlainLSTMConfig("plain_lstm", 3, 7, "letters", 8, 0.25),
    FeedForwardConfig("feed_forward", 3, 7, "letters", 8, 0.25),
    MetaNetConfig("metanet", 3, 7, 9, 2, 8, 0.25),
    SNAILConfig("snail", 3, 4, 7, 9, (2, 5), 8, 0.25),
]


@pytest.mark.parametrize("config", CHANGED, ids=lambda config: config.method)
def test_a_config_builds_its_learner(config: Any, random_episode: Episodes):
    """All arguments arrive, each at its own place: no two numbers are equal, and none is a default."""
    defaults = type(config)()
    assert all(getattr(config, f.name) != getattr(defaults, f.name) for f in fields(config) if f.name != "method")
    network = small()
    method = config.build(network)
    assert type(method) is CONFIGS[config.method][0]
    assert method.config == config
    assert method.network is network
    assert (method.n_way, method.finetune_steps, method.finetune_lr) == (3, 8, 0.25)
    assert method.double()(random_episode(1)).shape == (1, 6, 3)


def test_sizes_are_what_they_were_asked_to_be():
    mann, plain, forward, metanet, snail = (config.build(small()) for config in CHANGED)
    size, code = small().embedding_size, 25  # five letters of five
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


@every_config
def test_learner_and_config_agree_on_the_defaults(method: str):
    build, config = CONFIGS[method]
    assert build(small()).config == config()
    assert config().method == method
    defaults = {f.name: f.default for f in fields(config) if f.name != "method"}
    arguments = inspect.signature(build.__init__).parameters
    assert {n: p.default for n, p in arguments.items() if n not in ("self", "network")} == defaults


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
    """By the learner, and by its config before there is one."""
    learn: Callable[..., Any]
    learn, config = CONFIGS[method]
    network: Embedding = small()
    for build in (lambda: learn(network, **options), lambda: config(**options)):
        with pytest.raises(ValueError, match=exactly(message)):
            build()
