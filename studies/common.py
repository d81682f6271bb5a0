"""What the studies share: where they write, and pictures of other kinds than characters."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from metatutor.data import Omniglot, Strokes
from metatutor.data.images import from_arrays, from_dataset
from metatutor.episodes import ClassImages
from metatutor.files import replacing
from metatutor.runs import results_folder, run_folders


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Write the rows of a study to `results/studies/NAME.json`, one a line."""
    about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    lines = ",\n".join(json.dumps(row) for row in rows)
    path = results_folder() / "studies" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(f'{{"made": {json.dumps(about)}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"wrote {path}")


def settings_of(run: str) -> dict[str, Any]:
    """The configuration of a recorded run, to be changed and parsed again."""
    [folder] = [folder for folder in run_folders() if folder.name == run]
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def pictures(folder: Path | None, omniglot: Path | None) -> dict[str, ClassImages]:
    """Classes of eight kinds of pictures, grey, 28 pixels high and wide, the background dark.

    `folder` holds the data sets of photographs and silhouettes, each in a folder of its own; without it there are only
    test characters of Omniglot, drawn characters and scikit-learn's digits.
    """
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    kinds = {
        "characters (Omniglot)": Omniglot.load(omniglot).split(rotations=False).test,
        "drawn characters (Strokes)": Strokes.load().split(rotations=False).test,
        "handwritten digits": from_dataset(zip(found.images / 16, found.target.tolist(), strict=True)),
    }
    if folder is not None:
        kinds |= {
            "oracle-bone characters": oracle(folder / "oracle"),
            "leaves": _of_zip(folder / "leaves" / "leaves.zip"),
            "hand signs": _of_zip(folder / "handsigns" / "handsigns.zip"),
            "grocery photos": _of_zip(folder / "grocery" / "grocery.zip"),
            "blood cells": _of_zip(folder / "bloodcells" / "bloodcells.zip"),
        }
    return kinds


def _of_zip(path: Path) -> ClassImages:
    """Classes are the folders that images lie in; bright backgrounds are turned dark."""
    pairs = []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if PurePosixPath(name).suffix.lower() in (".jpg", ".png"):
                image = np.array(Image.open(io.BytesIO(archive.read(name))).convert("L"))
                pairs.append((image, PurePosixPath(name).parent.name))
    bright = np.mean([image.mean() for image, _ in pairs]) > 127
    return from_dataset((255 - image if bright else image, label) for image, label in pairs)


def oracle(folder: Path) -> ClassImages:
    """The first forty images of each class, from the file format of MNIST."""
    images, labels = (
        np.frombuffer(gzip.decompress((folder / f"t10k-{name}-ubyte.gz").read_bytes()), np.uint8, offset=offset)
        for name, offset in (("images-idx3", 16), ("labels-idx1", 8))
    )
    images = images.reshape(-1, 28, 28)
    first = np.concatenate([np.flatnonzero(labels == label)[:40] for label in range(10)])
    return from_arrays(images[first], labels[first].tolist())
