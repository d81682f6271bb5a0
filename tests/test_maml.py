"""MAML: the meta-gradient is exact, the tasks do not see each other, and what must not be read is not read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metatutor.backbones import ConvNet, Normalization, Pooling
from metatutor.episodes import ClassImages, Episode, EpisodeSampler, EpisodeSpec
from metatutor.optimization import MAML, MAMLConfig
from metatutor.training import TrainConfig, train

Episodes = Callable[..., Episode]
Parameters = dict[str, Tensor]


def small(
    *,
    pooling: Pooling = "stride",
    normalization: Normalization = "batch",
    hidden: tuple[int, ...] = (),
    seed: int = 0,
    inner_lr: float = 0.3,
    **options: Any,
) -> MAML:
    """A learner of 3-way tasks of 8×8 pixels in float64, every parameter random."""
    network = ConvNet(
        3, filters=4, n_blocks=2, image_size=8, pooling=pooling, normalization=normalization, hidden=hidden
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.double().parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 2
    return MAML(network, inner_lr=inner_lr, **options)


def meta_gradient(learner: MAML, episode: Episode) -> Tensor:
    """The gradient of the meta-loss in all parameters, as one vector."""
    learner.zero_grad()
    learner.meta_loss(episode).backward()
    return flat([p.grad for p in learner.parameters() if p.grad is not None])


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def close(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=tolerance)


# --- by hand ---------------------------------------------------------------------------------------------------


class ThreeWeights(ConvNet):
    """Two logits, 0 and `w · x`, for images `x` of three pixels."""

    def __init__(self, weights: list[float]) -> None:
        nn.Module.__init__(self)
        self.n_outputs, self.normalization = 2, "group"
        self.weights = nn.Parameter(torch.tensor(weights, dtype=torch.float64))

    def forward(self, images: Tensor, n_support: int | None = None) -> Tensor:
        logit = images.flatten(1) @ self.weights
        return torch.stack([torch.zeros_like(logit), logit], dim=1)


def of_three_pixels(*tasks: tuple[list[float], int, list[float], int]) -> Episode:
    """Tasks of one support and one query image: pixels, label, pixels, label."""

    def images(which: int) -> Tensor:
        return torch.tensor([task[which] for task in tasks], dtype=torch.float64).view(-1, 1, 1, 1, 3)

    def labels(which: int) -> Tensor:
        return torch.tensor([[task[which]] for task in tasks])

    return Episode(images(0), labels(1), images(2), labels(3), n_way=2)


# Three weights w, one support image x with label 1, one query image q with label 1, s = sigmoid:
#
#   support loss        L(w) = -log s(w·x)              gradient  g(w) = -(1 - s) x      Hessian  H(w) = s (1 - s) x xᵀ
#   adapted weights     v = w - α g(w) = w + α (1 - s(w·x)) x
#   query loss          Q(v) = -log s(v·q)              gradient  ∇Q(v) = -(1 - s(v·q)) q
#   meta-gradient       dQ/dw = (I - α H(w)) ∇Q(v)      first order: ∇Q(v)
#
# At w = 0, s(w·x) = 1/2: v = α/2 x and H = x xᵀ / 4. With x = (1, 2, 0), q = (1, 0, 1), x·q = 1 and α = 2 log 3:
# v·q = log 3, so s(v·q) = 3/4, the query loss is log(4/3) and ∇Q(v) = -q/4. Then
#
#   meta-gradient = -1/4 (q - α/4 (x·q) x) = -1/4 (q - (log 3)/2 x) = (-1/4 + (log 3)/8, (log 3)/4, -1/4).
#
# A second task with support label 0 instead (x unchanged): L = -log s(-w·x), so v = -α/2 x and H the same. With the
# query q of label 0, v·q = -log 3 and by symmetry everything but the sign of ∇Q is the same.
TASK_OF_ONES = ([1.0, 2.0, 0.0], 1, [1.0, 0.0, 1.0], 1)
TASK_OF_ZEROS = ([1.0, 2.0, 0.0], 0, [1.0, 0.0, 1.0], 0)
SECOND_ORDER = torch.tensor([-1 / 4 + math.log(3) / 8, math.log(3) / 4, -1 / 4], dtype=torch.float64)
FIRST_ORDER = torch.tensor([-1 / 4, 0, -1 / 4], dtype=torch.float64)


@pytest.mark.parametrize(("first_order", "expected"), [(False, SECOND_ORDER), (True, FIRST_ORDER)])
def test_three_weights_by_hand(first_order: bool, expected: Tensor):
    learner = MAML(ThreeWeights([0, 0, 0]), inner_lr=2 * math.log(3), first_order=first_order)
    episode = of_three_pixels(TASK_OF_ONES)
    adapted = learner.adapt(episode)["weights"]
    assert close(adapted, math.log(3) * torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64))
    assert close(learner(episode), torch.tensor([[[0, math.log(3)]]], dtype=torch.float64))
    assert learner.meta_loss(episode).item() == pytest.approx(math.log(4 / 3), abs=1e-12)
    assert close(meta_gradient(learner, episode), expected)
    assert close(meta_gradient(learner, of_three_pixels(TASK_OF_ZEROS)), -expected)
    # the loss is the mean over tasks: opposite tasks cancel, and two of one and one of the other leave a third
    assert close(meta_gradient(learner, of_three_pixels(TASK_OF_ONES, TASK_OF_ZEROS)), 0 * expected)
    assert close(meta_gradient(learner, of_three_pixels(TASK_OF_ONES, TASK_OF_ZEROS, TASK_OF_ONES)), expected / 3)


def test_no_inner_step_is_plain_training():
    learner = MAML(ThreeWeights([0, 0, 0]), inner_steps=0)
    # at w = 0 the query has probability 1/2: the gradient is -q/2
    expected = torch.tensor([-0.5, 0, -0.5], dtype=torch.float64)
    assert close(meta_gradient(learner, of_three_pixels(TASK_OF_ONES)), expected)


# --- against finite differences --------------------------------------------------------------------------------


@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden": (5,), "pooling": "max"},  # the article's network
        {"normalization": "support"},
        {"normalization": "group", "pooling": "max"},
        {"adapt": "head"},
        {"tasks_per_chunk": 2},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()) or "default",
)
def test_meta_gradient_against_finite_differences(random_episode: Episodes, options: dict[str, Any], inner_steps: int):
    """Central differences along random directions; the step is far too short to meet a kink of the ReLU."""
    learner, episode, step = small(inner_steps=inner_steps, **options), random_episode(), 1e-6
    gradient = meta_gradient(learner, episode)
    parameters = list(learner.parameters())
    start = flat(parameters).detach()

    def loss_at(position: Tensor) -> float:
        nn.utils.vector_to_parameters(position, parameters)
        return learner.meta_loss(episode).item()

    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        direction = torch.randn(len(start), dtype=torch.float64, generator=generator)
        slope = (loss_at(start + step * direction) - loss_at(start - step * direction)) / (2 * step)
        assert slope == pytest.approx((gradient @ direction).item(), rel=1e-6, abs=1e-7)


# --- against a plain loop --------------------------------------------------------------------------------------


def plain_logits(
    parameters: Parameters, images: Tensor, n_support: int, pooling: Pooling, normalization: Normalization
) -> Tensor:
    """The network of `small`, without `hidden`, in functions that PyTorch differentiates itself."""
    for i in range(2):
        weight, scale, shift = (parameters[f"blocks.{i}.{name}"] for name in ("weight", "scale", "shift"))
        images = F.conv2d(images, weight, stride=2 if pooling == "stride" else 1, padding=1)
        if normalization == "group":
            images = F.group_norm(images, 4, scale, shift)
        else:
            of_support = images[: n_support if normalization == "support" else len(images)]
            mean, variance = of_support.mean((0, 2, 3), keepdim=True), of_support.var((0, 2, 3), False, keepdim=True)
            images = scale.view(-1, 1, 1) * (images - mean) / (variance + 1e-5).sqrt() + shift.view(-1, 1, 1)
        images = images.relu() if pooling == "stride" else F.max_pool2d(images.relu(), 2)
    return images.flatten(1) @ parameters["head.weight"].T + parameters["head.bias"]


def plain_maml(
    learner: MAML, episode: Episode, pooling: Pooling, normalization: Normalization
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, meta-loss and meta-gradient by Finn et al.'s algorithm, task by task, step by step."""
    config, start = learner.config, dict(learner.network.named_parameters())
    all_logits, losses = [], []
    for task in range(len(episode)):
        support, labels = episode.support_images[task], episode.support_labels[task]
        parameters: Parameters = dict(start)
        for _ in range(config.inner_steps):
            loss = F.cross_entropy(plain_logits(parameters, support, len(support), pooling, normalization), labels)
            moving = [name for name in parameters if config.adapt == "all" or name.startswith("head")]
            gradients = torch.autograd.grad(loss, [parameters[name] for name in moving], create_graph=True)
            for name, gradient in zip(moving, gradients, strict=True):
                gradient = gradient.detach() if config.first_order else gradient
                parameters[name] = parameters[name] - config.inner_lr * gradient
        queries, n_support = episode.query_images[task], 0
        if normalization == "support":
            queries, n_support = torch.cat([support, queries]), len(support)
        logits = plain_logits(parameters, queries, n_support, pooling, normalization)[n_support:]
        all_logits.append(logits)
        losses.append(F.cross_entropy(logits, episode.query_labels[task]))
    loss = torch.stack(losses).mean()
    return torch.stack(all_logits), loss, flat(torch.autograd.grad(loss, list(start.values())))


