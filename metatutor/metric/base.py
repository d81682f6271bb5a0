"""What the metric-based methods share: embedding a batch of tasks, and fine-tuning on one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import vmap

from metatutor.backbones import ConvNet
from metatutor.episodes import Episode
from metatutor.learner import NetworkLearner, Parameters

SupportLabels = Int[Tensor, "task support"]
Logits = Float[Tensor, "task query way"]


class MetricLearner(NetworkLearner):
    """Compares query images with support images, in a space that the meta-training tasks have shaped.

    A method says how tasks are answered, `compare`, and, if not by cross-entropy, how the answer is judged,
    `meta_loss`. Ways and shots may differ from those of training.

    With `finetune_steps` the parameters are first adapted to the task, by gradient descent on `meta_loss` of the
    support images asked about themselves: what the source article proposes, and none of the papers does. Outer loop
    and fine-tuning do not meet: the outer loop trains without it.

    Args:
        network: the embedding; a last layer, if it has one, is not used.
        finetune_steps: of gradient descent on each support set, in evaluation mode.
        finetune_lr: its learning rate.

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

    def __init__(self, network: ConvNet, *, finetune_steps: int = 0, finetune_lr: float = 0.01) -> None:
        super().__init__(network)
        check_finetuning(finetune_steps, finetune_lr)
        self.finetune_steps, self.finetune_lr = finetune_steps, finetune_lr

    @abstractmethod
    def compare(self, episode: Episode) -> Logits:
        """Logits of the query images, under the parameters as they are."""

    def forward(self, episode: Episode) -> Logits:
        """Compare, in evaluation mode after fine-tuning on each support set if asked for."""
        if self.training or not self.finetune_steps:
            return self.compare(episode)
        tasks = [episode.task(i) for i in range(len(episode))]
        return torch.cat([self.under(self.finetune(task), self.compare, task) for task in tasks])

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The mean cross-entropy of the query images, without fine-tuning."""
        return F.cross_entropy(self.compare(episode).flatten(0, 1), episode.query_labels.flatten())

    def embed(
        self, episode: Episode
    ) -> tuple[Float[Tensor, "task support embedding"], Float[Tensor, "task query embedding"]]:
        """Embeddings of the support and of the query images; each task's are normalised by themselves."""
        n_support = episode.support_images.shape[1]
        images = torch.cat([episode.support_images, episode.query_images], dim=1)
        embeddings = each_task(lambda of_task: self.network.embed(of_task, n_support), images)
        return embeddings[:, :n_support], embeddings[:, n_support:]

    def finetune(self, task: Episode) -> Parameters:
        """One task's own parameters by name, after gradient descent on `meta_loss` of its support set."""
        asked = replace(task, query_images=task.support_images, query_labels=task.support_labels)
        own = {name: p.detach() for name, p in self.named_parameters()}
        with torch.enable_grad():
            for _ in range(self.finetune_steps):
                own = {name: p.requires_grad_() for name, p in own.items()}
                loss = self.under(own, self.meta_loss, asked)
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


def class_means(
    embeddings: Float[Tensor, "task support embedding"], labels: SupportLabels, n_way: int
) -> Float[Tensor, "task way embedding"]:
    """The mean embedding of each class."""
    members = F.one_hot(labels, n_way).to(embeddings.dtype)  # [task, support, way]
    return (members / members.sum(1, keepdim=True)).mT @ embeddings


def of_other_classes(labels: SupportLabels, n_way: int) -> Tensor:
    """Where a support image is not of a class: `[task, 1, way, support]`."""
    return (labels[:, None] != torch.arange(n_way, device=labels.device)[:, None])[:, None]


def check_finetuning(steps: int, lr: float) -> None:
    """Raise a `ValueError` if the arguments of fine-tuning are out of range."""
    if steps < 0:
        raise ValueError(f"finetune_steps must not be negative, got {steps}")
    if not lr > 0:
        raise ValueError(f"finetune_lr must be positive, got {lr}")
