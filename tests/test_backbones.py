"""The convolutional network, against the same one in plain `torch.nn`, and what each normalisation policy may see."""

from __future__ import annotations

import re
from itertools import pairwise
from math import gcd
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metatutor import MAML, Prototypical
from metatutor.backbones import MLP, ConvBlock, ConvNet, Embedding, Network, Normalization, Pixels, Pooling, ResNet
from metatutor.testing import check_learner

AnyNetwork = TypeVar("AnyNetwork", bound=Network)


def n_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def random(network: AnyNetwork, seed: int = 0) -> AnyNetwork:
    """The network in float64, every parameter random: scales and shifts too."""
    generator = torch.Generator().manual_seed(seed)
    network.double()
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return network


def pixels(n: int, channels: int = 1, size: int = 9, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, size, size, dtype=torch.float64, generator=generator)


def plain(
    network: ConvNet, pooling: Pooling, normalization: Normalization, widths: list[int], filters: int, channels: int
) -> nn.Sequential:
    """The network as a chapter would write it: convolution, normalisation, ReLU, then pooling."""
    layers: list[nn.Module] = []
    for _ in network.blocks:
        layers.append(nn.Conv2d(channels, filters, 3, 2 if pooling == "stride" else 1, padding=1, bias=False))
        if normalization == "group":
            layers.append(nn.GroupNorm(gcd(8, filters), filters))
        else:
            layers.append(nn.BatchNorm2d(filters, track_running_stats=False))
        layers.append(nn.ReLU())
        if pooling == "max":
            layers.append(nn.MaxPool2d(2))
        channels = filters
    layers.append(nn.Flatten())
    for width_in, width_out in pairwise(widths[:-1]):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    layers.append(nn.Linear(widths[-2], widths[-1]))
    reference = nn.Sequential(*layers).double()
    for theirs, ours in zip(reference.parameters(), network.parameters(), strict=True):
        theirs.data = ours.detach().clone()
    return reference


# --- architecture ----------------------------------------------------------------------------------------------


def test_parameters_of_the_papers_networks():
    """3×3 kernels, a scale and a shift a channel, the head; a strided Conv-4 ends in 2×2 pixels, a pooled one in 1."""
    blocks = 64 * 9 + 3 * 64 * 64 * 9 + 4 * 2 * 64
    assert n_parameters(ConvNet(5)) == blocks + (256 * 5 + 5) == 112_965
    assert n_parameters(ConvNet(5, pooling="max")) == blocks + (64 * 5 + 5) == 112_005
    assert n_parameters(ConvNet(20)) == blocks + (256 * 20 + 20)


def test_a_zero_head_begins_without_preferring_any_class():
    network = ConvNet(5, filters=8, zero_head=True)
    images = torch.rand(3, 1, 28, 28)
    assert network.embed(images).abs().sum() > 0
    assert network(images).abs().sum() == 0 < ConvNet(5, filters=8)(images).abs().sum()


def test_parameters_of_the_articles_network():
    """Four convolutional and two fully connected layers."""
    network = ConvNet(5, hidden=(64,))
    assert n_parameters(network) == n_parameters(ConvNet(5)) - (256 * 5 + 5) + (256 * 64 + 64) + (64 * 5 + 5) == 128_453
    assert (len(network.blocks), len(network.hidden)) == (4, 1)


@pytest.mark.parametrize(
    ("options", "embedding"),
    [
        ({}, 64 * 2 * 2),
        ({"pooling": "max"}, 64),
        ({"hidden": (32, 16)}, 16),
        ({"filters": 8, "image_size": 20}, 8 * 2 * 2),  # 20, 10, 5, 3, 2
        ({"filters": 8, "image_size": 20, "pooling": "max"}, 8),  # 20, 10, 5, 2, 1
        ({"filters": 8, "image_size": 84, "in_channels": 3, "pooling": "max"}, 8 * 5 * 5),
        ({"filters": 8, "image_size": 1}, 8),  # a strided convolution can halve one pixel
        ({"filters": 8, "n_blocks": 2}, 8 * 7 * 7),
    ],
)
def test_shapes(options: dict[str, Any], embedding: int):
    network = ConvNet(7, **options)
    images = torch.rand(3, *network.image_shape)
    assert network.image_shape[1] == options.get("image_size", 28)
    assert network.embedding_size == embedding
    assert network.embed(images).shape == (3, embedding)
    assert network(images).shape == (3, 7)
    assert torch.equal(network(images), network.head(network.embed(images)))


