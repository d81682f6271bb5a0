"""Images by class, and nothing else."""

from metatutor.data.omniglot import Omniglot, Splits

__all__ = ["Omniglot", "Splits"]
