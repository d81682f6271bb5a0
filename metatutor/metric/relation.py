"""Relation Networks: the comparison itself is a network, and learns what "the same" means."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.backbones import NORMALIZATIONS, ConvBlock
from metatutor.checks import check_choice, check_positive
from metatutor.embedding import EmbeddingLearner, Logits
from metatutor.episodes import Episode
from metatutor.learner import Loss


class Relation(EmbeddingLearner):
    """Answers with the class that a learned comparison finds most related to the query.

    `score(query, c) = sigmoid(r([F(c), f(query)]))`: the feature maps of the query and of the class (for the latter,
    the mean over its support images) are stacked as channels, and a small convolutional network `r` looks at both.
    Training: the mean squared error of the score against 1 for the right class and 0 for the others. The logits are
    those of the sigmoid.

    Args:
        network: the one whose feature maps `f` are compared; they must be 4×4 pixels or larger, such as the 7×7 of
            `ConvNet(..., pooling="max", n_halving=2)`, or those of a layer of any network, named with
            `backbone(..., features=)`.
        hidden: width of the last hidden layer of `r`.
        objective: `"mse"` as in the paper, or `"cross-entropy"` over the classes; `loss`, if given, replaces it.
        over_shots: `"mean"`, with which the number of shots may change after training, or `"sum"` as in the paper, with
            which it may not: five shots then give feature maps five times as large as one shot. With one shot the two
            agree.
        finetune_steps: steps of gradient descent on each support set at test time (see `EmbeddingLearner`).
        finetune_lr: learning rate of fine-tuning.
        loss: function of logits and labels, in place of `objective`.

    Raises:
        ValueError: if the feature maps are too small, or unknown.

    Example:
        >>> from metatutor import ConvNet, Episode
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> Relation(ConvNet(filters=8, pooling="max", n_halving=2))(Episode(images, labels, images)).shape
        torch.Size([2, 5, 5])

    Reference:
        Sung et al. (2018), equations 1 and 2, figure 2.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        hidden: int = 8,
        objective: Literal["mse", "cross-entropy"] = "mse",
        over_shots: Literal["mean", "sum"] = "mean",
        finetune_steps: int = 0,
        finetune_lr: float = 0.01,
        loss: Loss | None = None,
    ) -> None:
        super().__init__(network, finetune_steps=finetune_steps, finetune_lr=finetune_lr, loss=loss)
        check_positive(hidden=hidden)
        check_choice("objective", objective, ["mse", "cross-entropy"])
        check_choice("over_shots", over_shots, ["mean", "sum"])
        self.by_squares, self.over_shots = objective == "mse" and loss is None, over_shots
        if self.network.feature_shape is None:
            raise ValueError(
                "Relation compares feature maps; say which layer's: backbone(network, features=its name, "
                "image_shape=(channels, height, width))"
            )
        filters, height, width = self.network.feature_shape
        if height != width or height < 4:
            raise ValueError(
                f"feature maps of {height}×{width} pixels leave nothing to compare; they must be square, 4×4 or "
                "larger: give a ConvNet n_halving=2, or name an earlier layer"
            )
        policy: Any = self.network.normalization if self.network.normalization in NORMALIZATIONS else "group"
        self.first, self.second = (ConvBlock(i, filters, "max", policy) for i in (2 * filters, filters))
        self.hidden = nn.Linear(filters * (height // 4) ** 2, hidden)
        self.score = nn.Linear(hidden, 1)

    def answer(self, episode: Episode) -> Logits:
        """The logit of "the same" for every query image and class."""
        n_way = episode.n_way

        def of_task(support_images: Tensor, members: Tensor, query_images: Tensor) -> Tensor:
            n_support = len(support_images)
            maps = self.network.features(torch.cat([support_images, query_images]), n_support)
            classes = (members.mT @ maps[:n_support].flatten(1)).unflatten(1, maps.shape[1:])  # [way, filter, h, w]
            if self.network.normalization == "support":  # support images are compared too: they give the statistics
                return self.relate(maps, classes, n_support)[n_support:]
            return self.relate(maps[n_support:], classes)

        members = F.one_hot(episode.support_labels, n_way).to(episode.support_images.dtype)  # [task, support, way]
        if self.over_shots == "mean":
            members = members / members.sum(1, keepdim=True)
        return self.of_tasks(of_task, episode.support_images, members, episode.query_images)

    def relate(
        self, images: Float[Tensor, "n filter h w"], classes: Float[Tensor, "way filter h w"], n_support: int = 0
    ) -> Float[Tensor, "n way"]:
        """The logit of "the same" for every pair of feature maps; the first `n_support` rows are of support images."""
        n, n_way = len(images), len(classes)
        of_support = n_support * n_way or None
        pairs = self.second(self.first.of_pairs(classes, images, of_support), of_support)
        return self.score(F.relu(self.hidden(pairs.flatten(1)))).view(n, n_way)

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The mean squared error of the scores, or the loss of the classes."""
        if not self.by_squares:
            return super().meta_loss(episode)
        logits = self.answer(episode)
        return F.mse_loss(logits.sigmoid(), F.one_hot(episode.query_labels, episode.n_way).to(logits.dtype))
