"""Optimization-based meta-learning: learn a starting point from which a few gradient steps are enough."""

from metatutor.optimization.imaml import ImplicitMAML
from metatutor.optimization.maml import MAML
from metatutor.optimization.meta_lstm import MetaLSTM
from metatutor.optimization.reptile import Reptile

__all__ = ["MAML", "ImplicitMAML", "MetaLSTM", "Reptile"]
