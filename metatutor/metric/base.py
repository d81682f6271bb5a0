"""What the metric-based methods share: comparing, and what is known of a class."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from metatutor.backbones import ConvNet
from metatutor.episodes import Episode
from metatutor.learner import EmbeddingLearner

SupportLabels = Int[Tensor, "task support"]
Logits = Float[Tensor, "task query way"]


class MetricLearner(EmbeddingLearner):
    """Compares query images with support images, in a space that the meta-training tasks have shaped.

    A method says how, `compare`. Ways and shots may differ from those of training.

    Args:
        network: the embedding; a last layer, if it has one, is not used.
        finetune_steps: see `EmbeddingLearner`.
        finetune_lr: see `EmbeddingLearner`.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> class NearestMean(MetricLearner):
        ...     def compare(self, episode):
        ...         support, query = self.embed(episode)
        ...         return -torch.cdist(query, class_means(support, episode.support_labels, episode.n_way))
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> NearestMean(ConvNet(filters=4))(Episode(images, labels, images, labels, n_way=5)).argmax(-1).tolist()
        [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]

    Reference:
        Vinyals et al. (2016), section 2.
    """

    network: ConvNet  # pyright: ignore[reportIncompatibleVariableOverride]

    @abstractmethod
    def compare(self, episode: Episode) -> Logits:
        """Logits of the query images, under the parameters as they are."""

    def answer(self, episode: Episode) -> Logits:
        """What comparing says."""
        return self.compare(episode)


def class_means(
    embeddings: Float[Tensor, "task support embedding"], labels: SupportLabels, n_way: int
) -> Float[Tensor, "task way embedding"]:
    """The mean embedding of each class."""
    members = F.one_hot(labels, n_way).to(embeddings.dtype)  # [task, support, way]
    return (members / members.sum(1, keepdim=True)).mT @ embeddings


def of_other_classes(labels: SupportLabels, n_way: int) -> Tensor:
    """Where a support image is not of a class: `[task, 1, way, support]`."""
    return (labels[:, None] != torch.arange(n_way, device=labels.device)[:, None])[:, None]
