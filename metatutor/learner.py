"""The contract every method keeps: an episode goes in, logits for its query images come out."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.episodes import ClassImages, Episode, EpisodeSampler, EpisodeSpec


class Learner(nn.Module, ABC):
    """Something that learns a task from its support set and answers its query images.

    `forward` and `meta_loss` are all that training and evaluation know of a method. A method that takes
    gradient steps at test time takes them inside `forward`, also under `torch.no_grad()`. No method reads
    `episode.query_labels` in `forward`.

    Attributes:
        normalization: the policy of its network (see `ConvNet`), or `"none"`.
        transductive: whether the answer for one query image may depend on the other query images.

    Example:
        >>> import torch
        >>> class AlwaysTheFirst(Learner):
        ...     def forward(self, episode):
        ...         return torch.eye(episode.n_way)[torch.zeros_like(episode.query_labels)]
        >>> images, labels = torch.zeros(1, 2, 1, 28, 28), torch.tensor([[0, 1]])
        >>> AlwaysTheFirst()(Episode(images, labels, images, labels, n_way=2)).argmax(-1)
        tensor([[0, 0]])

    Reference:
        Vinyals et al. (2016), section 2.2: train in the way you will be tested.
    """

    transductive: bool = False
    normalization: str = "none"

    @abstractmethod
    def forward(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """Logits of every query image of every task."""

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """What the outer loop minimises: the mean cross-entropy of the query images."""
        return F.cross_entropy(self(episode).flatten(0, 1), episode.query_labels.flatten())

    def sampler(self, classes: ClassImages, spec: EpisodeSpec, *, seed: int = 0) -> EpisodeSampler:
        """What the outer loop draws for this method from the meta-training classes: episodes, as a rule."""
        return EpisodeSampler(classes, spec, seed=seed)

    def finish(self) -> None:
        """Drop what only the outer loop needed, before the parameters are recorded: nothing, as a rule."""
