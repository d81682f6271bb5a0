"""SNAIL against a loop over queries, one sequence each, written from the paper; who sees whom, place by place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from metatutor.backbones import ConvNet, Pixels
from metatutor.episodes import Episode
from metatutor.memory import SNAIL
from metatutor.memory.snail import Attention, TemporalConvolutions, earlier, visible

Episodes = Callable[..., Episode]
CPU = torch.device("cpu")


def small(seed: int = 0, network: Any = None, **options: Any) -> SNAIL:
    """A learner in float64, every parameter random: also keys and queries, which begin alike."""
    defaults: dict[str, Any] = {"n_way": 3, "max_shot": 2, "embedding": 4, "filters": 3, "attention": (4, 5, 2)}
    learner = SNAIL(network or Pixels(3), **defaults | options).double()
    randomize(learner, seed)
    return learner


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.7 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)


def random_items(n_items: int, channels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, n_items, channels, dtype=torch.float64, generator=generator)


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-9, atol=1e-9)


# --- against the paper, one sequence for each query --------------------------------------------------------------


def attention_block(items: Tensor, block: Attention) -> tuple[Tensor, Tensor]:
    """Figure 2c for items `[place, channel]`; also the weights of the last item."""
    queries, keys, values = (items @ layer.weight.T + layer.bias for layer in (block.query, block.key, block.value))
    reads, weights = [], torch.zeros(0)
    for place, query in enumerate(queries):
        exponentials = torch.stack([(query @ key / math.sqrt(len(key))).exp() for key in keys[: place + 1]])
        weights = exponentials / exponentials.sum()
        reads.append(sum(w * value for w, value in zip(weights, values[: place + 1], strict=True)))
    return torch.cat([items, torch.stack(reads)], dim=1), weights


def temporal_block(items: Tensor, block: TemporalConvolutions, length: int) -> Tensor:
    """Figures 2a and 2b for items `[place, channel]`: PyTorch's convolution, padded on the left."""
    series = items.T
    for layer in range(math.ceil(math.log2(length))):
        here, there = dict(block.here[layer].named_parameters()), dict(block.there[layer].named_parameters())
        taps = torch.stack([there["weight"], here["weight"]], dim=2)
        padded = F.pad(series, (2**layer, 0))
        found = F.conv1d(padded[None], taps, here["bias"], dilation=2**layer)[0]
        half = len(found) // 2
        series = torch.cat([series, torch.tanh(found[:half]) * torch.sigmoid(found[half:])])
    return series.T


def paper(learner: SNAIL, episode: Episode) -> tuple[Tensor, list[Tensor]]:
    """Logits, and for each attention block how much each query attends to every image before it and to itself."""
    n_way, n_attention = learner.n_way, len(learner.arguments["attention"])
    length = n_way * learner.arguments["max_shot"] + 1
    logits, attention = [], [[] for _ in range(n_attention)]
    for task in range(len(episode)):
        for query_image in episode.query_images[task]:
            sequence = []
            for image, label in zip(episode.support_images[task], episode.support_labels[task], strict=True):
                told = torch.zeros(n_way, dtype=torch.float64)
                told[label] = 1
                sequence.append(torch.cat([learner.reduce(learner.network.embed(image[None])[0]), told]))
            nothing = torch.zeros(n_way, dtype=torch.float64)
            sequence.append(torch.cat([learner.reduce(learner.network.embed(query_image[None])[0]), nothing]))
            items, blocks = torch.stack(sequence), iter(learner.blocks)
            for number in range(n_attention):
                if number > 0:
                    block = next(blocks)
                    assert isinstance(block, TemporalConvolutions)
                    items = temporal_block(items, block, length)
                block = next(blocks)
                assert isinstance(block, Attention)
                items, weights = attention_block(items, block)
                attention[number].append(weights)
            assert next(blocks, None) is None
            logits.append(learner.out.weight @ items[-1] + learner.out.bias)
    n_tasks = len(episode)
    return torch.stack(logits).unflatten(0, (n_tasks, -1)), [
        torch.stack(of_block).unflatten(0, (n_tasks, -1)) for of_block in attention
    ]


@pytest.mark.parametrize("attention", [(3,), (4, 5), (4, 5, 2)])
@pytest.mark.parametrize("k_shot", [1, 2, 3])
def test_one_sequence_for_each_query(attention: tuple[int, ...], k_shot: int, random_episode: Episodes):
    """Support sets shorter than the convolutions reach, as long, and longer."""
    learner, episode = small(attention=attention), random_episode(2, k_shot=k_shot)
    logits, weights = paper(learner, episode)
    assert close(learner(episode), logits)
    found = learner.attention(episode)
    assert len(found) == len(attention)
    assert all(close(one, other) for one, other in zip(found, weights, strict=True))


