"""Implicit MAML: where the inner problem is solved, the implicit gradient is the gradient through all its steps."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metatutor.backbones import MLP, ConvNet, Normalization
from metatutor.episodes import Episode
from metatutor.functional import Parameters
from metatutor.optimization import MAML, ImplicitMAML
from metatutor.optimization.imaml import conjugate_gradient
from tests.gradients import close, drawn, flat, gradient_of, regression, slopes

Episodes = Callable[..., Episode]


def small(*, normalization: Normalization = "batch", seed: int = 0, **options: Any) -> ImplicitMAML:
    """A learner of 3-way tasks of 8×8 pixels in float64, every parameter random."""
    network = ConvNet(3, filters=4, n_blocks=2, image_size=8, normalization=normalization)
    return ImplicitMAML(drawn(network, seed), **options)


def in_the_plane() -> Episode:
    """Four tasks of six support and five query points."""
    return regression(6, 5, n_tasks=4, n_inputs=2)


def linear(**options: Any) -> ImplicitMAML:
    """Two numbers in, one out, no layer between: the squared error is quadratic in the three parameters."""
    network = MLP(2, 1, hidden=()).double()
    for i, parameter in enumerate(network.parameters()):
        parameter.data = torch.linspace(-1, 1 + i, parameter.numel()).double().view(parameter.shape)
    return ImplicitMAML(network, **{"inner_lr": 0.2, "inner_steps": 55, "proximity": 1.5, "cg_steps": 3} | options)


def distance(one: Tensor, other: Tensor) -> float:
    """As a fraction of the length of the second."""
    return ((one - other).norm() / other.norm()).item()


# --- where everything is known ---------------------------------------------------------------------------------


def test_one_weight_by_hand():
    """Outputs `w x`, support (1, 3), query (1, 2), w = 1, proximity 4, loss `(w x - y)^2`, of Hessian 2.

    The inner problem `(p - 3)^2 + 2 (p - 1)^2` has its minimum at p = 5/3. There the gradient of the query loss is
    `2 (5/3 - 2) = -2/3`, and `d p / d w = (1 + 2 / 4)^-1 = 2/3`: the meta-gradient is -4/9.
    """
    network = OneWeight(1.0)
    one, three, two = (torch.full((1, 1, 1), v).double() for v in (1.0, 3.0, 2.0))
    episode = Episode(one, three, one, two, n_way=1)
    options: dict[str, Any] = {"inner_lr": 0.15, "inner_steps": 14, "proximity": 4.0}
    learner = ImplicitMAML(network, cg_steps=1, **options)
    assert close(learner.adapt(episode)["weight"], torch.tensor([[5 / 3]], dtype=torch.float64))
    assert learner.meta_loss(episode).item() == pytest.approx(1 / 9)
    assert gradient_of(learner, episode).item() == pytest.approx(-4 / 9)
    assert gradient_of(ImplicitMAML(network, cg_steps=0, **options), episode).item() == pytest.approx(-2 / 3)


def test_a_parameter_without_axes():
    one = torch.ones(2, 1, 1, dtype=torch.float64)
    scalar = OneWeight(0.0)
    scalar.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    learner = ImplicitMAML(scalar, inner_lr=3.0, inner_steps=25, proximity=2.0)  # (p - 1)^2 + p^2: at the middle
    found = learner.adapt(Episode(one, one, one, one, n_way=1))["weight"]
    assert torch.allclose(found, torch.full((2,), 0.5).double(), atol=1e-6)


class OneWeight(MLP):
    def __init__(self, weight: float) -> None:
        super().__init__(1, 1, hidden=())
        del self.head
        self.weight = nn.Parameter(torch.tensor([weight], dtype=torch.float64))

    def forward(self, images: Tensor, n_support: int | None = None) -> Tensor:
        return images * self.weight


def closed_form(learner: ImplicitMAML, episode: Episode) -> tuple[Tensor, Tensor]:
    """Adapted parameters and meta-gradient of a linear learner, by solving linear systems."""
    initial, proximity = flat(learner.network.parameters()).detach(), learner.proximity
    adapted, gradients = [], []
    for task in range(len(episode)):
        design, queries = (
            torch.cat([x[task], torch.ones(x.shape[1], 1).double()], dim=1)
            for x in (episode.support_images, episode.query_images)
        )
        hessian = 2 * design.T @ design / len(design)
        right = 2 * design.T @ episode.support_labels[task, :, 0] / len(design) + proximity * initial
        solution = torch.linalg.solve(hessian + proximity * torch.eye(3).double(), right)
        of_query = 2 * queries.T @ (queries @ solution - episode.query_labels[task, :, 0]) / len(queries)
        spring = proximity + learner.cg_damping
        gradients.append(torch.linalg.solve(torch.eye(3).double() + hessian / spring, of_query))
        adapted.append(solution)
    return torch.stack(adapted), torch.stack(gradients).mean(0)


@pytest.mark.parametrize("cg_damping", [0.0, 2.5])
@pytest.mark.parametrize(("proximity", "inner_lr", "inner_steps"), [(1.0, 0.2, 75), (1.5, 0.2, 55), (4.0, 0.15, 40)])
def test_a_quadratic_against_the_closed_form(proximity: float, inner_lr: float, inner_steps: int, cg_damping: float):
    """Damping is a stronger spring in the linear system only: adaptation leads to the same place."""
    learner = linear(proximity=proximity, cg_damping=cg_damping, inner_lr=inner_lr, inner_steps=inner_steps)
    episode = in_the_plane()
    adapted, gradient = closed_form(learner, episode)
    assert close(torch.cat([p.flatten(1) for p in learner.adapt(episode).values()], dim=1), adapted)
    assert close(gradient_of(learner, episode), gradient)


def inner_problem(learner: ImplicitMAML, episode: Episode, parameters: Parameters) -> Tensor:
    """What adaptation is to make small, for each task, one task and one parameter at a time."""
    found = []
    for task in range(len(episode)):
        of_task = {n: p[task] for n, p in parameters.items()}
        outputs = functional_call(learner.network, of_task, (episode.support_images[task],))
        squares = [((p - of_task[n]) ** 2).sum() for n, p in learner.network.named_parameters()]
        spring = learner.proximity / 2 * torch.stack(squares).sum()
        found.append(learner.loss(outputs, episode.support_labels[task]) + spring)
    return torch.stack(found).detach()


@pytest.mark.parametrize("inner_lr", [0.15, 0.7, 51.2])
def test_steps_that_lead_up_are_halved(inner_lr: float):
    """Gradient descent with a rate of 51 would be far away after two steps; the minimum is reached all the same."""
    learner, episode = linear(inner_lr=inner_lr, inner_steps=50), in_the_plane().tasks(slice(2))
    path = learner.adaptation_path(episode)
    heights = torch.stack([inner_problem(learner, episode, parameters) for parameters in path])  # [step, task]
    assert (heights.diff(dim=0) < 1e-12).all()
    adapted, gradient = closed_form(learner, episode)
    assert close(torch.cat([p.flatten(1) for p in path[-1].values()], dim=1), adapted, 1e-3)
    assert close(gradient_of(learner, episode), gradient, 1e-3)
    alone = [  # a task that halves does not make another one halve
        torch.stack([inner_problem(learner, one, p) for p in learner.adaptation_path(one)])[:, 0]
        for one in (episode.task(i) for i in range(len(episode)))
    ]
    assert torch.allclose(torch.stack(alone, dim=1), heights, atol=1e-12)
    assert (heights[4] == heights[0]).all() == (inner_lr > 1)  # nothing is taken until the rate has been halved


def test_a_step_to_nowhere_is_not_taken():
    learner, episode = linear(inner_lr=1e200, inner_steps=3), in_the_plane()
    assert all(
        torch.equal(p, q.expand_as(p))
        for p, q in zip(learner.adapt(episode).values(), learner.network.parameters(), strict=True)
    )


def test_with_much_damping_first_order_is_left():
    first_order, damped = linear(cg_steps=0), linear(cg_damping=1e9)
    assert close(gradient_of(damped, in_the_plane()), gradient_of(first_order, in_the_plane()), 1e-6)


def unrolled(learner: ImplicitMAML, episode: Episode) -> Tensor:
    """The gradient of the mean query loss through every proximal step of every task, one by one."""
    initial = dict(learner.network.named_parameters())
    losses = []
    for task in range(len(episode)):
        parameters: Parameters = dict(initial)
        for _ in range(learner.inner_steps):
            outputs = functional_call(learner.network, parameters, (episode.support_images[task],))
            loss = learner.loss(outputs, episode.support_labels[task])
            away = sum((parameters[n] - initial[n]).pow(2).sum() for n in initial)
            gradients = torch.autograd.grad(
                loss + learner.proximity / 2 * away, list(parameters.values()), create_graph=True
            )
            parameters = {n: p - learner.inner_lr * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
        outputs = functional_call(learner.network, parameters, (episode.query_images[task],))
        losses.append(learner.loss(outputs, episode.query_labels[task]))
    return flat(torch.autograd.grad(torch.stack(losses).mean(), list(initial.values())))


def test_a_quadratic_against_the_gradient_through_all_steps():
    learner, episode = linear(), in_the_plane()
    assert close(gradient_of(learner, episode), unrolled(learner, episode))
    assert distance(gradient_of(linear(cg_steps=0), episode), unrolled(learner, episode)) > 0.1


@pytest.mark.parametrize(
    ("normalization", "seed", "inner_lr", "proximity"), [("batch", 0, 0.1, 4.0), ("group", 1, 0.05, 8.0)]
)
def test_a_network_against_the_gradient_through_all_steps(
    random_episode: Episodes, normalization: Normalization, seed: int, inner_lr: float, proximity: float
):
    """Not quadratic. Few steps of adaptation or of conjugate gradient come near, many are there.

    Where adaptation ends on a kink of a ReLU there is no Hessian, and the two differ; here it does not.
    """
    episode = random_episode(n_tasks=2)
    options: dict[str, Any] = {
        "normalization": normalization, "seed": seed, "inner_lr": inner_lr, "proximity": proximity
    }  # fmt: skip
    exact = unrolled(small(inner_steps=60, **options), episode)
    adapted = {n: small(inner_steps=n, **options).adapt(episode) for n in (5, 60)}

    def error(inner_steps: int, cg_steps: int) -> float:
        learner: Any = small(cg_steps=cg_steps, **options)
        learner.adapt = lambda *_: adapted[inner_steps]  # which takes most of the time
        return distance(gradient_of(learner, episode), exact)

    assert error(60, 20) < 1e-6
    assert 1e-3 < error(60, 2) < 0.05
    assert 1e-3 < error(5, 20) < 0.1
    assert error(60, 0) > 0.15


def test_a_solved_problem_against_finite_differences(random_episode: Episodes):
    """Central differences of the meta-loss itself along random directions; no reference to differentiate."""
    learner = small(normalization="support", inner_lr=0.1, inner_steps=36, proximity=4.0, cg_steps=20)
    for slope, found in slopes(learner, random_episode(n_tasks=2).task(0), n_directions=2):
        assert found == pytest.approx(slope, rel=1e-5, abs=1e-7)


# --- the inner loop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner_steps", [1, 4])
def test_adaptation_is_descent_within_reach(random_episode: Episodes, inner_steps: int):
    """PyTorch's own optimizer, task by task, on the support loss and the distance from the initial parameters."""
    episode, learner = random_episode(), small(inner_lr=0.2, inner_steps=inner_steps, proximity=0.7)
    adapted, initial = learner.adapt(episode), dict(learner.network.named_parameters())
    for task in range(len(episode)):
        network = deepcopy(learner.network)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
        for _ in range(inner_steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(episode.support_images[task]), episode.support_labels[task])
            away = sum((p - initial[n].detach()).pow(2).sum() for n, p in network.named_parameters())
            (loss + 0.35 * away).backward()
            optimizer.step()
        for name, parameter in network.named_parameters():
            assert close(adapted[name][task], parameter), name


