"""MAML with policy gradients: initial parameters from which one policy-gradient step learns a task.

The inner gradient is an estimate from sampled walks, and the outer loop differentiates through it. The estimate must
therefore have the right *derivative*, which the textbook's `log π(a) A` does not have: its second derivative lacks a
term.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.applications.trust_region import trust_region_step
from metatutor.checks import check_choice, check_positive, check_simulated
from metatutor.episodes import Episode
from metatutor.functional import Parameters
from metatutor.learner import Learner

LogProbabilities = Float[Tensor, "*task walk time"]
Advantages = Float[Tensor, "*task walk time"]
Estimator = Literal["likelihood-ratio", "dice", "log-probability"]


def surrogate(
    log_probabilities: LogProbabilities, advantages: Advantages, estimator: Estimator
) -> Float[Tensor, "*task"]:
    """A number per task whose gradient estimates that of the expected return per step, from sampled actions.

    With `⊥` for what is held constant, and `l` the log-probabilities of the actions taken:

    - `"likelihood-ratio"`: the mean of `exp(l - ⊥l) A`, right in its first two derivatives as far as an action affects
      its own advantage (the low-variance-curvature estimator).
    - `"dice"`: the mean of `exp(c - ⊥c) A`, `c` the sum of `l` up to now, right in all derivatives, and noisier.
    - `"log-probability"`: the mean of `l A`, right in its first derivative only. Its second lacks the expectation of
      `∇l ∇lᵀ A`: here for comparison.

    Args:
        log_probabilities: those of actions taken, `[..., walk, time]`.
        advantages: how much better than expected what followed was, `[..., walk, time]`; never differentiated.
        estimator: which one.

    Raises:
        ValueError: if there is no such estimator.

    Reference:
        Rothfuss et al. (2019), ProMP, equation 11; DiCE: Foerster et al. (2018), equation 4.
    """
    check_choice("estimator", estimator, get_args(Estimator))
    advantages = advantages.detach()
    if estimator == "log-probability":
        return (log_probabilities * advantages).mean((-2, -1))
    exponent = log_probabilities.cumsum(-1) if estimator == "dice" else log_probabilities
    return ((exponent - exponent.detach()).exp() * advantages).mean((-2, -1))


class GaussianPolicy(nn.Module):
    """Actions around a mean given by a network with two hidden layers, with spreads as parameters of their own.

    Args:
        n_observed: numbers in an observation.
        n_actions: numbers in an action.
        hidden: units of each hidden layer.
    """

    def __init__(self, n_observed: int = 2, n_actions: int = 2, hidden: int = 64) -> None:
        super().__init__()
        self.n_observed = n_observed
        layers = [nn.Linear(n_observed, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()]
        self.mean = nn.Sequential(*layers, nn.Linear(hidden, n_actions))
        self.log_spread = nn.Parameter(torch.full((n_actions,), -0.5))
        nn.init.zeros_(self.mean[-1].weight)  # pyright: ignore[reportArgumentType]

    def forward(self, observed: Float[Tensor, "*batch observed"]) -> Float[Tensor, "*batch action"]:
        """Means of the actions."""
        return self.mean(observed)

    def means(
        self, parameters: Parameters, observed: Float[Tensor, "task n observed"]
    ) -> Float[Tensor, "task n action"]:
        """Means of the actions of every task under its own parameters, `[task, ...]` by name."""
        layers = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]
        for layer in layers:
            weight, bias = parameters[f"{layer}.weight"], parameters[f"{layer}.bias"]
            observed = torch.baddbmm(bias[:, None], observed, weight.mT)
            observed = observed if layer == layers[-1] else observed.tanh()
        return observed

    def log_probabilities(self, parameters: Parameters, walks: Walks) -> Float[Tensor, "task walk time"]:
        """Log-densities of the actions of walks, under each task's parameters."""
        means = self.means(parameters, walks.observed.flatten(1, 2)).view_as(walks.actions)
        log_spread = parameters["log_spread"][:, None, None]
        rest = (walks.actions - means) * (-log_spread).exp()
        return -(0.5 * rest.pow(2) + log_spread + 0.5 * math.log(2 * math.pi)).sum(-1)


@dataclass(frozen=True)
class Walks:
    """Sampled walks: what was seen before each step, what was done, what it brought, `[task, walk, time, ...]`."""

    observed: Float[Tensor, "task walk time observed"]
    actions: Float[Tensor, "task walk time action"]
    rewards: Float[Tensor, "task walk time"]

    @property
    def returns(self) -> Float[Tensor, "task walk"]:
        """The sum of rewards of each walk."""
        return self.rewards.sum(-1)


Dynamics = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # places and actions to next places and rewards


