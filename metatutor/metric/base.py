"""What the metric-based methods share: one function of one task, and fine-tuning it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from metatutor.backbones import ConvNet
from metatutor.episodes import Episode
from metatutor.learner import NetworkLearner, Parameters

SupportImages = Float[Tensor, "support channel height width"]
SupportLabels = Int[Tensor, " support"]
QueryImages = Float[Tensor, "query channel height width"]
QueryLabels = Int[Tensor, " query"]


class MetricLearner(NetworkLearner):
    """Compares query images with support images, in a space that the meta-training tasks have shaped.

    A method says how *one* task is answered, `task_logits`, and, if not by cross-entropy, how the answer is judged,
    `task_loss`. Tasks are answered one after the other: they share the network, so nothing is gained by doing them side
    by side, and one task's activations stay in the processor's cache. Ways and shots may differ from those of training.

    With `finetune_steps` the parameters are first adapted to the task, by gradient descent on `task_loss` of the
    support images asked about themselves: what the source article proposes, and none of the papers does. Outer loop
    and fine-tuning do not meet: the outer loop trains without it.

    Args:
        network: the embedding; its last layer is not used.
        finetune_steps: of gradient descent on each support set, in evaluation mode.
        finetune_lr: its learning rate.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> class NearestMean(MetricLearner):
        ...     def task_logits(self, support_images, support_labels, query_images, n_way):
        ...         support, query = self.embed(support_images, query_images)
        ...         return -torch.cdist(query, class_means(support, support_labels, n_way))
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> NearestMean(ConvNet(1, filters=4))(Episode(images, labels, images, labels, n_way=5)).argmax(-1).tolist()
        [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]

    Reference:
        Vinyals et al. (2016), section 2.
    """

    def __init__(self, network: ConvNet, *, finetune_steps: int = 0, finetune_lr: float = 0.01) -> None:
        super().__init__(network)
        check_finetuning(finetune_steps, finetune_lr)
        self.finetune_steps, self.finetune_lr = finetune_steps, finetune_lr

    @abstractmethod
    def task_logits(
        self, support_images: SupportImages, support_labels: SupportLabels, query_images: QueryImages, n_way: int
    ) -> Float[Tensor, "query way"]:
        """Logits of the query images of one task."""

    def task_loss(
        self,
        support_images: SupportImages,
        support_labels: SupportLabels,
        query_images: QueryImages,
        query_labels: QueryLabels,
        n_way: int,
    ) -> Float[Tensor, ""]:
        """What training minimises, of one task: the mean cross-entropy of its query images."""
        return F.cross_entropy(self.task_logits(support_images, support_labels, query_images, n_way), query_labels)

    def forward(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """Compare the query images of every task with its support images, after fine-tuning if asked for."""
        logits, n_way = [], episode.n_way
        for support, labels, query in zip(
            episode.support_images, episode.support_labels, episode.query_images, strict=True
        ):
            if self.finetune_steps and not self.training:
                tuned = self.finetune(support, labels, n_way)
                logits.append(self._with(tuned, self.task_logits, support, labels, query, n_way))
            else:
                logits.append(self.task_logits(support, labels, query, n_way))
        return torch.stack(logits)

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The mean of `task_loss` over the tasks."""
        tasks = zip(
            episode.support_images,
            episode.support_labels,
            episode.query_images,
            episode.query_labels,
            strict=True,
        )
        return torch.stack([self.task_loss(*task, episode.n_way) for task in tasks]).mean()

    def embed(self, support_images: SupportImages, query_images: QueryImages) -> tuple[Tensor, Tensor]:
        """Embeddings of one task's images, `[support, embedding]` and `[query, embedding]`, in one call."""
        n_support = len(support_images)
        embeddings = self.network.embed(torch.cat([support_images, query_images]), n_support)
        return embeddings[:n_support], embeddings[n_support:]

    def finetune(self, support_images: SupportImages, support_labels: SupportLabels, n_way: int) -> Parameters:
        """A task's own parameters by name, after gradient descent on `task_loss` of its support set."""
        own = {name: p.detach() for name, p in self.named_parameters()}
        with torch.enable_grad():
            for _ in range(self.finetune_steps):
                own = {name: p.requires_grad_() for name, p in own.items()}
                task = (support_images, support_labels, support_images, support_labels, n_way)
                loss = self._with(own, self.task_loss, *task)
                gradients = torch.autograd.grad(loss, list(own.values()), allow_unused=True, materialize_grads=True)
                descent = zip(own.items(), gradients, strict=True)
                own = {name: (p - self.finetune_lr * g).detach() for (name, p), g in descent}
        return own

    def _with(self, parameters: Parameters, method: Callable[..., Tensor], *args: Any) -> Tensor:
        """What a method of this learner returns under other parameters."""
        return functional_call(_Method(self, method), {f"learner.{n}": p for n, p in parameters.items()}, args)


class _Method(nn.Module):
    """A method of a module as the `forward` of another, for `functional_call`."""

    def __init__(self, learner: nn.Module, method: Callable[..., Tensor]) -> None:
        super().__init__()
        self.learner, self.method = learner, method

    def forward(self, *args: Any) -> Tensor:
        return self.method(*args)


def class_means(
    embeddings: Float[Tensor, "support embedding"], labels: SupportLabels, n_way: int
) -> Float[Tensor, "way embedding"]:
    """The mean embedding of each class."""
    members = F.one_hot(labels, n_way).to(embeddings.dtype)  # [support, way]
    return (members / members.sum(0)).mT @ embeddings


def check_finetuning(steps: int, lr: float) -> None:
    """Raise a `ValueError` if the arguments of fine-tuning are out of range."""
    if steps < 0:
        raise ValueError(f"finetune_steps must not be negative, got {steps}")
    if not lr > 0:
        raise ValueError(f"finetune_lr must be positive, got {lr}")
