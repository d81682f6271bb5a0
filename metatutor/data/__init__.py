"""Images by class, and nothing else."""

from metatutor.data.omniglot import DownloadError, Omniglot, Splits
from metatutor.data.sinusoids import Sinusoids, SinusoidSampler
from metatutor.data.strokes import Strokes

__all__ = ["DownloadError", "Omniglot", "SinusoidSampler", "Sinusoids", "Splits", "Strokes"]