@pytest.mark.parametrize("normalization", ["group", "support"])
def test_embeddings_come_from_the_network(normalization: Any, random_episode: Episodes):
    network = ConvNet(filters=4, n_blocks=2, image_size=8, normalization=normalization)
    learner, episode = small(network=network), random_episode(1)
    images = torch.cat([episode.support_images[0], episode.query_images[0]])
    embeddings = network.embed(images, 6)
    items, n_support = learner.items(episode)
    assert n_support == 6
    assert close(items[0, :, :4], learner.reduce(embeddings))
    assert torch.equal(items[0, :6, 4:], F.one_hot(episode.support_labels[0], 3).double())
    assert not items[0, 6:, 4:].any()


# --- attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_support", "n_query"), [(0, 3), (1, 1), (6, 4), (9, 1)])
def test_attention_weights_are_a_distribution_over_what_is_visible(n_support: int, n_query: int):
    block = Attention(5, 4, 3).double()
    randomize(block)
    n_items = n_support + n_query
    weights = block.weights(3 * random_items(n_items, 5), n_support)[0]
    may_see = visible(n_items, n_support, CPU)
    assert (weights[may_see] > 0).all()
    assert (weights[~may_see] == 0).all()
    assert close(weights.sum(1), torch.ones(n_items).double())


def test_attention_sums_to_one_over_support_and_itself(random_episode: Episodes):
    learner = small()
    for weights in learner.attention(random_episode(2, n_query=1)):
        assert weights.shape == (2, 3, 7)
        assert (weights > 0).all()
        assert close(weights.sum(-1), torch.ones(2, 3).double())


def test_attention_is_what_the_answer_used(random_episode: Episodes, monkeypatch: pytest.MonkeyPatch):
    learner, episode, used = small(), random_episode(2), []
    weights_of = Attention.weights

    def recorded(self: Attention, items: Tensor, n_support: int) -> Tensor:
        used.append(weights_of(self, items, n_support))
        return used[-1]

    monkeypatch.setattr(Attention, "weights", recorded)
    learner(episode)
    monkeypatch.undo()
    for found, of_all in zip(learner.attention(episode), used, strict=True):
        assert not found.requires_grad
        assert torch.equal(found[..., :-1], of_all[:, 6:, :6])
        for query in range(6):
            assert torch.equal(found[:, query, -1], of_all[:, 6 + query, 6 + query])


def test_at_first_like_attends_to_like():
    torch.manual_seed(0)
    block = Attention(6, 16, 4).double()
    items = random_items(5, 6)
    assert torch.equal(block.query(items), block.key(items))
    items[0, 4] = items[0, 1]  # the query image is a copy of one in the support set
    weights = block.weights(8 * items, 4)[0, 4]
    assert close(weights[[1, 4]], weights.max().expand(2))
    assert weights[1] > 2 * weights[[0, 2, 3]].max()


def test_without_convolutions_the_support_set_is_a_set(random_episode: Episodes):
    episode, order = random_episode(), torch.tensor([4, 2, 0, 5, 1, 3])
    permuted = replace(
        episode, support_images=episode.support_images[:, order], support_labels=episode.support_labels[:, order]
    )
    alone, with_convolutions = small(attention=(4,)), small()
    assert close(alone(permuted), alone(episode))
    assert not close(with_convolutions(permuted), with_convolutions(episode))


# --- who sees whom ------------------------------------------------------------------------------------------------

SIZES = [(n_support, n_query) for n_support in (0, 1, 2, 5, 8) for n_query in (1, 3)]
every_size = pytest.mark.parametrize(("n_support", "n_query"), SIZES)


def place_of(item: int, n_support: int) -> int:
    """Where an item stands: every query image right behind the support set."""
    return min(item, n_support)


@every_size
def test_visible_by_a_loop(n_support: int, n_query: int):
    found = visible(n_support + n_query, n_support, CPU)
    for item in range(n_support + n_query):
        for other in range(n_support + n_query):
            is_before = other < n_support and other < place_of(item, n_support)
            assert found[item, other] == (item == other or is_before)


@every_size
def test_earlier_by_a_loop(n_support: int, n_query: int):
    """Also where the distance exceeds the sequence."""
    items = random_items(n_support + n_query, 2)
    for distance in (1, 2, 3, 4, 7, 8, 9, 16):
        found = earlier(items, distance, n_support)
        assert found.shape == items.shape
        for item in range(n_support + n_query):
            place = place_of(item, n_support) - distance
            expected = items[0, place] if place >= 0 else torch.zeros(2).double()
            assert torch.equal(found[0, item], expected)


def sees(network: Callable[[Tensor], Tensor], items: Tensor) -> Tensor:
    """`[item, other]`: whether what comes out for an item depends on what goes in for another, by the Jacobian."""
    jacobian = torch.autograd.functional.jacobian(network, items)
    assert isinstance(jacobian, Tensor)
    return jacobian.abs().sum((0, 2, 3, 5)) > 0


