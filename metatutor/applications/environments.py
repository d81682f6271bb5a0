"""The worlds of `navigation` and `tabular` as environments of Gymnasium, which needs `metatutor[acting]`."""

from __future__ import annotations

from typing import Any, SupportsInt

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from metatutor.applications.navigation import HORIZON, REACH, SIDE, check_goals, moved, rewards
from metatutor.applications.tabular import Processes

try:
    import gymnasium
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
except ImportError:
    raise ImportError("environments need Gymnasium: pip install 'metatutor[acting]'") from None

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
    """Many walks side by side, each with a goal of its own; all start again in the step after the hundredth.

    Args:
        goals: `[walk, 2]`.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 - as Gymnasium expects it

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


class Process(gymnasium.Env[int, SupportsInt]):
    """One round of one random process; `reset` keeps the process, unless `options={"new": True}`.

    Args:
        processes: what kind.
        seed: seed of the process.

    Raises:
        ValueError: if an action does not exist.
    """

    def __init__(self, processes: Processes | None = None, *, seed: int = 0) -> None:
        self.processes = processes or Processes()
        self.observation_space = gymnasium.spaces.Discrete(self.processes.n_states)  # pyright: ignore
        self.action_space = gymnasium.spaces.Discrete(self.processes.n_actions)  # pyright: ignore
        self.chance = torch.Generator().manual_seed(seed)
        self.numbers = self.processes.draw(1, self.chance)
        self.now = self.processes.begin(self.numbers)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Go back to state 0."""
        super().reset(seed=seed)
        if seed is not None:
            self.chance.manual_seed(seed)
        if options and options.get("new"):
            self.numbers = self.processes.draw(1, self.chance)
        self.now = self.processes.begin(self.numbers)
        return 0, {}

    def step(self, action: SupportsInt) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """Take an action; the round is cut off after `length` steps, in the state that the last one led to."""
        actions = torch.tensor([int(action)])
        self.now, paid, _ = self.processes.step(self.numbers, self.now, actions, self.chance)
        return int(self.now[0, 0]), paid.item(), False, int(self.now[0, 1]) == 0, {}
