"""The contract every method keeps: an episode goes in, logits for its query images come out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from metatutor.allocator import keep_freed_memory_once
from metatutor.backbones import Network
from metatutor.episodes import Episode, EpisodeSpec

Parameters = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]  # of outputs [n, way] and labels [n], or of outputs and targets [n, output]


def task_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of class labels, or the mean squared error of real-valued targets."""
    return F.mse_loss(outputs, targets) if targets.is_floating_point() else F.cross_entropy(outputs, targets)


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

    def sampler(self, classes: Any, spec: EpisodeSpec, *, seed: int = 0) -> Any:
        """What the outer loop draws for this method from the meta-training classes: episodes, as a rule."""
        return classes.sampler(spec, seed=seed)

    def finish(self) -> None:
        """Drop what only the outer loop needed, before the parameters are recorded: nothing, as a rule."""


class NetworkLearner(Learner):
    """A learner of one network, of which each task may have its own parameters, `[task, ...]` by name.

    Args:
        network: maps images and `n_support` to logits; its normalisation policy is the learner's.
        loss: of the outputs for a task's images and its labels; default: `task_loss`, which takes class labels or
            real-valued targets.

    Example:
        >>> class OneForAll(NetworkLearner):
        ...     def forward(self, episode):
        ...         everyones = {n: p.expand(len(episode), *p.shape) for n, p in self.network.named_parameters()}
        ...         return self.query_logits(episode, everyones)
        >>> from metatutor import ConvNet
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> OneForAll(ConvNet(5, filters=4))(Episode(images, labels, images, labels, n_way=5)).shape
        torch.Size([2, 5, 5])

    Reference:
        Finn, Abbeel & Levine (2017), section 3.1.
    """

    network: Network
    loss: Loss = staticmethod(task_loss)

    def __init__(self, network: Network, loss: Loss | None = None) -> None:
        super().__init__()
        self.network = network
        if loss is not None:
            self.loss = loss
        keep_freed_memory_once()

    @property
    def transductive(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether queries are normalised together, so that one may change another's logits."""
        return self.network.transductive

    @property
    def normalization(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The network's normalisation policy."""
        return self.network.normalization

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The mean loss of the query images."""
        return self.loss(self(episode).flatten(0, 1), episode.query_labels.flatten(0, 1))

    def under(self, parameters: Parameters, method: Callable[..., Any], *arguments: Any) -> Any:
        """What a method of this learner returns under other parameters, given by their names in the learner."""
        return functional_call(_Method(self, method), {f"learner.{n}": p for n, p in parameters.items()}, arguments)

    def support_losses(self, episode: Episode, parameters: Parameters) -> Float[Tensor, " task"]:
        """Each task's loss on its support set: what gradient descent on a task descends."""

        def loss(of_task: Parameters, images: Tensor, labels: Tensor) -> Tensor:
            return self.loss(functional_call(self.network, of_task, (images,)), labels)

        return vmap(loss)(parameters, episode.support_images, episode.support_labels)

    def query_logits(self, episode: Episode, parameters: Parameters) -> Float[Tensor, "task query way"]:
        """The logits of the query images; support images are seen only by the `"support"` normalisation."""

        def logits(of_task: Parameters, support: Tensor, query: Tensor) -> Tensor:
            if self.network.normalization != "support":
                return functional_call(self.network, of_task, (query,))
            images = torch.cat([support, query])
            return functional_call(self.network, of_task, (images, len(support)))[len(support) :]

        return vmap(logits)(parameters, episode.support_images, episode.query_images)


class _Method(nn.Module):
    """A method of a module as the `forward` of another, for `functional_call`."""

    def __init__(self, learner: nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.learner, self.method = learner, method

    def forward(self, *arguments: Any) -> Any:
        return self.method(*arguments)
