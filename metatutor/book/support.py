"""How a chapter starts: with which characters, and how much it computes itself."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from metatutor.data import DownloadError, Omniglot, Splits, Strokes

_unpacked: list[TemporaryDirectory[str]] = []  # gone when Python ends


def load_characters(root: Path | str | None = None, *, rotations: bool = True) -> tuple[str, Splits]:
    """Omniglot if it is available or can be downloaded, else Strokes; a printed line says which, and why.

    This is what the chapters draw their tasks from. Omniglot comes in the split `random-0`, that of the recorded runs,
    so that their meta-test classes are meta-test classes here. Only a failed download leads to Strokes: data that
    somebody named and that are missing or damaged remain an error.

    Args:
        root: the folder with Omniglot (see `Omniglot.load`).
        rotations: whether rotated characters are classes of their own.

    Returns:
        `"Omniglot"` or `"Strokes"`, for titles and captions, and the splits.

    Raises:
        ValueError: if the place that `root` or METATUTOR_DATA names does not hold Omniglot, or only a part of it.

    Reference:
        Lake, Salakhutdinov and Tenenbaum (2015); the split: Finn, Abbeel and Levine (2017), section 5.2.
    """
    try:
        characters, name, why = Omniglot.load(root), "Omniglot", ""
    except DownloadError as error:
        characters, name, why = Strokes.load(), "Strokes", f"\nOmniglot is not available ({error})."
    splits = characters.split(rotations=rotations)
    n, drawings = characters.images.shape[:2]
    print(f"{name}: {n} characters, {drawings} drawings of each; split {splits.id}.{why}")
    return name, splits


def sample_pictures(name: Literal["grocery", "bloodcells"]) -> Path:
    """A folder, which lasts until Python ends, of pictures that come with the package, their licence and their sources.

    `grocery`: eight kinds of fruit, ten photos of each to learn from (`support/`) and ten to name (`query/`), and ten
    photos of each of four other things (`other/`). `bloodcells`: sixty pictures of each of three kinds of cells.

    Raises:
        ValueError: if there are no such pictures.

    Example:
        >>> sorted(path.name for path in sample_pictures("bloodcells").iterdir())
        ['LICENSE', 'Platelets', 'RBC', 'SOURCES.txt', 'WBC']
    """
    archive = Path(__file__).parent / "pictures" / f"{name}.zip"
    if not archive.exists():
        raise ValueError(f"there are no pictures {name!r}; choose 'grocery' or 'bloodcells'")
    _unpacked.append(TemporaryDirectory(prefix=f"metatutor-{name}-"))
    with zipfile.ZipFile(archive) as pictures:
        pictures.extractall(_unpacked[-1].name)
    return Path(_unpacked[-1].name)


def preset() -> Literal["fast", "full"]:
    """How much a chapter computes itself, as METATUTOR_PRESET says.

    Returns:
        `"fast"`, the default: show the mechanism live, load recorded runs for what takes long; or `"full"`: retrain.

    Raises:
        ValueError: if METATUTOR_PRESET is anything else.
    """
    chosen = os.environ.get("METATUTOR_PRESET") or "fast"
    if chosen not in ("fast", "full"):
        raise ValueError(f"METATUTOR_PRESET must be fast or full, got {chosen!r}")
    return "full" if chosen == "full" else "fast"
