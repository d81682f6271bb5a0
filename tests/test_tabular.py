"""Random decision processes: Gymnasium's checks, plans against enumeration, posteriors, and errors."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from metatutor.applications.environments import Process
from metatutor.applications.tabular import Processes, likeliest, plan, play_rounds, posterior_sampling

SMALL = Processes(n_states=3, n_actions=2, length=3)


def drawn(n: int, processes: Processes = SMALL, seed: int = 0) -> torch.Tensor:
    return processes.draw(n, torch.Generator().manual_seed(seed))


def test_gymnasium_finds_nothing_wrong() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(Process(), skip_render_check=True)


def test_numbers_are_means_and_distributions() -> None:
    means, leads = SMALL.parts(drawn(4000))
    assert means.shape == (4000, 3, 2) and leads.shape == (4000, 3, 2, 3)
    assert abs(means.mean() - 1) < 0.02 and abs(means.std() - 1) < 0.02
    torch.testing.assert_close(leads.sum(-1), torch.ones(4000, 3, 2))
    assert abs(leads[..., 0].var() - 2 / 36) < 0.003  # of a coordinate of a uniform point of the triangle


def test_a_round_begins_in_state_0_and_pays_around_the_means() -> None:
    tasks, generator = drawn(1).expand(20_000, -1), torch.Generator().manual_seed(0)
    means, leads = SMALL.parts(tasks[:1])
    now, states = SMALL.begin(tasks), []
    for _ in range(SMALL.length):
        assert SMALL.observed(now).sum(1).eq(1).all()
        now, paid, _ = SMALL.step(tasks, now, torch.ones(20_000, dtype=torch.long), generator)
        states.append((now, paid))
    (first, paid), (last, _) = states[0], states[-1]
    assert abs(paid.mean() - means[0, 0, 1]) < 0.03 and abs(paid.var() - 1) < 0.05
    assert (first[:, 0].bincount(minlength=3) / 20_000 - leads[0, 0, 1]).abs().max() < 0.02
    assert (last == 0).all()


def test_a_plan_is_the_best_of_all_policies() -> None:
    """Every policy of a small process, by hand."""
    tasks = drawn(5)
    means, leads = SMALL.parts(tasks)
    best, worth = plan(means, leads, 2)
    for task, (m, p) in enumerate(zip(means, leads, strict=True)):
        values = [
            m[0, first] + sum(p[0, first, s] * m[s, second[s]] for s in range(3))
            for first in range(2)
            for second in itertools.product(range(2), repeat=3)
        ]
        assert worth[task] == pytest.approx(max(v.item() for v in values), rel=1e-5)
        assert best[1, task].tolist() == m.argmax(1).tolist()


def test_what_was_seen_often_is_believed() -> None:
    means, leads = SMALL.parts(drawn(2))
    counts = 1e6 * leads
    for believe in (posterior_sampling, likeliest):
        found_means, found_leads = believe(counts, 1e6 * means, torch.Generator().manual_seed(0))
        torch.testing.assert_close(found_means, means, atol=0.01, rtol=0)
        torch.testing.assert_close(found_leads, leads, atol=0.01, rtol=0)
    nothing = posterior_sampling(torch.zeros(3000, 3, 2, 3), torch.zeros(3000, 3, 2), torch.Generator().manual_seed(0))
    assert abs(nothing[0].mean() - 1) < 0.03 and abs(nothing[0].std() - 1) < 0.03  # what is drawn in the beginning


def test_who_learns_earns_more_from_round_to_round_and_never_more_than_a_plan() -> None:
    processes = Processes()
    tasks = drawn(300, processes, seed=1)
    _, worth = plan(*processes.parts(tasks), processes.length)
    for believe in (posterior_sampling, likeliest):
        rounds = play_rounds(processes, tasks, believe, 10).mean(0)
        assert rounds[0] < rounds[4] < worth.mean() and rounds[0] + 2 < rounds[9] < worth.mean()


def test_errors(unchecked_types: None) -> None:
    with pytest.raises(ValueError, match="n_states must be positive"):
        Processes(n_states=0)
    with pytest.raises(ValueError, match=r"expected \[task, 24\] numbers"):
        SMALL.parts(torch.zeros(2, 7))
    environment = Process(SMALL)
    environment.reset(seed=0)
    for action in (2, -1):
        with pytest.raises(ValueError, match="expected an action from 0 to 1"):
            environment.step(action)
    assert environment.reset(options={"new": True})[0] == 0
    assert isinstance(environment.step(np.int64(1))[1], float)
