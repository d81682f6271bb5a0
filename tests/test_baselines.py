"""The baselines learn what they claim from what they may read, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from inspect import signature

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.func import functional_call
from torch.optim import Optimizer

from metatutor.backbones import ConvNet, Normalization
from metatutor.baselines import (
    ClassificationSampler,
    NearestPixels,
    NearestPixelsConfig,
    PretrainedCosine,
    PretrainedCosineConfig,
    PretrainedFinetuned,
    PretrainedFinetunedConfig,
    Scratch,
    ScratchConfig,
)
from metatutor.episodes import ClassImages, Episode, EpisodeSampler, EpisodeSpec
from metatutor.evaluation import accuracies
from metatutor.learner import Learner
from metatutor.training import TrainConfig, train

SIZE, WAY, PRETRAINING_CLASSES = 8, 3, 6


def network(n_outputs: int = WAY, normalization: Normalization = "group", seed: int = 0) -> ConvNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = {"filters": 4, "n_blocks": 2, "hidden": (6,), "image_size": SIZE}
        return ConvNet(n_outputs, normalization=normalization, **options)


def pretrained(normalization: Normalization = "group") -> ConvNet:
    return network(PRETRAINING_CLASSES, normalization, seed=1)


LEARNERS: dict[str, Callable[[Normalization], Learner]] = {
    "scratch": lambda normalization: Scratch(network(WAY, normalization), steps=3, lr=0.01),
    "finetuned": lambda normalization: PretrainedFinetuned(pretrained(normalization), steps=3, lr=0.1),
    "finetuned-head": lambda normalization: PretrainedFinetuned(
        pretrained(normalization), steps=3, lr=0.1, adapt="head"
    ),
    "cosine": lambda normalization: PretrainedCosine(pretrained(normalization)),
    "pixels": lambda normalization: NearestPixels(),
}
each_learner = pytest.mark.parametrize("name", LEARNERS)
each_policy = pytest.mark.parametrize("normalization", ["batch", "support", "group"])


def random_episode(seed: int = 0, n_tasks: int = 3, n_way: int = WAY, n_support: int = 7, n_query: int = 5) -> Episode:
    """Classes of unequal size, in no order."""
    generator = torch.Generator().manual_seed(seed)

    def images(n: int) -> Tensor:
        return torch.rand(n_tasks, n, 1, SIZE, SIZE, generator=generator)

    def labels(n: int) -> Tensor:
        order = torch.rand(n_tasks, n, generator=generator).argsort(1)
        return (torch.arange(n) % n_way)[order]

    return Episode(images(n_support), labels(n_support), images(n_query), labels(n_query), n_way)


def patterned_classes(n_classes: int = PRETRAINING_CLASSES, rotations: bool = False) -> ClassImages:
    """Class `c` has one bright pixel, at place `c`; the drawing is written beside it."""
    images = torch.zeros(n_classes, 10, 1, SIZE, SIZE, dtype=torch.uint8)
    for c in range(n_classes):
        images[c, :, 0, c // SIZE, c % SIZE] = 255
        images[c, :, 0, 2, 2] = torch.arange(10, dtype=torch.uint8)
    return ClassImages(images, [f"class{c}" for c in range(n_classes)], rotations=rotations)


# --- what every baseline must keep to ---


@each_learner
@each_policy
def test_labels_of_queries_are_never_read(name: str, normalization: Normalization) -> None:
    learner, episode = LEARNERS[name](normalization), random_episode()
    hidden = replace(episode, query_labels=torch.full_like(episode.query_labels, -99))
    assert torch.equal(learner(episode), learner(hidden))


@each_learner
@each_policy
def test_permuting_queries_permutes_logits(name: str, normalization: Normalization) -> None:
    learner, episode = LEARNERS[name](normalization), random_episode()
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = replace(episode, query_images=episode.query_images[:, order])
    torch.testing.assert_close(learner(permuted), learner(episode)[:, order], atol=1e-5, rtol=1e-4)


@each_learner
@each_policy
def test_tasks_one_by_one_are_answered_as_in_a_batch(name: str, normalization: Normalization) -> None:
    learner, episode = LEARNERS[name](normalization), random_episode()
    alone = torch.cat([learner(episode.task(i)) for i in range(len(episode))])
    torch.testing.assert_close(learner(episode), alone, atol=1e-5, rtol=1e-4)


@each_learner
@each_policy
def test_only_a_transductive_learner_lets_one_query_change_another(name: str, normalization: Normalization) -> None:
    learner, episode = LEARNERS[name](normalization), random_episode()
    images = episode.query_images.clone()
    images[:, 0] = 1 - images[:, 0]
    changed = learner(replace(episode, query_images=images))
    others_moved = not torch.allclose(changed[:, 1:], learner(episode)[:, 1:], atol=1e-6)
    assert not torch.allclose(changed[:, 0], learner(episode)[:, 0], atol=1e-4)
    assert others_moved == learner.transductive == (normalization == "batch" and name != "pixels")
    assert learner.normalization == ("none" if name == "pixels" else normalization)


@each_learner
def test_the_support_labels_say_which_class_is_which(name: str) -> None:
    """Renaming the classes renames the logits; not exactly so for Scratch, whose last layer starts at random."""
    learner, episode = LEARNERS[name]("group"), random_episode()
    renamed = replace(episode, support_labels=(episode.support_labels + 1) % WAY)
    before, after = learner(episode), learner(renamed)
    assert not torch.allclose(before, after, atol=1e-4)
    if name != "scratch":
        torch.testing.assert_close(after, before.roll(1, dims=-1), atol=1e-5, rtol=1e-4)


@each_learner
def test_no_grad_changes_nothing(name: str) -> None:
    learner, episode = LEARNERS[name]("support"), random_episode()
    with torch.no_grad():
        quiet = learner(episode)
    torch.testing.assert_close(quiet, learner(episode))
    assert not quiet.requires_grad and learner(episode).requires_grad == (name == "cosine")


@each_learner
def test_accuracy_does_not_depend_on_the_size_of_batches(name: str) -> None:
    learner, classes = LEARNERS[name]("group"), patterned_classes()
    by_one, by_four = (
        accuracies(learner, EpisodeSampler(classes, EpisodeSpec(WAY, 2, 2)), 6, tasks_per_batch=n) for n in (1, 4)
    )
    assert torch.equal(by_one, by_four)


# --- gradient descent on the support set ---


def descend_alone(
    network: ConvNet, initial: dict[str, Tensor], episode: Episode, steps: int, descent: Callable[..., Optimizer]
) -> dict[str, Tensor]:
    """One task, one optimizer, no vmap."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in initial.items()}
    optimizer = descent(parameters.values())
    for _ in range(steps):
        optimizer.zero_grad()
        logits = functional_call(network, parameters, (episode.support_images[0],))
        F.cross_entropy(logits, episode.support_labels[0]).backward()
        optimizer.step()
    return parameters


