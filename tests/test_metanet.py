"""Meta Networks against algorithm 1 of the paper, one weight at a time; what fast weights depend on, and what not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from metatutor.backbones import ConvNet, Pixels
from metatutor.episodes import Episode
from metatutor.functional import call_method
from metatutor.memory import MetaNet
from metatutor.memory.metanet import FastMemory, TwoLayers

Episodes = Callable[..., Episode]
GENERATORS = ("make_base.", "watch.", "make_key.", "log_sharpness")  # they work on gradients, and make none


class Contrasts(Pixels):
    """Pixels around zero, so that a ReLU lets some through, whatever the weights; a parameter, so that it may learn."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.contrast = torch.nn.Parameter(torch.tensor(10.0))

    def embed(self, images: Tensor, n_support: int | None = None) -> Tensor:
        return self.contrast * (super().embed(images, n_support) - 0.5)


def small(seed: int = 68, **options: Any) -> MetaNet:
    """A learner in float64, every parameter random; of this seed, no key is all zeros."""
    defaults: dict[str, Any] = {"n_way": 3, "hidden_size": 6, "generator_size": 3, "n_gradients": 2}
    learner = MetaNet(Contrasts(2), **defaults | options).double()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in learner.named_parameters():
        if name == "network.contrast":
            continue
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return learner


def exact(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-9, atol=1e-9)


# --- against the paper, one weight at a time ----------------------------------------------------------------------


class Paper:
    """One task of algorithm 1, as the docstring of `MetaNet` states it.

    Args:
        learner: whose parameters it takes.
        episode: where the task comes from.
        task: which one.
        held_fixed: whether gradients are numbers; otherwise the outer loop could differentiate them.
    """

    def __init__(self, learner: MetaNet, episode: Episode, task: int, *, held_fixed: bool = True) -> None:
        self.learner, self.held_fixed = learner, held_fixed
        self.support = learner.network.embed(episode.support_images[task])
        self.query = learner.network.embed(episode.query_images[task])
        self.labels = episode.support_labels[task].tolist()
        seen = range(min(learner.n_gradients, len(self.labels)))
        of_key = [self.gradients(learner.key, i)[0] for i in seen]
        self.key_fast = self.weight_by_weight(self.key_weight, of_key)
        of_base = [self.gradients(learner.base, i) for i in range(len(self.labels))]
        self.fast = [[self.weight_by_weight(self.base_weight, [of_layer]) for of_layer in of] for of in of_base]
        self.keys = [self.hidden(learner.key, x, self.key_fast) for x in self.support]

    def gradients(self, layers: TwoLayers, i: int) -> tuple[Tensor, ...]:
        """Of the cross-entropy of one support image, with slow weights alone."""
        hidden = (layers.first @ self.support[i]).relu()
        logits = layers.last @ hidden
        loss = logits.exp().sum().log() - logits[self.labels[i]]
        found = torch.autograd.grad(loss, [layers.first, layers.last], create_graph=not self.held_fixed)
        return tuple(g.detach() for g in found) if self.held_fixed else found

    def weight_by_weight(self, make: Callable[..., Tensor], gradients: list[Tensor]) -> Tensor:
        """Each weight from its own gradients, one number for each image; then less the mean of the layer."""
        shape = gradients[0].shape
        rows = [[make(*[g[i, j] for g in gradients]) for j in range(shape[1])] for i in range(shape[0])]
        made = torch.stack([torch.stack(row) for row in rows])
        return made - made.sum() / made.numel()

    def base_weight(self, gradient: Tensor) -> Tensor:
        """A network of three layers."""
        layers = [layer for layer in self.learner.make_base if isinstance(layer, torch.nn.Linear)]
        x = of_any_size(gradient)
        for number, layer in enumerate(layers):
            x = layer.weight @ x if number == 2 else (layer.weight @ x + layer.bias).relu()
        assert len(layers) == 3
        return x[0]

    def key_weight(self, *gradients: Tensor) -> Tensor:
        """An LSTM, one gradient after another, its gates written out."""
        watch, size = dict(self.learner.watch.named_parameters()), self.learner.watch.hidden_size
        h = c = torch.zeros(size, dtype=torch.float64)
        for gradient in gradients:
            z = watch["weight_ih_l0"] @ of_any_size(gradient) + watch["bias_ih_l0"]
            z = z + watch["weight_hh_l0"] @ h + watch["bias_hh_l0"]
            enter, keep, new, show = z[:size], z[size : 2 * size], z[2 * size : 3 * size], z[3 * size :]
            c = torch.sigmoid(keep) * c + torch.sigmoid(enter) * torch.tanh(new)
            h = torch.sigmoid(show) * torch.tanh(c)
        return (self.learner.make_key.weight @ h)[0]

    def hidden(self, layers: TwoLayers, x: Tensor, fast: Tensor) -> Tensor:
        """Layer augmentation."""
        return (layers.first @ x).relu() + (fast @ x).relu()

    def attention(self, x: Tensor) -> Tensor:
        """By the cosines of a query image's key with those in the memory."""
        asked = self.hidden(self.learner.key, x, self.key_fast)
        cosines = [(asked @ key) / (asked.norm() * key.norm()) for key in self.keys]
        exponentials = [(self.learner.log_sharpness.exp() * cosine).exp() for cosine in cosines]
        return torch.stack([e / torch.stack(exponentials).sum() for e in exponentials])

    def answer(self, x: Tensor) -> Tensor:
        """Logits of one query image."""
        base, weights = self.learner.base, self.attention(x)
        first, last = (
            torch.stack([w * of[layer] for w, of in zip(weights, self.fast, strict=True)]).sum(0) for layer in (0, 1)
        )
        hidden = self.hidden(base, x, first)
        return base.last @ hidden + last @ hidden

    def answers(self) -> Tensor:
        """Logits of all query images."""
        return torch.stack([self.answer(x) for x in self.query])


