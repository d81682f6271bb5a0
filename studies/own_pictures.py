"""Few photos of a few things: pixels, a network for characters, a network for photos, and its heads.

    python studies/own_pictures.py --pictures-in DIR

Every picture is embedded once; tasks of five support pictures a class are drawn from the embeddings. The same head has
to tell when it is not to be trusted: white blood cells of another laboratory, which are named by chance.
"""

from __future__ import annotations

import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import tyro
from common import oracle, write
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import normalize

from metatutor import Episode, NearestPixels
from metatutor.classify import nearest_cosine, novelty_threshold
from metatutor.data.images import from_dataset
from metatutor.data.pictures import decoded, picture_of
from metatutor.heads import fit_head
from metatutor.pretrained import PictureNetwork, batched, picture_network

K_SHOT, N_QUERY = 5, 15
HEADS = {
    "omniglot": ("prototypes", "ridge"),
    "photos": ("prototypes", "ridge", "gaussians", "auto"),
}


@dataclass
class Kind:
    """Pictures of one kind with their classes and the part (such as a laboratory) that each is from."""

    pictures: list[Image.Image]
    classes: list[str]
    parts: list[str]

    def of(self, part: str) -> dict[str, list[int]]:
        """The numbers of a part's pictures, by class."""
        found = defaultdict(list)
        for i, (name, where) in enumerate(zip(self.classes, self.parts, strict=True)):
            if where == part:
                found[name].append(i)
        return dict(found)


def zipped(path: Path) -> Kind:
    """The pictures of a zip of PART/CLASS/FILE or CLASS/FILE."""
    kind = Kind([], [], [])
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            *parts, file = PurePosixPath(name).parts
            if PurePosixPath(file).suffix.lower() in (".jpg", ".png"):
                kind.pictures.append(decoded(archive.read(name)))
                kind.classes.append(parts[-1])
                kind.parts.append("/".join(parts[:-1]))
    return kind


def oracle_kind(folder: Path) -> Kind:
    """Forty pictures of each oracle-bone character."""
    images = oracle(folder).images
    pictures = [picture_of(image) for image in images.flatten(0, 1)]
    return Kind(pictures, [str(c) for c in range(len(images)) for _ in range(images.shape[1])], [""] * len(pictures))


def tasks(kind: Kind, n_way: int, parts: tuple[str, str], n_tasks: int) -> Iterator[tuple[Tensor, ...]]:
    """Numbers of support pictures, their labels, numbers of query pictures, their labels."""
    support, query = kind.of(parts[0]), kind.of(parts[1])
    names, generator = sorted(support.keys() & query.keys()), torch.Generator().manual_seed(0)
    for _ in range(n_tasks):
        chosen = [names[i] for i in torch.randperm(len(names), generator=generator)[:n_way].tolist()]
        drawn = ([], [], [], [])
        for label, name in enumerate(chosen):
            order = torch.randperm(len(support[name]), generator=generator)[:K_SHOT]
            first = [support[name][i] for i in order.tolist()]
            rest = [i for i in query[name] if i not in first]
            second = [rest[i] for i in torch.randperm(len(rest), generator=generator)[:N_QUERY].tolist()]
            for numbers, more in zip(drawn, (first, [label] * len(first), second, [label] * len(second)), strict=True):
                numbers.extend(more)
        yield tuple(torch.tensor(numbers) for numbers in drawn)


def embedded(network: PictureNetwork, pictures: list[Image.Image]) -> Tensor:
    """Directions of all embeddings, `[picture, embedding]`."""
    some = (torch.stack([network.prepared(p) for p in few]) for few in batched(pictures, network.batch))
    return normalize(torch.cat([network.embed(prepared) for prepared in some]), dim=1)


def mean(values: list[float]) -> dict[str, float]:
    """Mean and half its 95% interval over tasks."""
    return {"accuracy": float(np.mean(values)), "ci95": float(1.96 * np.std(values, ddof=1) / len(values) ** 0.5)}


def pixels(kind: Kind, n_way: int, parts: tuple[str, str], n_tasks: int) -> dict[str, Any]:
    """The nearest of the pixels."""
    grey = from_dataset((picture, "") for picture in kind.pictures).images[0].float() / 255
    found = []
    for support, labels, query, truth in tasks(kind, n_way, parts, n_tasks):
        logits = NearestPixels()(Episode(grey[support][None], labels[None], grey[query][None], n_way=n_way))
        found.append((logits[0].argmax(1) == truth).float().mean().item())
    return {"backbone": "pixels", "head": "nearest", "transductive": False} | mean(found)


