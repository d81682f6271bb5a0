"""The networks that learners adapt or embed with: blocks of convolutions, then fully connected layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from inspect import signature
from itertools import pairwise
from math import gcd
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.checks import check_not_negative, check_sizes
from metatutor.double_backward import EPSILON, batch_norm, conv2d, group_norm, max_pool2d

Images = Float[Tensor, "n channel height width"]
Normalization = Literal["batch", "support", "group"]
Pooling = Literal["stride", "max"]
_MOST_BLOCKS = 1000
NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)


class Described:
    """Keeps in `arguments` what it was made with, including defaults, but no networks or functions."""

    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls)
        bound = signature(cls.__init__).bind_partial(made, *args, **kwargs)
        bound.apply_defaults()
        named = [n for n, p in bound.signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        data = {n: bound.arguments[n] for n in named[1:] if n in bound.arguments and not callable(bound.arguments[n])}
        object.__setattr__(made, "arguments", data)  # a Module accepts no attributes before its own __init__
        return made


class Network(Described, nn.Module):
    """What learners know about a backbone: `forward(images, n_support)`, and how it normalises.

    Attributes:
        n_outputs: outputs per image; None: an embedding, or unknown.
        normalization: a policy of `ConvNet`, `"running"` statistics, or `"none"`.
        head_prefix: prefix of the names of the last layer's parameters, such as `"head."`; None: there is no such
            layer.
        largest_activation: numbers in the largest activation of one image; 0: unknown.
    """

    n_outputs: int | None
    normalization: str = "none"
    head_prefix: str | None = None
    largest_activation: int = 0

    @property
    def transductive(self) -> bool:
        """Whether the logits of one image may depend on other images outside the support set."""
        return self.normalization == "batch"


class Embedding(Network):
    """A network that can also give the input of its last layer, or its output if it has none.

    Attributes:
        head: the last layer, from embeddings to logits; the identity if there is none.
        embedding_size: length of an embedding; None: unknown.
        feature_shape: channels, height and width of the feature maps that `features` returns; None: unknown.
    """

    embedding_size: int | None = None
    feature_shape: tuple[int, int, int] | None = None
    head: nn.Module

    def forward(self, images: Float[Tensor, "n ..."], n_support: int | None = None) -> Float[Tensor, "n output"]:
        """Logits, or embeddings without a last layer; the first `n_support` images (default: all) are support."""
        return self.head(self.embed(images, n_support))

    def embed(self, images: Images, n_support: int | None = None) -> Float[Tensor, "n embedding"]:
        """The input of the last layer, or the output of the network if there is none."""
        raise NotImplementedError

    def features(self, images: Images, n_support: int | None = None) -> Float[Tensor, "n filter h w"]:
        """The feature maps that the embedding is made from."""
        raise ValueError(f"{type(self).__name__} has no feature maps; take a ConvNet, or backbone(…, features=a layer)")


class Pixels(Embedding):
    """No network: the pixels of a smaller copy of the image, flattened.

    Args:
        size: height and width of the copy in pixels; 20 in Santoro et al. (2016), section 4.1.
        in_channels: channels of the images.

    Example:
        >>> Pixels(20)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 400])
    """

    def __init__(self, size: int = 20, *, in_channels: int = 1) -> None:
        super().__init__()
        check_sizes(size=size, in_channels=in_channels)
        self.n_outputs, self.size, self.embedding_size = None, size, in_channels * size * size
        self.head = nn.Identity()

    def embed(self, images: Images, n_support: int | None = None) -> Float[Tensor, "n embedding"]:
        """The pixels, each averaged over the area it covers."""
        return F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True).flatten(1)


class MLP(Embedding):
    """Fully connected layers with ReLU between them; images are treated as long vectors.

    Args:
        n_inputs: number of inputs.
        n_outputs: number of outputs.
        hidden: widths of the hidden layers; two of 40 for the sinusoids of Finn et al. (2017), section 5.1; 256, 128,
            64 and 64 for their network without convolutions, section 5.2.
        normalization: a policy of `ConvNet`, between every hidden layer and its ReLU; None: no normalisation.

    Raises:
        ValueError: if a size is not positive or a policy is unknown.

    Example:
        >>> MLP(n_inputs=1, n_outputs=1, hidden=(40, 40))(torch.zeros(10, 1)).shape
        torch.Size([10, 1])
    """

    def __init__(
        self,
        n_inputs: int = 1,
        n_outputs: int = 1,
        *,
        hidden: Sequence[int] = (40, 40),
        normalization: Normalization | None = None,
    ) -> None:
        super().__init__()
        check_sizes(n_inputs=n_inputs, n_outputs=n_outputs, **{f"hidden[{i}]": w for i, w in enumerate(hidden)})
        self.n_outputs = n_outputs
        widths = [n_inputs, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.norms = nn.ModuleList()
        if normalization is not None:
            _check_options(normalization=normalization)
            self.norms.extend(_VectorNorm(width, normalization) for width in hidden)
            self.normalization = normalization
        self.head = nn.Linear(widths[-1], n_outputs)
        self.head_prefix, self.embedding_size = "head.", widths[-1]

    def embed(self, images: Float[Tensor, "n ..."], n_support: int | None = None) -> Float[Tensor, "n embedding"]:
        """The input of the last layer."""
        images = images.flatten(1)
        for n, layer in enumerate(self.hidden):
            images = layer(images)
            images = F.relu(self.norms[n](images, n_support) if self.norms else images)
        return images


class _VectorNorm(nn.Module):
    """Vectors normalised under a policy of `ConvNet`, as images of a single pixel, with their scale and shift."""

    def __init__(self, n_features: int, policy: Normalization) -> None:
        super().__init__()
        self.policy: Normalization = policy
        self.scale, self.shift = nn.Parameter(torch.ones(n_features)), nn.Parameter(torch.zeros(n_features))

    def forward(self, vectors: Float[Tensor, "n feature"], n_support: int | None) -> Float[Tensor, "n feature"]:
        """`[n, feature]` -> `[n, feature]`."""
        return _by_policy(vectors[..., None, None], self.scale, self.shift, self.policy, n_support).flatten(1)


class ConvNet(Embedding):
    """Blocks of convolution, normalisation and ReLU, each halving the image, then fully connected layers.

    With its defaults this is the Conv-4 of the MAML paper's Omniglot experiment; `hidden=(256,)` gives the
    article's network of four convolutional and two fully connected layers; `pooling="max"` gives the Conv-4
    of Matching and Prototypical Networks.

    The normalisation policy decides whose statistics normalise an image:

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
        zero_head: whether the last layer starts at zero. Classes are numbered at random in every task, so an initial
            layer that distinguishes class 0 from class 1 can only mislead; MAML trains faster from one that does not.
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
        a last layer without order: Ye & Chao (2022), How to train your MAML to excel in few-shot classification.
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
        in_channels: int = 1,
        image_size: int = 28,
    ) -> None:
        super().__init__()
        _check_options(pooling=pooling, normalization=normalization)
        check_sizes(n_outputs=n_outputs, filters=filters, n_blocks=n_blocks, in_channels=in_channels)
        check_sizes(image_size=image_size, **{f"hidden[{i}]": width for i, width in enumerate(hidden)})
        if n_blocks > _MOST_BLOCKS:
            raise ValueError(f"n_blocks must be at most {_MOST_BLOCKS}, got {n_blocks}")
        halving = n_blocks if n_halving is None else n_halving
        if not 0 <= halving <= n_blocks:
            raise ValueError(f"n_halving must be from 0 to n_blocks = {n_blocks}, got {halving}")
        size = -(-image_size // 2**halving) if pooling == "stride" else image_size // 2**halving
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
        self.head = nn.Identity() if n_outputs is None else nn.Linear(widths[-1], n_outputs)
        if zero_head:
            for parameter in self.head.parameters():
                nn.init.zeros_(parameter)
        self.head_prefix = None if n_outputs is None else "head."

    def features(self, images: Images, n_support: int | None = None) -> Float[Tensor, "n filter h w"]:
        """The output of the last convolutional block."""
        _check_images(images, self.image_shape)
        for block in self.blocks:
            images = block(images, n_support)
        return images

    def embed(self, images: Images, n_support: int | None = None) -> Float[Tensor, "n embedding"]:
        """The input of the last fully connected layer."""
        embedding = self.features(images, n_support).flatten(1)
        for layer in self.hidden:
            embedding = F.relu(layer(embedding))
        return embedding


class ConvBlock(nn.Module):
    """Convolution 3×3, normalisation, halving, ReLU.

    Max-pooling comes before the ReLU: the two commute, and the ReLU then touches a quarter of the values.
    The convolution has no bias, since the normalisation that follows would remove it again.
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
        self.normalization: Normalization = normalization

    def forward(self, images: Tensor, n_support: int | None) -> Tensor:
        """`[n, c_in, h, w]` -> `[n, c_out, h / 2, w / 2]`."""
        return self._after_convolution(conv2d(images, self.weight, stride=self.stride, padding=1), n_support)

    def of_pairs(self, first: Tensor, second: Tensor, n_support: int | None) -> Tensor:
        """The block on every image of `second` paired with every image of `first`, their channels stacked.

        `[m, c, h, w]` and `[n, c_in - c, h, w]` -> `[n * m, c_out, h / 2, w / 2]`. The convolution of stacked channels
        is the sum of the convolutions of each: `m + n` images are convolved, not `m * n` pairs.
        """
        of_first, of_second = self.weight.split([first.shape[1], second.shape[1]], dim=1)
        below = conv2d(first, of_first, stride=self.stride, padding=1)
        above = conv2d(second, of_second, stride=self.stride, padding=1)
        return self._after_convolution((below + above[:, None]).flatten(0, 1), n_support)

    def _after_convolution(self, images: Tensor, n_support: int | None) -> Tensor:
        images = _by_policy(images, self.scale, self.shift, self.normalization, n_support)
        return F.relu(max_pool2d(images) if self.pools else images)


class ResNet(Embedding):
    """A strided convolution and residual blocks with group normalisation: larger than `ConvNet`, and inductive.

    Every block but the last halves its image by max-pooling, rounded up: 28×28 pixels become 14×14 by the first
    convolution, then 7×7 and, with three blocks, 4×4.

    Fine images cost hardly more than coarse ones if their pixels are rearranged first: with `unshuffle=3`, each square
    of 3×3 pixels becomes one pixel with nine times the channels, so that 84×84 pixels are computed like 28×28.

    Args:
        n_outputs: logits at the end, the ways of a task; None: no last layer, the network embeds.
        widths: channels of each residual block; the first convolution has as many as the first block.
        members: networks of these widths side by side, each with weights of its own; their embeddings are concatenated.
        unshuffle: the side of the squares of pixels that are rearranged into channels (`torch.nn.PixelUnshuffle`).
        shift: in evaluation mode, an embedding is the mean over the image and the image moved by this many pixels to
            each of the four sides: five passes instead of one; 0: the image alone.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels.

    Raises:
        ValueError: if a size is not positive, the image is too small for the blocks, or it is not made of such squares.

    Example:
        >>> ResNet(widths=(8, 16))(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 784])

    Reference:
        He et al. (2016), section 3.3; in few-shot learning: Chen et al. (2019), section 4.3; group normalisation: Wu &
        He (2018); pixels as channels: Shi et al. (2016), section 2.2, the other way round.
    """

    def __init__(
        self,
        n_outputs: int | None = None,
        *,
        widths: Sequence[int] = (64, 128, 160),
        members: int = 1,
        unshuffle: int = 1,
        shift: int = 0,
        in_channels: int = 1,
        image_size: int = 28,
    ) -> None:
        super().__init__()
        check_sizes(n_outputs=n_outputs, in_channels=in_channels, image_size=image_size, n_blocks=len(widths))
        check_sizes(members=members, unshuffle=unshuffle, **{f"widths[{i}]": width for i, width in enumerate(widths)})
        check_not_negative(shift=shift)
        if image_size % unshuffle:
            raise ValueError(f"unshuffle={unshuffle} does not divide image_size={image_size}; choose a divisor")
        side = image_size // unshuffle
        if 2 ** len(widths) > 2 * side:
            raise ValueError(f"{len(widths)} blocks halve a {side}×{side} image to nothing; use fewer")
        self.n_outputs, self.shift, self.image_shape = n_outputs, shift, (in_channels, image_size, image_size)
        self.unshuffle = nn.PixelUnshuffle(unshuffle)
        self.members = nn.ModuleList(_trunk(in_channels * unshuffle**2, widths) for _ in range(members))
        size = -(-side // 2 ** len(widths))
        self.feature_shape = (members * widths[-1], size, size)
        self.normalization, self.largest_activation = "group", members * widths[0] * (-(-side // 2)) ** 2
        self.embedding_size = n_features = members * widths[-1] * size * size
        self.head = nn.Identity() if n_outputs is None else nn.Linear(n_features, n_outputs)
        self.head_prefix = None if n_outputs is None else "head."

    def features(self, images: Images, n_support: int | None = None) -> Float[Tensor, "n filter h w"]:
        """The output of the last block."""
        _check_images(images, self.image_shape)
        if self.training or not self.shift:
            return self._features(images)
        sides = [(self.shift * x, self.shift * y) for x, y in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))]
        return torch.stack([self._features(F.pad(images, (x, -x, y, -y))) for x, y in sides]).mean(0)

    def _features(self, images: Images) -> Float[Tensor, "n filter h w"]:
        images = self.unshuffle(images)
        return torch.cat([member(images) for member in self.members], dim=1)

    def embed(self, images: Images, n_support: int | None = None) -> Float[Tensor, "n embedding"]:
        """The input of the last layer, in the precision of the images, even under autocast."""
        return self.features(images, n_support).flatten(1).to(images.dtype)


def _trunk(in_channels: int, widths: Sequence[int]) -> nn.Sequential:
    """A strided convolution and residual blocks."""
    pairs = list(pairwise([widths[0], *widths]))
    blocks = [ResidualBlock(i, o, halves=n + 1 < len(pairs)) for n, (i, o) in enumerate(pairs)]
    return nn.Sequential(_normalised(in_channels, widths[0], stride=2), nn.ReLU(), *blocks)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a 1×1 one, each normalised; their sum, halved or not, and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, halves: bool) -> None:
        super().__init__()
        self.first, self.second = _normalised(in_channels, out_channels), _normalised(out_channels, out_channels)
        self.beside, self.halves = _normalised(in_channels, out_channels, size=1), halves

    def forward(self, images: Tensor) -> Tensor:
        """`[n, c_in, h, w]` -> `[n, c_out, h, w]`, or half as high and wide, rounded up."""
        images = self.second(F.relu(self.first(images))) + self.beside(images)
        return F.relu(F.max_pool2d(images, 2, ceil_mode=True) if self.halves else images)


def _normalised(in_channels: int, out_channels: int, *, size: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution and group normalisation."""
    convolution = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(gcd(8, out_channels), out_channels))


