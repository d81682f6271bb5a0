"""Learners that embed every image of a task and answer from the embeddings; and their fine-tuning."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.backbones import Embedding, backbone
from metatutor.checks import check_not_negative, check_positive
from metatutor.episodes import Episode
from metatutor.functional import Parameters, call_method, gradients_of, leaves, one_by_one
from metatutor.learner import Loss, NetworkLearner

Logits = Float[Tensor, "task query way"]
Support = Float[Tensor, "task support embedding"]
Query = Float[Tensor, "task query embedding"]

_MOST_REMEMBERED = 2**27  # numbers, 512 MiB in full precision


class EmbeddingLearner(NetworkLearner):
    """Embeds every image of a task and answers from the embeddings, in one pass: no steps are taken on a task.

    A method defines how tasks are answered, `answer`, and, if not by cross-entropy, how answers are judged,
    `meta_loss`.

    With `finetune_steps` the parameters are first adapted to the task, by gradient descent on `finetune_loss`, with the
    support images as their own queries. This is what the source article proposes; of the papers, only one row of
    Vinyals et al. (2016) does it. The outer loop trains without fine-tuning.

    Args:
        network: the embedding. If it is one of the package's networks and has a last layer, that layer is not used; the
            outputs of any other module are the embeddings (see `backbone`).
        finetune_steps: steps of gradient descent on each support set, in evaluation mode.
        finetune_lr: its learning rate.
        loss: function of logits and labels; default: cross-entropy.

    Example:
        >>> import torch.nn.functional as F
        >>> from metatutor import ConvNet
        >>> class NearestSum(EmbeddingLearner):
        ...     def answer(self, episode):
        ...         support, query = self.embed(episode)
        ...         return query @ (F.one_hot(episode.support_labels).float().mT @ support).mT
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> NearestSum(ConvNet(filters=4))(Episode(images, labels, images)).shape
        torch.Size([2, 5, 5])

    Reference:
        Vinyals et al. (2016), section 2.
    """

    network: Embedding  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self, network: nn.Module, *, finetune_steps: int = 0, finetune_lr: float = 0.01, loss: Loss | None = None
    ) -> None:
        check_not_negative(finetune_steps=finetune_steps)
        check_positive(finetune_lr=finetune_lr)
        embedding = backbone(network, head="")
        if not isinstance(embedding, Embedding):
            raise ValueError(
                f"{type(self).__name__} compares embeddings, and {type(network).__name__} does not say what enters its "
                "last layer; take a ConvNet, or any nn.Module that embeds"
            )
        super().__init__(embedding, loss)
        self.finetune_steps, self.finetune_lr = finetune_steps, finetune_lr
        self._remembered: _Remembered | None = None

    @abstractmethod
    def answer(self, episode: Episode) -> Logits:
        """Logits of the query images, with the current parameters."""

    def forward(self, episode: Episode) -> Logits:
        """Answer; in evaluation mode, after fine-tuning on each support set if there are steps for it."""
        if self.training or not self.finetune_steps:
            return self.answer(episode)
        return torch.cat([call_method(self, self.finetune(task), self.answer, task) for task in episode])

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The mean loss of the query images, without fine-tuning."""
        return self.loss(self.answer(episode).flatten(0, 1), episode.query_labels.flatten())

    def finetune_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """What fine-tuning minimises: by default, the meta-loss."""
        return self.meta_loss(episode)

    def embed(self, episode: Episode) -> tuple[Support, Query]:
        """Embeddings of the support and of the query images; each task is normalised separately."""
        n_support = episode.support_images.shape[1]
        images = torch.cat([episode.support_images, episode.query_images], dim=1)
        embed = self._remembered or self.network.embed
        embeddings = self.of_tasks(lambda of_task: embed(of_task, n_support), images)
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))  # what is compared, exactly
        return embeddings[:, :n_support], embeddings[:, n_support:]

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Within the block an image that comes again is not embedded again, where nothing but itself can matter.

        That is on a CPU, with a network of the package with group normalisation, and without fine-tuning.
        """
        alone = self.network.normalization == "group" and not self.finetune_steps and self.device.type == "cpu"
        self._remembered = _Remembered(self.network) if alone else None
        try:
            yield
        finally:
            self._remembered = None

    def of_tasks(self, function, *tensors: Tensor) -> Tensor:
        """A function's result for every task's tensors, each task processed separately.

        Side by side on a GPU; one after the other on a CPU, where one task's activations stay in the cache.
        """
        return self.map_tasks(function, *tensors) if tensors[0].is_cuda else one_by_one(function, *tensors)

    def finetune(self, task: Episode) -> Parameters:
        """One task's own parameters by name, after gradient descent on `finetune_loss` of its support set."""
        asked = replace(task, query_images=task.support_images, query_labels=task.support_labels)
        own = {name: p.detach() for name, p in self.meta_parameters().items()}
        for _ in range(self.finetune_steps):
            own = leaves(own)
            with torch.enable_grad():
                gradients = gradients_of(call_method(self, own, self.finetune_loss, asked), list(own.values()))
            own = {n: p.detach() - self.finetune_lr * g for (n, p), g in zip(own.items(), gradients, strict=True)}
        return own


class _Remembered:
    """A network's embeddings, each computed once: evaluations ask for the same images hundreds of times."""

    def __init__(self, network: Embedding) -> None:
        self.network, self.size = network, 0
        self.known: dict[bytes, Tensor] = {}

    def __call__(self, images: Tensor, n_support: int | None = None) -> Tensor:
        """Embeddings of images, `[image, channel, height, width]`."""
        rows = images.detach().flatten(1).contiguous().view(torch.uint8).numpy()
        keys = [blake2b(row, digest_size=16).digest() for row in rows]
        new = {key: i for i, key in enumerate(keys) if key not in self.known}
        found = dict(zip(new, self.network.embed(images[list(new.values())]), strict=True)) if new else {}
        embeddings = torch.stack([found[key] if key in found else self.known[key] for key in keys])
        if self.size < _MOST_REMEMBERED:
            self.known |= found
            self.size += sum(embedding.numel() for embedding in found.values())
        return embeddings
