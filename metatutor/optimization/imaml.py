"""Implicit MAML: the meta-gradient from where adaptation ends, however it got there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from metatutor.checks import check_not_negative, check_positive
from metatutor.episodes import Episode
from metatutor.functional import (
    Parameters,
    Vectors,
    flatten_tasks,
    gradients_of,
    leaves,
    unflatten_tasks,
    with_gradient,
)
from metatutor.learner import Loss
from metatutor.optimization.base import AdaptingLearner, check_loss


class ImplicitMAML(AdaptingLearner):
    """Adapts while staying near the initial parameters, and differentiates the result rather than the path to it.

    Inner problem of each task: `adapted = argmin over p of support_loss(p) + proximity / 2 * |p - initial|^2`, by
    `inner_steps` steps of gradient descent. A step that would lead uphill is not taken, and the task's next ones are
    half as long: no gradient tells the outer loop when the steps become too long.

    Where the inner problem is solved, `initial = adapted + grad(support_loss)(adapted) / proximity`, so that
    `d adapted / d initial = (I + H / proximity)^-1` with `H` the Hessian of the support loss there, and the
    meta-gradient is `(I + H / proximity)^-1 grad(query_loss)(adapted)`: a linear system, solved by `cg_steps` steps of
    conjugate gradient, each of which needs one product of `H` with a vector. Nothing about the inner steps is stored.

    Args:
        network: maps `[n, channel, height, width]` and `n_support` to logits `[n, way]`.
        inner_lr: initial step size of the inner gradient descent.
        inner_steps: steps of adaptation while training.
        test_inner_steps: steps of adaptation in evaluation mode (`learner.eval()`); default: `inner_steps`.
        proximity: strength of the pull towards the initial parameters (the paper's lambda).
        cg_steps: steps of conjugate gradient; with 0 the meta-gradient is the gradient where adaptation ends, as in
            first-order MAML.
        cg_damping: added to `proximity` in the linear system only. The further adaptation is from convergence, the less
            accurate the formula; the more damping, the less of it is applied, down to first order. In the authors' code
            it amounts to `proximity + 20`.
        fixed_head: whether the outer loop leaves the last layer's initial values alone, unlike the inner loop.
        loss, inner_loss: functions of outputs and labels (see `AdaptingLearner`).

    Raises:
        ValueError: if an episode does not have as many ways as the network has outputs.

    Example:
        >>> from metatutor import ConvNet
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> ImplicitMAML(ConvNet(n_outputs=5, filters=8))(Episode(images, labels, images)).shape
        torch.Size([2, 5, 5])

    Reference:
        Rajeswaran, Finn, Kakade & Levine (2019), lemma 1 and algorithm 2; conjugate gradient: Hestenes & Stiefel
        (1952).
    """

    exact_gradient = False

    def __init__(
        self,
        network: nn.Module,
        *,
        inner_lr: float = 0.1,
        inner_steps: int = 16,
        test_inner_steps: int | None = None,
        proximity: float = 2.0,
        cg_steps: int = 5,
        cg_damping: float = 0.0,
        fixed_head: bool = False,
        loss: Loss | None = None,
        inner_loss: Loss | None = None,
    ) -> None:
        check_positive(inner_lr=inner_lr, proximity=proximity)
        check_not_negative(cg_steps=cg_steps, cg_damping=cg_damping)
        super().__init__(network, inner_steps, test_inner_steps, fixed_head, loss, inner_loss)
        check_loss(self)
        self.inner_lr, self.proximity, self.cg_steps, self.cg_damping = inner_lr, proximity, cg_steps, cg_damping

    def inner_step(self, parameters: Parameters, state: Any, episode: Episode, step: int) -> tuple[Parameters, Any]:
        """One step down each task's inner problem, taken by the tasks for which it leads downhill."""
        initial, rates = state or (parameters, episode.support_images.new_full((len(episode),), self.inner_lr))
        losses, gradients = self.support_gradients(parameters, episode)
        pulls = {n: gradients[n] + self.proximity * (p - initial[n]) for n, p in parameters.items()}
        tried = {n: p - like(rates, p) * pulls[n] for n, p in parameters.items()}
        before = losses + self.stretch(parameters, initial)
        rounding = 100 * torch.finfo(before.dtype).eps * before.abs()
        after = self.support_losses(episode, tried, self.inner_loss) + self.stretch(tried, initial)
        down = after <= before + rounding
        moved = {n: torch.where(like(down, p), tried[n], p) for n, p in parameters.items()}
        return moved, (initial, torch.where(down, rates, rates / 2))

    def stretch(self, parameters: Parameters, initial: Parameters) -> Float[Tensor, " task"]:
        """What the spring between the initial and the given parameters adds to each task's inner problem."""
        moved = flatten_tasks(p - initial[n] for n, p in parameters.items())
        return self.proximity / 2 * moved.pow(2).sum(1)

    def outer_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The mean query loss, with its implicit gradient with respect to the initial parameters."""
        with torch.no_grad():
            adapted = leaves(self.adapt(episode))
        loss = self.query_loss(episode, adapted)
        if not torch.is_grad_enabled():
            return loss
        of_query = gradients_of(loss, list(adapted.values()))
        _, of_support = self.support_gradients(adapted, episode, create_graph=True)

        def product(vectors: Vectors) -> Vectors:
            """`(I + H / (proximity + damping))` times a vector, for each task."""
            pieces = list(unflatten_tasks(vectors, adapted).values())
            hessian = gradients_of(list(of_support.values()), list(adapted.values()), pieces, retain_graph=True)
            return vectors + flatten_tasks(hessian) / (self.proximity + self.cg_damping)

        solution = conjugate_gradient(product, flatten_tasks(of_query), self.cg_steps)
        gradients = {n: piece.sum(0) for n, piece in unflatten_tasks(solution, adapted).items()}
        wanted = self.meta_parameters()
        return with_gradient(loss, wanted.values(), [gradients[n.removeprefix("network.")] for n in wanted])


def like(of_tasks: Shaped[Tensor, " task"], parameter: Tensor) -> Tensor:
    """One number per task, shaped to multiply its parameter."""
    return of_tasks.view(-1, *[1] * (parameter.dim() - 1))


def conjugate_gradient(product: Callable[[Vectors], Vectors], right: Vectors, steps: int) -> Vectors:
    """Solve `A x = right` for every task at once, from `x = right`, given products with the symmetric `A`.

    As many steps as there are dimensions give the solution, up to rounding, if `A` is positive definite.

    Example:
        >>> a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> conjugate_gradient(lambda v: v @ a, torch.tensor([[3.0, 4.0]]), steps=2)
        tensor([[1., 1.]])
    """
    solution = right
    if not steps:
        return solution
    residual = right - product(solution)
    direction, square = residual, (residual**2).sum(1, keepdim=True)
    tiny = torch.finfo(right.dtype).tiny
    for _ in range(steps):
        image = product(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        length = torch.where(curvature > tiny, square / curvature, 0)  # done, or A is not positive here: stay
        solution, residual = solution + length * direction, residual - length * image
        before, square = square, (residual**2).sum(1, keepdim=True)
        direction = residual + square / before.clamp_min(tiny) * direction
    return solution