@pytest.mark.parametrize("pooling", ["stride", "max"])
@pytest.mark.parametrize("normalization", ["batch", "group"])
@pytest.mark.parametrize(("hidden", "filters", "channels"), [((), 6, 1), ((7, 5), 4, 3)])
def test_values_and_gradients_of_plain_torch(
    pooling: Pooling, normalization: Normalization, hidden: tuple[int, ...], filters: int, channels: int
):
    options: dict[str, Any] = {"n_blocks": 2, "in_channels": channels, "image_size": 9}
    network = ConvNet(3, pooling=pooling, normalization=normalization, hidden=hidden, filters=filters, **options)
    first_width = filters * (3 * 3 if pooling == "stride" else 2 * 2)
    reference = plain(random(network), pooling, normalization, [first_width, *hidden, 3], filters, channels)
    images = pixels(4, channels)
    ours, theirs = network(images), reference(images)
    assert torch.allclose(ours, theirs, rtol=1e-10)
    ours.pow(3).sum().backward()
    theirs.pow(3).sum().backward()
    for one, other in zip(network.parameters(), reference.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-8, atol=1e-8)


def test_nothing_is_remembered_between_calls():
    network = ConvNet(3, filters=4, n_blocks=2)
    assert list(network.buffers()) == []
    images, others = torch.rand(2, 4, 1, 28, 28)
    before = network(images)
    network(others)
    assert torch.equal(network(images), before)
    assert torch.equal(network.eval()(images), before)


# --- normalisation policies ------------------------------------------------------------------------------------


def changed_rows(network: ConvNet, image: int, n_support: int | None) -> list[bool]:
    """Which of six images' logits change, bit for bit, when one image does."""
    images = pixels(6)
    other = images.clone()
    other[image] = 1 - other[image]
    return (network(images, n_support) != network(other, n_support)).any(dim=1).tolist()


def small(normalization: Normalization, **options: Any) -> ConvNet:
    return random(ConvNet(3, filters=4, n_blocks=2, image_size=9, normalization=normalization, **options))


def test_batch_policy_every_image_depends_on_every_other():
    network = small("batch")
    assert network.transductive
    for n_support in (None, 3):
        assert changed_rows(network, 0, n_support) == [True] * 6
        assert changed_rows(network, 5, n_support) == [True] * 6


def test_support_policy_only_support_images_count():
    network = small("support")
    assert not network.transductive
    assert changed_rows(network, 0, 3) == [True] * 6
    assert changed_rows(network, 4, 3) == [False, False, False, False, True, False]
    assert changed_rows(network, 5, None) == [True] * 6  # without `n_support`, all are support


def test_group_policy_no_image_depends_on_another():
    network = small("group")
    assert not network.transductive
    for n_support in (None, 3):
        assert changed_rows(network, 0, n_support) == [True] + [False] * 5
        assert changed_rows(network, 5, n_support) == [False] * 5 + [True]


@pytest.mark.parametrize("pooling", ["stride", "max"])
def test_support_policy_is_batch_norm_with_the_statistics_of_the_support(pooling: Pooling):
    """Values and gradients, which flow through the statistics too."""
    network, images, n_support = small("support", pooling=pooling), pixels(6), 4

    def reference() -> Tensor:
        values, parameters = images, dict(network.named_parameters())
        for i in range(2):
            weight, scale, shift = (parameters[f"blocks.{i}.{name}"] for name in ("weight", "scale", "shift"))
            values = F.conv2d(values, weight, stride=2 if pooling == "stride" else 1, padding=1)
            of_support = values[:n_support].transpose(0, 1).flatten(1)
            mean, variance = of_support.mean(1), of_support.var(1, correction=0)
            mean, deviation, scale, shift = (t.view(-1, 1, 1) for t in (mean, (variance + 1e-5).sqrt(), scale, shift))
            values = (scale * (values - mean) / deviation + shift).relu()
            values = values if pooling == "stride" else F.max_pool2d(values, 2)
        return network.head(values.flatten(1))

    ours, theirs = network(images, n_support), reference()
    assert torch.allclose(ours, theirs, rtol=1e-9)
    parameters = [*network.parameters()]
    gradients = [torch.autograd.grad(logits.pow(3).sum(), parameters) for logits in (ours, theirs)]
    assert all(torch.allclose(one, other, rtol=1e-7, atol=1e-7) for one, other in zip(*gradients, strict=True))


