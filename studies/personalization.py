"""Ratings of new users: baselines, exact Bayes and meta-learners, on Jester's jokes and on users who are not Gaussian.

    python studies/personalization.py --jester FILE

Half of Jester's users are trained on, a tenth serve to choose settings, the others are new. Errors are over the same
ratings whatever the method and however many ratings it has seen; differences are between methods, user by user.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import tyro
from common import write
from torch.nn.functional import mse_loss

from metatutor import MAML, EpisodeSpec, Reptile, TrainConfig, train
from metatutor.applications.recommendation import (
    GaussianUsers,
    ItemNetwork,
    MixedUsers,
    Predictor,
    Ratings,
    half_squares,
    item_means,
    load_jester,
    own_mean,
    predictor,
    shrunken_mean,
    squared_errors,
)
from metatutor.evaluation import confidence95

SEEN = (0, 1, 2, 3, 5, 10, 15, 20)
SPEC = EpisodeSpec(n_way=1, k_shot=20, n_query=15)


def meta_learned(learner: Any, users: Ratings, iterations: int, outer_lr: float, **options: Any) -> Predictor:
    """A learner after its training."""
    config = TrainConfig(iterations=iterations, tasks_per_step=100, outer_lr=outer_lr, **options)
    train(learner, users, SPEC, config, device="cpu", progress_bar=False)
    return predictor(learner.eval())


def network(users: Ratings, size: int, *, kinds: bool = False) -> ItemNetwork:
    """A network whose last layer is the user; the same for every method."""
    torch.manual_seed(0)
    return ItemNetwork(users.values.nanmean(0), size, kinds=kinds)


LEARNED: dict[str, Any] = {"learned_lr": "parameter", "loss": mse_loss, "inner_loss": half_squares, "inner_steps": 5}


def compared(methods: Mapping[str, Predictor], users: Ratings, bayes: str) -> list[dict[str, Any]]:
    """One row a method and number of ratings seen: error, and the difference to exact Bayes of its mean square."""
    histories, asked = users.histories(SEEN)
    rows = []
    for n, known in zip(SEEN, histories, strict=True):
        errors = {name: squared_errors(predict(known), asked) for name, predict in methods.items()}
        for name, error in errors.items():
            less = error - errors[bayes]
            row = {"method": name, "n_seen": n, "users": len(error), "rmse": error.mean().sqrt().item()}
            rows.append(row | {"ci95": confidence95(error) / (2 * row["rmse"])})
            rows[-1] |= {"less_bayes": less.mean().item(), "less_bayes_ci95": confidence95(less)}
            print(rows[-1], flush=True)
    return rows


def jester(path: Path) -> list[dict[str, Any]]:
    """The jokes: 2,000 new users."""
    ratings = load_jester(path)
    order = torch.randperm(len(ratings), generator=torch.Generator().manual_seed(0))
    known, new = ratings.of(order[:2500]), ratings.of(order[3000:])
    methods: dict[str, Predictor] = {
        "item means": item_means(known),
        "own mean": own_mean(known),
        "shrunken mean": shrunken_mean(known),
        "exact Bayes": GaussianUsers.fit(known, 12),
    }
    anil = MAML(network(known, 12), inner_lr=0.05, adapt="head", **LEARNED)
    methods["ANIL, learned rates"] = meta_learned(anil, known, 4000, 0.01, clip_norm=None)
    whole = MAML(network(known, 12), inner_lr=0.001, adapt="all", **LEARNED)
    methods["MAML, learned rates"] = meta_learned(whole, known, 2000, 0.003, clip_norm=1.0)
    plain = {"loss": mse_loss, "inner_loss": half_squares, "inner_steps": 5}
    fixed = MAML(network(known, 12), inner_lr=0.02, adapt="head", **plain)
    methods["ANIL, one rate"] = meta_learned(fixed, known, 2000, 0.01, clip_norm=None)
    reptile = Reptile(network(known, 12), inner_lr=0.2, inner_steps=10, loss=mse_loss)
    methods["Reptile"] = meta_learned(reptile, known, 1000, 0.5, optimizer="sgd")
    return [{"users_of": "Jester"} | row for row in compared(methods, new, "exact Bayes")]


def kinds_of_users() -> list[dict[str, Any]]:
    """Sixteen kinds of users, so that the exact answer is known and no linear prediction can give it."""
    generator = torch.Generator().manual_seed(0)
    exact = MixedUsers(2 * torch.randn(16, 60, generator=generator, dtype=torch.float64), 1.5)
    known, new = exact.sample(3000, seed=1), exact.sample(2000, seed=2)
    anil = MAML(network(known, 16, kinds=True), inner_lr=0.01, adapt="head", **LEARNED)
    methods: dict[str, Predictor] = {
        "item means": item_means(known),
        "exact Bayes": exact,
        "exact Gaussian Bayes": exact.gaussian(),
        "ANIL, learned rates": meta_learned(anil, known, 5000, 0.05),
    }
    return [{"users_of": "sixteen kinds"} | row for row in compared(methods, new, "exact Gaussian Bayes")]


def main(jester_file: Path) -> None:
    """Measure everything, and write `results/studies/personalization.json`.

    Args:
        jester_file: Jester's ratings as CSV, zipped or not.
    """
    torch.set_num_threads(1)
    of_kinds = kinds_of_users()
    write("personalization", of_kinds)
    write("personalization", of_kinds + jester(jester_file))


if __name__ == "__main__":
    tyro.cli(main)
