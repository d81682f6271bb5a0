"""Images by class, and nothing else."""

from __future__ import annotations

from pathlib import Path

from metatutor.data.omniglot import DownloadError, Omniglot, Splits
from metatutor.data.sinusoids import Sinusoids, SinusoidSampler
from metatutor.data.strokes import Strokes

__all__ = ["DownloadError", "Omniglot", "SinusoidSampler", "Sinusoids", "Splits", "Strokes", "load_characters"]


def load_characters(root: Path | str | None = None, *, rotations: bool = True) -> tuple[str, Splits]:
    """Omniglot where it is at hand or can be downloaded, else Strokes; a printed line says which, and why.

    This is what the chapters draw their tasks from. Omniglot comes in the split `random-0`, the one of the recorded
    runs, so that their meta-test classes are meta-test classes here. Only a failed download leads to Strokes: data that
    somebody named and that are not there, or are damaged, remain an error.

    Returns:
        `"Omniglot"` or `"Strokes"`, for titles and captions, and the splits; with `rotations`, turned characters are
        classes of their own.

    Raises:
        ValueError: if the place that `root` or METATUTOR_DATA names does not hold Omniglot, or not whole.
    """
    try:
        characters, name, why = Omniglot.load(root), "Omniglot", ""
    except DownloadError as error:
        characters, name, why = Strokes.load(), "Strokes", f"\nOmniglot is not at hand ({error})."
    splits = characters.split(rotations=rotations)
    n, drawings = characters.images.shape[:2]
    print(f"{name}: {n} characters, {drawings} drawings of each; split {splits.id}.{why}")
    return name, splits
