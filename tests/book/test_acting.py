"""The goal that a reader moves: its script walks and adapts as the package does, and a hand can use it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from browser import BROWSER, Window, window

from metatutor.applications.navigation import dynamics
from metatutor.applications.policy_gradient import GaussianPolicy, MetaPolicy, sample_walks
from metatutor.book import figures

pytestmark = pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome")
BOX = "document.querySelector('[id^=goal-]')"
GOAL = [0.35, -0.2]


def learner() -> MetaPolicy:
    torch.manual_seed(0)
    policy = GaussianPolicy(hidden=7)
    torch.nn.init.normal_(policy.mean[-1].weight, std=0.3)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        policy.log_spread.copy_(torch.tensor([-0.4, -0.9]))
    made = MetaPolicy(policy, dynamics, inner_lr=0.3, learned_lr=True, n_walks=6, horizon=30)
    for rate in made.rates:
        rate.data.uniform_(0.1, 0.5)
    return made


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Window]:
    """One browser, at the page of one figure."""
    folder = tmp_path_factory.mktemp("goal")
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    shown = figures.movable_goal(learner(), goal=(0.35, -0.2))
    (folder / "page.html").write_text(f'<!doctype html><meta charset="utf-8">{viewport}<body>{shown}</body>', "utf-8")
    with window(folder) as opened:
        opened.open(folder / "page.html", 390)
        yield opened


def test_a_step_is_that_of_the_package(browser: Window, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    noise = torch.randn(30, 6, 2, dtype=torch.float64)
    call = f"""(() => {{
      const {{start, walk, adapted}} = {BOX}.policy, noise = Float64Array.from({noise.flatten().tolist()});
      const walks = walk(start, {GOAL}, noise);
      const after = Object.entries(adapted(start, walks)).map(([name, values]) => [name, [...values]]);
      return JSON.stringify([[...walks.rewards], Object.fromEntries(after)]);
    }})()"""
    rewards, after = json.loads(browser.run(call))
    meta, goal = learner().double(), torch.tensor([GOAL], dtype=torch.float64)
    monkeypatch.setattr(torch, "randn", lambda *size, generator=None: noise.view(size))
    monkeypatch.setattr(torch, "zeros", lambda *size: torch.full(size, 0.0, dtype=torch.float64))
    monkeypatch.setattr(torch, "linspace", lambda a, b, n: torch.from_numpy(np.linspace(a, b, n)))
    monkeypatch.setattr(torch, "eye", lambda n: torch.diag(torch.full((n,), 1.0, dtype=torch.float64)))
    walks = sample_walks(meta.policy, meta.beginning(1), dynamics(goal), 6, 30, torch.Generator())
    found = torch.tensor(rewards, dtype=torch.float64).view(30, 6).mT
    assert (found - walks.rewards[0]).abs().max() < 1e-5
    expected = meta.adapted(meta.beginning(1), walks, keep=False)
    for name, values in after.items():
        moved = expected[name][0].flatten()
        assert (torch.tensor(values, dtype=torch.float64) - moved).abs().max() < 1e-4, name


def test_the_goal_is_moved_by_clicks_and_keys_and_walks_are_drawn(browser: Window) -> None:
    def state() -> tuple[str, int]:
        label = browser.run(f"{BOX}.querySelector('.move').getAttribute('aria-label')")
        return label, browser.run(f"{BOX}.querySelectorAll('.walk[d^=\"M0\"]').length")

    label, n = state()
    assert label.startswith("goal at x 0.35, y −0.20") and n == 12  # six walks before and six after
    left, top, side = browser.run(
        f"((box) => [box.left, box.top, box.width])({BOX}.querySelector('.board').getBoundingClientRect())"
    )
    browser.draw([(left + side * (0.5 - 0.2 / 1.8), top + side * (0.5 - 0.4 / 1.8))])
    assert state()[0].startswith("goal at x −0.20, y 0.40")
    browser.run(f"{BOX}.querySelector('.move').dispatchEvent(new KeyboardEvent('keydown', {{key: 'ArrowRight'}}))")
    assert state()[0].startswith("goal at x −0.15, y 0.40")
    before, after = json.loads(browser.run(f"{BOX}.dataset.returns"))
    browser.run(
        f"(() => {{const s = {BOX}.querySelector('input'); s.value = 0; s.dispatchEvent(new Event('input'))}})()"
    )
    assert state()[1] == 6 and json.loads(browser.run(f"{BOX}.dataset.returns")) == [before, before] != [before, after]
    assert browser.run("document.documentElement.scrollWidth") <= 390


def test_errors() -> None:
    with pytest.raises(ValueError, match="a goal has two coordinates"):
        figures.movable_goal(learner(), goal=(0.9, 0.0))
    with pytest.raises(ValueError, match="steps must be positive"):
        figures.movable_goal(learner(), steps=0)
