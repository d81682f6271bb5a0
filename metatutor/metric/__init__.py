"""Metric-based meta-learning: learn a space in which comparing is enough."""

from metatutor.metric.matching import Matching, MatchingConfig
from metatutor.metric.prototypical import Prototypical, PrototypicalConfig
from metatutor.metric.relation import Relation, RelationConfig
from metatutor.metric.siamese import Siamese, SiameseConfig

__all__ = [
    "Matching",
    "MatchingConfig",
    "Prototypical",
    "PrototypicalConfig",
    "Relation",
    "RelationConfig",
    "Siamese",
    "SiameseConfig",
]
