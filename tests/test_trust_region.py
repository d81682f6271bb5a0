"""The trust-region step: exact on quadratics, and never longer or worse than promised."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from metatutor.applications.trust_region import trust_region_step


def quadratic(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A positive definite matrix, a gradient, and a place."""
    generator = torch.Generator().manual_seed(seed)
    root, g, place = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((6, 6), (6,), (6,)))
    return root @ root.mT + torch.eye(6, dtype=torch.float64), g, place


def test_the_step_on_a_quadratic_is_the_one_in_closed_form() -> None:
    h, g, place = quadratic()
    parts = [nn.Parameter(place[:2].clone()), nn.Parameter(place[2:].clone())]

    def away() -> Tensor:
        return torch.cat(list(parts)) - place

    rise = trust_region_step(
        parts, lambda: g @ away(), lambda: 0.5 * away() @ h @ away(), radius=0.02, damping=0.0, cg_steps=6
    )
    newton = torch.linalg.solve(h, g)
    expected = (2 * 0.02 / (g @ newton)).sqrt() * newton
    torch.testing.assert_close(away(), expected, rtol=1e-8, atol=1e-10)
    assert rise == pytest.approx((g @ expected).item())
    assert (0.5 * expected @ h @ expected).item() == pytest.approx(0.02)


def test_it_is_halved_until_the_objective_rises() -> None:
    """The objective's top is nearer than the edge of the trust region: the full step leads down again."""
    x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    top = torch.full((3,), 0.05, dtype=torch.float64)

    def objective() -> Tensor:
        return -(x - top).pow(2).sum()

    rise = trust_region_step([x], objective, lambda: 0.5 * x.pow(2).sum(), radius=0.5)
    assert rise > 0
    torch.testing.assert_close(x.data, torch.full_like(top, 1 / 3**0.5 / 8), rtol=1e-3, atol=0)  # three times halved


def test_it_stays_within_the_radius_where_the_divergence_is_not_quadratic() -> None:
    x = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def divergence() -> Tensor:
        return (0.5 * x**2 + 50 * x**4).sum()

    assert trust_region_step([x], lambda: x.sum(), divergence, radius=0.1) > 0
    assert 0 < divergence().item() <= 0.1 * (1 + 1e-4)


def test_where_nothing_helps_nothing_changes() -> None:
    x = nn.Parameter(torch.ones(2))
    assert trust_region_step([x], lambda: 0 * x.sum(), lambda: (x - 1).pow(2).sum()) == 0
    assert torch.equal(x.data, torch.ones(2))


def test_errors() -> None:
    x = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="radius"):
        trust_region_step([x], lambda: x.sum(), lambda: x.pow(2).sum(), radius=0.0)
