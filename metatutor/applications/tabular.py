"""Markov decision processes with a handful of states: random ones, how well one can do, and who learns them by trying.

Many are played side by side: every array begins with `[task]`. Each is given by a row of numbers: what each action pays
in each state on average, `[state, action]`, and where it leads how often, `[state, action, next state]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from metatutor.checks import check_positive

Means = Float[Tensor, "task state action"]
Transitions = Float[Tensor, "task state action next"]


@dataclass(frozen=True)
class Processes:
    """Random processes: payments are Gaussian around means that are Gaussian around 1, transitions are uniform.

    All variances are 1. They are played for some rounds of `length` steps, each of which begins in state 0.

    Args:
        n_states: states of each.
        n_actions: actions in each state.
        length: steps of a round.

    Raises:
        ValueError: if one is not positive.

    Reference:
        Osband, Russo & Van Roy (2013), (More) efficient reinforcement learning via posterior sampling; Duan et al.
        (2016), RL², section 3.2.
    """

    n_states: int = 10
    n_actions: int = 5
    length: int = 10

    def __post_init__(self) -> None:
        check_positive(n_states=self.n_states, n_actions=self.n_actions, length=self.length)

    @property
    def n_observed(self) -> int:
        """How many numbers are seen: the state, one-hot."""
        return self.n_states

    @property
    def n_numbers(self) -> int:
        """Mean payments and transitions."""
        return self.n_states * self.n_actions * (1 + self.n_states)

    def draw(self, n: int, generator: torch.Generator) -> Float[Tensor, "task number"]:
        """New processes, each a row of numbers."""
        check_positive(n=n)
        means = 1 + torch.randn(n, self.n_states, self.n_actions, generator=generator)
        leads = torch.empty(n, self.n_states, self.n_actions, self.n_states).exponential_(generator=generator)
        leads = leads / leads.sum(-1, keepdim=True)  # uniform over all distributions
        return torch.cat([means.flatten(1), leads.flatten(1)], dim=1)

    def parts(self, tasks: Float[Tensor, "task number"]) -> tuple[Means, Transitions]:
        """Mean payments and transitions.

        Raises:
            ValueError: if there are not as many numbers as processes of this size need.
        """
        sizes = [self.n_states * self.n_actions, self.n_states * self.n_actions * self.n_states]
        if tasks.dim() != 2 or tasks.shape[1] != sum(sizes):
            raise ValueError(f"expected [task, {sum(sizes)}] numbers of processes, got {list(tasks.shape)}")
        means, leads = tasks.split(sizes, dim=1)
        shape = (len(tasks), self.n_states, self.n_actions)
        return means.view(shape), leads.view(*shape, self.n_states)

    def begin(self, tasks: Float[Tensor, "task number"]) -> Int64[Tensor, "task 2"]:
        """Where play starts: state 0, no step taken."""
        return torch.zeros(len(tasks), 2, dtype=torch.long)

    def observed(self, now: Int64[Tensor, "task 2"]) -> Float[Tensor, "task state"]:
        """What is seen of the current position."""
        return torch.nn.functional.one_hot(now[:, 0], self.n_states).float()

    def step(
        self,
        tasks: Float[Tensor, "task number"],
        now: Int64[Tensor, "task 2"],
        actions: Int64[Tensor, " task"],
        generator: torch.Generator,
    ) -> tuple[Int64[Tensor, "task 2"], Float[Tensor, " task"], Float[Tensor, " task"]]:
        """Where actions lead, what they pay, and what they pay on average; after `length` steps a new round begins."""
        if actions.shape != (len(tasks),) or int(actions.min()) < 0 or int(actions.max()) >= self.n_actions:
            raise ValueError(
                f"expected an action from 0 to {self.n_actions - 1} for each of {len(tasks)} tasks, got "
                f"{actions.tolist()[:9]}"
            )
        (means, leads), each = self.parts(tasks), torch.arange(len(tasks))
        state, steps = now.unbind(1)
        expected = means[each, state, actions]
        paid = expected + torch.randn(len(tasks), generator=generator)
        following = torch.multinomial(leads[each, state, actions], 1, generator=generator)[:, 0]
        steps = (steps + 1) % self.length
        return torch.stack([following.where(steps > 0, 0), steps], dim=1), paid, expected


def plan(
    means: Means, leads: Transitions, length: int
) -> tuple[Int64[Tensor, "step task state"], Float[Tensor, " task"]]:
    """The best action at each step of a round in each state, and what a round then pays on average, from state 0.

    Backward induction: `Q(s, a) = r(s, a) + Σ p(s' | s, a) max Q(s', ·)`, from the last step to the first.
    """
    values, best = torch.zeros_like(means[..., 0]), []
    for _ in range(length):
        worth = means + torch.einsum("tsan,tn->tsa", leads, values)
        values, chosen = worth.max(-1)
        best.append(chosen)
    return torch.stack(best[::-1]), values[:, 0]


Belief = Callable[[Transitions, Means, torch.Generator], tuple[Means, Transitions]]


def posterior_sampling(counts: Transitions, sums: Means, generator: torch.Generator) -> tuple[Means, Transitions]:
    """A process that might be the true one: a draw from what is still possible, given how often each thing was seen.

    Args:
        counts: how often each action led where.
        sums: what it paid, added up.
        generator: the source of randomness.

    Reference:
        Strens (2000), A Bayesian framework for reinforcement learning; Osband, Russo & Van Roy (2013), algorithm 1.
    """
    n = counts.sum(-1)
    mean, spread = (1 + sums) / (1 + n), (1 + n).rsqrt()  # a priori Gaussian around 1, with variance 1
    drawn = mean + spread * torch.randn(mean.shape, generator=generator)
    leads = torch._standard_gamma(1 + counts, generator=generator)  # pyright: ignore[reportPrivateImportUsage]
    return drawn, leads / leads.sum(-1, keepdim=True)


def likeliest(counts: Transitions, sums: Means, generator: torch.Generator) -> tuple[Means, Transitions]:
    """The expected process: whoever plans for it never tries anything just to find out."""
    n = counts.sum(-1)
    return (1 + sums) / (1 + n), (1 + counts) / (1 + counts).sum(-1, keepdim=True)


def play_rounds(
    processes: Processes, tasks: Float[Tensor, "task number"], believed: Belief, n_rounds: int, *, seed: int = 0
) -> Float[Tensor, "task round"]:
    """What each round pays to a player who plans it from what was seen in earlier rounds.

    Args:
        processes: what kind.
        tasks: their numbers.
        believed: maps counts and sums of payments to a process that is then planned for.
        n_rounds: rounds.
        seed: seed of plans and processes.
    """
    generator = torch.Generator().manual_seed(seed)
    means, leads = processes.parts(tasks)
    counts, sums, each = torch.zeros_like(leads), torch.zeros_like(means), torch.arange(len(tasks))
    now, found = processes.begin(tasks), []
    for _ in range(n_rounds):
        best, _ = plan(*believed(counts, sums, generator), processes.length)
        round_paid = torch.zeros(len(tasks))
        for of_step in best:
            state = now[:, 0]
            actions = of_step[each, state]
            now, paid, _ = processes.step(tasks, now, actions, generator)
            round_paid += paid
            sums[each, state, actions] += paid
            led = now[:, 1] > 0  # where the last step of a round leads is not seen
            counts[each[led], state[led], actions[led], now[led, 0]] += 1
        found.append(round_paid)
    return torch.stack(found, dim=1)
