"""Heads in closed form: against their equations, one picture and one class at a time; left out is fitted without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metatutor.heads import Fit, directions, fit_gaussians, fit_head, fit_prototypes, fit_ridge

PENALTY = 0.3
FITS: dict[str, Callable[..., Fit]] = {
    "prototypes": fit_prototypes,
    "ridge": lambda *given: fit_ridge(*given, penalty=PENALTY),
    "gaussians": lambda *given: fit_gaussians(*given, shrinkage=PENALTY),
}


@pytest.fixture(params=[(4, 4, 4), (2, 5, 3)], ids=["equal", "unequal"])
def support(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of length one in float64, their labels, in no order, and the counts of the classes."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor(request.param)
    labels = torch.arange(3).repeat_interleave(counts)[torch.randperm(int(counts.sum()), generator=generator)]
    middles = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(labels), 7, generator=generator, dtype=torch.float64)
    return F.normalize(middles[labels] + noise, dim=1), labels, counts


def logits(fit: Fit, rows: Tensor) -> Tensor:
    return rows @ fit[0] + fit[1]


def test_prototypes_are_cosines_from_the_middle(support: tuple[Tensor, Tensor, Tensor]):
    rows, labels, counts = support
    found = logits(fit_prototypes(*support), rows)
    means = [sum(rows[j] for j in range(len(rows)) if labels[j] == c) / counts[c] for c in range(3)]
    middle = sum(means) / 3
    for i, row in enumerate(rows):
        for c in range(3):
            cosine = F.cosine_similarity(row - middle, means[c] - middle, dim=0)
            assert found[i, c].item() == pytest.approx(cosine.item() * (row - middle).norm().item())


def test_ridge_is_the_least_of_its_sum(support: tuple[Tensor, Tensor, Tensor]):
    rows, labels, counts = support
    weights, bias = (part.requires_grad_() for part in FITS["ridge"](*support)[:2])
    total = PENALTY * weights.pow(2).sum()
    for row, label in zip(rows, labels.tolist(), strict=True):
        target = torch.tensor([float(c == label) for c in range(3)], dtype=torch.float64)
        total = total + len(rows) / (3 * int(counts[label])) * (row @ weights + bias - target).pow(2).sum()
    for gradient in torch.autograd.grad(total, (weights, bias)):
        assert gradient.abs().max() < 1e-10


def test_gaussians_are_densities_of_one_shrunk_covariance(support: tuple[Tensor, Tensor, Tensor]):
    rows, labels, _ = support
    means = [rows[labels == c].mean(0) for c in range(3)]
    spread = sum(torch.outer(r := row - means[c], r) for row, c in zip(rows, labels.tolist(), strict=True))
    assert isinstance(spread, Tensor)
    floor = PENALTY * spread.trace() / 50
    density = [torch.distributions.MultivariateNormal(m, (spread + floor * torch.eye(7)) / floor) for m in means]
    expected = torch.stack([gaussian.log_prob(rows) for gaussian in density], dim=1)
    found = logits(FITS["gaussians"](*support), rows)
    assert torch.allclose(found.log_softmax(1), expected.log_softmax(1))


@pytest.mark.parametrize("head", ["prototypes", "ridge"])
def test_left_out_is_fitted_without(head: str, support: tuple[Tensor, Tensor, Tensor]):
    rows, labels, counts = support
    left_out = FITS[head](*support)[2]
    for i in range(len(rows)):
        rest = torch.arange(len(rows)) != i
        if head == "prototypes":
            again = fit_prototypes(rows[rest], labels[rest], labels[rest].bincount(minlength=3))
            expected = logits(again, rows[i])
        else:  # the weights of the others, and one more number, which has no penalty
            weight = (len(rows) / (3 * counts[labels].double())).sqrt()[:, None]
            x, y = weight * F.pad(rows, (0, 1), value=1.0), weight * F.one_hot(labels, 3)
            penalty = PENALTY * torch.eye(8).fill_diagonal_(1.0)
            penalty[-1, -1] = 0
            expected = F.pad(rows[i], (0, 1), value=1.0) @ torch.linalg.solve(
                x[rest].mT @ x[rest] + penalty, x[rest].mT @ y[rest]
            )
        assert torch.allclose(left_out[i], expected)


@pytest.mark.parametrize("head", [*FITS, "auto"])
def test_pictures_left_out_are_not_known_by_the_others(head):
    """Of embeddings and labels that have nothing to do with each other, left out no more are right than by chance."""
    generator, right = torch.Generator().manual_seed(0), []
    for _ in range(40):
        embeddings = 3 + torch.randn(20, 300, generator=generator)
        labels = torch.arange(4).repeat_interleave(5)
        right.append((fit_head(embeddings, labels, 4, head).left_out.argmax(1) == labels).double().mean().item())
    assert sum(right) / len(right) < 0.3


def test_left_out_gaussians_are_fitted_without(support: tuple[Tensor, Tensor, Tensor]):
    rows, labels, _ = support
    means = torch.stack([rows[labels == c].mean(0) for c in range(3)])
    floor = PENALTY * (rows - means[labels]).pow(2).sum() / 50  # stays as it is
    left_out = FITS["gaussians"](*support)[2]
    for i in range(len(rows)):
        rest = torch.arange(len(rows)) != i
        means = torch.stack([rows[rest & (labels == c)].mean(0) for c in range(3)])
        residuals = (rows - means[labels])[rest]
        inverse = torch.linalg.inv(residuals.mT @ residuals + floor * torch.eye(7))
        expected = torch.stack([-floor * (d := rows[i] - m) @ inverse @ d / 2 for m in means])
        assert torch.allclose(left_out[i], expected)


@pytest.mark.parametrize("head", [*FITS, "auto"])
def test_a_head_of_embeddings(head, support: tuple[Tensor, Tensor, Tensor]):
    embeddings = torch.cat([support[0], torch.zeros(len(support[0]), 30)], 1) + 5  # more numbers than pictures
    fitted = fit_head(embeddings, support[1], 3, head)
    assert (fitted(embeddings).argmax(1) == support[1]).double().mean() > 0.8
    rows = directions(embeddings, fitted.center)
    assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows), dtype=torch.float64))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    again = fit_head(embeddings[order], support[1][order], 3, head)
    assert torch.allclose(again(embeddings), fitted(embeddings), atol=1e-6)
    assert torch.allclose(again.left_out, fitted.left_out[order], atol=1e-6)


@pytest.mark.parametrize("head", FITS)
def test_one_picture_of_a_class_is_not_left_out(head):
    embeddings = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    fitted = fit_head(embeddings, torch.tensor([0, 0, 1, 2, 2]), 3, head)
    assert fitted.left_out.isnan().any(1).tolist() == [False, False, True, False, False]
    assert fitted(embeddings).argmax(1).tolist() == [0, 0, 1, 2, 2]
    single = fit_head(embeddings, torch.arange(5), 5, head)
    assert single.left_out.isnan().all() and single(embeddings).argmax(1).tolist() == [0, 1, 2, 3, 4]


def test_answers_that_are_all_right_are_not_certain():
    embeddings = torch.eye(2).repeat(3, 1) + 0.01 * torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    fitted = fit_head(embeddings, torch.tensor([0, 1] * 3), 2)
    assert fitted(embeddings).softmax(1).amax(1).min() > 0.8 and fitted(embeddings).softmax(1).max() < 0.97


def test_errors(unchecked_types: None):
    embeddings = torch.eye(3)
    with pytest.raises(ValueError, match="^head must be 'auto', 'ridge', 'gaussians' or 'prototypes', got 'svm'$"):
        fit_head(embeddings, torch.tensor([0, 1, 1]), 2, "svm")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="^class 2 has no picture; give at least one of each class$"):
        fit_head(embeddings, torch.tensor([0, 1, 1]), 3)
