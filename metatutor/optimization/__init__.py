"""Optimization-based meta-learning: learn a starting point from which a few gradient steps are enough."""

from metatutor.optimization.imaml import ImplicitMAML
from metatutor.optimization.maml import MAML
from metatutor.optimization.meta_lstm import MetaLSTM
from metatutor.optimization.protomaml import ProtoMAML
from metatutor.optimization.reptile import Reptile
from metatutor.optimization.ridge import R2D2

__all__ = ["MAML", "R2D2", "ImplicitMAML", "MetaLSTM", "ProtoMAML", "Reptile"]