def of_any_size(gradient: Tensor) -> Tensor:
    """Andrychowicz et al. (2016), appendix A."""
    if gradient.abs() >= math.exp(-10):
        return torch.stack([gradient.abs().log() / 10, gradient.sign()])
    return torch.stack([-torch.ones_like(gradient), math.exp(10) * gradient])


@pytest.mark.parametrize(("k_shot", "n_gradients"), [(1, 1), (1, 2), (2, 3), (2, 50)])
def test_every_answer_by_a_loop(k_shot: int, n_gradients: int, random_episode: Episodes):
    learner, episode = small(n_gradients=n_gradients), random_episode(2, k_shot=k_shot, n_query=1)
    expected = torch.stack([Paper(learner, episode, task).answers() for task in range(2)])
    assert close(learner(episode), expected)
    with torch.no_grad():
        assert close(learner(episode), expected)


def test_what_is_remembered_by_a_loop(random_episode: Episodes):
    learner, episode = small(), random_episode(2)
    memory = learner.memory(episode)
    assert memory.fast.keys() == {"first", "last"} and memory.key_fast.keys() == {"first"}
    attention = learner.attend(memory, learner.embed(episode)[1])
    for task in range(2):
        paper = Paper(learner, episode, task)
        assert close(memory.key_fast["first"][task], paper.key_fast)
        assert close(memory.keys[task], torch.stack(paper.keys))
        assert ((paper.support @ paper.key_fast.T).relu() > 0).any(1).all()  # the ReLU hides no key's fast weights
        for layer, name in enumerate(("first", "last")):
            assert close(memory.fast[name][task], torch.stack([of_image[layer] for of_image in paper.fast]))
        assert close(attention[task], torch.stack([paper.attention(x) for x in paper.query]))


# --- the outer gradient -------------------------------------------------------------------------------------------


def loss_of_the_paper(learner: MetaNet, episode: Episode, *, held_fixed: bool) -> Tensor:
    tasks = [Paper(learner, episode, task, held_fixed=held_fixed).answers() for task in range(len(episode))]
    return torch.nn.functional.cross_entropy(torch.cat(tasks), episode.query_labels.flatten())


