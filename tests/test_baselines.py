"""The baselines learn what they claim from what they may read, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from metatutor.backbones import ConvNet, Normalization
from metatutor.baselines import NearestPixels, PretrainedCosine, PretrainedFinetuned, Scratch
from metatutor.episodes import ClassificationSampler, ClassImages, Episode, EpisodeSampler, EpisodeSpec
from metatutor.evaluation import is_transductive, scores
from metatutor.learner import Learner, Loss, load
from metatutor.testing import check_learner
from metatutor.training import TrainConfig, train
from tests.networks import NETWORKS, SIZE, Tied, sequential, with_running_statistics

WAY, PRETRAINING_CLASSES = 3, 6


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


# --- what every baseline must keep to, besides the contract ---


@each_learner
@each_policy
def test_it_is_transductive_if_its_network_is(name: str, normalization: Normalization) -> None:
    learner = LEARNERS[name](normalization)
    assert learner.transductive == (normalization == "batch" and name != "pixels")
    assert is_transductive(learner, random_episode()) == learner.transductive
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
def test_accuracy_does_not_depend_on_the_size_of_batches(name: str) -> None:
    learner, classes = LEARNERS[name]("group"), patterned_classes()
    by_one, by_four = (
        scores(learner, EpisodeSampler(classes, EpisodeSpec(WAY, 2, 2)), 6, tasks_per_batch=n) for n in (1, 4)
    )
    assert torch.equal(by_one, by_four)


# --- gradient descent on the support set ---


def descend_alone(
    network: nn.Module,
    initial: dict[str, Tensor],
    episode: Episode,
    steps: int,
    descent: Callable[..., Optimizer],
    loss: Loss = F.cross_entropy,
) -> dict[str, Tensor]:
    """One task, one optimizer, no vmap."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in initial.items()}
    optimizer = descent(parameters.values())
    for _ in range(steps):
        optimizer.zero_grad()
        logits = functional_call(network, parameters, (episode.support_images[0],))
        loss(logits, episode.support_labels[0]).backward()
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
        learner.steps = steps  # pyright: ignore[reportArgumentType]
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
    drawn = Scratch(template).initial_parameters(random_episode(n_tasks=8, n_way=40, n_support=40))
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
    other.load_state_dict(same.state_dict())
    assert torch.equal(second.query_images, other.sample(2).query_images)


@each_policy
def test_pretraining_loss_is_the_cross_entropy_of_the_classifier(normalization: Normalization) -> None:
    learner = PretrainedCosine(pretrained(normalization))
    batch = patterned_classes().mini_batches(EpisodeSpec(WAY, 1, 4), seed=0).sample(2)
    images, labels = batch.query_images.flatten(0, 1), batch.query_labels.flatten()
    assert len(images) == 2 * WAY * (1 + 4)
    torch.testing.assert_close(learner.meta_loss(batch), F.cross_entropy(learner.network(images), labels))


def test_pretraining_teaches_the_classes() -> None:
    learner, classes = PretrainedFinetuned(pretrained()), patterned_classes()
    spec = EpisodeSpec(WAY, 1, 4)
    untrained = learner.meta_loss(classes.mini_batches(spec).sample(4)).item()
    config = TrainConfig(iterations=80, tasks_per_step=4, outer_lr=0.02, warmup=0, log_every=40, seed=1)
    tested = classes.sampler(spec)
    history = train(
        learner,
        classes,
        spec,
        config,
        validate=lambda current: scores(current, tested, 5).mean().item(),
        device="cpu",
        progress_bar=False,
    )
    assert untrained > 1.0 and history[-1]["meta_loss"] < 0.2
    assert history[-1]["train_accuracy"] > 0.95 and history[-1]["validation_accuracy"] > 0.95


@pytest.mark.parametrize("learner", [PretrainedFinetuned, PretrainedCosine])
def test_the_recorded_weights_need_no_pretraining_head(learner, tmp_path: Path) -> None:
    finished, episode = learner(pretrained()), random_episode()
    before = finished(episode)
    finished.finish()
    loaded = learner(network(n_outputs=1, seed=2))
    loaded.load_state_dict(finished.state_dict())
    assert torch.equal(finished(episode), before) and torch.equal(loaded(episode), before)
    finished.save(tmp_path / "finished.safetensors")
    assert torch.equal(load(tmp_path / "finished.safetensors")(episode), before)
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


# --- anybody's networks ---

PARTS: dict[str, Callable[[nn.Module], Learner]] = {
    "scratch": partial(Scratch, steps=3),
    "finetuned": partial(PretrainedFinetuned, steps=2, lr=0.1),
    "cosine": PretrainedCosine,
}


