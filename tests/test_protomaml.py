"""ProtoMAML: it starts as a Prototypical Network, takes the steps of MAML, and knows what to differentiate through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from metatutor import ConvNet, Episode, ProtoMAML, Prototypical
from tests.tasks import close


def network(**options: Any) -> ConvNet:
    torch.manual_seed(0)
    of = {"filters": 4, "n_blocks": 2, "n_halving": 1, "image_size": 8, "pooling": "max", "normalization": "group"}
    return ConvNet(**of | options).double()


def episode(n_tasks: int = 3, n_way: int = 3, k_shot: int = 2, n_query: int = 2) -> Episode:
    generator = torch.Generator().manual_seed(0)
    labels = [torch.arange(n_way).repeat(n).repeat(n_tasks, 1) for n in (k_shot, n_query)]
    images = [torch.rand(*of.shape, 1, 8, 8, generator=generator, dtype=torch.float64) for of in labels]
    return Episode(images[0], labels[0], images[1], labels[1], n_way)


@pytest.mark.parametrize("normalization", ["group", "support"])
def test_without_steps_it_is_a_prototypical_network(normalization: str):
    """Its probabilities, that is: the logits differ by what all classes share."""
    of, tasks = network(normalization=normalization), episode()
    found, expected = ProtoMAML(of, inner_steps=0)(tasks), Prototypical(of)(tasks)
    assert close(found.softmax(-1), expected.softmax(-1))
    assert not torch.allclose(found, expected, atol=1e-2)
    losses = [learner.meta_loss(tasks) for learner in (ProtoMAML(of, inner_steps=0), Prototypical(of))]
    gradients = [torch.autograd.grad(loss, list(of.parameters())) for loss in losses]
    assert all(close(a, b) for a, b in zip(*gradients, strict=True))


def by_hand(of: ConvNet, tasks: Episode, i: int, lr: float, steps: int, through: bool) -> Tensor:
    """The query loss of one task in a loop: a step moves the embedding with the layer fixed, and the layer."""
    shared = dict(of.named_parameters())
    images, labels = tasks.support_images[i], tasks.support_labels[i]

    def embed(parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(of, dict(parameters), (x,))

    embeddings = embed(shared, images)
    means = torch.stack([embeddings[labels == c].mean(0) for c in range(3)])
    own = {n: p + 0 for n, p in shared.items()} | {"w": 2 * means, "b": -(means**2).sum(1)}
    for _ in range(steps):
        # leaves stand for the parameters in the inner gradient, which thereby cannot pass through the prototypes
        here = own if through else {n: p.detach().requires_grad_() for n, p in own.items()}
        body = {n: here[n] for n in shared}
        loss = F.cross_entropy(F.linear(embed(body, images), here["w"], here["b"]), labels)
        gradients = torch.autograd.grad(loss, list(here.values()), create_graph=through)
        own = {n: p - lr * g for (n, p), g in zip(own.items(), gradients, strict=True)}
    answers = F.linear(embed({n: own[n] for n in shared}, tasks.query_images[i]), own["w"], own["b"])
    return F.cross_entropy(answers, tasks.query_labels[i])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_steps_and_meta_gradient_are_those_of_a_loop(steps: int, first_order: bool):
    of, tasks = network(), episode()
    learner = ProtoMAML(of, inner_lr=0.05, inner_steps=steps, first_order=first_order)
    # the inner gradient is taken where the embedding and the layer are independent of each other
    losses = torch.stack([by_hand(of, tasks, i, 0.05, steps, through=not first_order) for i in range(len(tasks))])
    assert close(learner.meta_loss(tasks), losses.mean())
    found, expected = (
        torch.autograd.grad(loss, list(of.parameters())) for loss in (learner.meta_loss(tasks), losses.mean())
    )
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


def test_first_order_is_another_gradient():
    of, tasks = network(), episode()
    learners = [ProtoMAML(of, inner_lr=0.05, first_order=first) for first in (False, True)]
    one, other = (torch.autograd.grad(learner.meta_loss(tasks), list(of.parameters())) for learner in learners)
    assert not all(torch.allclose(a, b, atol=1e-3) for a, b in zip(one, other, strict=True))


def test_the_layer_moves_and_so_does_the_embedding():
    learner, tasks = ProtoMAML(network(), inner_lr=0.05), episode()
    before, after = learner.adaptation_path(tasks)
    assert {name for name in before if not close(before[name], after[name])} == set(learner.moving)
    assert set(learner.moving) > {"prototype weight", "prototype bias"}


def test_one_learner_takes_any_number_of_ways():
    learner = ProtoMAML(network())
    for n_way in (2, 5):
        assert learner(episode(n_way=n_way)).shape == (3, 2 * n_way, n_way)
    assert learner.ways is None and ProtoMAML.outputs(5, 100) is None


def test_more_steps_in_the_test_than_in_training():
    tasks = episode()
    learner, other = (ProtoMAML(network(), inner_lr=0.05, test_inner_steps=steps) for steps in (None, 4))
    assert close(learner(tasks), other(tasks))
    assert not torch.allclose(learner.eval()(tasks), other.eval()(tasks), atol=1e-3)


@pytest.mark.parametrize(("option", "value"), [("inner_lr", 0.0), ("inner_steps", -1), ("test_inner_steps", -2)])
def test_bad_arguments_are_told(option: str, value: float):
    with pytest.raises(ValueError, match=r"must (be positive|not be negative)"):
        ProtoMAML(network(), **{option: value})