def test_support_images_are_normalised_as_if_alone():
    network, images = small("support"), pixels(6)
    assert torch.allclose(network(images, 4)[:4], network(images[:4]))
    assert torch.allclose(network(images), small("batch")(images))


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "avg"}, "pooling must be one of stride, max, got 'avg'"),
        ({"normalization": "layer"}, "normalization must be one of batch, support, group, got 'layer'"),
        ({"n_outputs": 0}, "n_outputs must be a positive integer, got 0"),
        ({"filters": -1}, "filters must be a positive integer, got -1"),
        ({"n_blocks": 0}, "n_blocks must be a positive integer, got 0"),
        ({"in_channels": 0}, "in_channels must be a positive integer, got 0"),
        ({"image_size": 0}, "image_size must be a positive integer, got 0"),
        ({"hidden": (64, 0)}, "hidden[1] must be a positive integer, got 0"),
        (
            {"pooling": "max", "image_size": 15},
            "4 blocks halve a 15×15 image to nothing; use fewer blocks",
        ),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str):
    valid: dict[str, Any] = {"n_outputs": 5}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ConvNet(**valid | options)


def test_without_a_last_layer_it_embeds():
    network, images = ConvNet(filters=4), torch.rand(2, 1, 28, 28)
    assert torch.equal(network(images), network.embed(images))
    assert network(images).shape == (2, network.embedding_size)
    assert not [name for name, _ in network.named_parameters() if name.startswith("head")]


@pytest.mark.parametrize("pooling", ["stride", "max"])
def test_only_the_first_blocks_halve(pooling: Pooling):
    network = ConvNet(filters=4, pooling=pooling, n_halving=2)
    assert network.features(torch.rand(2, 1, 28, 28)).shape == (2, *network.feature_shape) == (2, 4, 7, 7)
    with pytest.raises(ValueError, match="n_halving must be from 0 to n_blocks = 4, got 5"):
        ConvNet(n_halving=5)


@pytest.mark.parametrize("pooling", ["stride", "max"])
@pytest.mark.parametrize("normalization", ["batch", "support", "group"])
def test_a_block_of_pairs_is_the_block_of_stacked_pairs(pooling: Pooling, normalization: Normalization):
    block = ConvBlock(5, 4, pooling, normalization).double()
    first, second = torch.rand(3, 2, 8, 8, dtype=torch.float64), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    pairs = torch.stack([torch.cat([a, b]) for b in second for a in first])
    assert torch.allclose(block.of_pairs(first, second, 6), block(pairs, 6))


# --- without convolutions --------------------------------------------------------------------------------------


def test_parameters_of_the_papers_regression_network():
    """One number in, two layers of 40, one number out."""
    assert n_parameters(MLP()) == (40 + 40) + (40 * 40 + 40) + (40 + 1) == 1761
    assert n_parameters(MLP(3, 2, hidden=())) == 3 * 2 + 2
    names = [name for name, _ in MLP().named_parameters()]
    assert names == [f"{layer}.{kind}" for layer in ("hidden.0", "hidden.1", "head") for kind in ("weight", "bias")]


@pytest.mark.parametrize("hidden", [(), (4,), (5, 3)])
def test_a_multilayer_perceptron_of_plain_torch(hidden: tuple[int, ...]):
    """Values and gradients; the last layer has no ReLU."""
    network = random(MLP(2, 3, hidden=hidden))
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise((2, *hidden)):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    reference = nn.Sequential(*layers, nn.Linear((2, *hidden)[-1], 3)).double()
    for theirs, ours in zip(reference.parameters(), network.parameters(), strict=True):
        theirs.data = ours.detach().clone()
    inputs = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = network(inputs), reference(inputs)
    assert ours.shape == (50, 3)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    assert (ours < 0).any() and (ours > 0).any()
    parameters = [list(module.parameters()) for module in (network, reference)]
    of_ours, of_theirs = (
        torch.autograd.grad(o.pow(3).sum(), p) for o, p in zip((ours, theirs), parameters, strict=True)
    )
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(of_ours, of_theirs, strict=True))