@torch.no_grad()
def sample_walks(
    policy: GaussianPolicy,
    parameters: Parameters,
    dynamics: Dynamics,
    n_walks: int,
    horizon: int,
    generator: torch.Generator,
) -> Walks:
    """Walks of every task under its own parameters, `[task, ...]` by name, all side by side.

    Raises:
        ValueError: if the parameters are not on the CPU, where walks are simulated.
    """
    spread = parameters["log_spread"].exp()[:, None]
    check_simulated(spread)
    n_tasks = len(spread)
    noise = torch.randn(horizon, n_tasks, n_walks, spread.shape[-1], generator=generator)
    places, steps = torch.zeros(n_tasks, n_walks, policy.n_observed), []
    for drawn in noise:
        actions = policy.means(parameters, places) + spread * drawn
        following, rewards = dynamics(places, actions)
        steps.append((places, actions, rewards))
        places = following
    return Walks(*(torch.stack(part, dim=2) for part in zip(*steps, strict=True)))


def advantages(walks: Walks, discount: float = 0.99, trace: float = 0.9) -> Float[Tensor, "task walk time"]:
    """Generalised advantages, with a baseline that is fitted to the walks of each task; none of it is differentiated.

    The baseline is linear in observations, their squares and powers of time. Advantages are scaled to mean 0 and
    variance 1 over the walks of a task.

    Reference:
        Schulman et al. (2016), High-dimensional continuous control using generalized advantage estimation; the baseline
        is that of Duan et al. (2016), Benchmarking deep reinforcement learning.
    """
    n_tasks, _, horizon = walks.rewards.shape
    to_go = _discounted(walks.rewards, discount)
    time = torch.linspace(0, 1, horizon).view(1, 1, -1, 1).expand(*walks.rewards.shape, 1)
    features = torch.cat([walks.observed, walks.observed**2, time, time**2, time**3, torch.ones_like(time)], dim=-1)
    flat = features.flatten(1, 2)
    ridge = 1e-5 * torch.eye(flat.shape[-1]) * flat.shape[1]
    weights = torch.linalg.solve(flat.mT @ flat + ridge, flat.mT @ to_go.flatten(1)[..., None])
    values = (flat @ weights).view(to_go.shape)
    after = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], dim=-1)
    surprise = walks.rewards + discount * after - values
    found = _discounted(surprise, discount * trace)
    flat_found = found.view(n_tasks, -1)
    scaled = (flat_found - flat_found.mean(1, keepdim=True)) / (flat_found.std(1, keepdim=True) + 1e-8)
    return scaled.view(found.shape).detach()


def _discounted(values: Float[Tensor, "*batch time"], factor: float) -> Float[Tensor, "*batch time"]:
    """The sum from each time on, itself included, every later step counting `factor` times as much."""
    sums = [values[..., -1]]
    for value in values.flip(-1).unbind(-1)[1:]:
        sums.append(value + factor * sums[-1])
    return torch.stack(sums[::-1], dim=-1)


