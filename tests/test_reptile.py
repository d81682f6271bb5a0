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
from metatutor.episodes import Episode
from metatutor.learner import Parameters
from metatutor.optimization import Reptile
from metatutor.training import TrainConfig, train
from tests.conftest import ForgetfulReptile

Episodes = Callable[..., Episode]


def small(
    *, normalization: Normalization = "batch", seed: int = 0, kind: type[Reptile] = ForgetfulReptile, **options: Any
) -> Reptile:
    """A learner of 3-way tasks of 8×8 pixels in float64, every parameter random."""
    network = ConvNet(3, filters=4, n_blocks=2, image_size=8, normalization=normalization)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.double().parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 2
    return kind(network, **{"inner_lr": 0.02, "test_inner_steps": None} | options)


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def close(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=tolerance)


def outer_gradient(learner: Reptile, episode: Episode) -> Tensor:
    learner.zero_grad()
    learner.meta_loss(episode).backward()
    return flat([p.grad for p in learner.network.parameters() if p.grad is not None])


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
    learner, episode = ForgetfulReptile(network, inner_lr=0.5, inner_steps=2), Episode(x, y, x, y, n_way=1)
    second = 0.25 / math.sqrt(0.001 * (0.999 + 0.25) / (1 - 0.999**2))
    path = learner.adaptation_path(episode)
    for name in ("head.weight", "head.bias"):
        found = [parameters[name].item() for parameters in path]
        assert found == pytest.approx([0, 0.5, 0.5 + second], abs=1e-8)
    assert close(outer_gradient(learner, episode), torch.full((2,), -0.5 - second).double(), 1e-8)
    assert learner.meta_loss(episode).item() == pytest.approx((0.5 + second) ** 2, abs=1e-7)


# --- the inner loop --------------------------------------------------------------------------------------------


