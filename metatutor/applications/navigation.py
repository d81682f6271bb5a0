"""Navigation in the plane: walk to a goal that is not shown; only the distance is, as what each step costs.

The dynamics are functions of batches of any shape, for learning; two environments wrap them, for Gymnasium.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Float
from torch import Tensor

from metatutor.episodes import Episode, EpisodeSpec

HORIZON, STRIDE, REACH = 100, 0.1, 0.5  # steps; the longest step in x and y; goals lie so far from 0 in x and y
SIDE = 4.0  # nobody walks farther in x and y

Places = Float[Tensor, "*batch 2"]


def goals(n: int, *, seed: int = 0) -> Float[Tensor, "goal 2"]:
    """Goals of new tasks, uniformly from a square around the start."""
    if n < 1:
        raise ValueError(f"the number of goals must be positive, got {n}")
    return REACH * (2 * torch.rand(n, 2, generator=torch.Generator().manual_seed(seed)) - 1)


def check_goals(places: Places) -> None:
    """Raise a `ValueError` if a goal is none, or lies outside the square."""
    if places.shape[-1:] != (2,) or not bool((places.abs() <= REACH + 1e-6).all()):
        raise ValueError(f"a goal has two coordinates from {-REACH:g} to {REACH:g}, got {places.tolist()}")


def moved(places: Places, actions: Places) -> Places:
    """Where steps lead: a tenth of an action, which counts from -1 to 1 in x and y."""
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
        """What draws goals."""
        return GoalSampler(seed)


class GoalSampler:
    """Draws goals and, as images, the numbers that chance comes from."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def state_dict(self) -> dict[str, Tensor]:
        """Where the stream of tasks is."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken."""
        self.generator.set_state(state["generator"])

    def sample(self, n_tasks: int) -> Episode:
        """Draw the next `n_tasks` tasks: `images` `[task, 1, 1]`, `labels` `[task, 1, 2]`."""
        chance, places = torch.rand(n_tasks, 3, generator=self.generator)[:, None].split([1, 2], dim=2)
        goal = REACH * (2 * places - 1)
        return Episode(chance, goal, chance, goal, n_way=2)


_PLACE = gymnasium.spaces.Box(-SIDE, SIDE, (2,), np.float32)
_ACTION = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)


class Navigation(gymnasium.Env[np.ndarray, np.ndarray]):
    """One walk of 100 steps from the origin to a goal; a new goal at each `reset`, unless one is given.

    Args:
        goal: two numbers from -0.5 to 0.5; None: any.

    Raises:
        ValueError: if the goal lies elsewhere, or an action has another shape.

    Reference:
        Finn, Abbeel & Levine (2017), section 5.3; here a step costs the distance, not its square.
    """

    observation_space, action_space = _PLACE, _ACTION

    def __init__(self, goal: Any = None) -> None:
        self.fixed = None if goal is None else torch.as_tensor(goal, dtype=torch.float32)
        if self.fixed is not None:
            check_goals(self.fixed)
        self.place, self.goal, self.steps = torch.zeros(2), torch.zeros(2), 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Go back to the origin."""
        super().reset(seed=seed)
        drawn = torch.from_numpy(self.np_random.uniform(-REACH, REACH, 2).astype(np.float32))
        self.place, self.goal, self.steps = torch.zeros(2), drawn if self.fixed is None else self.fixed, 0
        return self.place.numpy(), {"goal": self.goal.numpy()}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Walk; the walk is cut off after 100 steps."""
        self.place = moved(self.place, _checked(action, (2,)))
        self.steps += 1
        return self.place.numpy(), rewards(self.place, self.goal).item(), False, self.steps >= HORIZON, {}


class NavigationVector(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Many walks side by side, each with a goal of its own; all begin anew in the step after the hundredth.

    Args:
        goals: `[walk, 2]`.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 - as Gymnasium wants it

    def __init__(self, goals: Float[Tensor, "walk 2"]) -> None:
        check_goals(goals)
        self.goals, self.num_envs = goals, len(goals)
        self.single_observation_space, self.single_action_space = _PLACE, _ACTION
        self.observation_space, self.action_space = batch_space(_PLACE, len(goals)), batch_space(_ACTION, len(goals))
        self.places, self.steps = torch.zeros(len(goals), 2), 0

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Everybody goes back to the origin."""
        super().reset(seed=seed)
        self.places, self.steps = torch.zeros(self.num_envs, 2), 0
        return self.places.numpy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Walk; what is returned is Gymnasium's observation, reward, terminated, truncated and information."""
        never = np.zeros(self.num_envs, bool)
        given = _checked(actions, (self.num_envs, 2))
        if self.steps >= HORIZON:
            places, about = self.reset()
            return places, np.zeros(self.num_envs, np.float32), never, never, about
        self.places, self.steps = moved(self.places, given), self.steps + 1
        cut = np.full(self.num_envs, self.steps >= HORIZON)
        return self.places.numpy(), rewards(self.places, self.goals).numpy(), never, cut, {}


def _checked(action: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    given = torch.as_tensor(np.asarray(action), dtype=torch.float32)
    if given.shape != shape or not bool(given.isfinite().all()):
        raise ValueError(f"expected finite actions of shape {list(shape)}, got {list(given.shape)}: {given.tolist()}")
    return given
