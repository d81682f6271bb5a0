"""How many tasks adapt side by side, and compilation of the whole adaptation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metatutor.backbones import Network
from metatutor.episodes import Episode

_ACTIVATION_BYTES, _KEPT_BYTES = 128 * 2**20, 64 * 2**20  # measured with benchmarks/maml_step.py


def tasks_that_fit(episode: Episode, network: Network, copies_kept: int = 0) -> int:
    """How many tasks of an episode are best adapted side by side, each keeping `copies_kept` copies of its parameters.

    On a GPU all; on a CPU as many as keep the largest activation within 128 MiB, and the copies of parameters within 64
    MiB. There are as few parts as possible, of sizes as equal as possible: larger ones would cost more in page faults
    than they save.
    """
    if episode.query_images.device.type != "cpu":
        return len(episode)
    n_images = episode.support_images.shape[1] + episode.query_images.shape[1]
    kept = copies_kept * sum(p.numel() for p in network.parameters())
    size = len(episode) * episode.query_images.element_size()
    n_parts = math.ceil(
        max(1, size * n_images * network.largest_activation / _ACTIVATION_BYTES, size * kept / _KEPT_BYTES)
    )
    return math.ceil(len(episode) / min(n_parts, len(episode)))


class Compiled:
    """A function of tensors, traced once for every set of shapes, and compiled; a ValueError if that is impossible.

    Tracing sees through `autograd.grad` and `vmap`: the whole computation is compiled, as one graph of products and
    sums. Whatever the function reads besides its tensors is fixed at the first call.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]]) -> None:
        self.function = function
        self.compiled: dict[Any, Callable[..., Sequence[Tensor]]] = {}

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        from torch.fx.experimental.proxy_tensor import make_fx  # slow to import, and rarely needed

        shapes = tuple((t.shape, t.dtype, t.device) for t in tensors)
        if shapes in self.compiled:
            with torch.no_grad():
                return self.compiled[shapes](*tensors)
        try:
            compiled = torch.compile(make_fx(self.function, _NO_SCATTERING)(*tensors))
            with torch.no_grad():
                outputs = compiled(*tensors)  # compiles
        except (RuntimeError, TypeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"this network cannot be compiled ({reason}); leave compiled out") from error
        self.compiled[shapes] = compiled
        return outputs


def _scatter_add(into: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """`into.scatter_add(dim, index, source)` as a sum, for small dimensions.

    On a CPU, compiling the scatter itself ends in an error (PyTorch 2.6), or in writes beyond the tensor (2.10, with
    several threads).
    """
    here = index.movedim(dim, -1)[..., None] == torch.arange(into.shape[dim], device=into.device)
    return into + torch.where(here, source.movedim(dim, -1)[..., None], 0).sum(-2).movedim(-1, dim)


_NO_SCATTERING = {torch.ops.aten.scatter_add.default: _scatter_add}
