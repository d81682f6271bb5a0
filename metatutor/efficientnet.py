"""EfficientNet-Lite0: a small network for photos, whose weights come from a separate package."""

from __future__ import annotations

from itertools import chain

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from metatutor.backbones import Embedding, Images

STAGES = (  # blocks, kernel, stride of the first, channels, widening; a row of the paper's table 1 each
    (1, 3, 1, 16, 1),
    (2, 3, 2, 24, 6),
    (2, 5, 2, 40, 6),
    (3, 3, 2, 80, 6),
    (3, 5, 1, 112, 6),
    (4, 5, 2, 192, 6),
    (1, 3, 1, 320, 6),
)
_EPSILON = 1e-3  # of the batch normalisation it was trained with


class EfficientNetLite0(Embedding):
    """The smallest EfficientNet without squeeze-and-excitation, with ReLU6 instead of swish: 4.65 million parameters.

    It takes colours as `(bytes - 127) / 128`, `[n, 3, 224, 224]`; an embedding has 1,280 numbers, the last layer
    distinguishes the 1,000 classes of ImageNet. Layers are named as in the published weights, without their
    underscores.

    Args:
        n_outputs: classes of the last layer.

    Example:
        >>> import torch
        >>> EfficientNetLite0().eval().embed(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 1280])

    Reference:
        Tan & Le (2019), EfficientNet, table 1; Liu (2020), Higher accuracy on vision models with EfficientNet-Lite.
    """

    def __init__(self, n_outputs: int = 1000) -> None:
        super().__init__()
        self.n_outputs, self.embedding_size, self.normalization, self.head_prefix = n_outputs, 1280, "running", "fc."
        self.conv_stem, self.bn0 = _convolution(3, 32, 3, 2), _norm(32)
        widths = [32, *chain.from_iterable([channels] * n for n, _, _, channels, _ in STAGES)]
        shapes = [(k, stride if not i else 1, widen) for n, k, stride, _, widen in STAGES for i in range(n)]
        pairs = zip(widths[:-1], widths[1:], shapes, strict=True)
        self.blocks = nn.ModuleList(_Block(before, after, *shape) for before, after, shape in pairs)
        self.conv_head, self.bn1 = _convolution(320, 1280, 1), _norm(1280)
        self.fc = nn.Linear(1280, n_outputs)

    @property
    def head(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The last layer."""
        return self.fc

    def features(self, images: Images, n_support: int | None = None) -> Float[Tensor, "n filter h w"]:
        """`[n, 3, 224, 224]` -> `[n, 1280, 7, 7]`."""
        images = _relu6(self.bn0(self.conv_stem(images)))
        for block in self.blocks:
            images = block(images)
        return _relu6(self.bn1(self.conv_head(images)))

    def embed(self, images: Images, n_support: int | None = None) -> Float[Tensor, "n embedding"]:
        """The mean of each feature map."""
        return self.features(images).mean((2, 3))


class _Block(nn.Module):
    """Widen by a 1×1 convolution, filter every channel separately, narrow again; added to the input if it fits."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, widen: int) -> None:
        super().__init__()
        wide = before * widen
        if widen > 1:
            self.expand_conv, self.bn0 = _convolution(before, wide, 1), _norm(wide)
        self.depthwise_conv, self.bn1 = _convolution(wide, wide, kernel, stride, groups=wide), _norm(wide)
        self.project_conv, self.bn2 = _convolution(wide, after, 1), _norm(after)
        self.widens, self.adds = widen > 1, stride == 1 and before == after

    def forward(self, images: Tensor) -> Tensor:
        wide = _relu6(self.bn0(self.expand_conv(images))) if self.widens else images
        narrow = self.bn2(self.project_conv(_relu6(self.bn1(self.depthwise_conv(wide)))))
        return images + narrow if self.adds else narrow


class _SamePadding(nn.Conv2d):
    """A convolution with stride 2, centred as in TensorFlow: of an odd number of zeros on a side, more are at the end.

    Instead of padding a copy, even sides get zeros on both ends, and the output before the first one is left out.
    """

    def forward(self, input: Tensor) -> Tensor:
        top, left = (1 - side % 2 for side in input.shape[2:])
        around = (self.kernel_size[0] // 2 + top, self.kernel_size[1] // 2 + left)
        output = F.conv2d(input, self.weight, self.bias, self.stride, around, groups=self.groups)
        return output[:, :, top:, left:]


def _convolution(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    made = nn.Conv2d if stride == 1 else _SamePadding
    return made(before, after, kernel, stride, (kernel // 2) * (stride == 1), groups=groups, bias=False)


def _relu6(values: Tensor) -> Tensor:
    return F.relu6(values, inplace=True)  # nothing else uses the input


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_EPSILON)


def fused(network: EfficientNetLite0) -> EfficientNetLite0:
    """The same function with every normalisation folded into the convolution before it, in place: twice as fast."""
    network.eval()
    for module in (network, *network.blocks):
        for convolution, norm in _PAIRS:
            if hasattr(module, convolution):
                folded = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
                setattr(module, convolution, folded)
                setattr(module, norm, nn.Identity())
    return network


_PAIRS = (
    ("conv_stem", "bn0"),
    ("expand_conv", "bn0"),
    ("depthwise_conv", "bn1"),
    ("project_conv", "bn2"),
    ("conv_head", "bn1"),
)
