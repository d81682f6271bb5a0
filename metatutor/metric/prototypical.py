"""Prototypical Networks: a class is the mean of its embeddings; the nearest mean wins."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.checks import check_choice
from metatutor.embedding import EmbeddingLearner, Logits, Query
from metatutor.episodes import Episode
from metatutor.functional import class_means
from metatutor.learner import Loss

Distance = Literal["squared", "euclidean", "cosine"]


class Prototypical(EmbeddingLearner):
    """Answers with the class whose prototype, the mean of its support embeddings, is nearest.

    `prototype[c] = mean of f(x) over the support images x of class c`, `logits[c] = -|f(query) - prototype[c]|²`.

    The square matters: with it the logits are linear in `f(query)` up to a term that all classes share, and the method
    is the linear classifier that fits Gaussian classes of equal spread. `"euclidean"` leaves the square out,
    `"cosine"` compares directions; both are here to show the difference.

    Args:
        network: the embedding `f` (see `EmbeddingLearner`).
        distance: `"squared"` (Euclidean), `"euclidean"`, or `"cosine"`, whose logits are 10 times the cosine.
        finetune_steps: steps of gradient descent on each support set at test time (see `EmbeddingLearner`).
        finetune_lr: learning rate of fine-tuning.
        loss: of logits and labels; default: cross-entropy.

    Example:
        >>> import torch
        >>> from metatutor import ConvNet, Episode
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> Prototypical(ConvNet(filters=8))(Episode(images, labels, images, labels, n_way=5)).shape
        torch.Size([2, 5, 5])

    Reference:
        Snell, Swersky & Zemel (2017), equations 1, 2 and 8.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        distance: Distance = "squared",
        finetune_steps: int = 0,
        finetune_lr: float = 0.01,
        loss: Loss | None = None,
    ) -> None:
        super().__init__(network, finetune_steps=finetune_steps, finetune_lr=finetune_lr, loss=loss)
        check_choice("distance", distance, get_args(Distance))
        self.distance: Distance = distance

    def answer(self, episode: Episode) -> Logits:
        """Minus the distance of each query image to each prototype."""
        support, query = self.embed(episode)
        prototypes = class_means(support, episode.support_labels, episode.n_way)
        return similarity(query, prototypes, self.distance)


def similarity(query: Query, prototypes: Float[Tensor, "task way embedding"], distance: Distance) -> Logits:
    """Minus the distance of every pair, or ten times its cosine."""
    if distance == "cosine":
        return 10 * F.normalize(query, dim=-1) @ F.normalize(prototypes, dim=-1).mT
    squared = (query[:, :, None] - prototypes[:, None]).pow(2).sum(-1)
    return -squared if distance == "squared" else -(squared + 1e-12).sqrt()