def test_a_multilayer_perceptron_answers_each_input_by_itself():
    network = random(MLP(2, 1, hidden=(4,)))
    assert isinstance(network, Network)
    assert (network.normalization, network.transductive, network.n_outputs) == ("none", False, 1)
    inputs = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = inputs.clone()
    other[2] += 1
    for n_support in (None, 3):
        changed = (network(inputs, n_support) != network(other, n_support)).any(1)
        assert changed.tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("normalization", "changed"),
    [("batch", [True] * 6), ("support", [False] * 4 + [True, False]), ("group", [False] * 4 + [True, False])],
)
def test_a_multilayer_perceptron_normalises_as_the_convolutional_network_does(
    normalization: Normalization, changed: list[bool]
):
    """Every hidden layer before its ReLU; which answers change with the fifth input, the first three being support."""
    network = random(MLP(7, 3, hidden=(8, 16), normalization=normalization))
    assert network.normalization == normalization
    inputs = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = inputs
    for layer, norm in zip(network.hidden, network.norms, strict=True):
        expected = layer(expected)
        seen = expected[:3] if normalization == "support" else expected
        mean, variance = seen.mean(0), seen.var(0, correction=0)
        if normalization == "group":
            of_groups = expected.unflatten(1, (8, -1))
            mean, variance = of_groups.mean(-1), of_groups.var(-1, correction=0)
            mean, variance = (m.repeat_interleave(expected.shape[1] // 8, 1) for m in (mean, variance))
        expected = (norm.scale * (expected - mean) / (variance + 1e-5).sqrt() + norm.shift).relu()
    assert torch.allclose(network(inputs, 3), network.head(expected), rtol=1e-6)
    other = inputs.clone()
    other[4] += 1
    assert (network(inputs, 3) != network(other, 3)).any(1).tolist() == changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_inputs": 0}, "n_inputs must be a positive integer, got 0"),
        ({"n_outputs": -1}, "n_outputs must be a positive integer, got -1"),
        ({"hidden": (40, 0)}, "hidden[1] must be a positive integer, got 0"),
        ({"normalization": "layer"}, "normalization must be one of batch, support, group, got 'layer'"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_mistakes_of_a_multilayer_perceptron_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        MLP(**options)


# --- no network at all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "channels"), [(20, 1), (5, 3), (1, 2), (40, 1)])
def test_pixels_are_a_smaller_copy_in_a_row(size: int, channels: int):
    """Smaller or larger; and a constant image stays as it is."""
    network, images = Pixels(size, in_channels=channels), pixels(4, channels, 28)
    found = network(images)
    assert found.shape == (4, network.embedding_size) == (4, channels * size * size)
    assert torch.equal(network.embed(images), found)
    assert (found >= 0).all() and (found <= 1).all()
    levels = torch.rand(4, channels, 1, 1, dtype=torch.float64)
    assert torch.allclose(network(levels.expand(-1, -1, 28, 28)), levels.flatten(1).repeat_interleave(size**2, 1))


def test_pixels_of_the_same_size_are_the_pixels():
    images = pixels(3, 2, 6)
    assert torch.allclose(Pixels(6, in_channels=2)(images), images.flatten(1), rtol=1e-12)


@pytest.mark.parametrize("size", [3, 7, 20])
def test_no_pixel_is_lost(size: int):
    """Each of the copy is an average, and none of the original is skipped."""
    every_pixel = torch.eye(28 * 28, dtype=torch.float64).view(-1, 1, 28, 28)
    weights = Pixels(size)(every_pixel).T  # [of the copy, of the original]
    assert (weights >= 0).all() and (weights.sum(0) > 0).all()
    assert torch.allclose(weights.sum(1), torch.ones(size**2, dtype=torch.float64), rtol=1e-6)
    corner = weights[0].view(28, 28)  # the upper left of the copy comes of the upper left
    assert corner[: 28 // size, : 28 // size].sum() > 0.3
    assert corner[14:].sum() == 0 and corner[:, 14:].sum() == 0


def test_pixels_see_each_image_by_itself():
    images, network = pixels(5), Pixels(4)
    assert torch.allclose(torch.cat([network(image[None]) for image in images]), network(images, 3))
    assert (network.normalization, network.transductive, network.n_outputs) == ("none", False, None)
    assert n_parameters(network) == 0


def test_what_embeds_says_what_enters_its_last_layer():
    images = pixels(6)
    network = random(ConvNet(5, filters=4, n_blocks=2, image_size=9, hidden=(7,)))
    assert network.head is not None
    assert network.embed(images).shape == (6, network.embedding_size) == (6, 7)
    assert torch.allclose(network.head(network.embed(images)), network(images))
    headless = random(ConvNet(filters=4, n_blocks=2, image_size=9))
    assert torch.equal(headless.embed(images), headless(images))
    assert headless.embedding_size == headless(images).shape[1]
    assert isinstance(network, Embedding) and isinstance(Pixels(), Embedding) and isinstance(MLP(), Embedding)
    with pytest.raises(NotImplementedError):
        Embedding().embed(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be a positive integer, got 0"),
        ({"in_channels": -1}, "in_channels must be a positive integer, got -1"),
    ],
)
def test_mistakes_of_pixels_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Pixels(**options)


# --- with residual blocks ---


def test_a_residual_network_halves_by_its_first_convolution_and_every_block_but_the_last():
    network = ResNet(5, widths=(8, 12, 16), in_channels=3, image_size=20)
    assert network.features(torch.rand(2, 3, 20, 20)).shape[1:] == network.feature_shape == (16, 3, 3)  # 20, 10, 5, 3
    assert network(torch.rand(2, 3, 20, 20)).shape == (2, 5) and network.embedding_size == 16 * 9
    assert ResNet(widths=(8,)).head_prefix is None


def test_a_residual_block_is_what_its_paper_writes():
    network = random(ResNet(widths=(8, 16)))
    images, [[first, _, block, last]] = pixels(3, channels=1, size=28), network.members
    weight, *norm = first.parameters()
    maps = F.relu(F.group_norm(F.conv2d(images, weight, stride=2, padding=1), 8, *norm))
    for residual, halves in ((block, True), (last, False)):
        (first, *norm_1), (second, *norm_2), (beside, *norm_3) = (
            layers.parameters() for layers in (residual.first, residual.second, residual.beside)
        )
        path = F.relu(F.group_norm(F.conv2d(maps, first, padding=1), 8, *norm_1))
        path = F.group_norm(F.conv2d(path, second, padding=1), 8, *norm_2)
        maps = F.relu(path + F.group_norm(F.conv2d(maps, beside), 8, *norm_3))
        maps = F.max_pool2d(maps, 2) if halves else maps
    torch.testing.assert_close(network.features(images), maps)


@pytest.mark.parametrize("method", [MAML, Prototypical])
def test_a_residual_network_keeps_the_contract_in_double_precision_too(method: Any):
    torch.manual_seed(0)  # with few others, a ReLU or a maximum changes between the points of a finite difference
    check_learner(method(ResNet(5, widths=(8, 8))))


def test_images_of_a_residual_network_do_not_see_each_other():
    network, images = random(ResNet(widths=(8, 8))), pixels(4, size=28)
    torch.testing.assert_close(network(images)[:1], network(images[:1]))
    assert not network.transductive


def test_members_of_a_residual_network_stand_side_by_side():
    images, network = pixels(2, size=28), random(ResNet(5, widths=(4, 6), members=2))
    halves = []
    for member in network.members:
        alone = random(ResNet(widths=(4, 6)))
        alone.members[0].load_state_dict(member.state_dict())
        halves.append(alone(images))
    assert not torch.equal(*halves) and network.feature_shape == (12, 7, 7)
    torch.testing.assert_close(network.embed(images), torch.cat(halves, dim=1))
    torch.testing.assert_close(network(images), network.head(network.embed(images)))


def test_squares_of_pixels_become_channels():
    images = pixels(2, channels=2, size=12)
    network = random(ResNet(widths=(4, 6), unshuffle=3, in_channels=2, image_size=12))
    plain = random(ResNet(widths=(4, 6), in_channels=18, image_size=4))
    plain.load_state_dict(network.state_dict())
    squares = images.unflatten(3, (4, 3)).unflatten(2, (4, 3))  # image, channel, y, y in square, x, x in square
    torch.testing.assert_close(network(images), plain(squares.permute(0, 1, 3, 5, 2, 4).reshape(2, 18, 4, 4)))
    assert network.image_shape == (2, 12, 12) and network.feature_shape == (6, 1, 1)


def test_moved_images_are_averaged_in_evaluation_mode_only():
    images = pixels(2, size=28)
    moved, plain = random(ResNet(widths=(8,), shift=2)), random(ResNet(widths=(8,)))
    torch.testing.assert_close(moved.train()(images), plain(images))
    framed = F.pad(images, (2, 2, 2, 2))
    views = [framed[:, :, y : y + 28, x : x + 28] for x, y in ((2, 2), (0, 2), (4, 2), (2, 0), (2, 4))]
    torch.testing.assert_close(moved.eval()(images), torch.stack([plain(view) for view in views]).mean(0))


def test_sizes_of_a_residual_network_are_checked():
    for options, message in (
        ({"widths": ()}, "n_blocks"),
        ({"widths": (8, 0)}, r"widths\[1\]"),
        ({"shift": -1}, "shift"),
        ({"widths": (8,) * 6}, "halve a 28×28 image to nothing"),
        ({"widths": (8,) * 5, "unshuffle": 2}, "halve a 14×14 image to nothing"),
        ({"members": 0}, "members"),
        ({"unshuffle": 0}, "unshuffle"),
        ({"unshuffle": 3}, "unshuffle=3 does not divide image_size=28; choose a divisor"),
    ):
        with pytest.raises(ValueError, match=message):
            ResNet(**options)
    with pytest.raises(ValueError, match="takes images of 1×28×28"):
        ResNet(widths=(8,))(torch.rand(1, 1, 30, 30))
