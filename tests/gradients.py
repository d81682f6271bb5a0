"""What the tests of gradient methods share: gradients as vectors, parameters drawn from a seed, tasks of points."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from metatutor.episodes import Episode
from metatutor.learner import Learner


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers in one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def close(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> bool:
    """Of the same shape, and equal but for so much."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=tolerance)


def drawn(module: Any, seed: int = 0) -> Any:
    """The module in float64, every parameter random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 2
    return module


def gradient_of(learner: Learner, episode: Episode) -> Tensor:
    """The gradient of the meta-loss in all parameters that have one, as a vector."""
    learner.zero_grad()
    learner.meta_loss(episode).backward()
    return flat(p.grad for p in learner.parameters() if p.grad is not None)


def slopes(learner: Learner, episode: Episode, n_directions: int = 4, step: float = 1e-6) -> list[tuple[float, float]]:
    """Central differences of the meta-loss along random directions, and what its gradient says of them."""
    gradient, parameters = gradient_of(learner, episode), list(learner.parameters())
    start, generator = flat(parameters).detach(), torch.Generator().manual_seed(1)

    def loss_at(position: Tensor) -> float:
        nn.utils.vector_to_parameters(position, parameters)
        with torch.no_grad():
            return learner.meta_loss(episode).item()

    found = []
    for _ in range(n_directions):
        direction = torch.randn(len(start), dtype=torch.float64, generator=generator)
        slope = (loss_at(start + step * direction) - loss_at(start - step * direction)) / (2 * step)
        found.append((slope, (gradient @ direction).item()))
    nn.utils.vector_to_parameters(start, parameters)
    return found


def regression(n_support: int = 4, n_query: int = 5, *, n_tasks: int = 3, n_inputs: int = 1, seed: int = 0) -> Episode:
    """Tasks of random points."""
    generator = torch.Generator().manual_seed(seed)
    shape = n_tasks, n_support + n_query
    x, y = (torch.randn(*shape, n, dtype=torch.float64, generator=generator) for n in (n_inputs, 1))
    return Episode(x[:, :n_support], y[:, :n_support], x[:, n_support:], y[:, n_support:], n_way=1)
