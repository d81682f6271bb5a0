"""What several test files ask for: one episode again and again; whether two tensors are the same but for rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metatutor.episodes import Episode


class Always:
    """Classes of which every task is the same."""

    def __init__(self, episode: Episode) -> None:
        self.episode = episode

    def sampler(self, spec: Any, *, seed: int = 0) -> Always:
        return self

    def sample(self, n_tasks: int) -> Episode:
        return self.episode

    def state_dict(self) -> dict[str, Tensor]:
        return {}


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-9, atol=1e-9)
