"""Policy gradients: the second derivative on a bandit whose meta-gradient is known, the baseline, the meta-learner."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from metatutor.applications.navigation import Goals, dynamics
from metatutor.applications.policy_gradient import (
    Estimator,
    GaussianPolicy,
    MetaPolicy,
    Walks,
    advantages,
    sample_walks,
    surrogate,
)
from metatutor.episodes import Episode, EpisodeSpec
from metatutor.training import TrainConfig, train

# --- two arms, pulled with the chances 1 - sigmoid(t) and sigmoid(t): the value and its derivatives are known ---

PAYS = torch.tensor([1.0, 3.5], dtype=torch.float64)


def value(t: Tensor) -> Tensor:
    return PAYS[0] + (PAYS[1] - PAYS[0]) * t.sigmoid()


def derivatives_of_expectation(t: Tensor, estimator: Estimator) -> tuple[Tensor, Tensor]:
    """First and second derivative of the surrogate, in expectation over the arms that would be pulled."""
    log_probabilities = torch.stack([(-t).sigmoid().log(), t.sigmoid().log()])
    each = surrogate(log_probabilities[:, None, None], PAYS[:, None, None], estimator)
    expected = (log_probabilities.exp().detach() * each).sum()
    [first] = torch.autograd.grad(expected, t, create_graph=True)
    [second] = torch.autograd.grad(first, t, create_graph=True)
    return first, second


@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_the_second_derivative_of_a_bandit(estimator: Estimator) -> None:
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    [slope] = torch.autograd.grad(value(t), t, create_graph=True)
    [curvature] = torch.autograd.grad(slope, t)
    first, second = derivatives_of_expectation(t, estimator)
    torch.testing.assert_close(first, slope)
    assert torch.isclose(second, curvature) == (estimator != "log-probability")


@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_the_meta_gradient_of_a_bandit(estimator: Estimator) -> None:
    """`d V(t + a V'(t)) / d t = V'(t') (1 + a V''(t))`, through the estimate of the inner step."""
    inner_lr, t = 0.7, torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    first, _ = derivatives_of_expectation(t, estimator)
    [found] = torch.autograd.grad(value(t + inner_lr * first), t)
    p = t.sigmoid()
    gap = PAYS[1] - PAYS[0]
    slope, curvature = gap * p * (1 - p), gap * p * (1 - p) * (1 - 2 * p)
    after = (t + inner_lr * slope).sigmoid()
    expected = gap * after * (1 - after) * (1 + inner_lr * curvature)
    assert torch.isclose(found, expected) == (estimator != "log-probability")


def test_dice_credits_later_rewards_to_earlier_actions() -> None:
    log_probabilities = torch.zeros(1, 3, requires_grad=True)
    scores = torch.tensor([[1.0, 2.0, 4.0]])
    gradients = {}
    for estimator in get_args(Estimator):
        [gradients[estimator]] = torch.autograd.grad(surrogate(log_probabilities, scores, estimator), log_probabilities)
    torch.testing.assert_close(gradients["likelihood-ratio"], scores / 3)
    torch.testing.assert_close(gradients["log-probability"], scores / 3)
    torch.testing.assert_close(gradients["dice"], torch.tensor([[7.0, 6.0, 4.0]]) / 3)


# --- walks and their baseline ---


def walks_of(n_tasks: int = 3, n_walks: int = 8, horizon: int = 20) -> Walks:
    policy = GaussianPolicy(hidden=8)
    parameters = {name: p.expand(n_tasks, *p.shape) for name, p in policy.named_parameters()}
    step = dynamics(torch.tensor([[0.3, 0.1], [-0.2, 0.4], [0.0, -0.5]])[:n_tasks])
    return sample_walks(policy, parameters, step, n_walks, horizon, torch.Generator().manual_seed(0))


def test_log_probabilities_are_those_of_the_distribution() -> None:
    policy, walks = GaussianPolicy(hidden=8), walks_of()
    parameters = {name: p.expand(3, *p.shape) for name, p in policy.named_parameters()}
    normal = torch.distributions.Normal(policy(walks.observed), policy.log_spread.exp())
    expected = normal.log_prob(walks.actions).sum(-1)
    torch.testing.assert_close(policy.log_probabilities(parameters, walks), expected)


def test_walks_begin_at_the_origin_and_go_where_actions_lead() -> None:
    walks = walks_of()
    assert walks.observed.shape == (3, 8, 20, 2) and walks.returns.shape == (3, 8)
    assert (walks.observed[:, :, 0] == 0).all()
    expected = walks.observed[:, :, :-1] + 0.1 * walks.actions[:, :, :-1].clamp(-1, 1)
    torch.testing.assert_close(walks.observed[:, :, 1:], expected)


def test_advantages_are_of_each_task_alone_and_never_differentiated() -> None:
    walks = walks_of()
    found = advantages(walks)
    assert not found.requires_grad
    torch.testing.assert_close(found.mean((1, 2)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.flatten(1).std(1), torch.ones(3), atol=1e-4, rtol=0)
    alone = advantages(Walks(*(part[1:2] for part in (walks.observed, walks.actions, walks.rewards))))
    torch.testing.assert_close(found[1:2], alone, atol=1e-4, rtol=1e-4)


def test_what_the_baseline_foresees_is_no_advantage() -> None:
    """Rewards that depend on time alone are known beforehand, but for what the fit leaves."""
    walks = walks_of()
    time = torch.linspace(1, 0, 20).expand(3, 8, 20)
    noise = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(1))
    correlations = []
    for scale in (0.0, 100.0):
        scores = advantages(Walks(walks.observed, walks.actions, noise + scale * time), discount=0.0, trace=0.0)
        correlations.append(torch.corrcoef(torch.stack([scores.flatten(), noise.flatten()]))[0, 1])
    assert correlations[0] > 0.95 and correlations[1] > 0.9


# --- the meta-learner ---


def learner(**options: object) -> MetaPolicy:
    torch.manual_seed(0)
    return MetaPolicy(GaussianPolicy(hidden=8), dynamics, n_walks=6, horizon=12, **options)  # pyright: ignore


def test_the_meta_loss_is_the_same_when_asked_twice_and_of_tasks_one_by_one() -> None:
    tasks = Goals().sampler(EpisodeSpec(2, 1, 1)).sample(3)
    meta = learner()
    assert meta.meta_loss(tasks) == meta.meta_loss(tasks)
    assert meta(tasks).shape == (3, 1, 2)
    assert [w.returns.shape for w in meta.path(tasks, 2)] == [(3, 6)] * 3


def test_first_order_and_the_naive_estimator_give_other_gradients() -> None:
    tasks, gradients = Goals().sampler(EpisodeSpec(2, 1, 1)).sample(3), []
    for options in ({}, {"first_order": True}, {"estimator": "log-probability"}, {"estimator": "dice"}):
        meta = learner(inner_lr=0.5, **options)
        meta.meta_loss(tasks).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in meta.parameters() if p.grad is not None]))
    assert all((g - gradients[0]).norm() > 1e-3 * gradients[0].norm() for g in gradients[1:])


def test_a_training_goes_on_where_it_was(tmp_path: Path) -> None:
    def trained(folder: Path | None, iterations: int) -> dict[str, Tensor]:
        meta, config = learner(), TrainConfig(iterations, tasks_per_step=2, warmup=1, schedule="constant")
        train(meta, Goals(), EpisodeSpec(2, 1, 1), config, folder=folder, device="cpu", progress_bar=False)
        return meta.state_dict()

    whole = trained(None, 4)
    trained(tmp_path, 2)
    resumed = trained(tmp_path, 4)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_trust_region_step_stays_within_the_radius_and_helps() -> None:
    tasks, sizes = Goals().sampler(EpisodeSpec(2, 1, 1)).sample(3), []
    for radius in (1e-4, 1e-2):
        meta = learner(inner_lr=0.3)
        before = meta.state_dict()
        start = {name: value.clone() for name, value in before.items()}
        assert meta.trust_region_step(tasks, radius=radius) > 0
        sizes.append(torch.cat([(before[name] - start[name]).flatten() for name in start]).norm())
    assert 1.5 < sizes[1] / sizes[0] < 12  # ten times as far where the divergence is quadratic, and less if halved


def test_errors(unchecked_types: None) -> None:
    with pytest.raises(ValueError, match="estimator must be"):
        learner(estimator="reinforce")
    with pytest.raises(ValueError, match="estimator must be 'likelihood-ratio', 'dice' or 'log-probability'"):
        surrogate(torch.zeros(1, 1), torch.zeros(1, 1), "reinforce")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="inner_lr"):
        learner(inner_lr=-1.0)
    outside = Episode(torch.rand(1, 1, 1), torch.ones(1, 1, 2), torch.rand(1, 1, 1), torch.ones(1, 1, 2), n_way=2)
    with pytest.raises(ValueError, match="a goal has two coordinates"):
        learner().meta_loss(outside)


def test_a_policy_acts_where_its_world_is() -> None:
    method = learner().to("meta")
    with pytest.raises(
        ValueError, match=r"^the policy is on meta, but worlds are simulated on the CPU; train with dev"
    ):
        method.walks(method.beginning(2), dynamics(torch.zeros(2, 2)), torch.Generator())
