"""Sinusoids: points of a task lie on one wave, waves and points come uniformly from where they should."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from metatutor.data import Sinusoids, SinusoidSampler
from metatutor.episodes import Episode, EpisodeSpec

SPEC = EpisodeSpec(n_way=1, k_shot=5, n_query=7)


def tensors(episode: Episode) -> list[Tensor]:
    return [episode.support_images, episode.support_labels, episode.query_images, episode.query_labels]


def largest_gap(values: Tensor, low: float, high: float) -> float:
    """Between the distribution of values and the uniform one: the statistic of Kolmogorov and Smirnov."""
    n = values.numel()
    uniform = (values.flatten().double().sort().values - low) / (high - low)
    return (uniform - torch.arange(n) / n).abs().max().item()


# --- the waves -------------------------------------------------------------------------------------------------


@given(
    amplitude=st.tuples(st.floats(-3, 0), st.floats(0.5, 9)),
    phase=st.tuples(st.floats(-3, 0), st.floats(0.5, 9)),
    x=st.tuples(st.floats(-3, 0), st.floats(0.5, 9)),
    n_tasks=st.integers(1, 4),
    k_shot=st.integers(1, 6),
    n_query=st.integers(1, 6),
    seed=st.integers(0, 10**6),
)
def test_every_point_lies_on_its_wave_within_range(
    amplitude: tuple[float, float],
    phase: tuple[float, float],
    x: tuple[float, float],
    n_tasks: int,
    k_shot: int,
    n_query: int,
    seed: int,
):
    waves = Sinusoids(amplitude, phase, x)
    sampler = SinusoidSampler(waves, EpisodeSpec(1, k_shot, n_query), seed=seed)
    episode, of_tasks = sampler.sample_with_waves(n_tasks)
    assert [tuple(tensor.shape) for tensor in tensors(episode)] == [
        (n_tasks, n, 1) for n in (k_shot,) * 2 + (n_query,) * 2
    ]
    assert {tensor.dtype for tensor in tensors(episode)} == {torch.float32}
    assert episode.n_way == 1
    for values, (low, high) in (
        (of_tasks[:, 0], amplitude),
        (of_tasks[:, 1], phase),
        (torch.cat([episode.support_images, episode.query_images], dim=1), x),
    ):
        assert low - 1e-6 <= values.min().item() <= values.max().item() <= high + 1e-6
    for points, targets in (
        (episode.support_images, episode.support_labels),
        (episode.query_images, episode.query_labels),
    ):
        for task, (height, shift) in enumerate(of_tasks.tolist()):
            for point, target in zip(points[task, :, 0].tolist(), targets[task, :, 0].tolist(), strict=True):
                assert target == pytest.approx(height * math.sin(point - shift), abs=1e-4)


def test_the_waves_of_the_paper():
    waves = Sinusoids()
    assert (waves.amplitude, waves.phase, waves.x) == ((0.1, 5.0), (0.0, math.pi), (-5.0, 5.0))


def test_all_is_drawn_uniformly():
    """Each from its own range; 4000 draws differ from the uniform distribution by 1.95 / sqrt(n) once in 1000 cases."""
    episode, of_tasks = Sinusoids((1.0, 2.0), (-1.0, 0.5), (3.0, 7.0)).sampler(SPEC, seed=1).sample_with_waves(4000)
    limit = 1.95 / 4000**0.5
    assert largest_gap(of_tasks[:, 0], 1, 2) < limit
    assert largest_gap(of_tasks[:, 1], -1, 0.5) < limit
    for points in (episode.support_images, episode.query_images):
        for place in range(points.shape[1]):
            assert largest_gap(points[:, place], 3, 7) < limit


def test_what_is_drawn_is_drawn_independently():
    """No two columns are correlated: amplitude, phase, every support and every query point."""
    episode, of_tasks = Sinusoids().sampler(SPEC, seed=2).sample_with_waves(4000)
    columns = torch.cat([of_tasks, episode.support_images[..., 0], episode.query_images[..., 0]], dim=1)
    correlations = torch.corrcoef(columns.T.double()) - torch.eye(14)
    assert correlations.abs().max().item() < 4.5 / 4000**0.5


def test_no_point_is_both_support_and_query():
    episode = Sinusoids().sampler(SPEC).sample(50)
    for task in range(50):
        points = torch.cat([episode.support_images[task], episode.query_images[task]]).flatten().tolist()
        assert len(set(points)) == 12


# --- the stream of tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7], [11, 1], [3, 3, 3, 3]])
def test_the_tasks_do_not_depend_on_how_many_are_drawn_at_once(sizes: list[int]):
    whole, of_whole = Sinusoids().sampler(SPEC, seed=4).sample_with_waves(12)
    sampler = Sinusoids().sampler(SPEC, seed=4)
    parts = [sampler.sample_with_waves(n) for n in sizes]
    for i, expected in enumerate(tensors(whole)):
        assert torch.equal(torch.cat([tensors(episode)[i] for episode, _ in parts]), expected)
    assert torch.equal(torch.cat([waves for _, waves in parts]), of_whole)


def test_the_same_seed_gives_the_same_tasks_and_another_one_others():
    torch.manual_seed(0)
    one = Sinusoids().sampler(SPEC, seed=5).sample(3)
    torch.manual_seed(1)
    again, other = (Sinusoids().sampler(SPEC, seed=seed).sample(3) for seed in (5, 6))
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(again), strict=True))
    assert not any((a == b).any() for a, b in zip(tensors(one), tensors(other), strict=True))


def test_tasks_go_on_and_do_not_touch_the_global_generator():
    sampler, before = Sinusoids().sampler(SPEC), torch.get_rng_state()
    first, second = sampler.sample(2), sampler.sample(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert not (first.support_images == second.support_images).any()
    state = sampler.generator.get_state()
    third = sampler.sample(2)
    sampler.generator.set_state(state)  # as a resumed run does
    assert torch.equal(sampler.sample(2).support_labels, third.support_labels)


def test_with_or_without_the_waves_the_tasks_are_the_same():
    one = SinusoidSampler(Sinusoids(), SPEC, seed=3).sample(4)
    other, _ = Sinusoids().sampler(SPEC, seed=3).sample_with_waves(4)
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amplitude": (5.0, 0.1)}, "amplitude must be two numbers, the smaller first, got 5.0 and 0.1"),
        ({"phase": (1.0, 1.0)}, "phase must be two numbers, the smaller first, got 1.0 and 1.0"),
        ({"x": (0.0, float("nan"))}, "x must be two numbers, the smaller first, got 0.0 and nan"),
    ],
)
def test_empty_ranges(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Sinusoids(**options)


def test_a_wave_has_one_value_at_every_point():
    message = "a wave has one value at every point, so n_way must be 1, got 5"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Sinusoids().sampler(EpisodeSpec(5, 1, 1))


@pytest.mark.parametrize("n_tasks", [0, -1])
def test_no_tasks(n_tasks: int):
    sampler = Sinusoids().sampler(SPEC)
    for draw in (sampler.sample, sampler.sample_with_waves):
        with pytest.raises(ValueError, match=f"^n_tasks must be positive, got {n_tasks}$"):
            draw(n_tasks)
