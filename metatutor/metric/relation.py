"""Relation Networks: the comparison itself is a network, and learns what "the same" means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.backbones import ConvBlock, ConvNet
from metatutor.metric.base import (
    MetricLearner,
    QueryImages,
    QueryLabels,
    SupportImages,
    SupportLabels,
    check_finetuning,
)


@dataclass(frozen=True)
class RelationConfig:
    """The arguments of `Relation`, for a recorded run.

    Args:
        method: the tag of this learner in `config.json`.
        hidden: see `Relation`, as are the others.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> RelationConfig().build(ConvNet(1, filters=8, n_halving=2)).config.hidden
        8

    Reference:
        Sung et al. (2018).
    """

    method: Literal["relation"] = "relation"
    hidden: int = 8
    loss: Literal["mse", "cross-entropy"] = "mse"
    finetune_steps: int = 0
    finetune_lr: float = 0.01

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden must be positive, got {self.hidden}")
        if self.loss not in ("mse", "cross-entropy"):
            raise ValueError(f"loss must be 'mse' or 'cross-entropy', got {self.loss!r}")
        check_finetuning(self.finetune_steps, self.finetune_lr)

    def build(self, network: ConvNet) -> Relation:
        """The learner with these arguments."""
        arguments = {name: value for name, value in vars(self).items() if name != "method"}
        return Relation(network, **arguments)


class Relation(MetricLearner):
    """Answers with the class to which a learnt comparison finds the query most related.

    `score(query, c) = sigmoid(r([F(c), f(query)]))`: the feature maps of the query and of the class, the latter the sum
    over its support images, are laid on top of each other as channels, and a small convolutional network `r` looks at
    both. Training: the mean squared error of the score against 1 for the right class and 0 for the others. The logits
    are those of the sigmoid.

    Args:
        network: whose feature maps `f` are compared; they must be 4×4 pixels or larger, such as the 7×7 of
            `ConvNet(..., pooling="max", n_halving=2)`.
        hidden: width of the last hidden layer of `r`.
        loss: `"mse"` as in the paper, or `"cross-entropy"` over the classes.
        finetune_steps: see `MetricLearner`.
        finetune_lr: see `MetricLearner`.

    Raises:
        ValueError: if an argument is out of range, or the feature maps are too small.

    Example:
        >>> from metatutor import Episode
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> learner = Relation(ConvNet(1, filters=8, pooling="max", n_halving=2))
        >>> learner(Episode(images, labels, images, labels, n_way=5)).shape
        torch.Size([2, 5, 5])

    Reference:
        Sung et al. (2018), equations 1 and 2, figure 2.
    """

    def __init__(
        self,
        network: ConvNet,
        *,
        hidden: int = RelationConfig.hidden,
        loss: Literal["mse", "cross-entropy"] = RelationConfig.loss,
        finetune_steps: int = RelationConfig.finetune_steps,
        finetune_lr: float = RelationConfig.finetune_lr,
    ) -> None:
        super().__init__(network, finetune_steps=finetune_steps, finetune_lr=finetune_lr)
        self.config = RelationConfig("relation", hidden, loss, finetune_steps, finetune_lr)
        filters, size, _ = network.feature_shape
        if size < 4:
            raise ValueError(
                f"feature maps of {size}×{size} pixels leave nothing to compare; give the network n_halving=2"
            )
        policy = network.normalization
        self.blocks = nn.ModuleList(ConvBlock(i, filters, "max", policy) for i in (2 * filters, filters))
        self.hidden = nn.Linear(filters * (size // 4) ** 2, hidden)
        self.score = nn.Linear(hidden, 1)

    def task_logits(
        self, support_images: SupportImages, support_labels: SupportLabels, query_images: QueryImages, n_way: int
    ) -> Float[Tensor, "query way"]:
        """The logit of "the same" for every query image and class."""
        n_support = len(support_images)
        features = self.network.features(torch.cat([support_images, query_images]), n_support)
        support, query = features[:n_support], features[n_support:]
        members = F.one_hot(support_labels, n_way).to(support.dtype)  # [support, way]
        classes = (members.mT @ support.flatten(1)).unflatten(1, support.shape[1:])  # [way, filter, h, w]
        n_query = len(query)
        pairs = torch.cat(
            [classes.expand(n_query, *classes.shape), query[:, None].expand(-1, n_way, -1, -1, -1)], dim=2
        ).flatten(0, 1)
        for block in self.blocks:
            pairs = block(pairs, None)
        return self.score(F.relu(self.hidden(pairs.flatten(1)))).view(n_query, n_way)

    def task_loss(
        self,
        support_images: SupportImages,
        support_labels: SupportLabels,
        query_images: QueryImages,
        query_labels: QueryLabels,
        n_way: int,
    ) -> Float[Tensor, ""]:
        """The mean squared error of the scores, or the cross-entropy of the classes."""
        logits = self.task_logits(support_images, support_labels, query_images, n_way)
        if self.config.loss == "cross-entropy":
            return F.cross_entropy(logits, query_labels)
        return F.mse_loss(logits.sigmoid(), F.one_hot(query_labels, n_way).to(logits.dtype))