def test_the_pull_keeps_near(random_episode: Episodes):
    episode, travelled = random_episode(), []
    for proximity in (1e-9, 0.1, 1.0, 4.0):
        learner = small(inner_lr=0.2, inner_steps=10, proximity=proximity)
        adapted, initial = learner.adapt(episode), dict(learner.network.named_parameters())
        travelled.append(sum((adapted[n] - p).pow(2).sum().item() for n, p in initial.items()))
    assert travelled == sorted(travelled, reverse=True)
    assert travelled[-1] < 0.1 * travelled[0]


def test_without_a_pull_it_descends_as_maml_does(random_episode: Episodes):
    episode, options = random_episode(), {"inner_lr": 0.2, "inner_steps": 3}
    implicit = small(proximity=1e-12, cg_steps=0, **options)
    maml = MAML(implicit.network, first_order=True, **options)
    assert close(implicit(episode), maml(episode))
    assert close(gradient_of(implicit, episode), gradient_of(maml, episode))


def test_no_step_of_conjugate_gradient_is_first_order(random_episode: Episodes):
    """The gradient of the query loss in the adapted parameters, task by task."""
    episode, learner = random_episode(), small(inner_lr=0.2, inner_steps=3, cg_steps=0)
    adapted, of_tasks = learner.adapt(episode), []
    for task in range(len(episode)):
        own = {n: p[task].detach().requires_grad_() for n, p in adapted.items()}
        loss = F.cross_entropy(
            functional_call(learner.network, own, (episode.query_images[task],)), episode.query_labels[task]
        )
        of_tasks.append(flat(torch.autograd.grad(loss, list(own.values()))))
    expected = torch.stack(of_tasks).mean(0)
    assert close(gradient_of(learner, episode), expected)
    implicit = small(inner_lr=0.2, inner_steps=3, cg_steps=5)
    assert distance(gradient_of(implicit, episode), expected) > 0.1


