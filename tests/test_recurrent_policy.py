"""RL²: what it is told, that it plays by its own chances only, that it learns to try and to remember."""

from __future__ import annotations

import pytest
import torch

from metatutor.applications.bandits import Bandits, at_random, play
from metatutor.applications.recurrent_policy import RL2, BanditTasks, Played
from metatutor.episodes import EpisodeSpec
from metatutor.training import TrainConfig, train

SPEC = EpisodeSpec(n_way=3, k_shot=1, n_query=1)


def test_it_is_told_the_last_arm_and_what_that_paid() -> None:
    played = Played(torch.tensor([[2, 0, 1]]), torch.tensor([[1.0, 0.0, 1.0]]))
    expected = torch.tensor([[0.0, 0, 0, 0, 1], [0, 0, 1, 1, 0], [1, 0, 0, 0, 0]])  # three arms, payment, beginning
    assert torch.equal(RL2(3)._told(played)[0], expected)


def test_the_meta_loss_asks_the_network_what_it_was_told_when_it_played() -> None:
    torch.manual_seed(0)
    learner, chances = RL2(3, horizon=6), Bandits(3).sample(4).float()
    torch.nn.init.normal_(learner.actor.weight)
    played = learner.play(chances, torch.Generator().manual_seed(0))
    states, _ = learner.memory(learner._told(played))
    chosen = learner.actor(states).argmax(-1)
    step, state = learner._first(4), torch.zeros(1, 4, 64)
    for time in range(6):
        seen, state = learner.memory(step[:, None], state)
        assert torch.equal(learner.actor(seen[:, 0]).argmax(-1), chosen[:, time])
        step = learner._next(played.arms[:, time], played.paid[:, time])


def test_asked_twice_it_answers_the_same() -> None:
    torch.manual_seed(0)
    learner, tasks = RL2(3), BanditTasks(3).sampler(SPEC).sample(5)
    assert learner.meta_loss(tasks) == learner.meta_loss(tasks)
    assert learner(tasks).shape == (5, 1, 3)
    torch.testing.assert_close(learner(tasks).sum(-1), torch.ones(5, 1))


def test_it_learns_to_find_the_better_arm() -> None:
    torch.manual_seed(0)
    learner, chances = RL2(2, hidden_size=24, horizon=8), Bandits(2).sample(1500, seed=1).float()
    config = TrainConfig(iterations=250, tasks_per_step=150, outer_lr=0.02, warmup=5)
    train(learner, BanditTasks(2), EpisodeSpec(2, 1, 1), config, device="cpu", progress_bar=False)
    earned = learner.play(chances, torch.Generator().manual_seed(0)).paid
    without = play(at_random, chances.double(), 8).sum(1).mean()
    assert earned.sum(1).mean() > without + 0.25  # of about 1.3 that could be had by always pulling the better one
    assert earned[:, -2:].mean() > earned[:, :2].mean() + 0.03


def test_tasks_go_on_where_they_stopped() -> None:
    sampler = BanditTasks(3).sampler(SPEC, seed=2)
    sampler.sample(3)
    state, following = sampler.state_dict(), sampler.sample(4).query_labels
    sampler.load_state_dict(state)
    assert torch.equal(sampler.sample(4).query_labels, following)
    assert following.shape == (4, 1, 3) and 0 <= following.min() <= following.max() <= 1


def test_errors(unchecked_types: None) -> None:
    with pytest.raises(ValueError, match="at least 2 arms"):
        BanditTasks(1)
    with pytest.raises(ValueError, match="horizon"):
        RL2(3, horizon=0)
