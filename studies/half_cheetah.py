"""A cheetah that is to run forwards or backwards, and is not told which: MAML with policy gradients in MuJoCo.

    pip install 'metatutor[mujoco]'
    python studies/half_cheetah.py --work FOLDER

The body is Gymnasium's; it is simulated here in batches. A quarter of an hour on one core; a training that was cut off
goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import mujoco  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
import tyro
from common import write
from jaxtyping import Float
from mujoco import rollout  # pyright: ignore[reportMissingImports]
from torch import Tensor

from metatutor import EpisodeSpec, TrainConfig, train
from metatutor.applications.policy_gradient import GaussianPolicy, MetaPolicy
from metatutor.episodes import Episode, SeededSampler
from metatutor.evaluation import confidence95

SPEC, FRAMES, COST = EpisodeSpec(1, 1, 1), 5, 0.1  # frames a step; what a unit of squared control costs, as Gymnasium's
_XML = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / "half_cheetah.xml"
BODY = mujoco.MjModel.from_xml_path(str(_XML))
_DATA = mujoco.MjData(BODY)


def running(directions: Float[Tensor, "task 1"]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The dynamics of tasks: how fast it runs in the wanted direction is what a step brings, minus what control costs.

    A place is what Gymnasium's body shows, positions and velocities; how far it has run is always 0.
    """

    def step(places: Float[Tensor, "task walk 18"], actions: Float[Tensor, "task walk 6"]) -> tuple[Tensor, Tensor]:
        bounded = actions.clamp(-1, 1)
        state = np.pad(places.flatten(0, 1).double().numpy(), ((0, 0), (1, 0)))  # time comes first
        control = bounded.flatten(0, 1).double().numpy()[:, None].repeat(FRAMES, 1)
        states, _ = rollout.rollout(BODY, _DATA, state, control)
        following = torch.from_numpy(states[:, -1, 1:]).to(places).view_as(places)
        speed = following[..., 0] / (FRAMES * BODY.opt.timestep)
        following[..., 0] = 0
        return following, directions * speed - COST * bounded.pow(2).sum(-1)

    return step


class Directions:
    """Tasks as `train` draws them: the label of a task's only image is 1, forwards, or -1, backwards."""

    def sampler(self, spec: EpisodeSpec, *, seed: int = 0) -> DirectionSampler:
        """What draws directions."""
        return DirectionSampler(seed)


class DirectionSampler(SeededSampler):
    """Draws as many tasks forwards as backwards and, as images, the numbers that chance comes from."""

    def sample(self, n_tasks: int) -> Episode:
        """Draw the next tasks."""
        chance = torch.rand(n_tasks, 1, 1, generator=self.generator)
        directions = torch.tensor([1.0, -1.0]).repeat(n_tasks // 2).view(-1, 1, 1)
        return Episode(chance, directions, chance, directions, n_way=1)


def main(work: Path, iterations: int = 600, outer_lr: float = 3e-3) -> None:
    """Train, and write `results/studies/half_cheetah.json`: returns before and after a step, for either direction.

    Args:
        work: a folder for checkpoints.
        iterations: of the outer loop.
        outer_lr: its peak learning rate.
    """
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    tasks = Directions().sampler(SPEC, seed=99).sample(20)
    for method, options in {"MAML": {"learned_lr": True}, "pretrained": {"inner_steps": 0}}.items():
        torch.manual_seed(0)
        learner = MetaPolicy(GaussianPolicy(18, 6, 64), running, inner_lr=0.1, **options)
        config = TrainConfig(
            iterations, 4, outer_lr=outer_lr, warmup=10, clip_norm=0.5, log_every=50, checkpoint_every=50
        )
        report = [lambda model, row: print(row["iteration"], _returns(model, tasks), flush=True)]
        history = train(
            learner,
            Directions(),
            SPEC,
            config,
            folder=work / method,
            callbacks=report,
            device="cpu",
            progress_bar=False,
        )
        row: dict[str, Any] = {"method": method, "iterations": iterations, "seconds": history[-1]["seconds"]}
        if not learner.inner_steps:
            _take_best_rate(learner)
        rows.append(row | _returns(learner, tasks))
        write("half_cheetah", rows)


def _take_best_rate(learner: MetaPolicy) -> None:
    """Give a policy that was not trained to adapt the rate that is best for one step, on tasks of its own."""
    tasks, found = Directions().sampler(SPEC, seed=98).sample(20), {}
    for rate in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        for rates in learner.rates:
            rates.data.fill_(rate)
        found[rate] = learner.path(tasks, 1)[1].returns.mean().item()
    print(found, flush=True)
    for rates in learner.rates:
        rates.data.fill_(max(found, key=lambda rate: found[rate]))


def _returns(learner: MetaPolicy, tasks: Episode) -> dict[str, Any]:
    """Mean returns before and after one step, forwards and backwards, and the intervals of the latter."""
    before, after = (walks.returns.mean(1) for walks in learner.path(tasks, 1))
    parts = {"forwards": slice(0, None, 2), "backwards": slice(1, None, 2)}
    found = {name: [before[part].mean().item(), after[part].mean().item()] for name, part in parts.items()}
    return found | {f"{name}_ci95": confidence95(after[part]) for name, part in parts.items()}


if __name__ == "__main__":
    tyro.cli(main)
