"""Acting: navigation adapted by policy gradients, and recurrent policies on bandits and in random processes.

    python studies/reinforcement.py

Everything is trained here, on one core: navigation by MAML and beside it by first order, by the wrong second derivative
and without meta-learning, over three seeds; RL² on ten pulls, on a hundred, and in worlds of ten states.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
import tyro
from common import write
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from metatutor import EpisodeSpec, TrainConfig, train
from metatutor.applications import bandits
from metatutor.applications.bandits import Bandits, gittins, greedy, play, thompson, ucb1
from metatutor.applications.navigation import Goals, dynamics
from metatutor.applications.policy_gradient import GaussianPolicy, MetaPolicy
from metatutor.applications.recurrent_policy import RL2, Trials, World
from metatutor.applications.tabular import Processes, likeliest, plan, play_rounds, posterior_sampling
from metatutor.evaluation import confidence95
from metatutor.runs import results_folder, study

SPEC = EpisodeSpec(2, 1, 1)
Row = dict[str, Any]
ITERATIONS = 300  # of the outer loop, in navigation
NAVIGATION: dict[str, dict[str, Any]] = {
    "pretrained": {"inner_steps": 0},
    "pretrained, best step size": {"inner_steps": 0},
    "first-order MAML": {"first_order": True, "learned_lr": True},
    "MAML, wrong second derivative": {"estimator": "log-probability", "learned_lr": True},
    "MAML": {"learned_lr": True},
    "MAML, two steps": {"inner_steps": 2, "inner_lr": 0.3, "learned_lr": True},
}


def navigation(seeds: int) -> Iterator[Row]:
    """Returns before and after up to three steps of adaptation, on 200 goals; the best policy is kept."""
    goals = Goals().sampler(SPEC, seed=99).sample(200)
    best = -float("inf")
    for method, options in NAVIGATION.items():
        for seed in range(seeds):
            torch.manual_seed(seed)
            learner = MetaPolicy(GaussianPolicy(hidden=32), dynamics, **options)
            config = TrainConfig(ITERATIONS, 20, outer_lr=0.01, warmup=10, clip_norm=0.5, seed=seed)
            history = train(learner, Goals(), SPEC, config, device="cpu", progress_bar=False)
            if method.endswith("best step size"):
                take_best_rate(learner)
            returns = [walks.returns.mean(1) for walks in learner.path(goals, 3)]
            row: Row = {"world": "navigation", "method": method, "seed": seed, "seconds": history[-1]["seconds"]}
            yield row | {"returns": [r.mean().item() for r in returns], "ci95": [confidence95(r) for r in returns]}
            if returns[2].mean() > best:
                best = returns[2].mean().item()
                weights = {name: value.contiguous() for name, value in learner.state_dict().items()}
                save_file(weights, results_folder() / "studies/navigation.safetensors")


def take_best_rate(learner: MetaPolicy) -> None:
    """Give a policy that was not trained to adapt the rate that is best for one step, on goals of its own."""
    goals, found = Goals().sampler(SPEC, seed=98).sample(200), {}
    for rate in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5):
        for rates in learner.rates:
            rates.data.fill_(rate)
        found[rate] = learner.path(goals, 1)[1].returns.mean().item()
    print(found)
    for rates in learner.rates:
        rates.data.fill_(max(found, key=lambda rate: found[rate]))


def trained(world: World, stages: list[tuple[int, TrainConfig, float]], **options: Any) -> RL2:
    """RL² after its training, with horizons that grow."""
    torch.manual_seed(0)
    player = RL2(world, **options)
    for player.horizon, config, player.entropy in stages:
        train(player, Trials(world), EpisodeSpec(world.n_numbers, 1, 1), config, device="cpu", progress_bar=False)
    return player.eval()


def stage(horizon: int, iterations: int, tasks: int, lr: float, entropy: float) -> tuple[int, TrainConfig, float]:
    """A part of a training."""
    return horizon, TrainConfig(iterations, tasks, outer_lr=lr, warmup=10, clip_norm=1.0, seed=horizon), entropy


SHORT = [stage(10, 1500, 100, 0.02, 0.05)]
LONG = [*SHORT, stage(30, 800, 100, 0.005, 0.02), stage(100, 2000, 100, 0.004, 0.01), stage(100, 1000, 200, 0.002, 0.0)]
PROCESSES = {  # states, actions and steps of a round, and how RL² is trained there
    (4, 3, 5): [
        stage(10, 600, 100, 0.01, 0.05),
        stage(25, 600, 100, 0.01, 0.03),
        stage(50, 2000, 100, 0.005, 0.01),
        stage(50, 1000, 200, 0.003, 0.0),
    ],
    (10, 5, 10): [
        stage(20, 600, 100, 0.01, 0.05),
        stage(50, 600, 100, 0.01, 0.03),
        stage(100, 1500, 100, 0.005, 0.01),
    ],
}


def of_bandits() -> Iterator[Row]:
    """What is earned in 10 and in 100 pulls of 20,000 new bandits with five arms."""
    machines = Bandits(5).sample(20_000, seed=1)
    strategies = {
        "at random": bandits.at_random,
        "Thompson sampling": thompson,
        "UCB1": ucb1,
        "greedy": greedy,
        "Gittins' index": gittins,
    }
    for pulls, stages in ((10, SHORT), (100, LONG)):
        earned = {name: play(strategy, machines, pulls).sum(1) for name, strategy in strategies.items()}
        player = trained(Bandits(5), stages)
        earned["RL²"] = player.play(machines, torch.Generator().manual_seed(0), pulls).paid.sum(1)
        for method, of_machines in earned.items():
            yield _earned("bandits", method, of_machines) | {"pulls": pulls}


def of_processes(rounds: int = 10) -> Iterator[Row]:
    """What is earned in ten rounds in 5,000 new random processes, of two sizes."""
    for sizes, stages in PROCESSES.items():
        processes, generator = Processes(*sizes), torch.Generator().manual_seed(1)
        tasks = processes.draw(5000, generator)
        earned = {
            "at random": _at_random(processes, tasks, rounds, generator),
            "the expected world": play_rounds(processes, tasks, likeliest, rounds),
            "posterior sampling": play_rounds(processes, tasks, posterior_sampling, rounds),
            "the true world": plan(*processes.parts(tasks), processes.length)[1][:, None].expand(-1, rounds),
        }
        player = trained(processes, stages, hidden_size=128)
        played = player.play(tasks, generator, rounds * processes.length).paid
        earned["RL²"] = played.unflatten(1, (rounds, processes.length)).sum(2)
        for method, of_rounds in earned.items():
            row = _earned("processes", method, of_rounds.sum(1)) | {"states": sizes[0]}
            yield row | {"first": of_rounds[:, 0].mean().item(), "last": of_rounds[:, -1].mean().item()}


def _at_random(processes: Processes, tasks: Tensor, rounds: int, generator: torch.Generator) -> Tensor:
    now, found = processes.begin(tasks), []
    for _ in range(rounds * processes.length):
        actions = torch.randint(processes.n_actions, (len(tasks),), generator=generator)
        now, paid, _ = processes.step(tasks, now, actions, generator)
        found.append(paid)
    return torch.stack(found, 1).unflatten(1, (rounds, processes.length)).sum(2)


def _earned(world: str, method: str, of_tasks: Float[Tensor, " task"]) -> Row:
    return {"world": world, "method": method, "earned": of_tasks.mean().item(), "ci95": confidence95(of_tasks)}


def main(seeds: int = 3, only: Literal["navigation", "processes", "bandits"] | None = None) -> None:
    """Train and measure everything, and write `results/studies/reinforcement.json`.

    Args:
        seeds: how often each training of navigation is repeated.
        only: one of the worlds; the rows of the others stay as they are.
    """
    torch.set_num_threads(1)
    worlds = {"navigation": partial(navigation, seeds), "processes": of_processes, "bandits": of_bandits}
    chosen = [only] if only else list(worlds)
    rows = [row for row in study("reinforcement") if row["world"] not in chosen]
    for world in chosen:
        for row in worlds[world]():
            rows.append(row)
            print(row, flush=True)
            write("reinforcement", sorted(rows, key=lambda row: list(worlds).index(row["world"])))


if __name__ == "__main__":
    tyro.cli(main)