def gradient(learner: MetaNet, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(learner.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def test_the_outer_gradient_takes_gradients_as_numbers(random_episode: Episodes):
    learner, episode = small(), random_episode(2, n_query=1)
    found = gradient(learner, learner.meta_loss(episode))
    fixed = gradient(learner, loss_of_the_paper(learner, episode, held_fixed=True))
    through = gradient(learner, loss_of_the_paper(learner, episode, held_fixed=False))
    for name in found:
        assert close(found[name], fixed[name]), name
    for name in ("network.contrast", "base.first", "base.last", "key.first", "key.last"):
        assert (found[name] - through[name]).norm() > 0.03 * through[name].norm(), name


def test_numbers_in_their_place_give_the_same_gradient(random_episode: Episodes, monkeypatch: pytest.MonkeyPatch):
    """Gradients of the support loss that were computed before, and know nothing of any parameter."""
    learner, episode = small(), random_episode()
    found = gradient(learner, learner.meta_loss(episode))
    support, labels = learner.embed(episode)[0].detach(), episode.support_labels
    numbers = {
        layers: {name: exact(g.tolist()) for name, g in gradients.items()}
        for layers, gradients in (
            (learner.base, learner.gradients(learner.base, support, labels)),
            (learner.key, learner.gradients(learner.key, support[:, :2], labels[:, :2])),
        )
    }
    with monkeypatch.context() as patch:
        patch.setattr(learner, "gradients", lambda layers, *_: numbers[layers])
        fixed = gradient(learner, learner.meta_loss(episode))
    for name in found:
        assert close(found[name], fixed[name]), name


def test_the_outer_gradient_of_the_generators_against_finite_differences(random_episode: Episodes):
    """Of them alone: all others make gradients, which the outer loop does not differentiate."""
    learner, episode = small(), random_episode(2)
    names = [name for name, _ in learner.named_parameters() if name.startswith(GENERATORS)]
    assert len(names) == 5 + 4 + 1 + 1
    parameters = [learner.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def loss(*values: Tensor) -> Tensor:
        own = dict(zip(names, values, strict=True))
        return call_method(learner, own, learner.meta_loss, episode)

    assert gradcheck(loss, tuple(parameters), fast_mode=True)


# --- what fast weights depend on ----------------------------------------------------------------------------------


def changed(before: Tensor, after: Tensor) -> list[bool]:
    """Of each support image of the first task: whether its row is another."""
    return [not close(one, other) for one, other in zip(before[0], after[0], strict=True)]


@pytest.mark.parametrize("image", range(6))
def test_fast_weights_are_of_one_image_and_its_label(image: int, random_episode: Episodes):
    """Keys are of the first two labels too, from which the key function has its fast weights."""
    learner, episode = small(), random_episode(1)
    before, only = learner.memory(episode), [i == image for i in range(6)]
    labels, images = episode.support_labels.clone(), episode.support_images.clone()
    labels[:, image] = (labels[:, image] + 1) % 3
    images[:, image] = 1 - images[:, image]
    relabelled = learner.memory(replace(episode, support_labels=labels))
    redrawn = learner.memory(replace(episode, support_images=images))
    makes_keys = image < 2
    for name in ("first", "last"):
        assert changed(before.fast[name], relabelled.fast[name]) == only
        assert changed(before.fast[name], redrawn.fast[name]) == only
    assert close(before.key_fast["first"], relabelled.key_fast["first"]) != makes_keys
    assert close(before.key_fast["first"], redrawn.key_fast["first"]) != makes_keys
    assert changed(before.keys, relabelled.keys) == [makes_keys] * 6
    assert changed(before.keys, redrawn.keys) == [makes_keys or this for this in only]


def test_permuted_labels_make_other_fast_weights(random_episode: Episodes):
    learner, episode = small(), random_episode()
    permuted = replace(episode, support_labels=(episode.support_labels + 1) % 3)
    before, after = learner.memory(episode), learner.memory(permuted)
    for name in ("first", "last"):
        assert all(changed(before.fast[name], after.fast[name]))
    assert not close(before.key_fast["first"], after.key_fast["first"])
    assert not close(learner(episode), learner(permuted))


def test_behind_the_first_images_the_support_set_is_a_set(random_episode: Episodes):
    learner, episode = small(), random_episode()
    for order, is_set in (([0, 1, 5, 3, 2, 4], True), ([1, 0, 2, 3, 4, 5], False)):
        images, labels = episode.support_images[:, order], episode.support_labels[:, order]
        permuted = replace(episode, support_images=images, support_labels=labels)
        assert close(learner(permuted), learner(episode)) == is_set


def test_a_generator_works_weight_by_weight():
    """Permuted gradients make permuted fast weights; another gradient changes its own weight, and the layer's mean."""
    learner, generator = small(), torch.Generator().manual_seed(1)
    gradients = torch.randn(2, 5, 4, 3, dtype=torch.float64, generator=generator)
    order = torch.randperm(12, generator=generator)

    def permuted(weights: Tensor) -> Tensor:
        return weights.flatten(-2)[..., order].unflatten(-1, (4, 3))

    other = gradients.clone()
    other[1, 3, 2, 1] += 1
    for make, shape in ((learner.base_weights, (2, 5, 4, 3)), (learner.key_weights, (2, 4, 3))):
        found = make(gradients)
        assert found.shape == shape
        assert close(make(permuted(gradients)), permuted(found))
        change = make(other) - found
        layer, at = ((1, 3), (2, 1)) if len(shape) == 4 else ((1,), (2, 1))
        of_mean = -change[layer][at] / 11  # what its change takes from each of the eleven others
        assert of_mean.abs() > 1e-6
        expected = torch.zeros_like(change)
        expected[layer] = of_mean
        expected[(*layer, *at)] = -11 * of_mean
        assert close(change, expected)


@pytest.mark.parametrize("seed", range(8))
def test_no_generator_is_dead_at_first(seed: int):
    """Embeddings are not negative: fast weights that are all negative would be hidden by the ReLU, for good."""
    torch.manual_seed(seed)
    learner = MetaNet(ConvNet(filters=8, normalization="group", hidden=(32,)))
    images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
    learner.meta_loss(Episode(images, labels, images, labels, n_way=5)).backward()
    silent = {name for name, p in learner.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == {"key.last"}


def test_the_order_of_gradients_matters_to_keys_and_tasks_do_not_mix():
    learner, generator = small(), torch.Generator().manual_seed(1)
    gradients = torch.randn(3, 4, 2, 5, dtype=torch.float64, generator=generator)
    found = learner.key_weights(gradients)
    assert not close(learner.key_weights(gradients.flip(1)), found)
    assert close(learner.key_weights(gradients.flip(0)), found.flip(0))


def test_without_fast_weights_the_slow_ones_answer(random_episode: Episodes):
    learner, episode = small(), random_episode()
    for layer in (learner.make_base[-1], learner.make_key):
        for parameter in layer.parameters():
            parameter.data.zero_()
    slow = learner.base.slow(dict(learner.base.named_parameters()), learner.embed(episode)[1])
    assert close(learner(episode), slow)


# --- attention ----------------------------------------------------------------------------------------------------


def attention_of(learner: MetaNet, episode: Episode) -> Tensor:
    return learner.attend(learner.memory(episode), learner.embed(episode)[1])


def test_attention_is_a_distribution_over_the_support_set(random_episode: Episodes):
    learner, episode = small(), random_episode(3, n_query=3)
    attention = attention_of(learner, episode)
    assert attention.shape == (3, 9, 6)
    assert (attention >= 0).all()
    assert close(attention.sum(-1), torch.ones(3, 9).double())


def test_an_image_finds_itself(random_episode: Episodes):
    """The sharper, the more; without sharpness it takes the mean of all fast weights."""
    learner, episode = small(), random_episode()
    itself = replace(episode, query_images=episode.support_images, query_labels=episode.support_labels)
    for log_sharpness in (1.0, 3.0):
        learner.log_sharpness.data.fill_(log_sharpness)
        attention = attention_of(learner, itself)
        assert torch.equal(attention.argmax(-1), torch.arange(6).expand(3, -1))
    learner.log_sharpness.data.fill_(16.0)
    assert torch.allclose(attention_of(learner, itself), torch.eye(6).double().expand(3, -1, -1), atol=1e-3)
    learner.log_sharpness.data.fill_(-50.0)
    assert close(attention_of(learner, itself), torch.full((3, 6, 6), 1 / 6, dtype=torch.float64))
    memory = learner.memory(episode)
    read = learner.recall(memory, learner.embed(episode)[1])
    for name, stored in memory.fast.items():
        assert close(read[name], stored.mean(1, keepdim=True).expand(-1, 6, -1, -1))


def test_the_nearest_image_gives_its_fast_weights():
    """By hand: two keys at a right angle, and a query image at the one."""
    learner = small(n_way=2, hidden_size=2)
    learner.key.first.data = exact([[1.0, 0, 0, 0], [0, 1, 0, 0]])
    learner.log_sharpness.data.fill_(math.log(3.0))
    keys, nothing = torch.eye(2).double()[None], torch.zeros(1, 2, 4).double()
    stored = exact([5.0, 7.0]).view(1, 2, 1, 1)
    memory = FastMemory(keys, {"first": stored}, {"first": nothing})
    query = exact([[[9.0, 0, 0, 0], [1, 1, 0, 0]]])
    e = math.exp(3)
    expected = exact([[e / (e + 1), 1 / (e + 1)], [0.5, 0.5]])[None]
    assert close(learner.attend(memory, query), expected)
    assert close(learner.recall(memory, query)["first"].flatten(), expected[0] @ stored.flatten())


# --- two layers ---------------------------------------------------------------------------------------------------


def test_layers_side_by_side_by_hand():
    layers = TwoLayers(1, 2, 1).double()
    layers.first.data = exact([[1.0], [-1.0]])
    layers.last.data = exact([[2.0, 3.0]])
    fast = {"first": exact([[-4.0], [5.0]]), "last": exact([[10.0, 20.0]])}
    x = exact([3.0])
    assert layers.slow(dict(layers.named_parameters()), x).tolist() == [6]
    assert layers.hidden(x, fast["first"]).tolist() == [3, 15]  # relu of each, not of the sum
    assert layers.with_fast(x, fast).tolist() == [2 * 3 + 3 * 15 + 10 * 3 + 20 * 15]