def _by_policy(
    images: Images, scale: Tensor, shift: Tensor, policy: Normalization, n_support: int | None
) -> Float[Tensor, "n channel height width"]:
    """Images under a policy of `ConvNet`, then scaled and shifted by one number a channel."""
    if policy == "group":
        return group_norm(images, scale, shift, gcd(8, images.shape[1]))
    if policy == "batch" or n_support is None:
        return batch_norm(images, scale, shift)
    variance, mean = torch.var_mean(images[:n_support], dim=(0, 2, 3), correction=0, keepdim=True)
    factor = scale[:, None, None] * torch.rsqrt(variance + EPSILON)
    return torch.addcmul(shift[:, None, None] - mean * factor, images, factor)  # one pass over the images


def _check_images(images: Tensor, shape: tuple[int, int, int]) -> None:
    """Raise a `ValueError` if a network with this `image_shape` does not take the images."""
    if tuple(images.shape[1:]) != shape:
        found, wanted = ("×".join(map(str, sizes)) for sizes in (images.shape[1:], shape))
        raise ValueError(
            f"the network takes images of {wanted} (channels × height × width), got {found}; resize the images or "
            "build it with their in_channels and image_size"
        )


def _check_options(**given: str) -> None:
    for name, value in given.items():
        options = get_args({"pooling": Pooling, "normalization": Normalization}[name])
        if value not in options:
            raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")


