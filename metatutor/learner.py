"""The contract every method keeps: an episode goes in, logits for its query images come out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from metatutor.allocator import keep_freed_memory_once
from metatutor.backbones import Embedding, Network
from metatutor.episodes import ClassImages, Episode, EpisodeSampler, EpisodeSpec

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

    def test_sampler(self, classes: ClassImages, spec: EpisodeSpec, *, seed: int = 0) -> EpisodeSampler:
        """What draws the tasks that this method is tested on."""
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


class EmbeddingLearner(NetworkLearner):
    """Embeds every image of a task and answers from the embeddings, in one pass: no steps are taken on a task.

    A method says how tasks are answered, `answer`, and, if not by cross-entropy, how the answer is judged, `meta_loss`.

    With `finetune_steps` the parameters are first adapted to the task, by gradient descent on `finetune_loss` of the
    support images asked about themselves: what the source article proposes, and none of the papers does. Outer loop
    and fine-tuning do not meet: the outer loop trains without it.

    Args:
        network: the embedding; a last layer, if it has one, is not used.
        finetune_steps: of gradient descent on each support set, in evaluation mode.
        finetune_lr: its learning rate.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> from metatutor import ConvNet
        >>> class NearestSum(EmbeddingLearner):
        ...     def answer(self, episode):
        ...         support, query = self.embed(episode)
        ...         return query @ (F.one_hot(episode.support_labels).float().mT @ support).mT
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> NearestSum(ConvNet(filters=4))(Episode(images, labels, images, labels, n_way=5)).shape
        torch.Size([2, 5, 5])

    Reference:
        Vinyals et al. (2016), section 2.
    """

    network: Embedding  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, network: Embedding, *, finetune_steps: int = 0, finetune_lr: float = 0.01) -> None:
        super().__init__(network)
        check_finetuning(finetune_steps, finetune_lr)
        self.finetune_steps, self.finetune_lr = finetune_steps, finetune_lr

    @abstractmethod
    def answer(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """Logits of the query images, under the parameters as they are."""

    def forward(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """Answer, in evaluation mode after fine-tuning on each support set if asked for."""
        if self.training or not self.finetune_steps:
            return self.answer(episode)
        tasks = [episode.task(i) for i in range(len(episode))]
        return torch.cat([self.under(self.finetune(task), self.answer, task) for task in tasks])

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The mean cross-entropy of the query images, without fine-tuning."""
        return F.cross_entropy(self.answer(episode).flatten(0, 1), episode.query_labels.flatten())

    def finetune_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """What fine-tuning descends: the meta-loss, as a rule."""
        return self.meta_loss(episode)

    def embed(
        self, episode: Episode
    ) -> tuple[Float[Tensor, "task support embedding"], Float[Tensor, "task query embedding"]]:
        """Embeddings of the support and of the query images; each task's are normalised by themselves."""
        n_support = episode.support_images.shape[1]
        images = torch.cat([episode.support_images, episode.query_images], dim=1)
        embeddings = each_task(lambda of_task: self.network.embed(of_task, n_support), images)
        return embeddings[:, :n_support], embeddings[:, n_support:]

    def finetune(self, task: Episode) -> Parameters:
        """One task's own parameters by name, after gradient descent on `finetune_loss` of its support set."""
        asked = replace(task, query_images=task.support_images, query_labels=task.support_labels)
        own = {name: p.detach() for name, p in self.named_parameters()}
        with torch.enable_grad():
            for _ in range(self.finetune_steps):
                own = {name: p.requires_grad_() for name, p in own.items()}
                loss = self.under(own, self.finetune_loss, asked)
                gradients = torch.autograd.grad(loss, list(own.values()), allow_unused=True, materialize_grads=True)
                descent = zip(own.items(), gradients, strict=True)
                own = {name: (p - self.finetune_lr * g).detach() for (name, p), g in descent}
        return own


def each_task(network: Callable[..., Tensor], *tensors: Tensor, side_by_side: bool | None = None) -> Tensor:
    """What a network makes of every task's tensors, each task by itself.

    Side by side on a GPU; one after the other on a CPU, where one task's activations stay in the cache.
    """
    if tensors[0].is_cuda if side_by_side is None else side_by_side:
        return vmap(network)(*tensors)
    return torch.stack([network(*of_task) for of_task in zip(*tensors, strict=True)])


def check_finetuning(steps: int, lr: float) -> None:
    """Raise a `ValueError` if the arguments of fine-tuning are out of range."""
    if steps < 0:
        raise ValueError(f"finetune_steps must not be negative, got {steps}")
    if not lr > 0:
        raise ValueError(f"finetune_lr must be positive, got {lr}")


def without_method(config: Any) -> dict[str, Any]:
    """The arguments of a learner in its configuration."""
    return {name: value for name, value in vars(config).items() if name != "method"}


def preprocess(values: Float[Tensor, " n"], p: float = 10.0) -> Float[Tensor, "n 2"]:
    """Size and sign of numbers of any magnitude: `(log|x| / p, sign(x))`, or `(-1, e^p x)` where `|x| < e^-p`.

    Args:
        values: gradients or losses.
        p: how small a number still counts.

    Returns:
        Two numbers each, from about -1 to 1.

    Example:
        >>> preprocess(torch.tensor([1.0, -math.exp(-5), 0.0]))
        tensor([[ 0.0000,  1.0000],
                [-0.5000, -1.0000],
                [-1.0000,  0.0000]])

    Reference:
        Andrychowicz et al. (2016), appendix A.
    """
    large = values.abs() >= math.exp(-p)
    size = values.abs().clamp_min(math.exp(-p)).log() / p
    return torch.stack([torch.where(large, size, -1.0), torch.where(large, values.sign(), math.exp(p) * values)], dim=1)


class _Method(nn.Module):
    """A method of a module as the `forward` of another, for `functional_call`."""

    def __init__(self, learner: nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.learner, self.method = learner, method

    def forward(self, *arguments: Any) -> Any:
        return self.method(*arguments)
