"""Prototypical Networks: a class is the mean of its embeddings; the nearest mean wins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from metatutor.backbones import ConvNet
from metatutor.episodes import Episode
from metatutor.learner import check_finetuning
from metatutor.metric.base import Logits, MetricLearner, class_means

Distance = Literal["squared", "euclidean", "cosine"]


@dataclass(frozen=True)
class PrototypicalConfig:
    """The arguments of `Prototypical`, for a recorded run.

    Args:
        method: the tag of this learner in `config.json`.
        distance: see `Prototypical`, as are the others.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> PrototypicalConfig().build(ConvNet(filters=8)).config.distance
        'squared'

    Reference:
        Snell, Swersky & Zemel (2017).
    """

    method: Literal["prototypical"] = "prototypical"
    distance: Distance = "squared"
    finetune_steps: int = 0
    finetune_lr: float = 0.01

    def __post_init__(self) -> None:
        if self.distance not in ("squared", "euclidean", "cosine"):
            raise ValueError(f"distance must be 'squared', 'euclidean' or 'cosine', got {self.distance!r}")
        check_finetuning(self.finetune_steps, self.finetune_lr)

    def build(self, network: ConvNet) -> Prototypical:
        """The learner with these arguments."""
        arguments = {name: value for name, value in vars(self).items() if name != "method"}
        return Prototypical(network, **arguments)


class Prototypical(MetricLearner):
    """Answers with the class whose prototype, the mean of its support embeddings, is nearest.

    `prototype[c] = mean of f(x) over the support images x of class c`, `logits[c] = -|f(query) - prototype[c]|²`.

    The square matters: with it the logits are linear in `f(query)` up to a term that all classes share, and the method
    is the linear classifier that fits Gaussian classes of equal spread. `"euclidean"` leaves the square out,
    `"cosine"` compares directions; both are here to show the difference.

    Args:
        network: the embedding `f`; a last layer, if it has one, is not used.
        distance: `"squared"` (Euclidean), `"euclidean"`, or `"cosine"`, whose logits are 10 times the cosine.
        finetune_steps: see `EmbeddingLearner`.
        finetune_lr: see `EmbeddingLearner`.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> import torch
        >>> from metatutor import Episode
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> Prototypical(ConvNet(filters=8))(Episode(images, labels, images, labels, n_way=5)).shape
        torch.Size([2, 5, 5])

    Reference:
        Snell, Swersky & Zemel (2017), equations 1, 2 and 8.
    """

    def __init__(
        self,
        network: ConvNet,
        *,
        distance: Distance = PrototypicalConfig.distance,
        finetune_steps: int = PrototypicalConfig.finetune_steps,
        finetune_lr: float = PrototypicalConfig.finetune_lr,
    ) -> None:
        super().__init__(network, finetune_steps=finetune_steps, finetune_lr=finetune_lr)
        self.config = PrototypicalConfig("prototypical", distance, finetune_steps, finetune_lr)

    def compare(self, episode: Episode) -> Logits:
        """Minus the distance of each query image to each prototype."""
        support, query = self.embed(episode)
        prototypes = class_means(support, episode.support_labels, episode.n_way)
        return similarity(query, prototypes, self.config.distance)


def similarity(
    query: Float[Tensor, "task query embedding"], prototypes: Float[Tensor, "task way embedding"], distance: Distance
) -> Logits:
    """Minus the distance of every pair, or ten times its cosine."""
    if distance == "cosine":
        return 10 * F.normalize(query, dim=-1) @ F.normalize(prototypes, dim=-1).mT
    squared = (query[:, :, None] - prototypes[:, None]).pow(2).sum(-1)
    return -squared if distance == "squared" else -(squared + 1e-12).sqrt()