@pytest.mark.filterwarnings("ignore:tasks are computed one by one")
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_any_network_keeps_the_contract(name: str, kind: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[kind](WAY if name == "scratch" else PRETRAINING_CLASSES)
    check_learner(PARTS[name](network), image_shape=(1, SIZE, SIZE))


def test_scratch_begins_with_the_layers_of_anybody_as_they_are_made() -> None:
    """Normalisation with ones and zeros, whatever its present values; weights at random, each task its own."""
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.PReLU(), nn.GroupNorm(2, 4), nn.LayerNorm([6, 6])]
    template = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 36, WAY))
    with torch.no_grad():
        for p in template.parameters():
            p.add_(3)
    initial = Scratch(template).initial_parameters(random_episode(n_tasks=4))
    expected = {"1.weight": 1, "1.bias": 0, "1.running_mean": 0, "1.running_var": 1, "1.num_batches_tracked": 0}
    expected |= {"2.weight": 0.25, "3.weight": 1, "3.bias": 0, "4.weight": 1, "4.bias": 0}
    for name, value in expected.items():
        assert (initial.pop(f"module.{name}") == value).all(), name
    bounds = {"module.0.weight": 1 / 3, "module.0.bias": 1 / 3, "module.6.weight": 1 / 12, "module.6.bias": 1 / 12}
    assert initial.keys() == bounds.keys()
    for name, bound in bounds.items():
        assert 0.5 * bound < initial[name].abs().max() <= bound, name
        assert not torch.isclose(initial[name][0], initial[name][1]).any()


def test_scratch_normalises_by_the_running_statistics_of_the_task() -> None:
    """As whoever trains a network on one support set alone: normalising by the batch, then by what was seen."""
    template, episode = with_running_statistics(WAY).double(), random_episode().to(torch.float64)
    before = deepcopy(template.state_dict())
    learner = Scratch(template, steps=2)
    logits, initial = learner(episode), learner.initial_parameters(episode)
    for i in range(len(episode)):
        alone = deepcopy(template).train()
        alone.load_state_dict({name.removeprefix("module."): p[i] for name, p in initial.items()})
        optimizer = torch.optim.Adam(alone.parameters(), lr=0.01)
        for _ in range(2):  # few: Adam divides by gradients that are almost zero, rounding errors too
            optimizer.zero_grad()
            F.cross_entropy(alone(episode.support_images[i]), episode.support_labels[i]).backward()
            optimizer.step()
        expected = alone.eval()(episode.query_images[i]).detach()
        torch.testing.assert_close(logits[i], expected, atol=1e-9, rtol=1e-9)
    assert template.training and all(torch.equal(p, before[n]) for n, p in template.state_dict().items())


def test_frozen_parameters_stay_in_every_task() -> None:
    episode, template = random_episode(), sequential(WAY)
    template.requires_grad_(False).get_submodule("4").requires_grad_()
    for adapted in (Scratch(template).adapt(episode), PretrainedFinetuned(template).adapt(episode)):
        moved = {n for n, p in adapted.items() if not torch.equal(p, template.state_dict()[n[7:]].expand_as(p))}
        assert moved == {"module.4.weight", "module.4.bias"}


def test_the_last_layer_is_anew_in_every_task_even_if_it_is_frozen() -> None:
    """Or a pretrained network without gradients could not be fine-tuned at all."""
    torch.manual_seed(0)
    learner = PretrainedFinetuned(sequential(PRETRAINING_CLASSES).requires_grad_(False), steps=60, lr=0.5)
    episode = random_episode()
    asked = replace(episode, query_images=episode.support_images, query_labels=episode.support_labels)
    assert learner.eval()(episode).shape == (3, 5, WAY)
    assert (learner(asked).argmax(-1) == asked.query_labels).float().mean() > 0.8


@pytest.mark.parametrize("learner", [PretrainedFinetuned, PretrainedCosine])
def test_tasks_are_normalised_by_the_running_statistics_of_pretraining(learner: Any) -> None:
    network = with_running_statistics(PRETRAINING_CLASSES)
    pretrained, classes = learner(network), patterned_classes()
    config = TrainConfig(iterations=3, tasks_per_step=2, warmup=0)
    train(pretrained, classes, EpisodeSpec(WAY, 1, 4), config, device="cpu", progress_bar=False)
    seen = {name: tensor.clone() for name, tensor in network.named_buffers()}
    assert seen["1.num_batches_tracked"] >= 3 and seen["1.running_mean"].any()
    before = pretrained(random_episode())
    assert all(torch.equal(seen[name], tensor) for name, tensor in network.named_buffers())
    network.get_submodule("1").reset_running_stats()  # pyright: ignore[reportCallIssue]
    assert not torch.allclose(pretrained(random_episode()), before)


