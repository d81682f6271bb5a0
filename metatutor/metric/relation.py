"""Relation Networks: the comparison itself is a network, and learns what "the same" means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.backbones import ConvBlock, ConvNet
from metatutor.episodes import Episode
from metatutor.learner import check_finetuning, each_task
from metatutor.metric.base import Logits, MetricLearner


@dataclass(frozen=True)
class RelationConfig:
    """The arguments of `Relation`, for a recorded run.

    Args:
        method: the tag of this learner in `config.json`.
        hidden: see `Relation`, as are the others.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> RelationConfig().build(ConvNet(filters=8, n_halving=2)).config.hidden
        8

    Reference:
        Sung et al. (2018).
    """

    method: Literal["relation"] = "relation"
    hidden: int = 8
    loss: Literal["mse", "cross-entropy"] = "mse"
    over_shots: Literal["mean", "sum"] = "mean"
    finetune_steps: int = 0
    finetune_lr: float = 0.01

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden must be positive, got {self.hidden}")
        if self.loss not in ("mse", "cross-entropy"):
            raise ValueError(f"loss must be 'mse' or 'cross-entropy', got {self.loss!r}")
        if self.over_shots not in ("mean", "sum"):
            raise ValueError(f"over_shots must be 'mean' or 'sum', got {self.over_shots!r}")
        check_finetuning(self.finetune_steps, self.finetune_lr)

    def build(self, network: ConvNet) -> Relation:
        """The learner with these arguments."""
        arguments = {name: value for name, value in vars(self).items() if name != "method"}
        return Relation(network, **arguments)


class Relation(MetricLearner):
    """Answers with the class to which a learnt comparison finds the query most related.

    `score(query, c) = sigmoid(r([F(c), f(query)]))`: the feature maps of the query and of the class, the latter
    their mean over its support images, are laid on top of each other as channels, and a small convolutional network
    `r` looks at both. Training: the mean squared error of the score against 1 for the right class and 0 for the
    others. The logits are those of the sigmoid.

    Args:
        network: whose feature maps `f` are compared; they must be 4×4 pixels or larger, such as the 7×7 of
            `ConvNet(..., pooling="max", n_halving=2)`.
        hidden: width of the last hidden layer of `r`.
        loss: `"mse"` as in the paper, or `"cross-entropy"` over the classes.
        over_shots: `"mean"`, with which the number of shots may change after training, or `"sum"` as in the paper, with
            which it may not: five shots then make feature maps five times as large as one. With one shot they agree.
        finetune_steps: see `EmbeddingLearner`.
        finetune_lr: see `EmbeddingLearner`.

    Raises:
        ValueError: if an argument is out of range, or the feature maps are too small.

    Example:
        >>> from metatutor import Episode
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> learner = Relation(ConvNet(filters=8, pooling="max", n_halving=2))
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
        over_shots: Literal["mean", "sum"] = RelationConfig.over_shots,
        finetune_steps: int = RelationConfig.finetune_steps,
        finetune_lr: float = RelationConfig.finetune_lr,
    ) -> None:
        super().__init__(network, finetune_steps=finetune_steps, finetune_lr=finetune_lr)
        self.config = RelationConfig("relation", hidden, loss, over_shots, finetune_steps, finetune_lr)
        filters, size, _ = network.feature_shape
        if size < 4:
            raise ValueError(
                f"feature maps of {size}×{size} pixels leave nothing to compare; give the network n_halving=2"
            )
        policy = network.normalization
        self.first, self.second = (ConvBlock(i, filters, "max", policy) for i in (2 * filters, filters))
        self.hidden = nn.Linear(filters * (size // 4) ** 2, hidden)
        self.score = nn.Linear(hidden, 1)

    def compare(self, episode: Episode) -> Logits:
        """The logit of "the same" for every query image and class."""
        n_way = episode.n_way

        def of_task(support_images: Tensor, members: Tensor, query_images: Tensor) -> Tensor:
            n_support = len(support_images)
            maps = self.network.features(torch.cat([support_images, query_images]), n_support)
            classes = (members.mT @ maps[:n_support].flatten(1)).unflatten(1, maps.shape[1:])  # [way, filter, h, w]
            if self.network.normalization == "support":  # support images are compared too: theirs are the statistics
                return self.relate(maps, classes, n_support)[n_support:]
            return self.relate(maps[n_support:], classes)

        members = F.one_hot(episode.support_labels, n_way).to(episode.support_images.dtype)  # [task, support, way]
        if self.config.over_shots == "mean":
            members = members / members.sum(1, keepdim=True)
        return each_task(of_task, episode.support_images, members, episode.query_images)

    def relate(
        self, images: Float[Tensor, "n filter h w"], classes: Float[Tensor, "way filter h w"], n_support: int = 0
    ) -> Float[Tensor, "n way"]:
        """The logit of "the same" for every pair of feature maps; the first `n_support` rows are of support images."""
        n, n_way = len(images), len(classes)
        of_support = n_support * n_way or None
        pairs = self.second(self.first.of_pairs(classes, images, of_support), of_support)
        return self.score(F.relu(self.hidden(pairs.flatten(1)))).view(n, n_way)

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The mean squared error of the scores, or the cross-entropy of the classes."""
        if self.config.loss == "cross-entropy":
            return super().meta_loss(episode)
        logits = self.compare(episode)
        return F.mse_loss(logits.sigmoid(), F.one_hot(episode.query_labels, episode.n_way).to(logits.dtype))
