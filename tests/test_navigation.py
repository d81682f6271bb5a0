"""Navigation: Gymnasium's own checks, one walk against many, and clear errors."""

from __future__ import annotations

import importlib
import sys
import warnings

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from metatutor.applications.environments import Navigation, NavigationVector
from metatutor.applications.navigation import HORIZON, Goals, check_goals, dynamics, goals, moved, rewards
from metatutor.episodes import EpisodeSpec


def test_gymnasium_finds_nothing_wrong() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(Navigation(), skip_render_check=True)


def test_without_gymnasium_the_command_to_install_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "metatutor.applications.environments")
    with pytest.raises(ImportError, match=r"pip install 'metatutor\[acting\]'"):
        importlib.import_module("metatutor.applications.environments")


def test_an_action_counts_from_minus_one_to_one() -> None:
    places = moved(torch.zeros(3, 2), torch.tensor([[0.5, -0.2], [7.0, -7.0], [0.0, 0.0]]))
    torch.testing.assert_close(places, torch.tensor([[0.05, -0.02], [0.1, -0.1], [0.0, 0.0]]))
    torch.testing.assert_close(rewards(torch.tensor([[0.3, 0.4]]), torch.zeros(1, 2)), torch.tensor([-0.5]))


def test_many_walks_are_single_walks_and_batches_of_them() -> None:
    targets, random = goals(3, seed=1), np.random.default_rng(0)
    many, single = NavigationVector(targets), [Navigation(goal) for goal in targets]
    step, places = dynamics(targets), torch.zeros(3, 1, 2)
    many.reset()
    for environment in single:
        environment.reset(seed=0)
    for i in range(HORIZON):
        actions = random.uniform(-1.5, 1.5, (3, 2)).astype(np.float32)
        found = many.step(actions)
        each = [environment.step(action) for environment, action in zip(single, actions, strict=True)]
        places, paid = step(places, torch.from_numpy(actions)[:, None])
        for parts in (np.stack([e[0] for e in each]), places[:, 0].numpy()):
            np.testing.assert_allclose(found[0], parts, rtol=1e-6)
        np.testing.assert_allclose(found[1], [e[1] for e in each], rtol=1e-6)
        np.testing.assert_allclose(found[1], paid[:, 0], rtol=1e-6)
        assert found[3].tolist() == [i == HORIZON - 1] * 3 == [e[3] for e in each]
    assert (many.step(np.ones((3, 2), np.float32))[0] == 0).all()


def test_tasks_go_on_where_they_stopped() -> None:
    spec = EpisodeSpec(2, 1, 1)
    sampler = Goals().sampler(spec, seed=4)
    sampler.sample(3)
    state, following = sampler.state_dict(), sampler.sample(5)
    sampler.load_state_dict(state)
    assert torch.equal(sampler.sample(5).query_labels, following.query_labels)
    check_goals(following.query_labels)


@pytest.mark.parametrize("goal", [[0.6, 0.0], [0.1], [float("nan"), 0.0], [0.0, 0.0, 0.0]])
def test_goals_outside(unchecked_types: None, goal: list[float]) -> None:
    with pytest.raises(ValueError, match=r"a goal has two coordinates from -0\.5 to 0\.5"):
        Navigation(goal)


@pytest.mark.parametrize("action", [[0.1], [[0.1, 0.2]], [np.nan, 0.0], [0.1, 0.2, 0.3]])
def test_actions_of_another_shape(action: list[float]) -> None:
    environment = Navigation()
    environment.reset(seed=0)
    with pytest.raises(ValueError, match=r"expected finite actions of shape \[2\]"):
        environment.step(np.array(action, np.float32))
    with pytest.raises(ValueError, match="number of goals must be positive"):
        goals(0)