@pytest.mark.parametrize(
    ("pooling", "normalization"), [("stride", "batch"), ("max", "batch"), ("stride", "support"), ("max", "group")]
)
@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("adapt", ["all", "head"])
def test_side_by_side_is_one_by_one(
    random_episode: Episodes,
    pooling: Pooling,
    normalization: Normalization,
    inner_steps: int,
    first_order: bool,
    adapt: Literal["all", "head"],
):
    episode = random_episode()
    learner = small(
        pooling=pooling, normalization=normalization, inner_steps=inner_steps, first_order=first_order, adapt=adapt
    )
    logits, loss, gradient = plain_maml(learner, episode, pooling, normalization)
    assert close(learner(episode), logits)
    assert close(learner.meta_loss(episode), loss)
    assert close(meta_gradient(learner, episode), gradient)


@pytest.mark.parametrize("adapt", ["all", "head"])
def test_first_order_is_another_gradient_of_the_same_loss(random_episode: Episodes, adapt: Literal["all", "head"]):
    episode = random_episode()
    second, first = small(adapt=adapt), small(adapt=adapt, first_order=True)
    assert torch.equal(second(episode), first(episode))
    assert second.meta_loss(episode).item() == first.meta_loss(episode).item()
    one, other = meta_gradient(second, episode), meta_gradient(first, episode)
    assert (one - other).norm() > 0.1 * one.norm()


