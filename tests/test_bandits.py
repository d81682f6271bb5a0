"""Bandits: what arms pay, strategies against enumeration, Gittins' published indices."""

from __future__ import annotations

import pytest
import torch

from metatutor.applications import bandits
from metatutor.applications.bandits import Bandits, gittins_indices, play, pull


def test_arms_pay_with_their_chances() -> None:
    chances = torch.tensor([[0.2, 0.9]], dtype=torch.float64).expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)
    for arm, chance in enumerate((0.2, 0.9)):
        paid = pull(chances, torch.full((20_000,), arm), generator)
        assert set(paid.tolist()) == {0.0, 1.0} and abs(paid.mean() - chance) < 0.01


def test_gittins_indices_are_those_of_the_tables() -> None:
    """Gittins, Glazebrook & Weber (2011), table 8.4, counts from 1: discount 0.9."""
    table = gittins_indices(0.9)
    for paid, not_paid, index in (
        (1, 1, 0.7029),
        (2, 1, 0.8001),
        (1, 2, 0.5001),
        (2, 2, 0.6346),
        (3, 1, 0.8452),
        (2, 3, 0.5163),
    ):
        assert table[paid - 1, not_paid - 1] == pytest.approx(index, abs=0.003)


@pytest.mark.parametrize("discount", [0.5, 0.9, 0.99])
def test_an_index_lies_above_the_mean_and_grows_with_patience(discount: float) -> None:
    table, patient = gittins_indices(discount), gittins_indices(0.995)
    a, b = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
    mean = (a + 1) / (a + b + 2)
    assert (table[:20, :20] >= mean - 0.003).all() and (patient[:20, :20] >= table[:20, :20] - 0.003).all()


def test_strategies_choose_what_they_say() -> None:
    paid = torch.tensor([[3.0, 0.0, 1.0]], dtype=torch.float64)
    not_paid = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    assert bandits.greedy(paid, not_paid, 5, generator).tolist() in ([0], [2])  # 4/6 and 2/3
    assert bandits.ucb1(paid, not_paid, 5, generator).tolist() == [1]  # never pulled
    many = paid.expand(9000, -1), not_paid.expand(9000, -1)
    draws = torch.distributions.Beta(paid + 1, not_paid + 1).sample((90_000,))[:, 0]
    expected = draws.argmax(1).bincount() / 90_000
    found = bandits.thompson(many[0], many[1], 5, generator).bincount() / 9000
    assert (found - expected).abs().max() < 0.02


def test_ties_are_broken_at_random() -> None:
    nothing = torch.zeros(3000, 3, dtype=torch.float64)
    for strategy in (bandits.greedy, bandits.ucb1, bandits.gittins, bandits.thompson, bandits.at_random):
        shares = strategy(nothing, nothing, 9, torch.Generator().manual_seed(0)).bincount() / 3000
        assert (shares - 1 / 3).abs().max() < 0.04


def test_the_textbooks_order() -> None:
    chances = Bandits(5).sample(400, seed=1)
    earned = {
        s.__name__: play(s, chances, 50).sum(1).mean() for s in (bandits.at_random, bandits.greedy, bandits.gittins)
    }
    assert earned["at_random"] < 27 < earned["greedy"] < earned["gittins"] < 50 * chances.amax(1).mean()
    again = play(bandits.thompson, chances, 20, seed=3)
    assert torch.equal(again, play(bandits.thompson, chances, 20, seed=3)) and again.shape == (400, 20)


def test_errors(unchecked_types: None) -> None:
    chances = Bandits(2).sample(3)
    for arms in ([0, 1, 2], [-1, 0, 0], [0, 1]):
        with pytest.raises(ValueError, match="expected an arm from 0 to 1 for each of 3 bandits"):
            pull(chances, torch.tensor(arms), torch.Generator())
    with pytest.raises(ValueError, match="at least 2 arms, got 1"):
        Bandits(1)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        Bandits().sample(0)
