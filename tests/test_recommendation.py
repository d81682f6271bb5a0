"""Personalisation: exact answers against enumeration, loaders, histories that stay apart from what is asked."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import mse_loss

from metatutor import MAML, EpisodeSpec, TrainConfig, train
from metatutor.applications.recommendation import (
    GaussianUsers,
    ItemNetwork,
    MixedUsers,
    Ratings,
    half_squares,
    item_means,
    load_jester,
    load_movielens,
    own_mean,
    predictor,
    shrunken_mean,
    squared_errors,
)

NAN = torch.nan


@pytest.fixture
def users() -> GaussianUsers:
    generator = torch.Generator().manual_seed(0)
    mean, factors = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((12,), (12, 2)))
    return GaussianUsers(mean, factors, 0.7)


# --- closed forms ---


def test_gaussian_users_are_the_conditional_of_their_joint_gaussian(users: GaussianUsers) -> None:
    known = users.sample(4).values.clone()
    known[:, 5:], known[1, 0] = NAN, NAN
    covariance = users.factors @ users.factors.mT
    for row, predicted in zip(known, users(known), strict=True):
        seen = ~row.isnan()
        noisy = covariance[seen][:, seen] + users.noise**2 * torch.eye(int(seen.sum()), dtype=torch.float64)
        expected = users.mean + covariance[:, seen] @ torch.linalg.solve(noisy, row[seen] - users.mean[seen])
        torch.testing.assert_close(predicted, expected)


def test_nothing_known_is_the_mean(users: GaussianUsers) -> None:
    nothing = torch.full((2, 12), NAN, dtype=torch.float64)
    torch.testing.assert_close(users(nothing), users.mean.expand(2, -1))
    ratings = users.sample(50)
    torch.testing.assert_close(shrunken_mean(ratings)(nothing), ratings.values.mean(0).expand(2, -1))
    torch.testing.assert_close(own_mean(ratings)(nothing), ratings.values.mean().expand(2, 12))


def test_users_are_fitted_from_half_of_their_ratings(users: GaussianUsers) -> None:
    ratings = users.sample(3000, seed=1).values
    hidden = torch.rand(ratings.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    fitted = GaussianUsers.fit(Ratings(ratings.masked_fill(hidden, NAN)), 2)
    assert abs(fitted.noise - users.noise) < 0.02
    torch.testing.assert_close(fitted.mean, users.mean, atol=0.15, rtol=0)
    torch.testing.assert_close(
        fitted.factors @ fitted.factors.mT, users.factors @ users.factors.mT, atol=0.25, rtol=0.1
    )


def test_kinds_of_users_are_bayes_rule() -> None:
    users = MixedUsers(torch.tensor([[1.0, 4.0, 2.0], [3.0, 1.0, 5.0]], dtype=torch.float64), 1.5)
    known = torch.tensor([[2.0, NAN, 4.5]], dtype=torch.float64)
    likelihoods = [(-(((2 - a) ** 2) + (4.5 - c) ** 2) / 4.5).exp() for a, _, c in users.tastes]
    share = likelihoods[0] / (likelihoods[0] + likelihoods[1])
    torch.testing.assert_close(users(known)[0], share * users.tastes[0] + (1 - share) * users.tastes[1])


def test_the_gaussian_of_kinds_has_their_mean_and_covariance() -> None:
    users = MixedUsers(torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 0.5)
    gaussian, rest = users.gaussian(), users.tastes - users.tastes.mean(0)
    torch.testing.assert_close(gaussian.factors @ gaussian.factors.mT, rest.mT @ rest / 5)
    torch.testing.assert_close(gaussian.mean, users.tastes.mean(0))


def test_shrinking_is_right_between_the_extremes() -> None:
    users = GaussianUsers(torch.zeros(30, dtype=torch.float64), torch.ones(30, 1, dtype=torch.float64), 2.0)
    ratings = users.sample(4000)  # a shift of variance 1 under noise of variance 4
    known = torch.full((1, 30), NAN, dtype=torch.float64)
    known[0, :4] = 3.0
    shift = shrunken_mean(ratings)(known) - ratings.values.mean(0)
    torch.testing.assert_close(shift, torch.full_like(shift, 3 * 4 / (4 + 4)), atol=0.12, rtol=0)


# --- data ---


def test_histories_grow_and_never_hold_what_is_asked(users: GaussianUsers) -> None:
    ratings = Ratings(users.sample(6).values.masked_fill(torch.arange(12) == 3, NAN))
    (none, three, five), asked = ratings.histories((0, 3, 5), seed=1)
    assert none.isnan().all() and [int((~h.isnan()).sum(1).unique()) for h in (three, five, asked)] == [3, 5, 6]
    assert (five.isnan() | asked.isnan()).all() and (five.isnan() <= three.isnan()).all()
    assert five.nansum() + asked.nansum() == pytest.approx(ratings.values.nansum().item())
    with pytest.raises(ValueError, match="every user must have rated more than 11 items"):
        ratings.histories((11,))


def test_tasks_are_users_with_known_ratings_and_others(users: GaussianUsers) -> None:
    ratings = Ratings(users.sample(9).values.masked_fill(torch.arange(12) == 3, NAN))
    sampler = ratings.sampler(EpisodeSpec(1, 4, 5), seed=3)
    state, lengths = sampler.state_dict(), set()
    for _ in range(20):
        task = sampler.sample(8)
        items = torch.cat([task.support_images, task.query_images], 1)[..., 0]
        assert all(len(set(row)) == len(row) and 3.0 not in row for row in items.tolist())
        lengths.add(task.support_images.shape[1])
    assert lengths == {1, 2, 3, 4}
    sampler.load_state_dict(state)
    again = ratings.sampler(EpisodeSpec(1, 4, 5), seed=3).sample(8)
    assert torch.equal(sampler.sample(8).query_labels, again.query_labels)


def test_loaders(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,31,2.5,9\n1,7,3.0,9\n4,31,5,9\n")
    (tmp_path / "ratings.dat").write_text("1::31::2.5::9\n1::7::3.0::9\n4::31::5::9\n")
    (tmp_path / "u.data").write_text("1\t31\t2.5\t9\n1\t7\t3.0\t9\n4\t31\t5\t9\n")
    expected = torch.tensor([[3.0, 2.5], [NAN, 5.0]], dtype=torch.float64)
    for name in ("ratings.csv", "ratings.dat", "u.data"):
        torch.testing.assert_close(load_movielens(tmp_path / name).values, expected, equal_nan=True)
    with zipfile.ZipFile(tmp_path / "jester.zip", "w") as archive:
        archive.writestr("ratings.csv", "user,joke,rating\n1,1,-9.5\n2,2,4.25\n")
    expected = torch.tensor([[-9.5, NAN], [NAN, 4.25]], dtype=torch.float64)
    torch.testing.assert_close(load_jester(tmp_path / "jester.zip").values, expected, equal_nan=True)


@pytest.mark.parametrize("content", ["", "user,joke,rating\n", "a\n1,2\n", "h\nx,y,z\n", "h\n1,1,11\n"])
def test_damaged_ratings(tmp_path: Path, content: str) -> None:
    (tmp_path / "ratings.csv").write_text(content)
    with pytest.raises(ValueError, match="holds no lines of user,item,rating|ratings must lie from"):
        load_jester(tmp_path / "ratings.csv")


def test_errors(users: GaussianUsers) -> None:
    ratings = users.sample(3)
    for values, scale, message in (
        (torch.full((2, 2), NAN), None, "at least one known"),
        (torch.tensor([[torch.inf]]), None, "a rating is infinite"),
        (torch.tensor([[6.0]]), (1.0, 5.0), "ratings must lie from 1 to 5, got 6 to 6"),
    ):
        with pytest.raises(ValueError, match=message):
            Ratings(values, scale)
    for spec, message in ((EpisodeSpec(2, 1, 1), "n_way must be 1"), (EpisodeSpec(1, 9, 9), "nobody has rated 18")):
        with pytest.raises(ValueError, match=message):
            ratings.sampler(spec)
    with pytest.raises(ValueError, match="n_tasks must be positive"):
        ratings.sampler(EpisodeSpec(1, 2, 2)).sample(0)
    with pytest.raises(ValueError, match="nobody has rated item 0"):
        item_means(Ratings(torch.tensor([[NAN, 1.0]])))


# --- the network ---


@pytest.mark.parametrize("kinds", [False, True])
def test_only_the_last_layer_is_the_user(users: GaussianUsers, kinds: bool) -> None:
    ratings = users.sample(200)
    network = ItemNetwork(ratings.values.mean(0), 3, kinds=kinds)
    learner = MAML(network, inner_lr=0.05, adapt="head", loss=mse_loss, inner_loss=half_squares)
    assert sorted(learner.moving) == ["module.user.bias", "module.user.weight"]
    task = ratings.sampler(EpisodeSpec(1, 3, 4)).sample(5)
    assert learner(task).shape == (5, 4, 1)


def test_a_learner_predicts_users_of_any_history_as_one_by_one(users: GaussianUsers) -> None:
    ratings = users.sample(40)
    learner = MAML(ItemNetwork(ratings.values.mean(0), 2), inner_lr=0.1, adapt="head", loss=mse_loss).eval()
    known = ratings.values.clone()
    known[0], known[1, 3:], known[2, 1:] = NAN, NAN, NAN
    predict = predictor(learner)
    together = predict(known[:4])
    for i in range(4):
        torch.testing.assert_close(together[i : i + 1], predict(known[i : i + 1]))
    torch.testing.assert_close(together[0], ratings.values.mean(0), atol=1e-5, rtol=0)


def test_gradient_steps_come_near_to_exact_bayes(users: GaussianUsers) -> None:
    torch.manual_seed(0)
    users = replace(users, noise=1.2)
    ratings = users.sample(600, seed=1)
    network = ItemNetwork(ratings.values.mean(0), 2)
    options = {"adapt": "head", "learned_lr": "parameter", "loss": mse_loss, "inner_loss": half_squares}
    learner = MAML(network, inner_lr=0.05, inner_steps=3, **options)
    config = TrainConfig(iterations=500, tasks_per_step=50, outer_lr=0.02)
    train(learner, ratings, EpisodeSpec(1, 6, 6), config, device="cpu", progress_bar=False)
    [known], asked = users.sample(300, seed=2).histories((5,))
    predictors = (users, predictor(learner), item_means(ratings))
    bayes, steps, means = (squared_errors(p(known), asked).mean().item() for p in predictors)
    assert bayes < steps and means - steps > 0.5 * (means - bayes)