class MetaPolicy(Learner):
    """A policy that adapts to a task by one or more policy-gradient steps, each from its own walks.

    A task is a goal: the label of the task's only image, which is a number that seeds all randomness, so that the same
    episode always gives the same walks. `walk` is how it moves, `reward` what a step brings.

    Args:
        policy: the policy whose parameters are the initial ones.
        dynamics: maps the labels of tasks, such as goals `[task, 2]`, to a function of places and actions that returns
            next places and rewards. A walk starts where all numbers of its place are 0.
        inner_lr: length of a step of adaptation.
        learned_lr: whether the outer loop learns a rate for every parameter, starting from `inner_lr`.
        inner_steps: steps of adaptation.
        n_walks: walks for each step, and as many to judge the result.
        horizon: steps of a walk.
        estimator: estimator of the inner gradient (see `surrogate`).
        first_order: whether the outer loop treats the adapted parameters as the initial ones plus a constant.

    Reference:
        Finn, Abbeel & Levine (2017), algorithm 3; learned rates: Li et al. (2017), Meta-SGD.
    """

    def __init__(
        self,
        policy: GaussianPolicy,
        dynamics: Callable[[Float[Tensor, "task number"]], Dynamics],
        *,
        inner_lr: float = 0.5,
        learned_lr: bool = False,
        inner_steps: int = 1,
        n_walks: int = 20,
        horizon: int = 100,
        estimator: Estimator = "likelihood-ratio",
        first_order: bool = False,
    ) -> None:
        check_positive(inner_lr=inner_lr, n_walks=n_walks, horizon=horizon)
        check_choice("estimator", estimator, get_args(Estimator))
        super().__init__()
        self.policy, self.dynamics = policy, dynamics
        rates = (torch.full_like(p, inner_lr) for p in policy.parameters())
        self.rates = nn.ParameterList(nn.Parameter(rate, requires_grad=learned_lr) for rate in rates)
        self.inner_steps, self.n_walks, self.horizon = inner_steps, n_walks, horizon
        self.estimator: Estimator = estimator
        self.first_order = first_order
        self.exact_gradient = False  # an estimate from samples

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """Minus the surrogate of walks after adaptation."""
        generator, dynamics = episode.chance(), self.dynamics(episode.query_labels[:, 0])
        parameters = self.beginning(len(episode))
        for _ in range(self.inner_steps):
            parameters = self.adapted(parameters, self.walks(parameters, dynamics, generator))
        return -self.gains(parameters, self.walks(parameters, dynamics, generator), "log-probability").mean()

    def forward(self, episode: Episode) -> Float[Tensor, "task query observed"]:
        """Where a walk of the adapted policy ends, on average."""
        walks = self.path(episode)[-1]
        return walks.observed[:, :, -1].mean(1, keepdim=True).expand(-1, episode.query_images.shape[1], -1)

    def path(self, episode: Episode, inner_steps: int | None = None) -> list[Walks]:
        """Walks before the first step of adaptation and after each; the goals are the labels of the episode."""
        generator, dynamics = episode.chance(), self.dynamics(episode.query_labels[:, 0])
        parameters = self.beginning(len(episode))
        found = [self.walks(parameters, dynamics, generator)]
        for _ in range(self.inner_steps if inner_steps is None else inner_steps):
            parameters = self.adapted(parameters, found[-1], keep=False)
            found.append(self.walks(parameters, dynamics, generator))
        return found

    def beginning(self, n_tasks: int) -> Parameters:
        """The parameters of every task before it is seen."""
        return {name: p.expand(n_tasks, *p.shape) for name, p in self.policy.named_parameters()}

    def walks(self, parameters: Parameters, dynamics: Dynamics, generator: torch.Generator) -> Walks:
        """Walks of every task under its parameters."""
        return sample_walks(self.policy, parameters, dynamics, self.n_walks, self.horizon, generator)

    def gains(self, parameters: Parameters, walks: Walks, estimator: Estimator) -> Float[Tensor, " task"]:
        """The surrogate of each task on its walks."""
        told = self.policy.log_probabilities(parameters, walks)
        return surrogate(told, advantages(walks), estimator)

    def adapted(self, parameters: Parameters, walks: Walks, *, keep: bool = True) -> Parameters:
        """The parameters after one step up the surrogate of each task; differentiable, if `keep`."""
        with torch.enable_grad():
            inside = {n: p if keep and p.requires_grad else p.detach().requires_grad_() for n, p in parameters.items()}
            total = self.gains(inside, walks, self.estimator).sum()
            through = keep and not self.first_order
            gradients = torch.autograd.grad(total, list(inside.values()), create_graph=through)
        steps = zip(inside.items(), self.rates, gradients, strict=True)
        return {name: p + rate * gradient for (name, p), rate, gradient in steps}

    def trust_region_step(self, episode: Episode, *, radius: float = 0.01, **options: Any) -> float:
        """One step of the outer loop by TRPO: as far as the adapted policies can go within the radius.

        Args:
            episode: tasks; their walks are sampled once, with the current parameters.
            radius: the greatest mean Kullback-Leibler divergence of an action's distribution.
            options: further arguments of `trust_region.trust_region_step`.

        Returns:
            How much the surrogate of the walks after adaptation rose; 0 if nothing changed.
        """
        generator, dynamics = episode.chance(), self.dynamics(episode.query_labels[:, 0])
        parameters, support = self.beginning(len(episode)), []
        for _ in range(self.inner_steps):
            support.append(self.walks(parameters, dynamics, generator))
            parameters = self.adapted(parameters, support[-1], keep=False)
        parameters = {name: p.detach() for name, p in parameters.items()}
        after = self.walks(parameters, dynamics, generator)
        seen, scores = after.observed.flatten(1, 2), advantages(after)
        before = self.policy.log_probabilities(parameters, after)
        old_means, old_log_spread = self.policy.means(parameters, seen), parameters["log_spread"][:, None]

        def adapted() -> Parameters:
            now = self.beginning(len(episode))
            for walks in support:
                now = self.adapted(now, walks)
            return now

        def objective() -> Tensor:
            return ((self.policy.log_probabilities(adapted(), after) - before).exp() * scores).mean()

        def divergence() -> Tensor:
            now = adapted()
            log_spread, moved = now["log_spread"][:, None], self.policy.means(now, seen) - old_means
            squares = (2 * old_log_spread).exp() + moved.pow(2)
            return (log_spread - old_log_spread + 0.5 * squares * (-2 * log_spread).exp() - 0.5).sum(-1).mean()

        return trust_region_step(list(self.policy.parameters()), objective, divergence, radius=radius, **options)
