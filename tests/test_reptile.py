"""Reptile: the inner loop is Adam without momentum on mini-batches in turn, the outer one a step towards its end."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metatutor.backbones import MLP, ConvNet, Normalization
from metatutor.episodes import Episode, EpisodeSpec
from metatutor.functional import Parameters
from metatutor.optimization import Reptile
from metatutor.training import TrainConfig, accumulate, train
from tests.gradients import close, drawn, flat, gradient_of

Episodes = Callable[..., Episode]


def small(*, normalization: Normalization = "batch", **options: Any) -> Reptile:
    """A learner of 3-way tasks of 8×8 pixels in float64, every parameter random."""
    network = ConvNet(3, filters=4, n_blocks=2, image_size=8, normalization=normalization)
    return Reptile(drawn(network), **{"inner_lr": 0.02, "test_inner_steps": None} | options)


# --- by hand ---------------------------------------------------------------------------------------------------


def test_two_steps_by_hand():
    """A line `w x + b` from zero, one point (2, 3), loss `(w x + b - y)^2`, rate 1/2.

    The first gradient is (-12, -6). Adam's mean square, corrected, is its square: both parameters rise by the rate, to
    1/2. There the line is at 3/2, and the gradient is half the first. The mean square is now `0.999 * 0.001 g^2 +
    0.001 (g / 2)^2`, divided by `1 - 0.999^2`: both rise by `1/2 * 1/2 / sqrt(0.001 * 1.249 / (1 - 0.999^2))`.
    """
    network = MLP(1, 1, hidden=()).double()
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    x, y = torch.full((1, 1, 1), 2.0).double(), torch.full((1, 1, 1), 3.0).double()
    learner, episode = Reptile(network, inner_lr=0.5, inner_steps=2), Episode(x, y, x, y, n_way=1)
    second = 0.25 / math.sqrt(0.001 * (0.999 + 0.25) / (1 - 0.999**2))
    path = learner.adaptation_path(episode)
    for name in ("head.weight", "head.bias"):
        found = [parameters[name].item() for parameters in path]
        assert found == pytest.approx([0, 0.5, 0.5 + second], abs=1e-8)
    assert close(gradient_of(learner, episode), torch.full((2,), -0.5 - second).double(), 1e-8)
    assert learner.meta_loss(episode).item() == pytest.approx((0.5 + second) ** 2, abs=1e-7)


# --- the inner loop --------------------------------------------------------------------------------------------


def naive(learner: Reptile, task: Episode) -> Parameters:
    """The parameters after PyTorch's own Adam has seen the mini-batches of one task."""
    network = deepcopy(learner.network)
    images, labels = task.support_images[0], task.support_labels[0]
    optimizer = torch.optim.Adam(network.parameters(), lr=learner.inner_lr, betas=(0.0, 0.999))
    of_class = [[i for i, label in enumerate(labels.tolist()) if label == way] for way in range(task.n_way)]
    for step in range(learner.inner_steps):
        chosen = list(range(len(labels)))
        if learner.shots_per_step is not None and learner.shots_per_step * task.n_way < len(labels):
            turns = [step * learner.shots_per_step + i for i in range(learner.shots_per_step)]
            chosen = [mine[turn % len(mine)] for mine in of_class for turn in turns]
        optimizer.zero_grad()
        F.cross_entropy(network(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return {name: p.detach() for name, p in network.named_parameters()}


@pytest.mark.parametrize(
    ("inner_steps", "shots_per_step"), [(1, 2), (1, None), *((6, shots) for shots in (1, 2, 4, 5, 9, None))]
)
def test_the_update_is_the_mean_of_what_adam_does_to_each_task(
    random_episode: Episodes, inner_steps: int, shots_per_step: int | None
):
    """Five shots: mini-batches of 2 and 4 go round, so that one holds the last shots and the first."""
    episode = random_episode(n_tasks=3, k_shot=5)
    learner = small(inner_steps=inner_steps, shots_per_step=shots_per_step)
    expected = [naive(learner, episode.task(i)) for i in range(len(episode))]
    adapted = learner.adapt(episode)
    initial = dict(learner.network.named_parameters())
    for name, parameter in initial.items():
        together = torch.stack([of_task[name] for of_task in expected])
        assert close(adapted[name], together, 1e-7), name
        assert not close(adapted[name], parameter.expand_as(together), 1e-3), name
    distances = [sum((initial[n] - p).pow(2).sum().item() for n, p in of_task.items()) for of_task in expected]
    assert learner.meta_loss(episode).item() == pytest.approx(sum(distances) / 6, rel=1e-7)
    mean = torch.stack([flat(of_task.values()) for of_task in expected]).mean(0)
    assert close(gradient_of(learner, episode), flat(initial.values()) - mean, 1e-7)


@pytest.mark.parametrize("shots_per_step", [1, 2, 3])
def test_each_class_takes_its_own_turns(random_episode: Episodes, shots_per_step: int):
    """One, three and five images: a class that has been seen begins again, the others go on; three a class are all."""
    task, learner = random_episode(n_tasks=1, k_shot=3), small(inner_steps=4, shots_per_step=shots_per_step)
    uneven = replace(task, support_labels=torch.tensor([[2, 1, 2, 0, 1, 2, 2, 1, 2]]))
    adapted = learner.adapt(uneven)
    for name, expected in naive(learner, uneven.task(0)).items():
        assert close(adapted[name][0], expected, 1e-7), name


def test_adam_goes_on_where_the_tasks_before_left_it(random_episode: Episodes):
    """Two outer steps on one task against one Adam of PyTorch's that never starts anew."""
    task, learner = random_episode(n_tasks=1, k_shot=5), small(inner_steps=3, shots_per_step=1)
    network = deepcopy(learner.network)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02, betas=(0.0, 0.999))
    images, labels = task.support_images[0], task.support_labels[0]
    by_class = labels.argsort(stable=True).view(3, 5)
    outer = torch.optim.SGD(learner.parameters(), lr=1.0)
    for _ in range(2):
        outer.zero_grad()
        learner.meta_loss(task).backward()
        outer.step()
        learner.after_step()
        for step in range(3):
            optimizer.zero_grad()
            F.cross_entropy(network(images[by_class[:, step]]), labels[by_class[:, step]]).backward()
            optimizer.step()
    assert close(flat(learner.network.parameters()), flat(network.parameters()), 1e-7)
    squares = [optimizer.state[p]["exp_avg_sq"] for p in network.parameters()]
    assert close(learner.squares, flat(squares), 1e-9)
    assert learner.filled.item() == pytest.approx(1 - 0.999**6)
    anew = deepcopy(learner)
    anew.squares.zero_()
    anew.filled.zero_()
    assert not close(learner.eval()(task), anew.eval()(task), 1e-3)  # nor does the test start anew


def state(learner: Reptile) -> Tensor:
    return torch.cat([learner.squares, learner.filled.view(1)])


def test_several_tasks_leave_their_mean_after_the_step(random_episode: Episodes):
    """Computed at once or in chunks, alike or not; until then the loss is what it was, however often it is asked."""
    episode, left = random_episode(n_tasks=4), []
    for task in episode:
        learner = small(inner_steps=2)
        learner.meta_loss(task).backward()
        assert not state(learner).any()
        learner.after_step()
        left.append(state(learner))
    expected = torch.stack(left).mean(0)
    for at_once in (None, 1, 2, 3):
        learner = small(inner_steps=2)
        accumulate(learner, episode, at_once)
        again = learner.meta_loss(episode)
        assert torch.equal(again, learner.meta_loss(episode))
        assert not state(learner).any()
        learner.after_step()
        assert close(state(learner), expected, 1e-14)
        assert (expected > 0).double().mean() > 0.8
        assert not close(learner.meta_loss(episode), again, 1e-3)  # now Adam goes on from there


def test_only_what_a_step_of_training_saw_is_left(random_episode: Episodes):
    episode, learner = random_episode(), small(inner_steps=2)
    learner.after_step()  # of no tasks: nothing
    assert not state(learner).any()
    accumulate(learner, episode)
    learner.after_step()
    left = state(learner)
    with torch.no_grad():
        learner.meta_loss(episode)
    learner(episode)
    learner.eval().meta_loss(episode)
    learner(episode)
    learner.train().after_step()
    assert torch.equal(state(learner), left)


def test_a_frozen_layer_has_no_state(random_episode: Episodes):
    """Nor do the others lose theirs when one is frozen in mid-training, or set free again."""
    episode, learner = random_episode(), small(inner_steps=2)
    steps = []
    for frozen in (False, True, False):
        learner.network.blocks.requires_grad_(not frozen)
        before = state(learner)
        accumulate(learner, episode)
        learner.after_step()
        steps.append(before != state(learner))
    n_blocks = sum(p.numel() for n, p in learner.network.named_parameters() if n.startswith("blocks."))
    assert [step[:n_blocks].any().item() for step in steps] == [True, False, True]
    assert all(step[n_blocks:].any() for step in steps)


class Watched(Reptile):
    """Notes the mini-batches."""

    def support_gradients(self, parameters: Parameters, episode: Episode, **options: Any) -> Any:
        self.seen = [*getattr(self, "seen", []), episode]
        return super().support_gradients(parameters, episode, **options)


@pytest.mark.parametrize(("shots_per_step", "shots"), [(1, 1), (3, 3), (5, 5), (7, 5), (None, 5)])
def test_what_a_mini_batch_holds(shots_per_step: int | None, shots: int):
    """Image `i` of class `c` has the brightness `10 c + i`. Labels come in random order, another one in each task."""
    generator, n_way, k_shot = torch.Generator().manual_seed(0), 3, 5
    brightness = [[10 * way + shot for way in range(n_way) for shot in range(k_shot)] for _ in range(4)]
    values = torch.stack([torch.tensor(b)[torch.randperm(15, generator=generator)] for b in brightness])
    labels = values // 10
    images = values.double().view(4, 15, 1, 1, 1).expand(4, 15, 1, 8, 8)
    learner = Watched(small().network, inner_steps=5, shots_per_step=shots_per_step, test_inner_steps=7)
    episode = Episode(images, labels, images[:, :3], labels[:, :3], n_way)
    learner.adapt(episode)
    assert len(learner.seen) == 5
    by_task: list[list[int]] = [[] for _ in range(4)]
    for batch in learner.seen:
        seen = batch.support_images.mean((2, 3, 4)).round().long()
        assert torch.equal(batch.support_labels, seen // 10)  # every image with its own label
        for task, of_task in enumerate(seen.tolist()):
            assert sorted(value // 10 for value in of_task) == sorted(list(range(n_way)) * shots)
            assert len(set(of_task)) == len(of_task)  # none twice
            by_task[task] += of_task
    for of_task in by_task:  # in five steps, every image was seen equally often
        assert sorted(of_task) == sorted(brightness[0] * shots)
    learner.seen = []
    learner.eval().adapt(episode)
    assert len(learner.seen) == 7
    assert all(torch.equal(batch.support_images, images) for batch in learner.seen)  # at the test, all of them


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_points_of_a_regression_come_in_turn_too(n_outputs: int):
    """Targets are no classes: of five points in any order, the first two, the next two, the last and the first."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 5, n, dtype=torch.float64, generator=generator) for n in (1, n_outputs))
    learner = Watched(MLP(1, n_outputs, hidden=(3,)).double(), inner_steps=3, shots_per_step=2)
    learner.adapt(Episode(x, y, x, y, n_way=n_outputs))
    for batch, points in zip(learner.seen, ([0, 1], [2, 3], [4, 0]), strict=True):
        assert torch.equal(batch.support_images, x[:, points])
        assert torch.equal(batch.support_labels, y[:, points])


def test_the_order_of_classes_does_not_matter_but_that_of_shots_does(random_episode: Episodes):
    """To put the images of another class first changes no mini-batch; to exchange two shots of a class does."""
    episode, learner = random_episode(k_shot=3, n_tasks=1), small(inner_steps=2, shots_per_step=1)
    labels = episode.support_labels[0]
    by_class = labels.argsort(stable=True)
    exchanged = by_class.clone()
    exchanged[[0, 1]] = by_class[[1, 0]]

    def answer(order: Tensor) -> Tensor:
        images, labels = episode.support_images[:, order], episode.support_labels[:, order]
        return learner(replace(episode, support_images=images, support_labels=labels))

    assert close(answer(by_class), learner(episode))
    assert not close(answer(exchanged), learner(episode), 1e-3)


def test_fifty_steps_at_the_test_by_default(random_episode: Episodes):
    episode, network = random_episode(k_shot=5), drawn(MLP(64, 3, hidden=()))
    learner, longer = Reptile(network).eval(), Reptile(network, inner_steps=50, shots_per_step=None).train()
    assert torch.equal(learner(episode), longer(episode))
    assert not torch.equal(learner.train()(episode), longer(episode))


# --- the outer loop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer_lr", [1.0, 0.25])
@pytest.mark.parametrize("through_train", [False, True])
def test_plain_descent_goes_to_the_mean_of_the_adapted(random_episode: Episodes, outer_lr: float, through_train: bool):
    """All of the way with a rate of 1, a quarter of it with a rate of 1/4."""
    episode, learner = random_episode(n_tasks=4), small(inner_steps=3, shots_per_step=1)
    initial = flat(learner.network.parameters()).detach()
    mean = flat([adapted.mean(0) for adapted in learner.adapt(episode).values()]).detach()
    if through_train:
        config = TrainConfig(1, 4, outer_lr=outer_lr, optimizer="sgd", warmup=0, schedule="constant", clip_norm=None)
        train(learner, Always(episode), SPEC, config, device="cpu", progress_bar=False)
    else:
        optimizer = torch.optim.SGD(learner.parameters(), lr=outer_lr)
        learner.meta_loss(episode).backward()
        optimizer.step()
    assert close(flat(learner.network.parameters()), initial + outer_lr * (mean - initial), 1e-14)
    assert (mean - initial).norm() > 0.1


SPEC = EpisodeSpec(3, 2, 2)


class Always:
    """Classes whose tasks are the same every time."""

    def __init__(self, episode: Episode) -> None:
        self.episode = episode

    def sampler(self, spec: EpisodeSpec, *, seed: int) -> Always:
        return self

    def sample(self, n_tasks: int) -> Episode:
        assert n_tasks == len(self.episode)
        return self.episode


def test_queries_do_not_teach(random_episode: Episodes):
    """Neither their images nor their labels, nor how many they are."""
    episode, learner = random_episode(), small(inner_steps=2)
    images, labels = torch.full_like(episode.query_images, torch.nan), torch.zeros_like(episode.query_labels)
    expected = gradient_of(learner, episode)
    for other in (
        replace(episode, query_images=images, query_labels=labels),
        replace(episode, query_images=images[:, :1], query_labels=None),
    ):
        assert torch.equal(gradient_of(learner, other), expected)
        assert torch.equal(learner.meta_loss(other), learner.meta_loss(episode))
    changed = gradient_of(learner, replace(episode, support_images=1 - episode.support_images))
    assert not close(changed, expected, 1e-3)


def test_the_transductive_choice_does_not_concern_training(random_episode: Episodes):
    """Normalised by themselves or by the support, support images are the same; query images are not."""
    episode = random_episode()
    batch, support = (small(normalization=normalization, inner_steps=2) for normalization in ("batch", "support"))
    assert close(gradient_of(batch, episode), gradient_of(support, episode), 1e-7)
    assert not close(batch(episode), support(episode), 1e-3)


def test_no_inner_step_teaches_nothing(random_episode: Episodes):
    episode, learner = random_episode(), small(inner_steps=0)
    assert learner.meta_loss(episode) == 0
    assert not gradient_of(learner, episode).any()


def test_no_graph_of_the_inner_steps_is_kept(random_episode: Episodes):
    """What autograd holds when the loss is there does not grow with the steps."""
    sizes = []
    for inner_steps in (1, 4):
        waiting: list[Any] = [small(inner_steps=inner_steps).meta_loss(random_episode()).grad_fn]
        functions = set()
        while waiting:
            functions.add(function := waiting.pop())
            waiting += [parent for parent, _ in function.next_functions if parent not in {None} | functions]
        sizes.append(len(functions))
    assert sizes[0] == sizes[1] > 10