@pytest.mark.parametrize(("n_support", "n_query"), [(1, 2), (5, 3), (9, 2)])
def test_attention_sees_exactly_what_is_visible(n_support: int, n_query: int):
    block = Attention(3, 4, 2).double()
    randomize(block)
    n_items = n_support + n_query
    found = sees(lambda items: block(items, n_support), random_items(n_items, 3))
    assert torch.equal(found, visible(n_items, n_support, CPU))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize(("n_support", "n_query"), [(1, 2), (5, 3), (9, 2)])
def test_convolutions_see_exactly_what_they_reach(length: int, n_support: int, n_query: int):
    """Taps 1, 2, 4, … places apart make every distance up to their sum, and none beyond."""
    block = TemporalConvolutions(2, length, 2).double()
    randomize(block)
    n_items, reach = n_support + n_query, 2 ** len(block.here) - 1
    found = sees(lambda items: block(items, n_support), random_items(n_items, 2))
    for item in range(n_items):
        for other in range(n_items):
            distance = place_of(item, n_support) - other
            is_reached = other < n_support and 0 < distance <= reach
            assert found[item, other] == (item == other or is_reached)


def test_as_many_convolutions_as_the_length_needs():
    for length in range(1, 140):
        n_layers = len(TemporalConvolutions(1, length, 1).here)
        assert 2**n_layers >= length
        assert n_layers == 1 or 2 ** (n_layers - 1) < length


def test_no_item_sees_a_later_one_after_any_block(random_episode: Episodes):
    """Nor one query image another; and all that comes before is seen, from the first block on."""
    learner = small()
    items, n_support = learner.items(random_episode(1))
    for depth in range(1, len(learner.blocks) + 1):

        def through(items: Tensor, depth: int = depth) -> Tensor:
            for block in learner.blocks[:depth]:
                items = block(items, n_support)
            return items

        assert torch.equal(sees(through, items.detach()), visible(12, 6, CPU)), depth


def test_a_later_image_leaves_the_features_of_earlier_ones(random_episode: Episodes):
    """From image to features, at every place and after every block."""
    learner, episode = small(), random_episode(1)

    def features(episode: Episode) -> list[Tensor]:
        items, n_support = learner.items(episode)
        found = [items]
        for block in learner.blocks:
            found.append(block(found[-1], n_support))
        return found

    before = features(episode)
    for later in range(6):
        images, labels = episode.support_images.clone(), episode.support_labels.clone()
        images[:, later], labels[:, later] = 1 - images[:, later], (labels[:, later] + 1) % 3
        after = features(replace(episode, support_images=images, support_labels=labels))
        for depth, (one, other) in enumerate(zip(after, before, strict=True)):
            assert torch.equal(one[:, :later], other[:, :later])
            assert not close(one[:, later], other[:, later])
            if depth > 0:
                assert ((one - other).abs().amax(2)[0, later:] > 1e-9).all()


@pytest.mark.parametrize("max_shot", [1, 2, 3])
@pytest.mark.parametrize("k_shot", [1, 2, 3, 4])
def test_the_convolutions_reach_back_to_max_shot(max_shot: int, k_shot: int, random_episode: Episodes):
    """Attention reads nothing here; what the one convolutional block does not reach is not seen."""
    learner, episode = small(max_shot=max_shot, attention=(4, 4)), random_episode(1, k_shot=k_shot)
    for block in learner.blocks:
        if isinstance(block, Attention):
            for parameter in block.value.parameters():
                parameter.data.zero_()
    images = episode.support_images.requires_grad_()
    n_layers = math.ceil(math.log2(3 * max_shot + 1))
    for query in range(len(episode.query_images[0])):
        (gradient,) = torch.autograd.grad(learner(episode)[0, query].pow(2).sum(), images)
        is_seen = gradient[0].flatten(1).any(1).tolist()
        n_unseen = max(0, 3 * k_shot - (2**n_layers - 1))
        assert is_seen == [False] * n_unseen + [True] * (3 * k_shot - n_unseen)
        assert n_unseen == 0 or k_shot > max_shot


# --- gradients ----------------------------------------------------------------------------------------------------


def test_gradients_in_the_images_against_finite_differences(random_episode: Episodes):
    network = ConvNet(filters=4, n_blocks=2, image_size=8, normalization="group")
    learner, episode = small(network=network), random_episode(1, k_shot=1, n_query=1)

    def logits(support: Tensor, query: Tensor) -> Tensor:
        return learner(replace(episode, support_images=support, query_images=query))

    images = (episode.support_images.requires_grad_(), episode.query_images.requires_grad_())
    assert gradcheck(logits, images, fast_mode=True)