def test_first_order_is_the_query_gradient_at_the_adapted_parameters(random_episode: Episodes):
    episode, learner = random_episode(), small(first_order=True, inner_steps=2)
    expected = torch.zeros(1, dtype=torch.float64)
    for task in range(len(episode)):
        adapted = {
            name: tensor[0].detach().requires_grad_() for name, tensor in learner.adapt(episode.task(task)).items()
        }
        logits = functional_call(learner.network, adapted, (episode.query_images[task],))
        loss = F.cross_entropy(logits, episode.query_labels[task]) / len(episode)
        expected = expected + flat(torch.autograd.grad(loss, list(adapted.values())))
    assert close(meta_gradient(learner, episode), expected)


# --- chunks of tasks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks_per_chunk", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("first_order", [False, True])
def test_chunks_change_nothing(random_episode: Episodes, tasks_per_chunk: int, first_order: bool):
    episode = random_episode(n_tasks=5)
    whole, chunked = small(first_order=first_order), small(first_order=first_order, tasks_per_chunk=tasks_per_chunk)
    assert close(chunked(episode), whole(episode))
    assert close(chunked.meta_loss(episode), whole.meta_loss(episode))
    assert close(meta_gradient(chunked, episode), meta_gradient(whole, episode))
    with torch.no_grad():
        assert close(chunked.meta_loss(episode), whole.meta_loss(episode))


