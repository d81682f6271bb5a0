"""Generation: the bound against numerical integration, gradients, support sets of any size and order, what is drawn."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from metatutor.applications.generation import (
    Adaptable,
    ConditionalVAE,
    Gaussian,
    drawing_task,
    ink,
    minus_bound,
    placed,
    spread_of_places,
)
from metatutor.data import Strokes
from metatutor.episodes import ClassImages, Episode, EpisodeSampler, EpisodeSpec
from metatutor.optimization import Reptile
from metatutor.testing import check_learner
from metatutor.training import TrainConfig, train


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(seed: int = 0, **options: Any) -> ConditionalVAE:
    torch.manual_seed(seed)
    return ConditionalVAE(latent=4, width=8, **options)


@cache
def classes() -> ClassImages:
    """Drawn once, and by the worker alone that needs them."""
    return Strokes.load().split(rotations=False).train


DRAWINGS = (torch.rand(6, 1, 28, 28, generator=generator(1)) > 0.8).float()


# --- the bound ---


def test_a_gaussian_agrees_with_torch() -> None:
    means, log_scales = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    one, other = (Gaussian(*pair) for pair in zip(means, log_scales, strict=True))
    normals = [Normal(m, s.exp()) for m, s in zip(means, log_scales, strict=True)]
    torch.testing.assert_close(one.divergence(other), kl_divergence(*normals).sum(-1))
    values = torch.randn(7, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(one.log_density(values), normals[0].log_prob(values).sum(-1))
    torch.testing.assert_close(one.at(values), means[0] + log_scales[0].exp() * values)


class OneNumber(ConditionalVAE):
    """Latent numbers are one, so that the integrals over it can be computed on a grid."""

    def __init__(self) -> None:
        super().__init__(latent=1, width=8)


def on_a_grid(model: ConditionalVAE, drawing: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """`log ∫ p(x | z) p(z) dz` and `∫ q(z) (log p(x | z) + log p(z) - log q(z)) dz`, by the trapezoidal rule."""
    posterior, prior = model.beliefs(drawing, context)
    grid = torch.linspace(-8, 8, 2001, dtype=torch.float64)[:, None]
    logits = model.decoder(grid, context.expand(len(grid), -1, -1, -1))
    pixels = torch.distributions.Bernoulli(logits=logits).log_prob(drawing).flatten(1).sum(1)
    log_prior, log_posterior = prior.log_density(grid), posterior.log_density(grid)
    width = grid[1, 0] - grid[0, 0]
    evidence = (pixels + log_prior).logsumexp(0) + width.log()
    return evidence, (log_posterior.exp() * (pixels + log_prior - log_posterior)).sum() * width


def test_the_bound_is_the_integral_it_estimates_and_below_the_evidence() -> None:
    torch.manual_seed(0)
    model, drawing = OneNumber().double(), DRAWINGS[:1].double()
    with torch.no_grad():
        context = model.context(DRAWINGS[1:3].double())
        evidence, expected = on_a_grid(model, drawing, context)
        n = 2000
        bounds = model.bound(drawing.expand(n, -1, -1, -1), context, generator())
        many = model.log_likelihood(drawing.expand(100, -1, -1, -1), context, generator(), samples=50)
    assert abs(bounds.mean() - expected) < 1e-3
    assert bounds.mean() <= evidence
    assert abs(many.mean() - evidence) < 1e-3


def test_more_samples_never_loosen_the_bound() -> None:
    model, copies = small(), DRAWINGS[:1].expand(400, -1, -1, -1)
    context = model.context(DRAWINGS[1:3])
    found = [model.log_likelihood(copies, context, generator(), samples=k) for k in (1, 5, 50)]
    single = model.bound(copies, context, generator(1)).detach()
    error = 4 * (single.std() + found[0].std()) / 20
    assert abs(single.mean() - found[0].mean()) < error
    assert found[0].mean() < found[1].mean() + error
    assert found[1].mean() < found[2].mean() + error


def test_gradients() -> None:
    model = small().double()
    context = model.context(DRAWINGS[1:3].double()).detach()

    def bound(*parameters: Tensor) -> Tensor:
        named = dict(zip(dict(model.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(_Bound(model, context), {f"model.{n}": p for n, p in named.items()}, ())

    start = [p.detach().requires_grad_() for p in model.parameters()]
    directions = [torch.randn_like(p) for p in start]
    gradient = torch.autograd.grad(bound(*start), start)
    slope = sum((g * d).sum().item() for g, d in zip(gradient, directions, strict=True))
    step = 1e-6
    ahead, behind = ([p + sign * step * d for p, d in zip(start, directions, strict=True)] for sign in (1, -1))
    assert math.isclose(slope, (bound(*ahead) - bound(*behind)).item() / (2 * step), rel_tol=1e-5)


class _Bound(torch.nn.Module):
    def __init__(self, model: ConditionalVAE, context: Tensor) -> None:
        super().__init__()
        self.model, self.given = model, context

    def forward(self) -> Tensor:
        drawings = DRAWINGS[:2].double()
        return self.model.bound(drawings, self.given, generator()).sum()


# --- support sets ---


def test_the_order_of_the_support_set_does_not_matter_and_its_size_does() -> None:
    model = small()
    forwards, backwards = model.context(DRAWINGS[:4]), model.context(DRAWINGS[:4].flip(0))
    torch.testing.assert_close(forwards, backwards)
    twice = model.context(DRAWINGS[:4].repeat(2, 1, 1, 1))
    torch.testing.assert_close(twice[:, :-1], forwards[:, :-1])  # the mean is the same
    assert (twice[:, -1] < forwards[:, -1]).all()  # and what says how few they are is not


def test_without_support_nothing_is_known() -> None:
    context = small().context(DRAWINGS[:0])
    assert context[:, :-1].eq(0).all() and context[:, -1].eq(1).all()


def test_contexts_of_an_episode_are_those_of_its_classes() -> None:
    model, labels = small(), torch.tensor([[1, 0, 1, 0, 1, 0]])
    episode = Episode(DRAWINGS[None], labels, DRAWINGS[None], labels)
    for shots in (None, 2, 0):
        contexts = model.contexts(episode, shots)
        for way in (0, 1):
            own = DRAWINGS[labels[0] == way][: 3 if shots is None else shots]
            torch.testing.assert_close(contexts[0, way], model.context(own)[0])


def test_training_shows_from_one_to_all_support_images() -> None:
    seen = set()

    class Watched(ConditionalVAE):
        def contexts(self, episode: Episode, shots: int | None = None) -> Tensor:
            seen.add(shots)
            return super().contexts(episode, shots)

    torch.manual_seed(0)
    model = Watched(latent=2, width=8, max_shots=3)
    for seed in range(20):
        model.meta_loss(EpisodeSampler(classes(), EpisodeSpec(2, 3, 1), seed=seed).sample(1))
    assert seen == {1, 2, 3}
    assert small(max_shots=0).meta_loss(EpisodeSampler(classes(), EpisodeSpec(2, 3, 1)).sample(1)).isfinite()


def test_the_query_is_never_in_its_own_context() -> None:
    model = small()
    episode = EpisodeSampler(classes(), EpisodeSpec(3, 2, 2)).sample(1)
    other = Episode(
        episode.support_images, episode.support_labels, 1 - episode.query_images, episode.query_labels, n_way=3
    )
    assert torch.equal(model.contexts(episode), model.contexts(other))


# --- as a learner ---


def test_contract() -> None:
    check_learner(small())


def test_it_learns_and_then_knows_classes_it_never_saw() -> None:
    torch.manual_seed(0)
    model = ConditionalVAE(latent=8, width=16)
    before = EpisodeSampler(classes(), EpisodeSpec(3, 3, 3), seed=9).sample(10)
    start, config = model.meta_loss(before).item(), TrainConfig(60, 2, outer_lr=3e-3, warmup=5)
    train(model, classes(), EpisodeSpec(4, 5, 5), config, device="cpu", progress_bar=False)
    assert model.meta_loss(before).item() < 0.6 * start


# --- adapted by gradients ---


def adaptable(**options: Any) -> Reptile:
    torch.manual_seed(0)
    return Reptile(Adaptable(small(max_shots=0)), loss=minus_bound, test_inner_steps=20, **options)


def test_the_loss_of_an_adaptable_network_is_minus_the_bound() -> None:
    learner, n = adaptable(), 3000
    task = drawing_task(DRAWINGS[None, :2], DRAWINGS[None, 2:3].expand(1, n, -1, -1, -1))
    with torch.no_grad():
        losses = minus_bound(learner.network(task.query_images[0]), task.query_labels[0])
        model = learner.network.model
        assert isinstance(model, ConditionalVAE)
        bounds = model.bound(task.query_images[0], model.context(DRAWINGS[:0]), generator())
    assert abs(losses + bounds.mean()) < 6 * bounds.std() / n**0.5


def test_adapting_improves_the_bound_and_moves_only_the_decoder() -> None:
    learner = adaptable(inner_lr=0.01).eval()
    task = drawing_task(DRAWINGS[None, :2], DRAWINGS[None, :2])
    start, end = learner.adaptation_path(task, 0)[0], learner.adapt(task)
    losses = [learner.query_loss(task, parameters) for parameters in (start, end)]
    assert losses[1] < 0.9 * losses[0]
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == {name for name in start if name.startswith("model.decoder.")}


def test_a_model_with_support_is_not_adapted_by_gradients() -> None:
    with pytest.raises(ValueError, match="max_shots=0"):
        Adaptable(small())


# --- what is drawn ---


def test_drawings_are_probabilities_the_same_for_the_same_chance_and_alike_when_cold() -> None:
    model = small()
    one, again = (model.draw(DRAWINGS[:2], 5, generator(3)) for _ in range(2))
    assert torch.equal(one, again) and one.shape == (5, 1, 28, 28) and one.min() > 0 and one.max() < 1
    cold = model.draw(DRAWINGS[:2], 5, generator(3), temperature=0.0)
    torch.testing.assert_close(cold, cold[:1].expand_as(cold))
    assert one.std(0).mean() > 0


def test_what_the_temperature_takes_from_the_place_is_given_back() -> None:
    model = small()
    model.places[2] = 0.2  # moved across
    warm, still = (model.draw(DRAWINGS[:2], 5, generator(3), temperature=1.0) for model in (model, small()))
    torch.testing.assert_close(warm, still)
    cold = model.draw(DRAWINGS[:2], 5, generator(3), temperature=0.0)
    assert cold.std(0).mean() > 0.01


def test_drawings_are_moved_by_pixels_and_paper_follows() -> None:
    logits = torch.randn(1, 1, 28, 28)
    torch.testing.assert_close(placed(logits, torch.zeros(1, 6)), logits)
    moved = placed(logits, torch.tensor([[0, 0, 2 / 28 * 3, 0, 0, -2 / 28]]))  # fetched from 3 to the right, 1 above
    torch.testing.assert_close(moved[:, :, 1:, :-3], logits[:, :, :-1, 3:])
    assert moved[:, :, 0].allclose(torch.tensor(-8.0)) and moved[:, :, :, -3:].allclose(torch.tensor(-8.0))


def test_the_spread_of_places_is_what_drawings_were_placed_by() -> None:
    spread = torch.tensor([0.1, 0.12, 0.05, 0.0, 0.08, 0.06])
    square = F.pad(torch.ones(12, 12), (8, 8, 8, 8)) * 16 - 8  # logits of a solid square
    places = spread * torch.randn(4000, 6, generator=generator())
    drawn = placed(square.expand(4000, 1, 28, 28), places).sigmoid()
    assert (spread_of_places(drawn[None]) - spread).abs().max() < 0.015


def test_ink_is_more_than_half() -> None:
    assert ink(torch.tensor([0.0, 0.5, 0.51, 1.0])).tolist() == [0, 0, 1, 1]


def test_errors(unchecked_types: None) -> None:
    model = small()
    with pytest.raises(ValueError, match=r"expected drawings \[n, 1, 28, 28\]"):
        model.draw(torch.rand(1, 1, 32, 32), 2, generator())
    with pytest.raises(ValueError, match="temperature"):
        model.draw(DRAWINGS, 2, generator(), temperature=-1.0)
    with pytest.raises(ValueError, match="n must be positive"):
        model.draw(DRAWINGS, 0, generator())
    with pytest.raises(ValueError, match="samples"):
        model.log_likelihood(DRAWINGS, model.context(DRAWINGS), generator(), samples=0)
    with pytest.raises(ValueError, match="max_shots"):
        ConditionalVAE(max_shots=-1)
