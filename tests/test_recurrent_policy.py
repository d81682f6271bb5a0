"""RL²: what it is told, that it plays by its own chances only, that it learns to try and to remember."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from metatutor.applications.bandits import Bandits, at_random, play
from metatutor.applications.recurrent_policy import RL2, Played, Trials, World
from metatutor.applications.tabular import Processes
from metatutor.episodes import Episode, EpisodeSpec
from metatutor.training import TrainConfig, train

SPEC = EpisodeSpec(n_way=3, k_shot=1, n_query=1)
WORLDS = {"bandits": Bandits(3), "processes": Processes(n_states=4, n_actions=3, length=2)}


def test_it_is_told_what_it_sees_its_last_action_and_what_that_paid() -> None:
    seen = torch.tensor([[[0.5], [0.6], [0.7]]])
    played = Played(seen, torch.tensor([[2, 0, 1]]), torch.tensor([[1.0, 0.0, 1.0]]), torch.rand(1, 3))
    expected = torch.tensor(  # what it sees; what it saw, at the arm that it pulled; the same times what that paid
        [[0.5, 0, 0, 0, 0, 0, 0], [0.6, 0, 0, 0.5, 0, 0, 0.5], [0.7, 0.6, 0, 0, 0, 0, 0]]
    )
    learner = RL2(Bandits(3))
    assert torch.equal(learner._told(played)[0], expected)


@pytest.mark.parametrize("name", WORLDS)
def test_the_meta_loss_asks_the_network_what_it_was_told_when_it_played(name: str) -> None:
    torch.manual_seed(0)
    world: World = WORLDS[name]
    learner = RL2(world, horizon=6)
    torch.nn.init.normal_(learner.actor.weight)
    generator = torch.Generator().manual_seed(0)
    played = learner.play(world.draw(4, generator), generator)
    states, _ = learner.memory(learner._told(played))
    told, state = torch.zeros(4, learner.memory.input_size - world.n_observed), torch.zeros(1, 4, 64)
    for time in range(6):
        seen, state = learner.memory(torch.cat([played.observed[:, time], told], 1)[:, None], state)
        torch.testing.assert_close(seen[:, 0], states[:, time])
        told = learner._done(played.observed[:, time], played.actions[:, time], played.paid[:, time])


@pytest.mark.parametrize("name", WORLDS)
def test_asked_twice_it_answers_the_same(name: str) -> None:
    torch.manual_seed(0)
    learner, tasks = RL2(WORLDS[name]), Trials(WORLDS[name]).sampler(SPEC).sample(5)
    assert learner.meta_loss(tasks) == learner.meta_loss(tasks)
    assert learner(tasks).shape == (5, 1, 3)
    torch.testing.assert_close(learner(tasks).sum(-1), torch.ones(5, 1))


@pytest.mark.parametrize("of_critic", [0.0, 3.0])
def test_its_gradient_is_that_of_what_it_earns_whatever_the_critic_says(of_critic: float) -> None:
    torch.manual_seed(0)
    learner, chances = RL2(Bandits(2), hidden_size=4, horizon=2, trace=1.0, entropy=0.0), torch.tensor([0.2, 0.9])
    torch.nn.init.normal_(learner.actor.weight, std=2)
    torch.nn.init.constant_(learner.critic[-1].bias, of_critic)
    first, state = learner.memory(F.pad(torch.ones(1, 1, 1), (0, 4)))
    exact = torch.zeros(())
    for arm, chance in enumerate(chances):
        for paid, how_often in ((1.0, chance), (0.0, 1 - chance)):
            done = learner._done(torch.ones(1, 1), torch.tensor([arm]), torch.tensor([paid]))
            second, _ = learner.memory(F.pad(done, (1, 0), value=1.0)[:, None], state)
            pulls = [learner.actor(seen[0, 0]).softmax(-1) for seen in (first, second)]
            exact = exact + pulls[0][arm] * how_often * (chance + pulls[1] @ chances)
    actor = list(learner.actor.parameters())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(exact, actor)])
    labels, images = chances.expand(40_000, 1, 2), torch.rand(40_000, 1, 1)
    loss = learner.meta_loss(Episode(images, labels, images, labels, n_way=2))
    found = -torch.cat([g.flatten() for g in torch.autograd.grad(loss, actor)])
    assert torch.cosine_similarity(found, expected, dim=0) > 0.99


def test_it_learns_to_find_the_better_arm() -> None:
    torch.manual_seed(0)
    learner, chances = RL2(Bandits(2), hidden_size=24, horizon=8), Bandits(2).sample(1500, seed=1)
    config = TrainConfig(iterations=250, tasks_per_step=150, outer_lr=0.02, warmup=5)
    train(learner, Trials(Bandits(2)), EpisodeSpec(2, 1, 1), config, device="cpu", progress_bar=False)
    earned = learner.play(chances, torch.Generator().manual_seed(0)).paid
    without = play(at_random, chances, 8).sum(1).mean()
    assert earned.sum(1).mean() > without + 0.25  # of about 1.3 that could be had by always pulling the better one
    assert earned[:, -2:].mean() > earned[:, :2].mean() + 0.03


@pytest.mark.parametrize("name", WORLDS)
def test_tasks_go_on_where_they_stopped(name: str) -> None:
    sampler = Trials(WORLDS[name]).sampler(SPEC, seed=2)
    sampler.sample(3)
    state, following = sampler.state_dict(), sampler.sample(4).query_labels
    sampler.load_state_dict(state)
    assert torch.equal(sampler.sample(4).query_labels, following)
    assert following.shape[:2] == (4, 1)


def test_errors(unchecked_types: None) -> None:
    with pytest.raises(ValueError, match="at least 2 arms"):
        Bandits(1)
    with pytest.raises(ValueError, match="horizon"):
        RL2(Bandits(3), horizon=0)


def test_a_player_plays_where_its_world_is() -> None:
    with pytest.raises(
        ValueError, match=r"^the policy is on meta, but worlds are simulated on the CPU; train with dev"
    ):
        RL2(Bandits(3)).to("meta").play(torch.zeros(1, 3), torch.Generator())