@pytest.mark.parametrize(("queries", "fit"), [(1, [32]), (15, [8, 8, 8, 8]), (15 * 200, [1] * 32)])
def test_chunks_by_default_keep_activations_small(queries: int, fit: list[int]):
    labels = torch.zeros(32, 5, dtype=torch.long)
    images = torch.zeros(32, 1, 1, 28, 28)
    episode = Episode(
        images.expand(-1, 5, -1, -1, -1),
        labels,
        images.expand(-1, 5 * queries, -1, -1, -1),
        labels.repeat(1, queries),
        n_way=5,
    )
    learner = MAML(ConvNet(5, pooling="max"))
    assert [len(chunk) for chunk in learner._chunks(episode)] == fit


def test_a_chunked_meta_loss_is_part_of_a_larger_one(random_episode: Episodes):
    """Its gradient is scaled, and adds to what other terms give, as any loss's."""
    episode = random_episode()
    gradients = []
    for learner in (small(), small(tasks_per_chunk=2)):
        loss = 3 * learner.meta_loss(episode) + sum(p.pow(2).sum() for p in learner.parameters())
        gradients.append(flat(torch.autograd.grad(loss, list(learner.parameters()))))
    assert close(*gradients)


def test_a_frozen_parameter_gets_no_gradient_from_chunks(random_episode: Episodes):
    episode, learner = random_episode(), small(adapt="head", tasks_per_chunk=2)
    learner.network.blocks.requires_grad_(False)
    learner.meta_loss(episode).backward()
    assert {name for name, p in learner.named_parameters() if p.grad is not None} == {
        "network.head.weight",
        "network.head.bias",
    }


def test_second_derivatives_of_a_chunked_meta_loss_raise(random_episode: Episodes):
    """It has none; autograd would take its gradient for a constant, and say nothing."""
    episode = random_episode()
    parameters = list((learner := small(tasks_per_chunk=2)).parameters())
    with pytest.raises(RuntimeError, match=r"in chunks can be differentiated once; for more, raise tasks_per_chunk"):
        torch.autograd.grad(learner.meta_loss(episode), parameters, create_graph=True)


@pytest.mark.parametrize("n_tasks", [1, 4])
def test_a_batch_of_tasks_is_the_tasks_one_by_one(random_episode: Episodes, n_tasks: int):
    episode, learner = random_episode(n_tasks=n_tasks), small(inner_steps=2)
    tasks = [episode.task(i) for i in range(n_tasks)]
    assert close(learner(episode), torch.cat([learner(task) for task in tasks]))
    assert close(learner.meta_loss(episode), torch.stack([learner.meta_loss(task) for task in tasks]).mean())


# --- what may depend on what -----------------------------------------------------------------------------------


