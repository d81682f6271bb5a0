"""Does meta-training on other classes of the same kind beat frozen features? Grocery photos and leaves.

    python studies/meta_training.py --pictures-in DIR

Classes are parted at random into two thirds to train on and one third for the tasks, three times. Photos: an
EfficientNet-Lite0 as it comes, with a linear map that is meta-trained on its embeddings, and meta-trained whole.
Leaves: a Conv-4 with its weights from Omniglot, meta-trained on leaves from either beginning; the network for photos.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import tyro
from common import write
from own_pictures import Kind, embedded, headed, zipped
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from metatutor import ConvNet, EpisodeSpec, Prototypical, TrainConfig, train
from metatutor.data.images import from_dataset
from metatutor.efficientnet import EfficientNetLite0
from metatutor.episodes import ClassImages
from metatutor.functional import class_means
from metatutor.metric.prototypical import similarity
from metatutor.pretrained import drawn, photo_network, picture_network
from metatutor.runs import load_run

SEEDS, N_TASKS = 3, 100


def parted(kind: Kind, seed: int) -> tuple[Kind, Kind]:
    """The pictures of two thirds of the classes, and those of the others."""
    names = sorted(set(kind.classes))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {names[i] for i in order[: 2 * len(names) // 3]}
    parts = []
    for wanted in (True, False):
        kept = [i for i, name in enumerate(kind.classes) if (name in chosen) == wanted]
        pictures, classes = [kind.pictures[i] for i in kept], [kind.classes[i] for i in kept]
        parts.append(Kind(pictures, classes, [kind.parts[i] for i in kept]))
    return parts[0], parts[1]


def class_images(kind: Kind, size: int, channels: int) -> ClassImages:
    """The classes of some pictures, for training."""
    return from_dataset(zip(kind.pictures, kind.classes, strict=True), image_size=size, channels=channels)


def linear_map(embeddings: Tensor, labels: Tensor, seed: int, steps: int = 300) -> nn.Linear:
    """A map of embeddings that is trained on tasks of 10 ways and 5 shots; it begins as the identity."""
    size, generator = embeddings.shape[1], torch.Generator().manual_seed(seed)
    mapped = nn.Linear(size, size, bias=False)
    nn.init.eye_(mapped.weight)
    descent = torch.optim.Adam(mapped.parameters(), lr=1e-4)
    for _ in range(steps):
        ways = torch.randperm(int(labels.max()) + 1, generator=generator)[:10]
        numbers = torch.stack([(labels == way).nonzero()[:, 0] for way in ways])
        numbers = numbers.gather(1, torch.rand(numbers.shape, generator=generator).argsort(1))[:, :10]
        vectors = normalize(mapped(embeddings[numbers]), dim=-1)  # [way, picture, embedding]
        own = torch.arange(10).repeat_interleave(5)
        means = class_means(vectors[:, :5].flatten(0, 1)[None], own[None], 10)
        logits = 10 * similarity(vectors[:, 5:].flatten(0, 1)[None], means, "squared")[0]
        descent.zero_grad()
        cross_entropy(logits, own).backward()
        descent.step()
    return mapped


class Bytes(nn.Module):
    """A network for photos that takes pixels from 0 to 1."""

    def __init__(self, network: EfficientNetLite0) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return 10 * normalize(self.network.embed((255 * images - 127) / 128), dim=1)


@torch.no_grad()
def of_photos(network: nn.Module, kind: Kind) -> Tensor:
    """Directions of the embeddings of photos in one view."""
    images = class_images(kind, 224, 3)
    found = {name: iter(of) for name, of in zip(images.names, images.images, strict=True)}
    rows = [network(next(found[name])[None].float() / 255)[0] for name in kind.classes]
    return normalize(torch.stack(rows), dim=1)


def photos(kind: Kind, seed: int) -> Iterator[dict[str, Any]]:
    """Grocery: 10 ways, 5 shots, queries from other shops than the support set."""
    known, new = parted(kind, seed)
    frozen, shop = picture_network("photos"), ("support", "query")

    def measured(network: str, vectors: Tensor) -> Iterator[dict[str, Any]]:
        for head in ("prototypes", "auto"):
            yield {"pictures": "grocery photos", "network": network} | headed(vectors, new, head, 10, shop, N_TASKS)

    of_known, of_new = embedded(frozen, known.pictures), embedded(frozen, new.pictures)
    yield from measured("frozen", of_new)
    numbers = {name: i for i, name in enumerate(sorted(set(known.classes)))}
    mapped = linear_map(of_known, torch.tensor([numbers[name] for name in known.classes]), seed)
    with torch.no_grad():
        yield from measured("frozen, and a linear map", normalize(mapped(of_new), dim=1))
    network = Bytes(photo_network())
    yield from measured("frozen, one view", of_photos(network, new))
    config = TrainConfig(iterations=60, tasks_per_step=1, outer_lr=1e-4, warmup=10, seed=seed)
    torch.manual_seed(seed)
    train(Prototypical(network), class_images(known, 224, 3), EpisodeSpec(8, 2, 1), config, progress_bar=False)
    yield from measured("meta-trained, one view", of_photos(network.eval(), new))


def leaves(kind: Kind, seed: int) -> Iterator[dict[str, Any]]:
    """Leaves: 33 ways, 5 shots, silhouettes of 28 pixels."""
    known, new = parted(kind, seed)

    def measured(network: str, vectors: Tensor) -> Iterator[dict[str, Any]]:
        for head in ("prototypes", "auto"):
            yield {"pictures": "leaves", "network": network} | headed(vectors, new, head, 33, ("", ""), N_TASKS)

    silhouettes = torch.stack([drawn(picture) for picture in new.pictures])
    classes = from_dataset(
        ((255 * drawn(picture)[0]).byte().numpy(), name)
        for picture, name in zip(known.pictures, known.classes, strict=True)
    )
    for name, of_omniglot, trained in (
        ("Conv-4 of Omniglot", True, False),
        ("Conv-4, meta-trained", False, True),
        ("Conv-4 of Omniglot, meta-trained", True, True),
    ):
        torch.manual_seed(seed)
        learner = Prototypical(ConvNet(pooling="max", normalization="group"))
        if of_omniglot:
            learner.load_state_dict(load_run("omniglot-prototypical-20w1s").learner().state_dict())
        if trained:
            config = TrainConfig(iterations=500, tasks_per_step=1, outer_lr=1e-3, seed=seed)
            train(learner, classes.with_rotations(), EpisodeSpec(30, 3, 3), config, device="cpu", progress_bar=False)
        with torch.no_grad():
            yield from measured(name, normalize(learner.eval().network.embed(silhouettes), dim=1))
    yield from measured("for photos, frozen", embedded(picture_network("photos"), new.pictures))


def main(pictures_in: Path) -> None:
    """Measure everything, and write `results/studies/meta_training.json`.

    Args:
        pictures_in: the folder of the data sets, each in a folder of its own.
    """
    torch.set_num_threads(1)
    rows = []
    for study, name in ((leaves, "leaves"), (photos, "grocery")):
        kind = zipped(pictures_in / name / f"{name}.zip")
        for seed in range(SEEDS):
            for row in study(kind, seed):
                rows.append({"seed": seed} | row)
                print(rows[-1], flush=True)
                write("meta_training", rows)


if __name__ == "__main__":
    tyro.cli(main)