@pytest.mark.parametrize("learner", [Scratch, PretrainedFinetuned])
def test_a_loss_of_ones_own_counts(learner: Any) -> None:
    smooth, episode = nn.CrossEntropyLoss(label_smoothing=0.3), random_episode()
    smoothed, plain = (learner(network(), steps=3, lr=0.05, **loss) for loss in ({"loss": smooth}, {}))
    start = {name: p.detach() for name, p in plain.network.named_parameters()}
    start |= {"head.weight": torch.zeros(WAY, 6), "head.bias": torch.zeros(WAY)}
    descent: Callable[..., Optimizer] = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    if learner is Scratch:
        start = {name: p[1] for name, p in plain.initial_parameters(episode).items()}
        descent = partial(torch.optim.Adam, lr=0.05)
    expected = descend_alone(plain.network, start, episode.task(1), 3, descent, smooth)
    found, other = smoothed.adapt(episode)["head.weight"][1], plain.adapt(episode)["head.weight"][1]
    torch.testing.assert_close(found, expected["head.weight"].detach(), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(found, other, atol=1e-3)


# --- arguments and mistakes ---


@pytest.mark.parametrize(
    ("learner", "other"),
    [
        (Scratch, {"steps": 7, "lr": 0.5, "seed": 3}),
        (PretrainedFinetuned, {"steps": 7, "lr": 0.5, "adapt": "head"}),
        (PretrainedCosine, {"scale": 2.0}),
    ],
)
def test_arguments_are_kept(learner: Any, other: dict[str, Any]) -> None:
    made = learner(network(), **other)
    assert made.arguments == other | {"loss": None}
    assert {name: getattr(made, name) for name in other if name != "adapt"}.items() <= other.items()
    assert learner(network()).arguments.keys() == made.arguments.keys()


def test_nearest_pixels_has_no_arguments_and_can_be_saved(tmp_path: Path) -> None:
    assert NearestPixels().arguments == {}
    NearestPixels().save(tmp_path / "pixels.safetensors")
    assert isinstance(load(tmp_path / "pixels.safetensors"), NearestPixels)


class Copying(nn.Module):
    """The last layer is the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(SIZE * SIZE, SIZE * SIZE), nn.Linear(SIZE * SIZE, SIZE * SIZE)
        self.last.weight = self.first.weight

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.first(images.flatten(1)))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: Scratch(network(), steps=-1), "steps must not be negative, got -1"),
        (lambda: Scratch(network(), lr=0.0), "lr must be positive"),
        (lambda: Scratch(network(), seed=-1), "seed must be from 0"),
        (lambda: PretrainedFinetuned(pretrained(), lr=float("nan")), "lr must be positive, got nan"),
        (
            lambda: PretrainedFinetuned(pretrained(), adapt="body"),  # pyright: ignore[reportArgumentType]
            "adapt must be 'all' or 'head', got 'body'",
        ),
        (lambda: PretrainedCosine(pretrained(), scale=0.0), "scale must be positive"),
        (lambda: Scratch(network(5))(random_episode()), r"5 outputs but the episode is 3-way; build ConvNet\(n_outp"),
        (lambda: Scratch(Tied(5))(random_episode()), "5 outputs but the episode is 3-way"),
        (
            lambda: Scratch(nn.Sequential(nn.Flatten(), nn.Tanh()))(random_episode()),
            "64 outputs but the episode is 3-way",
        ),
        (lambda: ClassificationSampler(patterned_classes(), 0), "images_per_task must be positive, got 0"),
        (lambda: ClassificationSampler(patterned_classes(), 1).sample(0), "n_tasks must be positive, got 0"),
        (
            lambda: PretrainedCosine(network(5))(ClassificationSampler(patterned_classes(), 2).sample(1)),
            "5 outputs but there are 6 classes",
        ),
        (
            lambda: PretrainedCosine(nn.Flatten()),
            r"needs a last layer; build ConvNet.*, or .* backbone\(network, head=",
        ),
        (lambda: PretrainedFinetuned(Copying()), "the last layer shares its weights with another"),
        (lambda: PretrainedFinetuned(pretrained()).meta_loss(random_episode()), "not on episodes; train"),
        (lambda: PretrainedCosine(pretrained()).meta_loss(random_episode()), "not on episodes; train"),
        (lambda: Scratch(network()).meta_loss(random_episode()), "Scratch learns nothing before it sees a task"),
        (lambda: NearestPixels().meta_loss(random_episode()), "NearestPixels learns nothing before it sees a task"),
    ],
)
def test_a_mistake_is_told(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()


@pytest.mark.parametrize("learner", [Scratch(network()), NearestPixels()], ids=["scratch", "pixels"])
def test_training_what_cannot_be_trained_is_a_mistake(learner: Learner) -> None:
    assert not learner.learns
    with pytest.raises(ValueError, match="learns nothing before it sees a task"):
        train(learner, patterned_classes(), EpisodeSpec(WAY, 1, 1), TrainConfig(iterations=1), progress_bar=False)


@pytest.mark.parametrize("images", [(1, 9, 9), (3, SIZE, SIZE)])
@pytest.mark.parametrize("name", PARTS)
def test_images_of_another_shape_are_refused_in_one_sentence(name: str, images: tuple[int, ...]) -> None:
    labels = torch.arange(WAY)[None]
    episode = Episode(torch.rand(1, WAY, *images), labels, torch.rand(1, WAY, *images))
    with pytest.raises(ValueError, match=f"takes images of 1×8×8 .*, got {'×'.join(map(str, images))}; resize"):
        PARTS[name](network())(episode)
