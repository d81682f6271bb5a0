"""The regression tasks of Finn, Abbeel & Levine (2017), section 5.1: sine waves of which a few points are known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from metatutor.episodes import Episode, EpisodeSpec, SeededSampler


@dataclass(frozen=True)
class Sinusoids:
    """All waves `y = amplitude * sin(x - phase)` of a range of amplitudes and phases, seen between two `x`.

    Args:
        amplitude: smallest and largest.
        phase: smallest and largest, in radians.
        x: where points are drawn.

    Example:
        >>> Sinusoids().sampler(EpisodeSpec(n_way=1, k_shot=10, n_query=10)).sample(4).support_images.shape
        torch.Size([4, 10, 1])
    """

    amplitude: tuple[float, float] = (0.1, 5.0)
    phase: tuple[float, float] = (0.0, math.pi)
    x: tuple[float, float] = (-5.0, 5.0)

    def __post_init__(self) -> None:
        for name, (low, high) in vars(self).items():
            if not low < high:
                raise ValueError(f"{name} must be two numbers, the smaller first, got {low} and {high}")

    def sampler(self, spec: EpisodeSpec, *, seed: int = 0) -> SinusoidSampler:
        """A sampler of tasks from these waves."""
        return SinusoidSampler(self, spec, seed=seed)


class SinusoidSampler(SeededSampler):
    """Draws waves with `k_shot` support and `n_query` query points each, everything uniformly at random.

    Args:
        waves: where the tasks come from.
        spec: `k_shot` and `n_query` of each task; the target is one number, so `n_way` is 1.
        seed: selects the stream of tasks.
    """

    def __init__(self, waves: Sinusoids, spec: EpisodeSpec, *, seed: int = 0) -> None:
        if spec.n_way != 1:
            raise ValueError(f"a wave has one value at every point, so n_way must be 1, got {spec.n_way}")
        self.waves, self.spec = waves, spec
        super().__init__(seed)

    def sample(self, n_tasks: int) -> Episode:
        """Draw the next `n_tasks` tasks: `images` are the `x` and `labels` the `y`, `[task, point, 1]`."""
        return self.sample_with_waves(n_tasks)[0]

    def sample_with_waves(self, n_tasks: int) -> tuple[Episode, Float[Tensor, "task 2"]]:
        """Draw the next `n_tasks` tasks; also return the amplitude and phase of each."""
        if n_tasks < 1:
            raise ValueError(f"n_tasks must be positive, got {n_tasks}")
        k_shot, n_query = self.spec.k_shot, self.spec.n_query
        # one row of random numbers per task, so that a task does not depend on how many are drawn at once
        drawn = torch.rand(n_tasks, 2 + k_shot + n_query, dtype=torch.float64, generator=self.generator)
        parts = zip(drawn.split([1, 1, k_shot + n_query], dim=1), vars(self.waves).values(), strict=True)
        amplitude, phase, x = (low + (high - low) * part for part, (low, high) in parts)
        y = amplitude * torch.sin(x - phase)
        points = [t[:, part, None].float() for part in (slice(k_shot), slice(k_shot, None)) for t in (x, y)]
        return Episode(*points, n_way=1), torch.cat([amplitude, phase], dim=1).float()
