"""A reader's own images: from a folder, from any dataset or from arrays, as classes or as one task."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metatutor.data.pictures import PictureFiles, picture_of, upright
from metatutor.episodes import ClassImages, Episode


def from_arrays(images: Any, labels: Sequence[Hashable] | Tensor) -> ClassImages:
    """Classes of images, not necessarily equally many in each.

    Args:
        images: see `pixels`.
        labels: one per image, of any kind; the classes are named after them.

    Example:
        >>> classes = from_arrays(torch.zeros(3, 28, 28), ["b", "a", "b"])
        >>> classes.names, classes.counts.tolist()
        (('b', 'a'), [2, 1])
    """
    tensor = (255 * pixels(images)).round().to(torch.uint8)
    numbers, names = _numbered(labels, len(tensor), "images")
    counts = numbers.bincount(minlength=len(names))
    by_class = tensor.new_zeros(len(names), int(counts.max()), *tensor.shape[1:])
    for number in range(len(names)):
        by_class[number, : counts[number]] = tensor[numbers == number]
    return ClassImages(by_class, tuple(map(str, names)), counts=counts)


def from_dataset(dataset: Any, *, image_size: int = 28, channels: int = 1, invert: bool = False) -> ClassImages:
    """Classes from any dataset of `(image, label)` pairs, such as those of torchvision.

    Args:
        dataset: its images are PIL images, tensors `[channel, height, width]` or arrays `[height, width]`.
        image_size: height and width in pixels that they are resized to.
        channels: 1 for grey levels, 3 for colours.
        invert: whether to make white black and black white, as dark strokes on white paper want it.
    """
    pairs = [(_resized(image, image_size, channels), label) for image, label in dataset]
    if not pairs:
        raise ValueError("the dataset is empty")
    images = torch.stack([image for image, _ in pairs])
    return from_arrays(1 - images if invert else images, [label for _, label in pairs])


def from_folder(folder: Path | str, *, image_size: int = 28, channels: int = 1, invert: bool = False) -> ClassImages:
    """Classes from image files: each sub-folder of `folder` is a class named after it; the rest as in `from_dataset`.

    Any file that Pillow can open will do (see `decoded`); a ValueError names the first that it cannot, or a sub-folder
    without a file.
    """
    found = PictureFiles.of(folder)
    files = [(path, name) for path, name in found.files if name is not None and path.is_file()]
    if not files:
        raise ValueError(f"{folder} holds no images; put those of each class into a folder of its own there")
    if empty := sorted(set(found.names) - {name for _, name in files}):
        raise ValueError(f"{Path(folder) / empty[0]} holds no images; put some there, or delete it")
    pairs = ((picture_of(path), name) for path, name in files)
    return from_dataset(pairs, image_size=image_size, channels=channels, invert=invert)


def _resized(image: Any, size: int, channels: int) -> Tensor:
    """`[channel, size, size]`, floats from 0 to 1."""
    if hasattr(image, "convert"):  # a PIL image
        array = torch.from_numpy(np.array(upright(image).convert("RGB" if channels == 3 else "L")))
        image = array.movedim(-1, 0) if channels == 3 else array
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 for grey levels or 3 for colours, got {channels}")
    tensor = torch.as_tensor(image)
    tensor = pixels(tensor[None] if tensor.dim() == 3 else tensor[None, None], "images", strokes=False)
    if tensor.shape[1] in (2, 4):  # the last is opacity; transparent parts become white, as in files
        colours, opacity = tensor[:, :-1], tensor[:, -1:]
        tensor = 1 - opacity + opacity * colours
    if tensor.shape[1] not in (1, 3):
        raise ValueError(f"images have 1 to 4 channels, grey or colours and perhaps opacity, got {len(tensor[0])}")
    if tensor.shape[1] != channels:
        tensor = tensor.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if tensor.shape[2:] != (size, size):
        resize = torch.nn.functional.interpolate
        tensor = resize(tensor, (size, size), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    return tensor[0]


def task_of(
    support_images: Any, support_labels: Sequence[Hashable] | Tensor, query_images: Any
) -> tuple[Episode, list[Hashable]]:
    """One task of labelled images (see `pixels`) and images to classify; and the label that each number stands for."""
    support, query = pixels(support_images, "support_images"), pixels(query_images, "query_images")
    labels, names = _numbered(support_labels, len(support), "support images")
    return Episode(support[None], labels[None], query[None], n_way=len(names)), names


def plain(label: Any) -> Any:
    """A label that arrives as a tensor or array as what it holds: tensors of equal numbers are not equal labels."""
    held = label.tolist() if hasattr(label, "tolist") else label
    while isinstance(held, list) and len(held) == 1:
        held = held[0]
    return held


def _numbered(labels: Any, n_images: int, of: str) -> tuple[Tensor, list[Hashable]]:
    """Labels of any kind as numbers, and the label that each number stands for."""
    given = list(map(plain, labels))
    if len(given) != n_images:
        raise ValueError(f"{n_images} {of} but {len(given)} labels; give one label per image")
    if not all(isinstance(label, Hashable) for label in given):
        raise ValueError("a label is one name or number per image; for one-hot labels give labels.argmax(1)")
    names = list(dict.fromkeys(given))
    return torch.tensor([names.index(label) for label in given]), names


def pixels(images: Any, name: str = "images", *, strokes: bool = True) -> Tensor:
    """Images as floats from 0 (paper) to 1 (ink), `[image, channel, height, width]`.

    Args:
        images: a tensor, an array or a sequence of them, `[image, channel, height, width]` or, with one channel,
            `[image, height, width]`; integers from 0 to 255 or floats from 0 to 1.
        name: what to call them in an error.
        strokes: whether dark strokes on white paper are an error, as they are for a network that expects ink to be 1,
            and integers that are all 0 or 1, as a single dark picture may have.
    """
    tensor = _stacked(images, name)
    if tensor.dim() == 3:
        tensor = tensor[:, None]
    if tensor.dim() != 4 or not tensor.numel():
        raise ValueError(
            f"{name} must be [image, channel, height, width] or [image, height, width], got {list(tensor.shape)}"
        )
    if tensor.shape[-1] in (1, 3, 4) and tensor.shape[1] not in (1, 3, 4):
        raise ValueError(f"{name} are channels-last, {list(tensor.shape)}; give images.movedim(-1, 1)")
    if tensor.is_complex() or (tensor.is_floating_point() and not bool(tensor.isfinite().all())):
        raise ValueError(f"{name} must be finite real numbers, from 0 (paper) to 1 (ink)")
    low, high = tensor.min().item(), tensor.max().item()
    most = 1 if tensor.is_floating_point() or tensor.dtype == torch.bool else 255
    if low < 0 or high > most:
        by = 65_535 if most == 255 and high > 255 else 255
        raise ValueError(
            f"{name} must be floats from 0 (paper) to 1 (ink) or bytes from 0 to 255, got {tensor.dtype} from {low:g} "
            f"to {high:g}; divide by {by}, or undo the normalisation"
        )
    if strokes and most == 255 and high == 1:
        raise ValueError(f"{name} are integers of 0 and 1, but bytes go up to 255 (ink); give images > 0")
    tensor = tensor if tensor.is_floating_point() else tensor.float() / most
    without_greys = ((tensor < 0.1) | (tensor > 0.9)).float().mean() > 0.9
    if strokes and tensor.shape[1] == 1 and without_greys and tensor.mean() > 0.7:
        raise ValueError(
            f"{name} look like dark strokes on white paper, but here 0 is paper and 1 is ink; give 1 - images, or "
            "invert=True where they are read from a folder or a dataset"
        )
    return tensor


def _stacked(images: Any, name: str) -> Tensor:
    if isinstance(images, Sequence):
        parts = [_tensor(image, name) for image in images]
        shapes = {tuple(part.shape) for part in parts}
        if len(shapes) != 1:
            raise ValueError(f"{name} must all be of one size, got {sorted(shapes) or 'none'}; resize them")
        return torch.stack(parts)
    return _tensor(images, name)


def _tensor(image: Any, name: str) -> Tensor:
    if hasattr(image, "convert"):
        raise ValueError(f"{name} are PIL images; give numpy.asarray(image) of each, or use FewShotClassifier for them")
    try:
        tensor = torch.as_tensor(image)
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name} must be tensors or arrays of numbers, got {type(image).__name__}: {error}") from None
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else tensor  # of few functions
