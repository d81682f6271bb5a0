"""Siamese networks: learn to say whether two pictures show the same class; then match."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.backbones import embedding_size
from metatutor.embedding import EmbeddingLearner, Logits
from metatutor.episodes import Episode
from metatutor.functional import class_maxima


class Siamese(EmbeddingLearner):
    """Learns whether two images show the same class, and answers with the class of the best match.

    `P(same | x, y) = sigmoid(sum over j of weight[j] |f(x)[j] - f(y)[j]| + bias)`. Training sees pairs, not classes:
    the mean binary cross-entropy over every query image with every support image. The logit of a class is that of its
    best matching support image.

    Two things differ from the paper: `f` ends in a ReLU, not a sigmoid, and pairs are not drawn half equal, half
    unequal; a task has `n_way - 1` unequal pairs for each equal one. Both gave better results.

    Args:
        network: the embedding `f` (see `EmbeddingLearner`).
        finetune_steps: steps of gradient descent on each support set at test time (see `EmbeddingLearner`).
        finetune_lr: learning rate of fine-tuning.

    Example:
        >>> import torch
        >>> from metatutor import ConvNet, Episode
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> Siamese(ConvNet(filters=8))(Episode(images, labels, images, labels, n_way=5)).shape
        torch.Size([2, 5, 5])

    Reference:
        Koch, Zemel & Salakhutdinov (2015), section 3.1 and 3.2; one-shot matching: section 4.3.
    """

    def __init__(self, network: nn.Module, *, finetune_steps: int = 0, finetune_lr: float = 0.01) -> None:
        super().__init__(network, finetune_steps=finetune_steps, finetune_lr=finetune_lr)
        size = embedding_size(self.network, "Siamese")
        self.same = nn.Linear(size, 1)
        nn.init.constant_(self.same.weight, -(size**-0.5))  # it starts as a distance: larger is less same

    def pair_logits(self, episode: Episode) -> Float[Tensor, "task query support"]:
        """The logit of "the same" for every query image with every support image."""
        support, query = self.embed(episode)
        return self.same((query[:, :, None] - support[:, None]).abs()).squeeze(-1)

    def answer(self, episode: Episode) -> Logits:
        """Each class's best match."""
        return class_maxima(self.pair_logits(episode), episode.support_labels, episode.n_way)

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The mean binary cross-entropy over all pairs of a query and a support image."""
        same = episode.query_labels[:, :, None] == episode.support_labels[:, None]
        return F.binary_cross_entropy_with_logits(self.pair_logits(episode), same.to(episode.support_images.dtype))
