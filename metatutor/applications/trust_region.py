"""Trust regions: the longest step that changes a policy by no more than a limit, whatever its parameters mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from metatutor.checks import check_positive
from metatutor.optimization.imaml import conjugate_gradient


def trust_region_step(
    parameters: Sequence[nn.Parameter],
    objective: Callable[[], Tensor],
    divergence: Callable[[], Tensor],
    *,
    radius: float = 0.01,
    cg_steps: int = 10,
    damping: float = 1e-5,
    halvings: int = 10,
) -> float:
    """Change parameters in place such that the objective rises and the divergence stays within the radius.

    With `g` the gradient of the objective and `H` the Hessian of the divergence, both where the parameters are, the
    step is `sqrt(2 radius / gᵀ H⁻¹ g) H⁻¹ g`: the longest uphill for a divergence that is quadratic. It is halved until
    the true functions keep its promise; if they never do, nothing changes.

    Args:
        parameters: what to change.
        objective: a scalar to be made larger, as a function of the parameters.
        divergence: a scalar that is zero, its minimum, where the parameters are: from the policy there to the current
            one.
        radius: the largest divergence allowed.
        cg_steps: steps of the conjugate gradient method, which solves `H x = g` without ever making `H`.
        damping: added to `H`'s diagonal.
        halvings: how often the step is halved, at most.

    Returns:
        How much the objective rose; 0 if nothing changed.

    Raises:
        ValueError: if the radius or the number of steps is not positive.

    Example:
        >>> x = nn.Parameter(torch.zeros(2))
        >>> rise = trust_region_step([x], lambda: x.sum(), lambda: (x**2).sum() / 2, radius=0.04)
        >>> [round(value, 3) for value in x.tolist()], round(rise, 3)  # sqrt(2 · 0.04) long, in the direction (1, 1)
        ([0.2, 0.2], 0.4)

    Reference:
        Schulman et al. (2015), Trust region policy optimization, appendix C.
    """
    check_positive(radius=radius, cg_steps=cg_steps)
    before = objective()
    gradient = _flat(torch.autograd.grad(before, parameters))
    slopes = _flat(torch.autograd.grad(divergence(), parameters, create_graph=True))

    def product(vectors: Tensor) -> Tensor:
        hessian = _flat(torch.autograd.grad(slopes @ vectors[0], parameters, retain_graph=True))
        return hessian[None] + damping * vectors

    direction = conjugate_gradient(product, gradient[None], cg_steps)[0]
    curvature = (direction * product(direction[None])[0]).sum().item()
    if not curvature > 0:
        return 0.0
    start, step = [p.detach().clone() for p in parameters], math.sqrt(2 * radius / curvature) * direction
    for halved in range(halvings + 1):
        _move(parameters, start, step / 2**halved)
        rise = (objective() - before).item()
        if rise > 0 and divergence().item() <= radius * (1 + 1e-4):
            return rise
    _move(parameters, start, torch.zeros_like(step))
    return 0.0


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


@torch.no_grad()
def _move(parameters: Sequence[nn.Parameter], start: Sequence[Tensor], step: Tensor) -> None:
    pieces = step.split([p.numel() for p in parameters])
    for parameter, where, piece in zip(parameters, start, pieces, strict=True):
        parameter.copy_(where + piece.view_as(where))
