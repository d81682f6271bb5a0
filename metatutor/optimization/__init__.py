"""Optimization-based meta-learning: learn a starting point from which a few gradient steps are enough."""

from metatutor.optimization.maml import MAML, MAMLConfig

__all__ = ["MAML", "MAMLConfig"]
