"""What every meta-gradient needs: tasks in chunks that fit the cache, and gradients that are known already."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from metatutor.backbones import Network
from metatutor.episodes import Episode

Gradients = Sequence[Tensor]
_ACTIVATION_BYTES, _KEPT_BYTES = 128 * 2**20, 64 * 2**20  # measured with benchmarks/maml_step.py


def chunks(
    episode: Episode, network: Network, tasks_per_chunk: int | None = None, copies_kept: int = 0
) -> Iterator[Episode]:
    """The tasks of an episode, as many at once as are to be adapted side by side.

    Args:
        episode: a batch of tasks.
        network: what all their images go through.
        tasks_per_chunk: how many; default: on a GPU all, on a CPU as many as keep the largest activation within
            128 MiB, and the copies of parameters within 64 MiB. Chunks are then as equal as can be, and as few: larger
            ones would cost more in page faults than they save.
        copies_kept: how many copies of the network's parameters are kept for each task at a time.

    Example:
        >>> from metatutor import ConvNet
        >>> images, labels = torch.rand(5, 2, 1, 28, 28), torch.arange(2).repeat(5, 1)
        >>> [len(chunk) for chunk in chunks(Episode(images, labels, images, labels, 2), ConvNet(2), tasks_per_chunk=2)]
        [2, 2, 1]
    """
    largest = getattr(network, "largest_activation", 0)  # other modules than ours need not say
    kept = copies_kept * sum(p.numel() for p in network.parameters())
    size = tasks_per_chunk or _tasks_that_fit(episode, largest, kept)
    return (episode.tasks(slice(i, i + size)) for i in range(0, len(episode), size))


def _tasks_that_fit(episode: Episode, largest_activation: int, numbers_kept: int) -> int:
    if episode.query_images.device.type != "cpu":
        return len(episode)
    n_images = episode.support_images.shape[1] + episode.query_images.shape[1]
    size = len(episode) * episode.query_images.element_size()
    n_chunks = math.ceil(
        max(1, size * n_images * largest_activation / _ACTIVATION_BYTES, size * numbers_kept / _KEPT_BYTES)
    )
    return math.ceil(len(episode) / min(n_chunks, len(episode)))


def with_known_gradient(parts: Sequence[tuple[float, Tensor, Gradients]], parameters: Sequence[Tensor]) -> Tensor:
    """A loss that `backward` finds the gradient of already computed.

    Args:
        parts: of the loss: weight, value and gradient in the parameters.
        parameters: one for each gradient; the frozen ones are passed over.

    Returns:
        The weighted sum, which can be differentiated once.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> with_known_gradient([(0.5, torch.tensor(6.0), [torch.tensor([2.0, 4.0])])], [weight]).backward()
        >>> weight.grad
        tensor([1., 2.])
    """
    value = sum(weight * value.detach() for weight, value, _ in parts)
    scaled = [[weight * g for g in gradients] for weight, _, gradients in parts]
    gradients = [sum(of_one) for of_one in zip(*scaled, strict=True)]
    return _KnownGradient.apply(value, gradients, *parameters)


class _KnownGradient(torch.autograd.Function):
    """A scalar whose gradient in the parameters is already known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # create_graph
            raise RuntimeError("a meta-gradient known beforehand cannot be differentiated again; see tasks_per_chunk")
        return None, None, *(scale * gradient for gradient in ctx.gradients)


class Compiled:
    """A function of tensors, traced once for every set of shapes, and compiled.

    Tracing sees through `autograd.grad` and `vmap`: what is compiled is the whole of it, as one graph of products and
    sums. Whatever the function reads besides its tensors is fixed at the first call.

    Args:
        function: of tensors, returning tensors.

    Example:
        >>> twice = Compiled(lambda x: [2 * x])  # compiles when called

    Reference:
        Ansel et al. (2024), PyTorch 2.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]]) -> None:
        self.function = function
        self.compiled: dict[Any, Callable[..., Sequence[Tensor]]] = {}

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        shapes = tuple((t.shape, t.dtype, t.device) for t in tensors)
        if shapes not in self.compiled:
            self.compiled[shapes] = torch.compile(make_fx(self.function)(*tensors))
        with torch.no_grad():
            return self.compiled[shapes](*tensors)
