"""Memory-based meta-learning: write the support set down, look it up when asked."""

from metatutor.memory.controls import FeedForward, FeedForwardConfig, PlainLSTM, PlainLSTMConfig
from metatutor.memory.mann import MANN, MANNConfig
from metatutor.memory.metanet import MetaNet, MetaNetConfig
from metatutor.memory.snail import SNAIL, SNAILConfig

__all__ = [
    "MANN",
    "SNAIL",
    "FeedForward",
    "FeedForwardConfig",
    "MANNConfig",
    "MetaNet",
    "MetaNetConfig",
    "PlainLSTM",
    "PlainLSTMConfig",
    "SNAILConfig",
]
