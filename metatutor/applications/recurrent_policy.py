"""RL²: a recurrent network that learns to learn a bandit; what it has seen is in its state, and no weight changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from metatutor.applications.bandits import Bandits, pull
from metatutor.checks import check_not_negative, check_positive
from metatutor.episodes import Episode, EpisodeSpec
from metatutor.learner import Learner


class BanditTasks:
    """Bandits, as `train` draws them: the label of a task's only image is the chances of its arms."""

    def __init__(self, n_arms: int = 5) -> None:
        self.bandits = Bandits(n_arms)

    def sampler(self, spec: EpisodeSpec, *, seed: int = 0) -> BanditSampler:
        """What draws bandits."""
        return BanditSampler(self.bandits.n_arms, seed)


class BanditSampler:
    """Draws bandits and, as images, the numbers that chance comes from."""

    def __init__(self, n_arms: int, seed: int = 0) -> None:
        self.n_arms, self.generator = n_arms, torch.Generator().manual_seed(seed)

    def state_dict(self) -> dict[str, Tensor]:
        """Where the stream of tasks is."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken."""
        self.generator.set_state(state["generator"])

    def sample(self, n_tasks: int) -> Episode:
        """Draw the next `n_tasks` bandits: `images` `[task, 1, 1]`, `labels` `[task, 1, arm]`."""
        drawn = torch.rand(n_tasks, 1, 1 + self.n_arms, generator=self.generator)
        chance, chances = drawn.split([1, self.n_arms], dim=2)
        return Episode(chance, chances, chance, chances, n_way=self.n_arms)


@dataclass(frozen=True)
class Played:
    """Bandits that were played: which arms, and what they paid, `[bandit, pull]`."""

    arms: Int64[Tensor, "bandit pull"]
    paid: Float[Tensor, "bandit pull"]


class RL2(Learner):
    """A GRU that is told its last arm and what that paid, and chooses the next; trained as an actor with a critic.

    Args:
        n_arms: arms of the bandits.
        hidden_size: numbers in its state.
        horizon: pulls of a bandit in training.
        discount: how much a later payment counts, a pull.
        trace: of generalised advantages.
        entropy: weight of a bonus for undecided choices.

    Reference:
        Duan et al. (2016), RL², section 2; Wang et al. (2016), Learning to reinforcement learn, with the actor-critic
        used here.
    """

    def __init__(
        self,
        n_arms: int = 5,
        *,
        hidden_size: int = 64,
        horizon: int = 10,
        discount: float = 0.99,
        trace: float = 0.95,
        entropy: float = 0.01,
    ) -> None:
        check_positive(n_arms=n_arms, hidden_size=hidden_size, horizon=horizon, discount=discount)
        check_not_negative(trace=trace, entropy=entropy)
        super().__init__()
        self.n_arms, self.horizon, self.discount, self.trace, self.entropy = n_arms, horizon, discount, trace, entropy
        self.ways, self.exact_gradient = n_arms, False
        self.memory = nn.GRU(n_arms + 2, hidden_size, batch_first=True)
        self.actor, self.critic = nn.Linear(hidden_size, n_arms), nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.actor.weight)

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The actor's, the critic's and minus the entropy's part, on bandits played by the current policy."""
        played = self.play(episode.query_labels[:, 0], self._chance(episode))
        states, _ = self.memory(self._told(played))
        log_chances, values = self.actor(states).log_softmax(-1), self.critic(states)[..., 0]
        later = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
        surprise = (played.paid + self.discount * later - values).detach()
        sums = [surprise[:, -1]]
        for now in surprise.flip(1).unbind(1)[1:]:
            sums.append(now + self.discount * self.trace * sums[-1])
        found = torch.stack(sums[::-1], dim=1)
        better = (found - found.mean()) / (found.std() + 1e-8)
        chosen = log_chances.gather(2, played.arms[..., None])[..., 0]
        undecided = -(log_chances.exp() * log_chances).sum(-1).mean()
        critic = F.mse_loss(values, (found + values).detach())
        return -(better * chosen).mean() + 0.5 * critic - self.entropy * undecided

    def forward(self, episode: Episode) -> Float[Tensor, "task query arm"]:
        """How often each arm is pulled, a pull."""
        played = self.play(episode.query_labels[:, 0], self._chance(episode))
        shares = F.one_hot(played.arms, self.n_arms).float().mean(1, keepdim=True)
        return shares.expand(-1, episode.query_images.shape[1], -1)

    @torch.no_grad()
    def play(
        self, chances: Float[Tensor, "bandit arm"], generator: torch.Generator, horizon: int | None = None
    ) -> Played:
        """Bandits played to the end of the horizon, side by side."""
        state = torch.zeros(1, len(chances), self.memory.hidden_size)
        told, arms, paid = self._first(len(chances)), [], []
        for _ in range(horizon or self.horizon):
            seen, state = self.memory(told[:, None], state)
            arms.append(torch.multinomial(self.actor(seen[:, 0]).softmax(-1), 1, generator=generator)[:, 0])
            paid.append(pull(chances, arms[-1], generator))
            told = self._next(arms[-1], paid[-1])
        return Played(torch.stack(arms, dim=1), torch.stack(paid, dim=1))

    def _told(self, played: Played) -> Float[Tensor, "bandit pull told"]:
        """What it is told before each pull."""
        before = self._next(played.arms[:, :-1], played.paid[:, :-1])
        return torch.cat([self._first(len(before))[:, None], before], dim=1)

    def _first(self, n: int) -> Float[Tensor, "bandit told"]:
        return torch.eye(self.n_arms + 2)[-1].expand(n, -1)

    def _next(self, arms: Int64[Tensor, "*batch"], paid: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch told"]:
        one_hot = F.one_hot(arms, self.n_arms).float()
        return torch.cat([one_hot, paid[..., None], torch.zeros_like(paid)[..., None]], dim=-1)

    def _chance(self, episode: Episode) -> torch.Generator:
        return torch.Generator().manual_seed(int(episode.query_images.double().sum().item() * 2**30))
