"""Bandits: arms that pay or do not, with chances that must be found out; and the textbook strategies.

Many bandits are played side by side: every array begins with `[bandit]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from metatutor.checks import check_positive

Chances = Float[Tensor, "bandit arm"]
Counts = Float[Tensor, "bandit arm"]
Strategy = Callable[[Counts, Counts, int, torch.Generator], Int64[Tensor, " bandit"]]


@dataclass(frozen=True)
class Bandits:
    """Bandits whose arms pay 1 with chances that are uniform from 0 to 1, and otherwise 0; a world for `RL2`.

    Args:
        n_actions: arms of each.

    Raises:
        ValueError: if there are fewer than two arms.

    Reference:
        Duan et al. (2016), RL², section 3.1.
    """

    n_actions: int = 5

    def __post_init__(self) -> None:
        if self.n_actions < 2:
            raise ValueError(f"a bandit has at least 2 arms, got {self.n_actions}")

    n_observed = 1  # a bandit has one place to be in

    @property
    def n_numbers(self) -> int:
        """A chance for each arm."""
        return self.n_actions

    def sample(self, n: int, *, seed: int = 0) -> Chances:
        """The chances of new bandits."""
        return self.draw(n, torch.Generator().manual_seed(seed))

    def draw(self, n: int, generator: torch.Generator) -> Chances:
        """The same, from a generator."""
        check_positive(n=n)
        return torch.rand(n, self.n_actions, generator=generator)

    def begin(self, tasks: Chances) -> Float[Tensor, "bandit 1"]:
        """The only place there is."""
        return torch.ones_like(tasks[:, :1])

    def observed(self, now: Float[Tensor, "bandit 1"]) -> Float[Tensor, "bandit 1"]:
        """A one."""
        return now

    def step(
        self,
        tasks: Chances,
        now: Float[Tensor, "bandit 1"],
        actions: Int64[Tensor, " bandit"],
        generator: torch.Generator,
    ) -> tuple[Float[Tensor, "bandit 1"], Float[Tensor, " bandit"], Float[Tensor, " bandit"]]:
        """Pull arms."""
        paid = pull(tasks, actions, generator)
        return now, paid, tasks.gather(1, actions[:, None])[:, 0]


def pull(chances: Chances, arms: Int64[Tensor, " bandit"], generator: torch.Generator) -> Float[Tensor, " bandit"]:
    """What the chosen arms pay, 0 or 1.

    Raises:
        ValueError: if an arm does not exist, or not every bandit has one.
    """
    n_bandits, n_arms = chances.shape
    if arms.shape != (n_bandits,) or int(arms.min()) < 0 or int(arms.max()) >= n_arms:
        raise ValueError(
            f"expected an arm from 0 to {n_arms - 1} for each of {n_bandits} bandits, got {arms.tolist()[:9]}"
        )
    drawn = torch.rand(n_bandits, generator=generator, dtype=chances.dtype)
    return (drawn < chances.gather(1, arms[:, None])[:, 0]).to(chances.dtype)


def play(strategy: Strategy, chances: Chances, horizon: int, *, seed: int = 0) -> Float[Tensor, "bandit pull"]:
    """What a strategy earns, pull by pull.

    Args:
        strategy: maps how often each arm paid and did not, how many pulls are left, and a generator to arms.
        chances: those of the bandits.
        horizon: pulls.
        seed: seed of strategy and arms.
    """
    generator = torch.Generator().manual_seed(seed)
    paid, not_paid, earned = torch.zeros_like(chances), torch.zeros_like(chances), []
    for left in range(horizon, 0, -1):
        arms = strategy(paid, not_paid, left, generator)
        earned.append(pull(chances, arms, generator))
        paid.scatter_add_(1, arms[:, None], earned[-1][:, None])
        not_paid.scatter_add_(1, arms[:, None], 1 - earned[-1][:, None])
    return torch.stack(earned, dim=1)


# --- strategies ---


def at_random(paid: Counts, not_paid: Counts, left: int, generator: torch.Generator) -> Int64[Tensor, " bandit"]:
    """Any arm."""
    return torch.randint(paid.shape[1], (len(paid),), generator=generator)


def greedy(paid: Counts, not_paid: Counts, left: int, generator: torch.Generator) -> Int64[Tensor, " bandit"]:
    """The arm with the greatest expected chance, if all chances are equally likely beforehand."""
    return _largest((paid + 1) / (paid + not_paid + 2), generator)


def thompson(paid: Counts, not_paid: Counts, left: int, generator: torch.Generator) -> Int64[Tensor, " bandit"]:
    """The best arm of a bandit that might be the true one: a draw from what is still possible.

    Reference:
        Thompson (1933), On the likelihood that one unknown probability exceeds another.
    """
    return _beta(paid + 1, not_paid + 1, generator).argmax(1)


def ucb1(paid: Counts, not_paid: Counts, left: int, generator: torch.Generator) -> Int64[Tensor, " bandit"]:
    """Every arm once, then the one with the greatest `mean + width * sqrt(2 log t / n)`.

    The width is 0.2, which was chosen for horizons around 100; 1 is the paper's, for which its bound holds.

    Reference:
        Auer, Cesa-Bianchi & Fischer (2002), Finite-time analysis of the multiarmed bandit problem, figure 1.
    """
    counts = paid + not_paid
    bonus = 0.2 * (2 * counts.sum(1, keepdim=True).clamp(min=1).log() / counts.clamp(min=1)).sqrt()
    return _largest(torch.where(counts == 0, math.inf, paid / counts.clamp(min=1) + bonus), generator)


def gittins(paid: Counts, not_paid: Counts, left: int, generator: torch.Generator) -> Int64[Tensor, " bandit"]:
    """The arm with the greatest Gittins index: the sure payment per pull that it is worth.

    Optimal for infinitely many pulls, each counting `1 - 1 / left` times the one before; nearly optimal for those left.

    Reference:
        Gittins (1979), Bandit processes and dynamic allocation indices.
    """
    discount = 1 - 1 / max(left, 2)
    rounded = max(d for d in _DISCOUNTS if d <= discount + 1e-9)
    table, (a, b) = gittins_indices(rounded), (paid.long(), not_paid.long())
    last = len(table) - 1
    return _largest(table[a.clamp(max=last), b.clamp(max=last)], generator)


_DISCOUNTS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


@cache
def gittins_indices(discount: float, longest: int = 110) -> Float[Tensor, "paid not_paid"]:
    """The index of an arm by how often it has paid, and how often not, by bisection in the sure payment.

    With `s` for sure per pull for ever, an arm is worth playing while `max(s / (1 - d), p + d E[value])` is the second
    term.
    """
    n = longest + 1
    paid, not_paid = torch.meshgrid(*(torch.arange(n, dtype=torch.float64),) * 2, indexing="ij")
    mean = (paid + 1) / (paid + not_paid + 2)
    sure = torch.linspace(0, 1, 401, dtype=torch.float64)  # all payments at once
    stop = sure / (1 - discount)
    value = torch.maximum(stop, mean[..., None] / (1 - discount))  # beyond the table, the mean is the chance
    indices = mean.clone()
    for total in range(2 * longest - 1, -1, -1):
        a = torch.arange(max(0, total - longest), min(total, longest) + 1)
        b = total - a
        inside = (a < longest) & (b < longest)
        a, b = a[inside], b[inside]
        if not len(a):
            continue
        p = mean[a, b][:, None]
        go_on = p + discount * (p * value[a + 1, b] + (1 - p) * value[a, b + 1])
        p_or_stop = torch.maximum(stop, go_on)
        value[a, b] = p_or_stop
        indices[a, b] = sure[(go_on > stop).sum(1).clamp(max=400)]
    return indices


def _largest(values: Counts, generator: torch.Generator) -> Int64[Tensor, " bandit"]:
    """The arm with the largest value; any of equal ones."""
    drawn = torch.rand(values.shape, generator=generator, dtype=values.dtype)
    return drawn.masked_fill(values < values.amax(1, keepdim=True), -1).argmax(1)


def _beta(a: Counts, b: Counts, generator: torch.Generator) -> Chances:
    """Draws from beta distributions, made from gamma distributions, by a generator."""
    draw = torch._standard_gamma  # pyright: ignore[reportPrivateImportUsage]
    x, y = draw(a, generator=generator), draw(b, generator=generator)
    return x / (x + y)