NORMALIZATIONS: list[Normalization] = ["batch", "support", "group"]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_permuted_queries_permute_the_logits(random_episode: Episodes, normalization: Normalization):
    episode, learner = random_episode(), small(normalization=normalization)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = replace(
        episode, query_images=episode.query_images[:, order], query_labels=episode.query_labels[:, order]
    )
    assert close(learner(permuted), learner(episode)[:, order])
    assert close(learner.meta_loss(permuted), learner.meta_loss(episode))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_permuted_support_leaves_the_logits(random_episode: Episodes, normalization: Normalization):
    episode, learner = random_episode(), small(normalization=normalization, inner_steps=2)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = replace(
        episode, support_images=episode.support_images[:, order], support_labels=episode.support_labels[:, order]
    )
    assert close(learner(permuted), learner(episode))
    wrongly = replace(permuted, support_labels=episode.support_labels)
    assert not close(learner(wrongly), learner(episode), 1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_query_labels_are_not_read(random_episode: Episodes, training: bool):
    episode, learner = random_episode(), small().train(training)
    poisoned = replace(episode, query_labels=torch.full_like(episode.query_labels, 10**6))
    assert torch.equal(learner(poisoned), learner(episode))


def test_query_images_are_not_adapted_to(random_episode: Episodes):
    episode, learner = random_episode(), small()
    other = replace(episode, query_images=1 - episode.query_images)
    adapted, again = learner.adapt(episode), learner.adapt(other)
    assert all(torch.equal(adapted[name], again[name]) for name in adapted)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_query_sees_other_queries_only_where_the_learner_says_so(
    random_episode: Episodes, normalization: Normalization
):
    episode, learner = random_episode(), small(normalization=normalization)
    images = episode.query_images.clone()
    images[:, 2] = 1 - images[:, 2]
    changed = (learner(replace(episode, query_images=images)) != learner(episode)).any(-1).any(0)
    assert changed.tolist() == ([True] * 6 if normalization == "batch" else [False, False, True, False, False, False])
    assert learner.transductive == (normalization == "batch")
    assert learner.normalization == normalization


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_no_task_sees_another(random_episode: Episodes, normalization: Normalization):
    episode, learner = random_episode(), small(normalization=normalization)
    other = replace(episode, support_images=episode.support_images.clone(), query_images=episode.query_images.clone())
    other.support_images[1] = 1 - other.support_images[1]
    other.query_images[1] = 1 - other.query_images[1]
    changed = (learner(other) != learner(episode)).flatten(1).any(1)
    assert changed.tolist() == [False, True, False]


# --- adaptation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("tasks_per_chunk", [None, 2])
def test_adapts_without_gradients_and_leaves_no_trace(
    random_episode: Episodes, first_order: bool, tasks_per_chunk: int | None
):
    episode = random_episode()
    learner = small(first_order=first_order, inner_steps=2, tasks_per_chunk=tasks_per_chunk)
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    expected = learner(episode).detach()
    with torch.no_grad():
        logits = learner(episode)
        assert not any(tensor.requires_grad for tensor in learner.adapt(episode).values())
        assert not torch.is_grad_enabled()
    assert not logits.requires_grad
    assert close(logits, expected)
    assert all(p.grad is None and p.requires_grad for p in learner.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_dict().items())


def test_only_the_head_moves_if_asked(random_episode: Episodes):
    episode = random_episode()
    for adapt in ("all", "head"):
        learner = small(adapt=adapt, hidden=(5,))
        adapted = learner.adapt(episode)
        for name, parameter in learner.network.named_parameters():
            assert adapted[name].shape == (len(episode), *parameter.shape)
            moved = (adapted[name] != parameter).flatten(1).any(1)
            assert moved.tolist() == [adapt == "all" or name.startswith("head.")] * len(episode), name


def test_test_inner_steps_are_for_evaluation_mode(random_episode: Episodes):
    episode, learner = random_episode(), small(inner_steps=1, test_inner_steps=3)
    one, three = small(inner_steps=1)(episode), small(inner_steps=3)(episode)
    assert torch.equal(learner(episode), one)
    assert torch.equal(learner.eval()(episode), three)
    assert torch.equal(learner.train()(episode), one)
    assert torch.equal(small(inner_steps=1).eval()(episode), one)
    assert torch.equal(small(inner_steps=3, test_inner_steps=0).eval()(episode), small(inner_steps=0)(episode))


def test_the_path_of_adaptation(random_episode: Episodes):
    episode, learner = random_episode(), small(inner_steps=2)
    path = learner.adaptation_path(episode)
    assert len(path) == 3
    assert len(learner.adaptation_path(episode, inner_steps=5)) == 6
    for steps, parameters in enumerate(path):
        adapted = learner.adapt(episode, inner_steps=steps)
        assert all(torch.equal(parameters[name], adapted[name]) for name in adapted)
    losses = [learner.support_losses(episode, parameters) for parameters in path]
    assert losses[0].shape == (len(episode),)
    assert (losses[1] < losses[0]).all()


def test_the_loss_falls_along_the_gradient_of_each_task(random_episode: Episodes):
    """The first step is `inner_lr` times the gradient of the mean cross-entropy of the task's own support."""
    episode, learner = random_episode(), small(inner_lr=0.25)
    adapted, parameters = learner.adapt(episode), dict(learner.network.named_parameters())
    for task in range(len(episode)):
        logits = learner.network(episode.support_images[task])
        loss = F.cross_entropy(logits, episode.support_labels[task])
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            assert close(adapted[name][task], parameter - 0.25 * gradient)


# --- learning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"first_order": True}, {"adapt": "head"}, {"normalization": "support"}])
def test_overfits_one_episode(random_episode: Episodes, options: dict[str, Any]):
    episode, learner = random_episode(n_tasks=1), small(**options)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        learner.meta_loss(episode).backward()
        optimizer.step()
    assert learner.meta_loss(episode).item() < 0.2
    assert torch.equal(learner(episode).argmax(-1), episode.query_labels)


class InDoublePrecision:
    """The tasks of a sampler in float64."""

    def __init__(self, sampler: EpisodeSampler) -> None:
        self.sampler, self.generator = sampler, sampler.generator

    def sample(self, n_tasks: int) -> Episode:
        episode = self.sampler.sample(n_tasks)
        return replace(
            episode, support_images=episode.support_images.double(), query_images=episode.query_images.double()
        )


@pytest.mark.parametrize(
    ("options", "losses"),  # after 10 and 20 steps
    [
        ({}, [0.7827286994272906, 0.5967709322091785]),
        ({"first_order": True}, [0.8278923954232955, 0.8062986436015036]),
        (
            {"inner_steps": 2, "normalization": "support", "tasks_per_chunk": 3},
            [0.6269739469688023, 0.42880839873533516],
        ),
    ],
)
def test_twenty_steps_go_where_they_went(
    class_images: Callable[..., ClassImages], options: dict[str, Any], losses: list[float]
):
    sampler = InDoublePrecision(EpisodeSampler(class_images(12, 6), EpisodeSpec(3, 1, 2), seed=3))
    config = TrainConfig(iterations=20, tasks_per_step=4, outer_lr=0.02, warmup=5, log_every=10)
    history = train(small(**options), sampler, config, progress_bar=False, device="cpu")
    assert [row["meta_loss"] for row in history] == pytest.approx(losses, rel=1e-6)


# --- errors ----------------------------------------------------------------------------------------------------


def test_another_number_of_ways(random_episode: Episodes):
    message = "the network has 3 outputs but the episode is 4-way; MAML adapts one head, so build ConvNet(n_outputs=4)"
    for method in (small().forward, small().meta_loss, small().adapt, small(tasks_per_chunk=1).meta_loss):
        with pytest.raises(ValueError, match=re.escape(message)):
            method(random_episode(n_way=4))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_lr": 0.0}, "inner_lr must be positive, got 0.0"),
        ({"inner_lr": float("nan")}, "inner_lr must be positive, got nan"),
        ({"inner_steps": -1}, "inner steps must not be negative, got -1 and None"),
        ({"test_inner_steps": -2}, "inner steps must not be negative, got 1 and -2"),
        ({"adapt": "body"}, "adapt must be 'all' or 'head', got 'body'"),
        ({"tasks_per_chunk": 0}, "tasks_per_chunk must be positive, got 0"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MAML(ConvNet(3), **options)


def test_a_config_builds_its_learner():
    config = MAMLConfig(inner_lr=0.1, inner_steps=2, test_inner_steps=5, first_order=True, adapt="head")
    assert config.build(ConvNet(3)).config == config
    assert MAML(ConvNet(3)).config == MAMLConfig()