def headed(
    embeddings: Tensor, kind: Kind, head: Any, n_way: int, parts: tuple[str, str], n_tasks: int
) -> dict[str, Any]:
    """Accuracy of a head, what the support sets said of it, and how many pictures were called too far."""
    right, left_out, far = [], [], []
    for support, labels, query, truth in tasks(kind, n_way, parts, n_tasks):
        fitted = fit_head(embeddings[support], labels, n_way, head)
        right.append((fitted(embeddings[query]).argmax(1) == truth).float().mean().item())
        left_out.append((fitted.left_out.argmax(1) == labels).float().mean().item())
        cosines = nearest_cosine(embeddings[query], embeddings[support])
        far.append((cosines < novelty_threshold(embeddings[support])).float().mean().item())
    about = {"leave_one_out": float(np.mean(left_out)), "too_far": float(np.mean(far)), "transductive": False}
    return {"head": head} | mean(right) | about


def moved(
    embeddings: Tensor, kind: Kind, head: Any, n_way: int, parts: tuple[str, str], n_tasks: int
) -> dict[str, Any]:
    """The same if the middle of the query pictures is laid on that of the support pictures: transductive."""
    right = []
    for support, labels, query, truth in tasks(kind, n_way, parts, n_tasks):
        fitted = fit_head(embeddings[support], labels, n_way, head)
        shifted = embeddings[query] - embeddings[query].mean(0) + fitted.center
        right.append((fitted(shifted).argmax(1) == truth).float().mean().item())
    return {"head": head} | mean(right) | {"transductive": True}


def told_apart(embeddings: Tensor, kind: Kind, n_way: int, home: str, away: str, n_tasks: int) -> float:
    """AUROC of the largest cosine to a support picture: pictures of home against those of away."""
    areas, others = [], torch.tensor([i for numbers in kind.of(away).values() for i in numbers])
    for support, _, query, _ in tasks(kind, n_way, (home, home), n_tasks):
        near, far = (nearest_cosine(embeddings[i], embeddings[support]) for i in (query, others))
        areas.append(roc_auc_score([1] * len(near) + [0] * len(far), torch.cat([near, far]).numpy()))
    return float(np.mean(areas))


def main(pictures_in: Path, n_tasks: int = 300) -> None:
    """Measure everything, and write `results/studies/own_pictures.json`.

    Args:
        pictures_in: the folder of the data sets, each in a folder of its own.
        n_tasks: tasks of each setting.
    """
    torch.set_num_threads(1)
    kinds = {
        name: zipped(pictures_in / name / f"{name}.zip") for name in ("bloodcells", "grocery", "handsigns", "leaves")
    }
    kinds |= {
        "oracle": oracle_kind(pictures_in / "oracle"),
        "whitecells": zipped(pictures_in / "whitecells/whitecells.zip"),
    }
    home, away, shop = "laboratory1", "laboratory2", ("support", "query")
    settings = [
        ("grocery photos", "grocery", 5, shop),
        ("grocery photos", "grocery", 30, shop),
        ("blood cells", "bloodcells", 3, ("", "")),
        ("hand signs", "handsigns", 10, ("", "")),
        ("oracle-bone characters", "oracle", 10, ("", "")),
        ("white cells, one laboratory", "whitecells", 4, (home, home)),
        ("white cells, support of another laboratory", "whitecells", 4, (home, away)),
        ("leaves", "leaves", 99, ("", "")),
    ]
    embeddings = {
        (backbone, name): embedded(picture_network(backbone), kind.pictures)
        for backbone in HEADS
        for name, kind in kinds.items()
    }
    rows = []
    for title, name, n_way, parts in settings:
        kind, about = kinds[name], {"pictures": title, "n_way": n_way, "k_shot": K_SHOT, "n_tasks": n_tasks}
        found = [pixels(kind, n_way, parts, n_tasks)]
        for backbone, heads in HEADS.items():
            task = (embeddings[backbone, name], kind)
            for head in heads:
                found.append({"backbone": backbone} | headed(*task, head, n_way, parts, n_tasks))
                if parts == (home, away):
                    found.append({"backbone": backbone} | moved(*task, head, n_way, parts, n_tasks))
                    found[-2]["auroc"] = told_apart(*task, n_way, home, away, n_tasks)
        for row in found:
            rows.append(about | row)
            print(rows[-1], flush=True)
        write("own_pictures", rows)


if __name__ == "__main__":
    tyro.cli(main)
