"""Optimization-based meta-learning: learn a starting point from which a few gradient steps are enough."""

from metatutor.optimization.imaml import ImplicitMAML, ImplicitMAMLConfig
from metatutor.optimization.maml import MAML, MAMLConfig
from metatutor.optimization.meta_lstm import MetaLSTM, MetaLSTMConfig
from metatutor.optimization.reptile import Reptile, ReptileConfig

__all__ = [
    "MAML",
    "ImplicitMAML",
    "ImplicitMAMLConfig",
    "MAMLConfig",
    "MetaLSTM",
    "MetaLSTMConfig",
    "Reptile",
    "ReptileConfig",
]
