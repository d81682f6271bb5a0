"""Prototypical Networks: a class is the mean of its embeddings; the nearest mean wins."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.checks import check_choice, check_sizes
from metatutor.embedding import EmbeddingLearner, Logits, Query, Support
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

    An episode compares each query image with one set of prototypes. The same embeddings allow more comparisons: with
    `in_turn`, the images of a class change places in training, so that each is a support image as often as any other,
    and the losses are averaged. Embedding images is what takes time, and they are embedded only once.

    Args:
        network: the embedding `f` (see `EmbeddingLearner`).
        distance: `"squared"` (Euclidean), `"euclidean"`, or `"cosine"`, whose logits are 10 times the cosine.
        in_turn: whether, in training, every image of a class is a support image in turn.
        parts: in how many equal parts the embedding falls, such as those of networks side by side
            (`ResNet(members=...)`). In training, each part answers alone and has its own loss, so that such networks
            learn apart; elsewhere all of them answer together, with the whole embedding.
        finetune_steps: steps of gradient descent on each support set at test time (see `EmbeddingLearner`).
        finetune_lr: learning rate of fine-tuning.
        loss: function of logits and labels; default: cross-entropy.

    Example:
        >>> import torch
        >>> from metatutor import ConvNet, Episode
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> Prototypical(ConvNet(filters=8))(Episode(images, labels, images, labels, n_way=5)).shape
        torch.Size([2, 5, 5])

    Reference:
        Snell, Swersky & Zemel (2017), equations 1, 2 and 8; what episodes leave uncompared: Laenen & Bertinetto (2021).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        distance: Distance = "squared",
        in_turn: bool = False,
        parts: int = 1,
        finetune_steps: int = 0,
        finetune_lr: float = 0.01,
        loss: Loss | None = None,
    ) -> None:
        super().__init__(network, finetune_steps=finetune_steps, finetune_lr=finetune_lr, loss=loss)
        check_choice("distance", distance, get_args(Distance))
        check_sizes(parts=parts)
        self.distance: Distance = distance
        self.in_turn, self.parts = in_turn, parts

    def answer(self, episode: Episode) -> Logits:
        """Minus the distance of each query image to each prototype."""
        return self._answer(*self.embed(episode), episode)

    def _answer(self, support: Support, query: Query, episode: Episode) -> Logits:
        with torch.autocast(query.device.type, enabled=False):
            prototypes = class_means(support, episode.support_labels, episode.n_way)
        return similarity(query, prototypes, self.distance)

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The mean loss of the query images; with `in_turn`, also over the tasks in which the images change places.

        Raises:
            ValueError: with `in_turn`, if a class of a task has more images than another; if the embedding does not
                fall into equal `parts`.
        """
        support, query = self.embed(episode)
        if support.shape[-1] % self.parts:
            size = support.shape[-1]
            raise ValueError(f"an embedding of {size} numbers has no {self.parts} equal parts; change parts")
        loss_of = self._loss_in_turn if self.in_turn else self._loss
        parts = zip(support.chunk(self.parts, -1), query.chunk(self.parts, -1), strict=True)
        return torch.stack([loss_of(*part, episode) for part in parts]).mean()

    def _loss(self, support: Support, query: Query, episode: Episode) -> Float[Tensor, ""]:
        return self.loss(self._answer(support, query, episode).flatten(0, 1), episode.query_labels.flatten())

    def _loss_in_turn(self, support: Support, query: Query, episode: Episode) -> Float[Tensor, ""]:
        labels = torch.cat([episode.support_labels, episode.query_labels], dim=1)
        n_way, n_images = episode.n_way, labels.shape[1] // episode.n_way
        if (F.one_hot(labels, n_way).sum(1) != n_images).any():
            raise ValueError("in_turn needs equally many images of every class; use in_turn=False for such tasks")
        embeddings = torch.cat([support, query], dim=1)
        order = labels.argsort(stable=True)[..., None].expand_as(embeddings)
        by_class = embeddings.gather(1, order).unflatten(1, (n_way, n_images))  # [task, way, image, embedding]
        k_shot = episode.support_labels.shape[1] // n_way
        asked = torch.arange(n_way, device=labels.device).repeat_interleave(n_images - k_shot).repeat(len(labels))
        losses = []
        for turn in range(n_images):
            support, query = by_class.roll(turn, dims=2).split([k_shot, n_images - k_shot], dim=2)
            logits = similarity(query.flatten(1, 2), support.mean(2), self.distance)
            losses.append(self.loss(logits.flatten(0, 1), asked))
        return torch.stack(losses).mean()

    def finetune_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The mean loss of the query images; no images change places."""
        return super().meta_loss(episode)


def similarity(query: Query, prototypes: Float[Tensor, "task way embedding"], distance: Distance) -> Logits:
    """Minus the distance of every pair, or ten times its cosine; in full precision, even under autocast."""
    with torch.autocast(query.device.type, enabled=False):
        if distance == "cosine":
            return 10 * F.normalize(query, dim=-1) @ F.normalize(prototypes, dim=-1).mT
        if distance == "euclidean":
            return -((query[:, :, None] - prototypes[:, None]).pow(2).sum(-1) + 1e-12).sqrt()
        # |q - p|² multiplied out: a matrix product, because the differences of all pairs would fill memory
        lengths = query.pow(2).sum(-1, keepdim=True) + prototypes.pow(2).sum(-1)[:, None]
        return 2 * query @ prototypes.mT - lengths
