"""What the memory-based methods share: they read labels, of a fixed number of classes."""

from __future__ import annotations

from torch import nn

from metatutor.backbones import embedding_size
from metatutor.checks import check_sizes
from metatutor.embedding import EmbeddingLearner
from metatutor.episodes import Episode


class MemoryLearner(EmbeddingLearner):
    """Puts the support set into a memory, and answers the query images from it; no query sees another.

    Such a method reads labels as inputs, so it is made for tasks of `n_way` classes. For the other arguments see
    `EmbeddingLearner`.
    """

    def __init__(
        self, network: nn.Module, *, n_way: int = 5, finetune_steps: int = 0, finetune_lr: float = 0.01
    ) -> None:
        super().__init__(network, finetune_steps=finetune_steps, finetune_lr=finetune_lr)
        check_sizes(n_way=n_way)
        self.n_way = self.ways = n_way
        self.embedding_size = embedding_size(self.network, type(self).__name__)

    def check_ways(self, episode: Episode) -> None:
        """Raise a `ValueError` if the episode does not have as many ways as this learner was made for."""
        if episode.n_way != self.n_way:
            raise ValueError(f"the episode has n_way = {episode.n_way} but this learner was made for {self.n_way}")
