"""The networks that learners adapt or embed with: blocks of convolutions, then fully connected layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import gcd
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.double_backward import EPSILON, batch_norm, conv2d, group_norm, max_pool2d

Normalization = Literal["batch", "support", "group"]
Pooling = Literal["stride", "max"]


class Network(nn.Module):
    """What learners know of a backbone: `forward(images, n_support)`, and how it normalises.

    Attributes:
        n_outputs: numbers that come out for an image; None: an embedding.
        normalization: a policy of `ConvNet`, or `"none"`.
        largest_activation: numbers in the largest activation of one image, if known.

    Example:
        >>> isinstance(ConvNet(), Network) and isinstance(MLP(), Network)
        True

    Reference:
        Finn, Abbeel & Levine (2017), section 5: one algorithm, networks of any kind.
    """

    n_outputs: int | None
    normalization: str = "none"
    largest_activation: int = 0

    @property
    def transductive(self) -> bool:
        """Whether the logits of one image may depend on the other images that are not support."""
        return self.normalization == "batch"


class Embedding(Network):
    """A network that can also say what enters its last layer.

    Attributes:
        embedding_size: length of an embedding.

    Example:
        >>> isinstance(ConvNet(), Embedding) and isinstance(Pixels(), Embedding)
        True

    Reference:
        Vinyals et al. (2016), section 2.1.1.
    """

    embedding_size: int

    def embed(
        self, images: Float[Tensor, "n channel height width"], n_support: int | None = None
    ) -> Float[Tensor, "n embedding"]:
        """What enters the last layer, or leaves the network if there is none."""
        raise NotImplementedError


class Pixels(Embedding):
    """No network: the pixels of a smaller copy of the image, in a row.

    Args:
        size: height and width of the copy in pixels.
        in_channels: channels of the images.

    Raises:
        ValueError: if a size is not positive.

    Example:
        >>> Pixels(20)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 400])

    Reference:
        Santoro et al. (2016), section 4.1: characters of 20×20 pixels.
    """

    def __init__(self, size: int = 20, *, in_channels: int = 1) -> None:
        super().__init__()
        _check_sizes(size=size, in_channels=in_channels)
        self.n_outputs, self.size, self.embedding_size = None, size, in_channels * size * size

    def embed(
        self, images: Float[Tensor, "n channel height width"], n_support: int | None = None
    ) -> Float[Tensor, "n embedding"]:
        """The pixels, each averaged over what it covers."""
        return F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True).flatten(1)

    def forward(
        self, images: Float[Tensor, "n channel height width"], n_support: int | None = None
    ) -> Float[Tensor, "n embedding"]:
        """The pixels, which are the embedding too."""
        return self.embed(images)


class MLP(Network):
    """Fully connected layers with ReLU between them, for inputs that are not images.

    Args:
        n_inputs: numbers that go in.
        n_outputs: numbers that come out.
        hidden: widths of the layers between.

    Raises:
        ValueError: if a size is not positive.

    Example:
        >>> MLP(n_inputs=1, n_outputs=1, hidden=(40, 40))(torch.zeros(10, 1)).shape
        torch.Size([10, 1])

    Reference:
        Finn, Abbeel & Levine (2017), section 5.1: two hidden layers of 40 for sinusoids.
    """

    def __init__(self, n_inputs: int = 1, n_outputs: int = 1, *, hidden: Sequence[int] = (40, 40)) -> None:
        super().__init__()
        _check_sizes(n_inputs=n_inputs, n_outputs=n_outputs, **{f"hidden[{i}]": w for i, w in enumerate(hidden)})
        self.n_outputs = n_outputs
        widths = [n_inputs, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.head = nn.Linear(widths[-1], n_outputs)

    def forward(self, inputs: Float[Tensor, "n input"], n_support: int | None = None) -> Float[Tensor, "n output"]:
        """Outputs of `n` inputs, each by itself."""
        for layer in self.hidden:
            inputs = F.relu(layer(inputs))
        return self.head(inputs)


class ConvNet(Embedding):
    """Blocks of convolution, normalisation and ReLU, each halving the image, then fully connected layers.

    With its defaults this is the Conv-4 of the MAML paper's Omniglot experiment; `hidden=(256,)` gives the
    article's network of four convolutional and two fully connected layers; `pooling="max"` gives the Conv-4
    of Matching and Prototypical Networks.

    The normalisation policy says whose statistics normalise an image:

    - `"batch"`: those of all images of the call. Query images are normalised together, as in the MAML code,
      so an answer may depend on the other queries: transductive.
    - `"support"`: those of the first `n_support` images of the call, the support set: inductive.
    - `"group"`: those of the image itself, over groups of channels: inductive.

    No policy keeps running averages, so nothing leaks from one task to the next.

    Args:
        n_outputs: logits at the end, the ways of a task; None: no last layer, the network embeds.
        filters: channels of every convolution.
        n_blocks: convolutional blocks.
        n_halving: how many of them, the first ones, halve their image; default: all.
        pooling: how a block halves its image: `"stride"` (a strided convolution) or `"max"` (2×2 max-pooling).
        hidden: widths of fully connected layers before the last one.
        normalization: `"batch"`, `"support"` or `"group"`.
        zero_head: whether the last layer begins at zero. Classes are numbered at random in every task, so an initial
            layer that tells number 0 from number 1 can only mislead; MAML trains faster from one that does not.
        fixed_head: whether the outer loop leaves the last layer's initial values alone; inner loops change it all the
            same. First-order gradients do not pull an initial layer that has come to prefer a number back to zero.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels.

    Raises:
        ValueError: if a size is not positive, an option is unknown, or the image is too small for the blocks.

    Example:
        >>> network = ConvNet(n_outputs=5)
        >>> network(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 5])

    Reference:
        Finn et al. (2017), section 5.2; Vinyals et al. (2016), section 4.1.1; group normalisation: Wu & He (2018);
        a last layer without order: Ye & Chao (2022), How to train your MAML to excel in few-shot classification; one
        that is always zero at first: Kao, Chiu & Chen (2022), MAML is a noisy contrastive learner in classification.
    """

    def __init__(
        self,
        n_outputs: int | None = None,
        *,
        filters: int = 64,
        n_blocks: int = 4,
        n_halving: int | None = None,
        pooling: Pooling = "stride",
        hidden: Sequence[int] = (),
        normalization: Normalization = "batch",
        zero_head: bool = False,
        fixed_head: bool = False,
        in_channels: int = 1,
        image_size: int = 28,
    ) -> None:
        super().__init__()
        _check_options(pooling, normalization)
        _check_sizes(
            n_outputs=1 if n_outputs is None else n_outputs, filters=filters, n_blocks=n_blocks, in_channels=in_channels
        )
        _check_sizes(image_size=image_size, **{f"hidden[{i}]": width for i, width in enumerate(hidden)})
        size, halving = image_size, n_blocks if n_halving is None else n_halving
        if not 0 <= halving <= n_blocks:
            raise ValueError(f"n_halving must be from 0 to n_blocks = {n_blocks}, got {halving}")
        for _ in range(halving):
            size = (size + 1) // 2 if pooling == "stride" else size // 2
        if size < 1:
            raise ValueError(f"{halving} blocks halve a {image_size}×{image_size} image to nothing; use fewer blocks")
        self.n_outputs = n_outputs
        self.normalization: Normalization = normalization  # pyright: ignore[reportIncompatibleVariableOverride]
        self.image_shape = (in_channels, image_size, image_size)
        first = (image_size + 1) // 2 if pooling == "stride" and halving else image_size
        self.largest_activation = filters * first * first  # numbers, of one image: after the first convolution
        channels = [in_channels] + [filters] * n_blocks
        self.blocks = nn.ModuleList(
            ConvBlock(i, o, pooling if n < halving else None, normalization)
            for n, (i, o) in enumerate(pairwise(channels))
        )
        self.feature_shape = (filters, size, size)
        widths = [filters * size * size, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.embedding_size = widths[-1]
        """Length of an embedding, which is what enters the last fully connected layer."""
        self.head: nn.Module = nn.Identity() if n_outputs is None else nn.Linear(widths[-1], n_outputs)
        if zero_head:
            for parameter in self.head.parameters():
                nn.init.zeros_(parameter)
        self.head.requires_grad_(not fixed_head)

    def features(
        self, images: Float[Tensor, "n channel height width"], n_support: int | None = None
    ) -> Float[Tensor, "n filter h w"]:
        """What leaves the last convolutional block."""
        for block in self.blocks:
            images = block(images, n_support)
        return images

    def embed(
        self, images: Float[Tensor, "n channel height width"], n_support: int | None = None
    ) -> Float[Tensor, "n embedding"]:
        """What enters the last fully connected layer."""
        embedding = self.features(images, n_support).flatten(1)
        for layer in self.hidden:
            embedding = F.relu(layer(embedding))
        return embedding

    def forward(
        self, images: Float[Tensor, "n channel height width"], n_support: int | None = None
    ) -> Float[Tensor, "n output"]:
        """Logits of `n` images, or their embeddings if there is no last layer.

        The first `n_support` images (default: all) are the support set of the normalisation.
        """
        return self.head(self.embed(images, n_support))


class ConvBlock(nn.Module):
    """Convolution 3×3, normalisation, halving, ReLU.

    Max-pooling comes before the ReLU: the two commute, and the ReLU then touches a quarter of the values.
    The convolution has no bias, since the normalisation that follows would take it away again.
    """

    def __init__(
        self, in_channels: int, out_channels: int, pooling: Pooling | None, normalization: Normalization
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as in torch.nn.Conv2d
        self.scale = nn.Parameter(torch.ones(out_channels))
        self.shift = nn.Parameter(torch.zeros(out_channels))
        self.stride, self.pools = 2 if pooling == "stride" else 1, pooling == "max"
        self.normalization = normalization

    def forward(self, images: Tensor, n_support: int | None) -> Tensor:
        """`[n, c_in, h, w]` -> `[n, c_out, h / 2, w / 2]`."""
        return self._after_convolution(conv2d(images, self.weight, stride=self.stride, padding=1), n_support)

    def of_pairs(self, first: Tensor, second: Tensor, n_support: int | None) -> Tensor:
        """The block on every image of `second` laid over every image of `first`, as channels after channels.

        `[m, c, h, w]` and `[n, c_in - c, h, w]` -> `[n * m, c_out, h / 2, w / 2]`. The convolution of stacked channels
        is the sum of the convolutions of each: `m + n` images are convolved, not `m * n` pairs.
        """
        weights = self.weight.split([first.shape[1], second.shape[1]], dim=1)
        below, above = (
            conv2d(images, weight, stride=self.stride, padding=1)
            for images, weight in zip((first, second), weights, strict=True)
        )
        return self._after_convolution((below + above[:, None]).flatten(0, 1), n_support)

    def _after_convolution(self, images: Tensor, n_support: int | None) -> Tensor:
        images = self.normalize(images, n_support)
        return F.relu(max_pool2d(images) if self.pools else images)

    def normalize(self, images: Tensor, n_support: int | None) -> Tensor:
        """Normalise by the policy's statistics, then scale and shift each channel."""
        if self.normalization == "group":
            return group_norm(images, self.scale, self.shift, gcd(8, images.shape[1]))
        if self.normalization == "batch" or n_support is None:
            return batch_norm(images, self.scale, self.shift)
        variance, mean = torch.var_mean(images[:n_support], dim=(0, 2, 3), correction=0, keepdim=True)
        scale = self.scale[:, None, None] * torch.rsqrt(variance + EPSILON)
        return torch.addcmul(self.shift[:, None, None] - mean * scale, images, scale)  # one pass over the images


def _check_options(pooling: str, normalization: str) -> None:
    for name, value, options in (("pooling", pooling, Pooling), ("normalization", normalization, Normalization)):
        if value not in get_args(options):
            raise ValueError(f"{name} must be one of {', '.join(get_args(options))}, got {value!r}")


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size}")