# --- any network ---


def backbone(
    network: nn.Module,
    *,
    head: str | None = None,
    features: str | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> Embedding | Network:
    """Turn any module into a `Network`; the package's own are returned unchanged. Learners call it for all others.

    Args:
        network: from images `[n, channel, height, width]` to logits or embeddings, `[n, number]`.
        head: the name of its last layer, such as `"fc"`; default: the last `nn.Linear`. An empty string means that
            there is none and that the whole network embeds, which metric and memory methods assume.
        features: the name of the layer whose outputs are the feature maps that `Relation` compares.
        image_shape: channels, height and width, used to find the sizes of embeddings and feature maps where nothing
            else gives them.

    Raises:
        ValueError: if a layer of that name is missing.

    Example:
        >>> network = backbone(nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 5)))
        >>> network.head_prefix, network.n_outputs, network.embedding_size
        ('module.3.', 5, 64)
    """
    if isinstance(network, Network):
        return network
    return Backbone(network, head=head, features=features, image_shape=image_shape)


class Backbone(Embedding):
    """Any module as a network; see `backbone`."""

    def __init__(
        self,
        network: nn.Module,
        *,
        head: str | None = None,
        features: str | None = None,
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.module = network
        linear = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
        self.head_name = (linear[-1] if linear else "") if head is None else head
        self.feature_name = features
        for name in filter(None, (head, features)):
            if name not in dict(network.named_modules()):
                raise ValueError(f"{type(network).__name__} has no layer {name!r}; see its named_modules()")
        last = network.get_submodule(self.head_name or linear[-1]) if self.head_name or linear else None
        self.head_prefix = f"module.{self.head_name}.".replace("..", ".") if self.head_name or last is network else None
        self.n_outputs = getattr(last, "out_features", None)
        self.embedding_size = getattr(last, "in_features" if self.head_name else "out_features", None)
        norms = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        without_average = any(norm.running_mean is None for norm in norms)
        self.normalization = "batch" if without_average else "running" if norms else "none"
        self._recurrent = any(isinstance(layer, nn.RNNBase) for layer in network.modules())
        if image_shape is not None:
            self._probe(image_shape)

    def forward(self, images: Float[Tensor, "n ..."], n_support: int | None = None) -> Float[Tensor, "n output"]:
        """The module's outputs for the images, which layers like batch normalisation may compute from all of them."""
        return self._outputs(images)

    def embed(self, images: Float[Tensor, "n ..."], n_support: int | None = None) -> Float[Tensor, "n embedding"]:
        """The input of the last layer; the output of the module if there is none."""
        if not self.head_name:
            return self._outputs(images).flatten(1)
        return self._seen(images, self.head_name, lambda inputs, _: inputs[0]).flatten(1)

    def features(self, images: Float[Tensor, "n ..."], n_support: int | None = None) -> Float[Tensor, "n filter h w"]:
        """The output of the layer that `features` names."""
        if self.feature_name is None:
            return super().features(images)
        return self._seen(images, self.feature_name, lambda _, outputs: outputs)

    def _seen(self, images: Tensor, name: str, which: Callable[[Any, Any], Tensor]) -> Tensor:
        layer, seen = self.module.get_submodule(name), []
        hook = layer.register_forward_hook(lambda _, inputs, outputs: seen.append(which(inputs, outputs)))
        try:
            self._outputs(images)
        finally:
            hook.remove()
        return seen[-1]

    def _outputs(self, images: Tensor) -> Tensor:
        """The module's outputs; without cuDNN if it is recurrent, which cuDNN differentiates once, and in training."""
        with torch.backends.cudnn.flags(enabled=False) if self._recurrent else nullcontext():
            return self.module(images)

    @torch.no_grad()
    def _probe(self, image_shape: tuple[int, int, int]) -> None:
        modes = {layer: layer.training for layer in self.modules()}
        self.eval()
        like = next(self.module.parameters(), torch.zeros(()))
        images = torch.zeros(2, *image_shape, dtype=like.dtype, device=like.device)
        self.embedding_size = self.embed(images).shape[1]
        if self.head_prefix is None and self.n_outputs is None:
            self.n_outputs = self._outputs(images).shape[-1]
        if self.feature_name is not None:
            self.feature_shape = tuple(self.features(images).shape[1:])  # pyright: ignore[reportAttributeAccessIssue]
        for layer, training in modes.items():
            layer.training = training


def embedding_size(network: Embedding, method: str) -> int:
    """The length of a network's embeddings; a ValueError if it is unknown."""
    if network.embedding_size is None:
        raise ValueError(
            f"{method} must know the length of an embedding, which {network_name(network)} does not state; give it "
            "backbone(network, image_shape=(channels, height, width))"
        )
    return network.embedding_size


def network_name(network: nn.Module) -> str:
    """The class of a network, or of the module that it was made from."""
    return type(network.module if isinstance(network, Backbone) else network).__name__
