"""Memory-based meta-learning: write the support set down, look it up when asked."""

from metatutor.memory.controls import FeedForward, PlainLSTM
from metatutor.memory.mann import MANN
from metatutor.memory.metanet import MetaNet
from metatutor.memory.snail import SNAIL

__all__ = ["MANN", "SNAIL", "FeedForward", "MetaNet", "PlainLSTM"]
