"""Metric-based meta-learning: learn a space in which comparing is enough."""

from metatutor.metric.matching import Matching
from metatutor.metric.prototypical import Prototypical
from metatutor.metric.relation import Relation
from metatutor.metric.siamese import Siamese

__all__ = ["Matching", "Prototypical", "Relation", "Siamese"]
