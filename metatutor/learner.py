"""The contract every method keeps: an episode goes in, logits for its query images come out."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from metatutor.allocator import keep_freed_memory_once
from metatutor.backbones import ConvNet
from metatutor.episodes import ClassImages, Episode, EpisodeSampler, EpisodeSpec

Parameters = dict[str, Tensor]


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


class NetworkLearner(Learner):
    """A learner of one network, of which each task may have its own parameters, `[task, ...]` by name.

    Args:
        network: maps images and `n_support` to logits; its normalisation policy is the learner's.

    Example:
        >>> class OneForAll(NetworkLearner):
        ...     def forward(self, episode):
        ...         everyones = {n: p.expand(len(episode), *p.shape) for n, p in self.network.named_parameters()}
        ...         return self.query_logits(episode, everyones)
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> OneForAll(ConvNet(5, filters=4))(Episode(images, labels, images, labels, n_way=5)).shape
        torch.Size([2, 5, 5])

    Reference:
        Finn, Abbeel & Levine (2017), section 3.1.
    """

    network: ConvNet

    def __init__(self, network: ConvNet) -> None:
        super().__init__()
        self.network = network
        keep_freed_memory_once()

    @property
    def transductive(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether queries are normalised together, so that one may change another's logits."""
        return self.network.transductive

    @property
    def normalization(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The network's normalisation policy."""
        return self.network.normalization

    def support_losses(self, episode: Episode, parameters: Parameters) -> Float[Tensor, " task"]:
        """Each task's mean cross-entropy over its support set: what gradient descent on a task descends."""

        def loss(of_task: Parameters, images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(self.network, of_task, (images,)), labels)

        return vmap(loss)(parameters, episode.support_images, episode.support_labels)

    def query_logits(self, episode: Episode, parameters: Parameters) -> Float[Tensor, "task query way"]:
        """The logits of the query images; support images are seen only by the `"support"` normalisation."""

        def logits(of_task: Parameters, support: Tensor, query: Tensor) -> Tensor:
            if self.network.normalization != "support":
                return functional_call(self.network, of_task, (query,))
            images = torch.cat([support, query])
            return functional_call(self.network, of_task, (images, len(support)))[len(support) :]

        return vmap(logits)(parameters, episode.support_images, episode.query_images)