def test_the_meta_loss_is_that_of_the_queries(random_episode: Episodes):
    episode, learner = random_episode(), small(inner_lr=0.2, inner_steps=2)
    expected = F.cross_entropy(learner(episode).flatten(0, 1), episode.query_labels.flatten())
    assert close(learner.meta_loss(episode), expected)


def test_nothing_of_the_way_is_kept(random_episode: Episodes):
    """What autograd holds at most does not grow with the inner steps."""

    def most_saved(**options: Any) -> int:
        alive, most = 0, 0

        class Held:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal alive, most
                self.tensor, self.size = tensor, tensor.numel()
                alive += self.size
                most = max(most, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            small(**options).meta_loss(random_episode()).backward()
        return most

    few, many = (most_saved(inner_steps=n) for n in (1, 8))
    assert many < 1.05 * few


# --- conjugate gradient ----------------------------------------------------------------------------------------


def systems(n: int, n_tasks: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Symmetric matrices, each task's own, with eigenvalues between 1/2 and 3, and right-hand sides."""
    generator = torch.Generator().manual_seed(seed)
    bases, _ = torch.linalg.qr(torch.randn(n_tasks, n, n, dtype=torch.float64, generator=generator))
    values = 0.5 + 2.5 * torch.rand(n_tasks, 1, n, dtype=torch.float64, generator=generator)
    return bases * values @ bases.mT, torch.randn(n_tasks, n, dtype=torch.float64, generator=generator)


def product_with(matrices: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda vectors: (matrices @ vectors[..., None])[..., 0]


@pytest.mark.parametrize("n", [1, 2, 5, 12])
@pytest.mark.parametrize("more", [0, 1, 30])
def test_solves_every_tasks_own_system(n: int, more: int):
    """In as many steps as there are dimensions; steps beyond do no harm, though nothing is left to do."""
    matrices, right = systems(n)
    solution = conjugate_gradient(product_with(matrices), right, n + more)
    assert close(solution, torch.linalg.solve(matrices, right))


def test_every_step_comes_nearer():
    """In the norm of the matrix, in which conjugate gradient is optimal; at first at the right-hand side itself."""
    matrices, right = systems(8)
    exact = torch.linalg.solve(matrices, right)
    solutions = [conjugate_gradient(product_with(matrices), right, steps) for steps in range(9)]
    assert torch.equal(solutions[0], right)
    errors = torch.stack([((s - exact) * product_with(matrices)(s - exact)).sum(1) for s in solutions])
    assert (errors[1:] < errors[:-1]).all()
    steepest = right + (residual := right - product_with(matrices)(right)) * (
        residual.pow(2).sum(1, keepdim=True) / (residual * product_with(matrices)(residual)).sum(1, keepdim=True)
    )
    assert close(solutions[1], steepest)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_one_product_a_step(steps: int):
    """And one for where it begins."""
    matrices, right = systems(6)
    calls: list[Tensor] = []
    conjugate_gradient(lambda v: calls.append(v) or product_with(matrices)(v), right, steps)
    assert len(calls) == (steps + 1 if steps else 0)


def test_one_task_with_nothing_to_solve_does_not_spoil_the_others():
    matrices, right = systems(5)
    matrices[1], right[2] = torch.eye(5), 0  # solved where it begins
    solution = conjugate_gradient(product_with(matrices), right, 10)
    assert close(solution, torch.linalg.solve(matrices, right))
    assert torch.equal(solution[1], right[1])
    assert not solution[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_matrices_that_are_not_positive_give_finite_numbers(dtype: torch.dtype, steps: int):
    """Negative, zero, and of both signs; where there is no descent, it stays."""
    matrices, right = systems(4, n_tasks=40)
    signs = torch.tensor([[1.0, -1.0, 0.5, -2.0]]).double()
    both = torch.randn(40, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for wrong in (-matrices, 0 * matrices, torch.diag_embed(signs).expand(40, 4, 4), both + both.mT):
        solution = conjugate_gradient(product_with(wrong.to(dtype)), right.to(dtype), steps)
        assert solution.isfinite().all()
    assert torch.equal(conjugate_gradient(product_with(-matrices), right, steps), right)
    assert torch.equal(conjugate_gradient(product_with(0 * matrices), right, steps), right)