def naive(learner: Reptile, task: Episode) -> Parameters:
    """The parameters after PyTorch's own Adam has seen the mini-batches of one task."""
    config, network = learner.config, deepcopy(learner.network)
    images, labels = task.support_images[0], task.support_labels[0]
    optimizer = torch.optim.Adam(network.parameters(), lr=config.inner_lr, betas=(0.0, 0.999))
    of_class = [[i for i, label in enumerate(labels.tolist()) if label == way] for way in range(task.n_way)]
    for step in range(config.inner_steps):
        chosen = list(range(len(labels)))
        if config.shots_per_step is not None and config.shots_per_step < len(of_class[0]):
            turns = [step * config.shots_per_step + i for i in range(config.shots_per_step)]
            chosen = [mine[turn % len(mine)] for mine in of_class for turn in turns]
        optimizer.zero_grad()
        F.cross_entropy(network(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return {name: p.detach() for name, p in network.named_parameters()}


@pytest.mark.parametrize(
    ("inner_steps", "shots_per_step", "tasks_per_chunk"),
    [(1, 2, None), (1, None, None), *((6, shots, None) for shots in (1, 2, 4, 5, 9, None)), (6, 2, 2)],
)
def test_the_update_is_the_mean_of_what_adam_does_to_each_task(
    random_episode: Episodes, inner_steps: int, shots_per_step: int | None, tasks_per_chunk: int | None
):
    """Five shots: mini-batches of 2 and 4 go round, so that one holds the last shots and the first."""
    episode = random_episode(n_tasks=3, k_shot=5)
    learner = small(inner_steps=inner_steps, shots_per_step=shots_per_step, tasks_per_chunk=tasks_per_chunk)
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
    assert close(outer_gradient(learner, episode), flat(initial.values()) - mean, 1e-7)


def test_adam_goes_on_where_the_tasks_before_left_it(random_episode: Episodes):
    """Two outer steps on one task against one Adam of PyTorch's that never starts anew."""
    task, learner = random_episode(n_tasks=1, k_shot=5), small(kind=Reptile, inner_steps=3, shots_per_step=1)
    network = deepcopy(learner.network)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02, betas=(0.0, 0.999))
    images, labels = task.support_images[0], task.support_labels[0]
    by_class = labels.argsort(stable=True).view(3, 5)
    outer = torch.optim.SGD(learner.parameters(), lr=1.0)
    for _ in range(2):
        outer.zero_grad()
        learner.meta_loss(task).backward()
        outer.step()
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


def test_several_tasks_leave_their_mean(random_episode: Episodes):
    episode, learner = random_episode(n_tasks=4), small(kind=Reptile, inner_steps=2)
    learner.meta_loss(episode)
    alone = [small(kind=Reptile, inner_steps=2) for _ in range(4)]
    for i, one in enumerate(alone):
        one.meta_loss(episode.task(i))
    assert close(learner.squares, torch.stack([one.squares for one in alone]).mean(0))
    assert learner.filled == alone[0].filled > 0
    for other in (
        small(kind=Reptile, inner_steps=2, tasks_per_chunk=3),
        small(kind=Reptile, inner_steps=2, compile=True),
    ):
        other.meta_loss(episode)
        assert close(other.squares, learner.squares, 1e-7)
        assert close(other.filled, learner.filled)
    left = learner.squares.clone()
    learner.eval().meta_loss(episode)
    learner(episode)
    assert torch.equal(learner.squares, left)  # only training moves it


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
    learner = Watched(small().network, inner_steps=5, shots_per_step=shots_per_step)
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
    assert len(learner.seen) == 50
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
    episode, network = random_episode(k_shot=5), small().network
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
        config = TrainConfig(
            1, 4, outer_lr=outer_lr, optimizer="sgd", warmup=0, schedule="constant", clip_norm=math.inf
        )
        train(learner, Always(episode), config, device="cpu", progress_bar=False)
    else:
        optimizer = torch.optim.SGD(learner.parameters(), lr=outer_lr)
        learner.meta_loss(episode).backward()
        optimizer.step()
    assert close(flat(learner.network.parameters()), initial + outer_lr * (mean - initial), 1e-14)
    assert (mean - initial).norm() > 0.1


class Always:
    """The same tasks every time."""

    def __init__(self, episode: Episode) -> None:
        self.episode, self.generator = episode, torch.Generator()

    def sample(self, n_tasks: int) -> Episode:
        assert n_tasks == len(self.episode)
        return self.episode


def test_queries_do_not_teach(random_episode: Episodes):
    """Neither their images nor their labels, nor how many they are."""
    episode, learner = random_episode(), small(inner_steps=2)
    images, labels = torch.full_like(episode.query_images, torch.nan), torch.full_like(episode.query_labels, 10**6)
    expected = outer_gradient(learner, episode)
    for other in (
        replace(episode, query_images=images, query_labels=labels),
        replace(episode, query_images=images[:, :1], query_labels=labels[:, :1]),
    ):
        assert torch.equal(outer_gradient(learner, other), expected)
        assert torch.equal(learner.meta_loss(other), learner.meta_loss(episode))
    changed = outer_gradient(learner, replace(episode, support_images=1 - episode.support_images))
    assert not close(changed, expected, 1e-3)


def test_the_transductive_choice_does_not_concern_training(random_episode: Episodes):
    """Normalised by themselves or by the support, support images are the same; query images are not."""
    episode = random_episode()
    batch, support = (small(normalization=normalization, inner_steps=2) for normalization in ("batch", "support"))
    assert close(outer_gradient(batch, episode), outer_gradient(support, episode), 1e-7)
    assert not close(batch(episode), support(episode), 1e-3)


def test_no_inner_step_teaches_nothing(random_episode: Episodes):
    episode, learner = random_episode(), small(inner_steps=0)
    assert learner.meta_loss(episode) == 0
    assert not outer_gradient(learner, episode).any()


def test_no_graph_of_the_inner_steps_is_kept(random_episode: Episodes):
    """What autograd holds when the loss is there does not grow with the steps."""
    learner = small(inner_steps=3)
    loss = learner.meta_loss(random_episode())
    assert loss.grad_fn is not None
    parents = [function for function, _ in loss.grad_fn.next_functions if function is not None]
    assert {type(function).__name__ for function in parents} == {"AccumulateGrad"}
