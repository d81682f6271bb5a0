"""What the memory-based methods share: support sets that come one image after another, in random order."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from metatutor.backbones import Embedding
from metatutor.episodes import ClassImages, Episode, EpisodeSpec, StreamSampler
from metatutor.learner import EmbeddingLearner, check_finetuning

Labels = Int[Tensor, "task support"]
Logits = Float[Tensor, "task query way"]


class MemoryLearner(EmbeddingLearner):
    """Puts the support set into a memory, and answers the query images from it; no query sees another.

    A label is something that such a method reads, so that it is made for tasks of `n_way` classes.

    Args:
        network: the embedding; a last layer, if it has one, is not used.
        n_way: classes in a task.
        finetune_steps: see `EmbeddingLearner`.
        finetune_lr: see `EmbeddingLearner`.

    Raises:
        ValueError: if an argument is out of range, or an episode has other ways.

    Example:
        >>> from metatutor import ConvNet
        >>> from metatutor.memory import SNAIL
        >>> isinstance(SNAIL(ConvNet(filters=8), n_way=5), MemoryLearner)
        True

    Reference:
        Santoro et al. (2016), section 2.
    """

    def __init__(
        self, network: Embedding, *, n_way: int = 5, finetune_steps: int = 0, finetune_lr: float = 0.01
    ) -> None:
        check_sizes(n_way=n_way)
        super().__init__(network, finetune_steps=finetune_steps, finetune_lr=finetune_lr)
        self.n_way = n_way

    def sampler(self, classes: ClassImages, spec: EpisodeSpec, *, seed: int = 0) -> StreamSampler:
        """Tasks whose support images come in random order."""
        return StreamSampler(classes, spec, seed=seed)

    def test_sampler(self, classes: ClassImages, spec: EpisodeSpec, *, seed: int = 0) -> StreamSampler:
        """Tasks whose support images come in random order, as in training."""
        return StreamSampler(classes, spec, seed=seed)

    def check_ways(self, episode: Episode) -> None:
        """Raise a `ValueError` if the episode has other ways than the labels that this learner reads."""
        if episode.n_way != self.n_way:
            raise ValueError(f"the episode has n_way = {episode.n_way} but this learner was made for {self.n_way}")


def check_memory(n_way: int, finetune_steps: int, finetune_lr: float, **sizes: int) -> None:
    """Raise a `ValueError` if an argument that memory-based methods share, or a size, is out of range."""
    check_sizes(n_way=n_way, **sizes)
    check_finetuning(finetune_steps, finetune_lr)


def check_sizes(**sizes: int) -> None:
    """Raise a `ValueError` if a size is not positive."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size}")
