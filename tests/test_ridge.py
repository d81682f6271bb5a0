"""R2-D2: the closed form against the equations, the optimum it claims, and what is learned of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metatutor import R2D2, ConvNet, Episode, EpisodeSpec, Strokes, TrainConfig, evaluate, train
from metatutor.optimization.ridge import ridge
from tests.tasks import close


def learner(**more) -> R2D2:
    torch.manual_seed(0)
    network = ConvNet(filters=4, n_blocks=2, n_halving=1, image_size=8, pooling="max", normalization="group")
    return R2D2(network, **more).double()


def episode(n_tasks: int = 3, n_way: int = 3, k_shot: int = 2, n_query: int = 2) -> Episode:
    generator = torch.Generator().manual_seed(0)
    labels = [torch.arange(n_way).repeat(n).repeat(n_tasks, 1) for n in (k_shot, n_query)]
    images = [torch.rand(*of.shape, 1, 8, 8, generator=generator, dtype=torch.float64) for of in labels]
    return Episode(images[0], labels[0], images[1], labels[1], n_way)


def problem(n: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, n, size, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(2, n, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("n", "size"), [(4, 9), (9, 4), (1, 1)])
def test_the_small_system_has_the_solution_of_the_large_one(n: int, size: int):
    """`(XᵀX + penalty I)⁻¹ Xᵀ Y`, as textbooks have it, of as many unknowns as there are features."""
    inputs, targets = problem(n, size)
    for penalty in (0.01, 1.0, 50.0):
        for x, y, found in zip(inputs, targets, ridge(inputs, targets, penalty), strict=True):
            expected = torch.linalg.inv(x.T @ x + penalty * torch.eye(size, dtype=x.dtype)) @ x.T @ y
            assert torch.allclose(found, expected, rtol=1e-9)


def test_it_minimises_what_it_says():
    inputs, targets = problem(6, 4)
    weights, penalty = ridge(inputs, targets, 0.7).requires_grad_(), 0.7

    def objective(w: Tensor) -> Tensor:
        return (inputs @ w - targets).pow(2).sum() + penalty * w.pow(2).sum()

    [gradient] = torch.autograd.grad(objective(weights), [weights])
    assert gradient.abs().max() < 1e-12
    assert objective(weights + 0.01 * torch.randn_like(weights)) > objective(weights)


def test_logits_are_the_regression_scaled_and_shifted():
    one, tasks = learner(penalty=0.3, scale=4.0), episode()
    with torch.no_grad():
        one.shift.fill_(0.25)
        logits = one(tasks)
        for i in range(len(tasks)):
            x, query = (one.network.embed(images[i]) for images in (tasks.support_images, tasks.query_images))
            y = F.one_hot(tasks.support_labels[i], 3).double()
            gram = torch.stack([torch.stack([(a * b).sum() for b in x]) for a in x])
            inverse = torch.linalg.inv(gram + one.log_penalty.exp() * torch.eye(len(x), dtype=x.dtype))
            weights = torch.stack([torch.outer(x[j], (inverse @ y)[j]) for j in range(len(x))]).sum(0)
            assert close(logits[i], one.log_scale.exp() * query @ weights + 0.25)


def test_the_outer_loop_learns_penalty_scale_and_embedding_through_the_solution():
    one, tasks = learner(penalty=0.3), episode()
    one.meta_loss(tasks).backward()
    for name in ("log_penalty", "log_scale"):
        parameter = one.get_parameter(name)
        assert parameter.grad is not None
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-6)
                values.append(one.meta_loss(tasks).item())
                parameter.sub_(sign * 1e-6)
        assert parameter.grad.item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)
    assert all(p.grad is not None and p.grad.any() for p in one.network.parameters())
    shift = one.shift.grad  # the same for all classes, so that no probability depends on it
    assert shift is not None and shift.abs() < 1e-12


def test_a_penalty_stays_positive_whatever_is_learned():
    one = learner(penalty=1e-3)
    with torch.no_grad():
        one.log_penalty.sub_(50)
    assert one.log_penalty.exp() > 0 and one(episode()).isfinite().all()


def test_ways_and_shots_may_change_and_classes_may_have_unlike_numbers():
    one = learner()
    for n_way, k_shot in ((2, 1), (5, 3)):
        assert one(episode(n_way=n_way, k_shot=k_shot)).shape == (3, 2 * n_way, n_way)
    images = torch.rand(1, 4, 1, 8, 8, dtype=torch.float64)
    assert one(Episode(images, torch.tensor([[0, 0, 0, 1]]), images)).shape == (1, 4, 2)


@pytest.mark.parametrize(("option", "value"), [("penalty", 0.0), ("penalty", -1.0), ("scale", 0.0)])
def test_bad_arguments_are_told(option: str, value: float):
    with pytest.raises(ValueError, match=f"{option} must be positive, got {value}"):
        learner(**{option: value})


def test_it_learns():
    splits = Strokes.load(n_alphabets=12, characters_per_alphabet=10).split()
    torch.manual_seed(0)
    one, spec = R2D2(ConvNet(filters=8, normalization="group")), EpisodeSpec(5, 1, 5)
    before = evaluate(one, splits.test, spec, n_episodes=60).accuracy
    train(one, splits.train, spec, TrainConfig(iterations=60, tasks_per_step=4, warmup=10), progress_bar=False)
    assert evaluate(one, splits.test, spec, n_episodes=60).accuracy > before + 0.05
