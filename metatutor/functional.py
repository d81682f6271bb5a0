"""Functions of many tasks at once: a function for every task, class means, a method with other parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_leaves, tree_map

Parameters = dict[str, Tensor]
Labels = Int[Tensor, "task support"]
Vectors = Float[Tensor, "task parameter"]  # all parameters of a task, concatenated


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    """Turn off the fast path of PyTorch's Transformer layers in evaluation mode, which has no derivatives."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class TaskMap:
    """Applies a function to every task: side by side if `vmap` can, one after the other if it cannot.

    Recurrent layers and running statistics are among the things that `vmap` cannot do. The first failure is reported
    once; from then on tasks are computed one by one, which gives the same results more slowly.
    """

    def __init__(self) -> None:
        self.side_by_side = True

    @_differentiable_attention()
    def __call__(self, function: Callable[..., Tensor], *trees: Any) -> Tensor:
        """The function's result for every task's tensors, `[task, ...]`; arguments may be dictionaries of tensors."""
        if self.side_by_side and len(tree_leaves(trees)[0]) > 1:  # vmap costs more than it saves for one
            try:
                return vmap(function, randomness="different")(*trees)
            except (RuntimeError, ValueError) as error:
                if not any(word in str(error) for word in ("vmap", "atching rule", "atch norm got a batched")):
                    raise
                self.side_by_side = False
                reason = str(error).strip().partition("\n")[0][:160]
                warnings.warn(f"tasks are computed one by one, since vmap fails: {reason}", stacklevel=3)
        return one_by_one(function, *trees)


def one_by_one(function: Callable[..., Tensor], *trees: Any) -> Tensor:
    """A function's result for every task's tensors, computed task by task."""
    n_tasks = len(tree_leaves(trees)[0])
    return torch.stack([function(*tree_map(lambda tensor, i=i: tensor[i], trees)) for i in range(n_tasks)])


def class_means(
    embeddings: Float[Tensor, "task support embedding"], labels: Labels, n_way: int
) -> Float[Tensor, "task way embedding"]:
    """The mean embedding of each class."""
    members = F.one_hot(labels, n_way).to(embeddings.dtype)  # [task, support, way]
    return (members / members.sum(1, keepdim=True)).mT @ embeddings


def class_maxima(
    scores: Float[Tensor, "task query support"], labels: Labels, n_way: int
) -> Float[Tensor, "task query way"]:
    """The highest score among the support images of each class."""
    of_classes = scores.new_full((*scores.shape[:2], n_way), -torch.inf)
    return of_classes.scatter_reduce(2, labels[:, None].expand_as(scores), scores, "amax")


def call_method(module: nn.Module, parameters: Parameters, method: Callable[..., Any], *arguments: Any) -> Any:
    """What a method of a module returns with other parameters, given by their names in the module."""
    under = {f"module.{name}": p for name, p in parameters.items()}
    return functional_call(_Method(module, method), under, arguments)


class _Method(nn.Module):
    """A method of a module as the `forward` of another, for `functional_call`."""

    def __init__(self, module: nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *arguments: Any) -> Any:
        return self.method(*arguments)


def with_gradient(value: Tensor, inputs: Iterable[Tensor], gradients: Iterable[Tensor]) -> Float[Tensor, ""]:
    """A scalar with known gradients with respect to some inputs: linear in them, and here equal to `value`.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> with_gradient(torch.tensor(6.0), [weight], [torch.tensor([2.0, 4.0])]).backward()
        >>> weight.grad
        tensor([2., 4.])
    """
    pairs = zip(inputs, gradients, strict=True)
    return value.detach() + torch.stack([((x - x.detach()) * gradient.detach()).sum() for x, gradient in pairs]).sum()


def flatten_tasks(tensors: Iterable[Tensor]) -> Vectors:
    """Tensors `[task, ...]`, concatenated into one vector per task."""
    return torch.cat([tensor.reshape(len(tensor), -1) for tensor in tensors], dim=1)


def unflatten_tasks(vectors: Vectors, like: Parameters) -> Parameters:
    """The vectors split up again, by the names and shapes of some parameters `[task, ...]`."""
    parts = vectors.split([p[0].numel() for p in like.values()], dim=1)
    return {name: part.reshape(p.shape) for part, (name, p) in zip(parts, like.items(), strict=True)}


def leaves(parameters: Parameters) -> Parameters:
    """The same parameters without their history."""
    return {n: p.detach().requires_grad_() for n, p in parameters.items()}


def gradients_of(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    pulls: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> list[Tensor]:
    """The gradients of a loss, or of outputs times `pulls`; zero where they do not depend on an input."""
    found = torch.autograd.grad(
        outputs, inputs, pulls, retain_graph, create_graph, allow_unused=True, materialize_grads=True
    )
    return list(found)


def preprocess(values: Float[Tensor, " n"], p: float = 10.0) -> Float[Tensor, "n 2"]:
    """Size and sign of numbers of any magnitude: `(log|x| / p, sign(x))`, or `(-1, e^p x)` where `|x| < e^-p`.

    Andrychowicz et al. (2016), appendix A.

    Example:
        >>> preprocess(torch.tensor([1.0, -math.exp(-5), 0.0]))
        tensor([[ 0.0000,  1.0000],
                [-0.5000, -1.0000],
                [-1.0000,  0.0000]])
    """
    large = values.abs() >= math.exp(-p)
    size = values.abs().clamp_min(math.exp(-p)).log() / p
    return torch.stack([torch.where(large, size, -1.0), torch.where(large, values.sign(), math.exp(p) * values)], dim=1)
