"""RL²: a recurrent network that learns a world by trying; what it has seen is in its state, and no weight changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from metatutor.checks import check_not_negative, check_positive, check_simulated
from metatutor.episodes import Episode, EpisodeSpec, SeededSampler
from metatutor.learner import Learner

Tasks = Float[Tensor, "task number"]


@runtime_checkable
class World(Protocol):
    """Tasks of one kind, many of which are played side by side: `Bandits` or `Processes`, or one of your own.

    A task is a row of numbers, `[task, number]`; a position in it is a tensor `[task, ...]`.
    """

    @property
    def n_actions(self) -> int:
        """How many actions there are."""
        ...

    @property
    def n_observed(self) -> int:
        """How many numbers are seen before each action."""
        ...

    @property
    def n_numbers(self) -> int:
        """How many numbers make a task."""
        ...

    def draw(self, n: int, generator: torch.Generator) -> Tasks:
        """New tasks."""
        ...

    def begin(self, tasks: Tasks) -> Any:
        """Where play starts."""
        ...

    def observed(self, now: Any) -> Float[Tensor, "task observed"]:
        """What is seen at the current position."""
        ...

    def step(self, tasks: Tasks, now: Any, actions: Tensor, generator: torch.Generator) -> tuple[Any, Tensor, Tensor]:
        """Where actions lead, what they pay, and what they would have paid on average."""
        ...


class Trials:
    """Tasks of a world, as `train` draws them: the label of a task's only image is its numbers.

    Args:
        world: the world of the tasks.
    """

    def __init__(self, world: World) -> None:
        self.world = world

    def sampler(self, spec: EpisodeSpec, *, seed: int = 0) -> TrialSampler:
        """A sampler of tasks."""
        return TrialSampler(self.world, seed)


class TrialSampler(SeededSampler):
    """Draws tasks and, as images, the numbers that seed all randomness."""

    def __init__(self, world: World, seed: int = 0) -> None:
        super().__init__(seed)
        self.world = world

    def sample(self, n_tasks: int) -> Episode:
        """Draw the next `n_tasks` tasks: `images` `[task, 1, 1]`, `labels` `[task, 1, number]`."""
        chance = torch.rand(n_tasks, 1, 1, generator=self.generator)
        numbers = self.world.draw(n_tasks, self.generator)[:, None]
        return Episode(chance, numbers, chance, numbers, n_way=self.world.n_numbers)


@dataclass(frozen=True)
class Played:
    """What was seen before each step, what was done, what it paid and would have on average, `[task, step, ...]`."""

    observed: Float[Tensor, "task step observed"]
    actions: Int64[Tensor, "task step"]
    paid: Float[Tensor, "task step"]
    expected: Float[Tensor, "task step"]


class RL2(Learner):
    """A GRU that is told what it sees, its last action and what that paid, and chooses the next action.

    To add up what each action paid in each place, a network must multiply. It is spared that: it is told where it was,
    once for each action, with zeros except for the one it took, and the same times what that paid.

    It is trained as an actor with a critic: PPO with one pass over each batch, where there is nothing yet to clip. In
    training the task is known, though never to the actor: the critic sees it, and what an action pays on average
    replaces what it happened to pay. Neither changes the expectation of the gradient; both make it less noisy.

    Args:
        world: what it is trained in.
        hidden_size: numbers in its state.
        horizon: steps of a task in training.
        trace: how far the surprise of a step is attributed to the actions before it, in generalised advantages.
        entropy: weight of a bonus for undecided choices.

    Reference:
        Duan et al. (2016), RL², section 2; Wang et al. (2016), Learning to reinforcement learn, with the actor-critic
        used here.
    """

    def __init__(
        self,
        world: World,
        *,
        hidden_size: int = 64,
        horizon: int = 10,
        trace: float = 0.95,
        entropy: float = 0.05,
    ) -> None:
        check_positive(hidden_size=hidden_size, horizon=horizon)
        check_not_negative(trace=trace, entropy=entropy)
        super().__init__()
        self.world, self.ways, self.exact_gradient = world, world.n_numbers, False
        self.horizon, self.trace, self.entropy = horizon, trace, entropy
        self.memory = nn.GRU(world.n_observed * (1 + 2 * world.n_actions), hidden_size, batch_first=True)
        self.actor = nn.Linear(hidden_size, world.n_actions)
        judge = nn.Linear(hidden_size + world.n_numbers, hidden_size)
        self.critic = nn.Sequential(judge, nn.Tanh(), nn.Linear(hidden_size, 1))
        nn.init.zeros_(self.actor.weight)

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The actor's, the critic's and minus the entropy's part, on tasks played by the current policy."""
        tasks = episode.query_labels[:, 0]
        played = self.play(tasks, episode.chance())
        states, _ = self.memory(self._told(played))
        known = tasks[:, None].expand(-1, states.shape[1], -1)
        log_chances, worth = self.actor(states).log_softmax(-1), self.critic(torch.cat([states, known], -1))[..., 0]
        left = torch.arange(states.shape[1], 0, -1)
        values = (left * worth).detach()  # the critic predicts what each of the steps left will pay
        later = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
        surprise = played.expected + later - values
        sums = [surprise[:, -1]]
        for now in surprise.flip(1).unbind(1)[1:]:
            sums.append(now + self.trace * sums[-1])
        found = torch.stack(sums[::-1], dim=1)
        better = (found - found.mean(0)) / (found.std() + 1e-8)
        chosen = log_chances.gather(2, played.actions[..., None])[..., 0]
        undecided = -(log_chances.exp() * log_chances).sum(-1).mean()
        critic = F.mse_loss(worth, (values + found) / left)
        return -(better * chosen).mean() + 0.5 * critic - self.entropy * undecided

    def forward(self, episode: Episode) -> Float[Tensor, "task query action"]:
        """How often each action is taken, per step."""
        played = self.play(episode.query_labels[:, 0], episode.chance())
        shares = F.one_hot(played.actions, self.world.n_actions).float().mean(1, keepdim=True)
        return shares.expand(-1, episode.query_images.shape[1], -1)

    @torch.no_grad()
    def play(self, tasks: Tasks, generator: torch.Generator, horizon: int | None = None) -> Played:
        """Tasks played to the end of the horizon, side by side; a ValueError if the player is not on the CPU."""
        check_simulated(self.actor.weight)
        now, state = self.world.begin(tasks), torch.zeros(1, len(tasks), self.memory.hidden_size)
        told, steps = torch.zeros(len(tasks), self.memory.input_size - self.world.n_observed), []
        for _ in range(horizon or self.horizon):
            observed = self.world.observed(now)
            seen, state = self.memory(torch.cat([observed, told], dim=1)[:, None], state)
            actions = torch.multinomial(self.actor(seen[:, 0]).softmax(-1), 1, generator=generator)[:, 0]
            now, paid, expected = self.world.step(tasks, now, actions, generator)
            steps.append((observed, actions, paid, expected))
            told = self._done(observed, actions, paid)
        return Played(*(torch.stack(part, dim=1) for part in zip(*steps, strict=True)))

    def _told(self, played: Played) -> Float[Tensor, "task step told"]:
        """What it is told before each step: what it sees, and what it did and was paid last."""
        done = self._done(played.observed, played.actions, played.paid)[:, :-1]
        return torch.cat([played.observed, F.pad(done, (0, 0, 1, 0))], dim=-1)

    def _done(self, observed: Tensor, actions: Tensor, paid: Tensor) -> Float[Tensor, "*batch done"]:
        """What it saw, one copy for each action, all but one of them zeros; and the same times what it was paid."""
        one_hot = F.one_hot(actions, self.world.n_actions).to(observed.dtype)
        done = (one_hot[..., None] * observed[..., None, :]).flatten(-2)
        return torch.cat([done, paid[..., None] * done], dim=-1)