@each_policy
def test_scratch_is_adam_on_each_task_alone(normalization: Normalization) -> None:
    learner, episode = Scratch(network(WAY, normalization), steps=4, lr=0.01), random_episode()
    adapted, initial, logits = learner.adapt(episode), learner.initial_parameters(episode), learner(episode)
    for i in range(len(episode)):
        of_task = {name: p[i] for name, p in initial.items()}
        adam = partial(torch.optim.Adam, lr=0.01)
        expected = descend_alone(learner.network, of_task, episode.task(i), 4, adam)
        for name, p in expected.items():
            torch.testing.assert_close(adapted[name][i], p.detach(), atol=1e-4, rtol=1e-3, msg=name)
        support, query = episode.support_images[i], episode.query_images[i]
        if normalization == "support":
            answer = functional_call(learner.network, expected, (torch.cat([support, query]), len(support)))[-5:]
        else:
            answer = functional_call(learner.network, expected, (query,))
        torch.testing.assert_close(logits[i], answer.detach(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("adapt", ["all", "head"])
def test_finetuning_descends_from_the_pretrained_weights_and_a_head_of_zeros(adapt) -> None:
    learner, episode = PretrainedFinetuned(pretrained(), steps=4, lr=0.01, adapt=adapt), random_episode()
    adapted, start = learner.adapt(episode), dict(learner.network.named_parameters())
    start |= {"head.weight": torch.zeros(WAY, 6), "head.bias": torch.zeros(WAY)}  # pyright: ignore[reportAssignmentType]
    for name, p in adapted.items():
        assert torch.equal(p, start[name].expand_as(p)) == (adapt == "head" and not name.startswith("head.")), name
    if adapt == "all":
        momentum = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
        expected = descend_alone(learner.network, start, episode.task(2), 4, momentum)
        for name, p in expected.items():
            torch.testing.assert_close(adapted[name][2], p.detach(), atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("name", ["scratch", "finetuned", "finetuned-head"])
def test_more_steps_fit_the_support_set(name: str) -> None:
    learner, episode = LEARNERS[name]("group"), random_episode()
    episode = replace(episode, query_images=episode.support_images, query_labels=episode.support_labels)

    def support_loss(steps: int) -> float:
        object.__setattr__(learner.config, "steps", steps)
        return F.cross_entropy(learner(episode).flatten(0, 1), episode.query_labels.flatten()).item()

    untrained, some, many = support_loss(0), support_loss(10), support_loss(40)
    assert untrained > 1.05 * some > 1.05**2 * many


@pytest.mark.parametrize("name", ["finetuned", "finetuned-head", "cosine"])
def test_a_task_leaves_the_pretrained_weights_untouched(name: str) -> None:
    learner, episode = LEARNERS[name]("batch"), random_episode()
    before = {n: p.clone() for n, p in learner.state_dict().items()}
    first = learner(episode).detach()
    learner(random_episode(seed=1).task(0))
    for n, p in learner.named_parameters():
        assert torch.equal(p, before[n]) and p.grad is None and p.requires_grad, n
    assert torch.equal(first, learner(episode))


# --- from scratch ---


def test_every_task_starts_from_its_own_network_whatever_the_batch() -> None:
    learner, episode = Scratch(network()), random_episode()
    initial = learner.initial_parameters(episode)
    other_seed = Scratch(network(), seed=1).initial_parameters(episode)
    alone = learner.initial_parameters(episode.task(2))
    other_template = Scratch(network(seed=9)).initial_parameters(episode)
    for name, p in initial.items():
        assert torch.equal(p[2], alone[name][0]) and torch.equal(p, other_template[name])
        if name.endswith(("weight", "bias")):
            assert not torch.isclose(p[0], p[1]).any() and not torch.isclose(p, other_seed[name]).any(), name


def test_networks_are_drawn_by_the_law_of_the_backbone() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        template = ConvNet(40, filters=16, hidden=(64,), n_blocks=2, image_size=SIZE)
    drawn = Scratch(template).initial_parameters(random_episode(n_tasks=8, n_way=40))
    assert drawn.keys() == dict(template.named_parameters()).keys()
    for name, p in template.named_parameters():
        assert drawn[name].shape == (8, *p.shape)
        if name.endswith(("scale", "shift")):
            assert torch.equal(drawn[name], p.detach().expand_as(drawn[name]))
        else:
            assert drawn[name].abs().max() == pytest.approx(p.abs().max().item(), rel=0.1), name
            assert drawn[name].std() == pytest.approx(p.std().item(), rel=0.2), name
            assert abs(drawn[name].mean()) < 0.15 * p.std(), name


def test_scratch_has_nothing_to_save() -> None:
    assert not Scratch(network()).state_dict() and not list(Scratch(network()).parameters())


# --- pretraining ---


def test_classification_labels_name_the_class_of_the_image() -> None:
    classes = patterned_classes(rotations=True)
    batch = ClassificationSampler(classes, images_per_task=50, seed=3).sample(4)
    assert batch.n_way == len(classes) == 4 * PRETRAINING_CLASSES and batch.support_labels.shape == (4, 0)
    seen = set()
    for image, label in zip(batch.query_images.flatten(0, 1), batch.query_labels.flatten().tolist(), strict=True):
        upright = image[0].rot90(-(label % 4), (-2, -1))
        assert upright[0, label // 4] == 1 and upright.sum() < 1.1
        seen.add((label, round(upright[2, 2].item() * 255)))
    assert {label for label, _ in seen} == set(range(len(classes))) and {d for _, d in seen} == set(range(10))


def test_same_seed_same_mini_batches_also_after_a_resume() -> None:
    classes = patterned_classes()
    one, same, other = (ClassificationSampler(classes, 5, seed=seed) for seed in (0, 0, 1))
    first = one.sample(2)
    assert torch.equal(first.query_images, same.sample(2).query_images)
    assert not torch.equal(first.query_images, other.sample(2).query_images)
    second = one.sample(2)
    assert not torch.equal(first.query_images, second.query_images)
    other.generator.set_state(same.generator.get_state())
    assert torch.equal(second.query_images, other.sample(2).query_images)


@each_policy
def test_pretraining_loss_is_the_cross_entropy_of_the_classifier(normalization: Normalization) -> None:
    learner = PretrainedCosine(pretrained(normalization))
    batch = learner.sampler(patterned_classes(), EpisodeSpec(WAY, 1, 4)).sample(2)
    images, labels = batch.query_images.flatten(0, 1), batch.query_labels.flatten()
    assert len(images) == 2 * WAY * (1 + 4)
    torch.testing.assert_close(learner.meta_loss(batch), F.cross_entropy(learner.network(images), labels))


def test_pretraining_teaches_the_classes() -> None:
    learner, classes = PretrainedFinetuned(pretrained()), patterned_classes()
    sampler = learner.sampler(classes, EpisodeSpec(WAY, 1, 4))
    untrained = learner.meta_loss(sampler.sample(4)).item()
    config = TrainConfig(iterations=80, tasks_per_step=4, outer_lr=0.02, warmup=0, log_every=40)
    tested = EpisodeSampler(classes, EpisodeSpec(WAY, 1, 4))
    history = train(
        learner,
        sampler,
        config,
        validate=lambda current: accuracies(current, tested, 5).mean().item(),
        device="cpu",
        progress_bar=False,
    )
    assert untrained > 1.0 and history[-1]["meta_loss"] < 0.2
    assert history[-1]["train_accuracy"] > 0.95 and history[-1]["validation_accuracy"] > 0.95


@pytest.mark.parametrize("learner", [PretrainedFinetuned, PretrainedCosine])
def test_the_recorded_weights_need_no_pretraining_head(learner) -> None:
    finished, episode = learner(pretrained()), random_episode()
    before = finished(episode)
    finished.finish()
    loaded = learner(network(n_outputs=1, seed=2))
    loaded.load_state_dict(finished.state_dict())
    assert torch.equal(finished(episode), before) and torch.equal(loaded(episode), before)
    with pytest.raises(ValueError, match="1 outputs but there are 6 classes"):
        finished(ClassificationSampler(patterned_classes(), 2).sample(1))


# --- comparisons by hand ---


def test_cosine_is_the_naive_loop() -> None:
    learner, episode = PretrainedCosine(pretrained("group"), scale=3.0), random_episode()
    logits = learner(episode)
    for t in range(len(episode)):
        support = [learner.network.embed(image[None])[0] for image in episode.support_images[t]]
        for q, image in enumerate(episode.query_images[t]):
            query = learner.network.embed(image[None])[0]
            for c in range(WAY):
                of_class = [s / s.norm() for s, y in zip(support, episode.support_labels[t], strict=True) if y == c]
                centroid = torch.stack(of_class).mean(0)
                expected = 3.0 * (query @ centroid) / (query.norm() * centroid.norm())
                torch.testing.assert_close(logits[t, q, c], expected)


def test_nearest_pixels_is_the_naive_loop() -> None:
    episode = random_episode()
    logits = NearestPixels()(episode)
    for t in range(len(episode)):
        for q, query in enumerate(episode.query_images[t]):
            for c in range(WAY):
                support = episode.support_images[t][episode.support_labels[t] == c]
                expected = max((query * s).sum() / (query.norm() * s.norm()) for s in support)
                torch.testing.assert_close(logits[t, q, c], expected)


# --- arguments and mistakes ---


@pytest.mark.parametrize(
    ("config", "other"),
    [
        (ScratchConfig, {"steps": 7, "lr": 0.5, "seed": 3}),
        (PretrainedFinetunedConfig, {"steps": 7, "lr": 0.5, "adapt": "head"}),
        (PretrainedCosineConfig, {"scale": 2.0}),
        (NearestPixelsConfig, {}),
    ],
)
def test_config_and_constructor_agree(config, other: dict) -> None:
    names = {f.name: f.default for f in fields(config) if f.name != "method"}
    learner = config().build(network())
    defaults = {n: p.default for n, p in signature(type(learner).__init__).parameters.items() if n in names}
    assert defaults == names and other.keys() == names.keys()
    assert type(learner)().config == config() if not names else type(learner)(network()).config == config()
    assert config(**other).build(network()).config == config(**other)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: Scratch(network(), steps=-1), "steps must not be negative, got -1"),
        (lambda: Scratch(network(), lr=0.0), "lr must be positive"),
        (lambda: Scratch(network(), seed=-1), "seed must be from 0"),
        (lambda: PretrainedFinetuned(pretrained(), lr=float("nan")), "lr must be positive, got nan"),
        (lambda: PretrainedFinetunedConfig(adapt="body"), "adapt"),  # pyright: ignore[reportArgumentType]
        (lambda: PretrainedCosine(pretrained(), scale=0.0), "scale must be positive"),
        (lambda: Scratch(network(5))(random_episode()), r"5 outputs but the episode is 3-way; build ConvNet\(n_outp"),
        (lambda: ClassificationSampler(patterned_classes(), 0), "images_per_task must be positive"),
        (lambda: ClassificationSampler(patterned_classes(), 1).sample(0), "n_tasks must be positive"),
        (
            lambda: PretrainedCosine(network(5)).sampler(patterned_classes(), EpisodeSpec()),
            "5 outputs but there are 6 classes to pretrain on; build",
        ),
        (
            lambda: PretrainedCosine(network(5))(ClassificationSampler(patterned_classes(), 2).sample(1)),
            "5 outputs but there are 6 classes",
        ),
        (lambda: PretrainedFinetuned(pretrained()).meta_loss(random_episode()), "not on episodes; draw its training"),
        (lambda: PretrainedCosine(pretrained()).meta_loss(random_episode()), "not on episodes; draw its training"),
        (lambda: Scratch(network()).meta_loss(random_episode()), "Scratch learns nothing before it sees a task"),
        (lambda: Scratch(network()).sampler(patterned_classes(), EpisodeSpec()), "Scratch learns nothing before"),
        (lambda: NearestPixels().meta_loss(random_episode()), "NearestPixels learns nothing before it sees a task"),
        (lambda: NearestPixels().sampler(patterned_classes(), EpisodeSpec()), "NearestPixels learns nothing before"),
    ],
)
def test_a_mistake_is_told(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeCheckError), match=message):  # the latter: an option that is no option
        mistake()


@pytest.mark.parametrize("learner", [Scratch(network()), NearestPixels()], ids=["scratch", "pixels"])
def test_training_what_cannot_be_trained_is_a_mistake(learner: Learner) -> None:
    sampler = EpisodeSampler(patterned_classes(), EpisodeSpec(WAY, 1, 1))
    with pytest.raises(ValueError):
        train(learner, sampler, TrainConfig(iterations=1), device="cpu", progress_bar=False)
