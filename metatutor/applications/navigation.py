"""Navigation in the plane: walk to a hidden goal; only its distance is revealed, as the cost of each step.

The dynamics are functions of batches of any shape; `environments` wraps them for Gymnasium.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from metatutor.episodes import Episode, EpisodeSpec, SeededSampler

HORIZON, STRIDE, REACH = 100, 0.1, 0.5  # steps; the longest step in x and y; how far from 0 goals lie in x and y
SIDE = 4.0  # nobody walks farther in x and y

Places = Float[Tensor, "*batch 2"]


def goals(n: int, *, seed: int = 0) -> Float[Tensor, "goal 2"]:
    """Goals of new tasks, uniformly from a square around the start."""
    if n < 1:
        raise ValueError(f"the number of goals must be positive, got {n}")
    return REACH * (2 * torch.rand(n, 2, generator=torch.Generator().manual_seed(seed)) - 1)


def check_goals(places: Places) -> None:
    """Raise a `ValueError` if a goal is invalid, or lies outside the square."""
    if places.shape[-1:] != (2,) or not bool((places.abs() <= REACH + 1e-6).all()):
        raise ValueError(f"a goal has two coordinates from {-REACH:g} to {REACH:g}, got {places.tolist()}")


def moved(places: Places, actions: Places) -> Places:
    """Where steps lead: a tenth of an action, which is clipped to -1 to 1 in x and y."""
    return (places + STRIDE * actions.clamp(-1, 1)).clamp(-SIDE, SIDE)


def rewards(places: Places, goals: Float[Tensor, "*#batch 2"]) -> Float[Tensor, "*batch"]:
    """Minus the distance to the goal."""
    return -torch.linalg.vector_norm(places - goals, dim=-1)


def dynamics(of: Float[Tensor, "task 2"]) -> Callable[[Places, Places], tuple[Places, Float[Tensor, "*batch"]]]:
    """The dynamics of tasks, for walks `[task, walk, 2]`: places and actions to next places and rewards."""
    check_goals(of)

    def step(places: Places, actions: Places) -> tuple[Places, Float[Tensor, "*batch"]]:
        following = moved(places, actions)
        return following, rewards(following, of[:, None])

    return step


class Goals:
    """Tasks of navigation, as `train` draws them: the label of a task's only image is its goal."""

    def sampler(self, spec: EpisodeSpec, *, seed: int = 0) -> GoalSampler:
        """A sampler of goals."""
        return GoalSampler(seed)


class GoalSampler(SeededSampler):
    """Draws goals and, as images, the numbers that seed all randomness."""

    def sample(self, n_tasks: int) -> Episode:
        """Draw the next `n_tasks` tasks: `images` `[task, 1, 1]`, `labels` `[task, 1, 2]`."""
        chance, places = torch.rand(n_tasks, 3, generator=self.generator)[:, None].split([1, 2], dim=2)
        goal = REACH * (2 * places - 1)
        return Episode(chance, goal, chance, goal, n_way=2)
