"""Model-Agnostic Meta-Learning: learn the initial parameters from which one gradient step learns a task."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from metatutor.backbones import ConvNet
from metatutor.episodes import Episode
from metatutor.learner import NetworkLearner, Parameters

_CHUNK_BYTES = 128 * 2**20  # measured with benchmarks/maml_step.py


@dataclass(frozen=True)
class MAMLConfig:
    """The arguments of `MAML`, for a recorded run.

    Args:
        method: the tag of this learner in `config.json`.
        inner_lr: see `MAML`, as are the others.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> MAMLConfig(inner_lr=0.1).build(ConvNet(n_outputs=5, filters=8)).config.inner_lr
        0.1

    Reference:
        Finn, Abbeel & Levine (2017).
    """

    method: Literal["maml"] = "maml"
    inner_lr: float = 0.4
    inner_steps: int = 1
    test_inner_steps: int | None = None
    first_order: bool = False
    adapt: Literal["all", "head"] = "all"

    def __post_init__(self) -> None:
        if not self.inner_lr > 0:
            raise ValueError(f"inner_lr must be positive, got {self.inner_lr}")
        if self.inner_steps < 0 or (self.test_inner_steps or 0) < 0:
            raise ValueError(f"inner steps must not be negative, got {self.inner_steps} and {self.test_inner_steps}")
        if self.adapt not in ("all", "head"):
            raise ValueError(f"adapt must be 'all' or 'head', got {self.adapt!r}")

    def build(self, network: ConvNet) -> MAML:
        """The learner with these arguments."""
        arguments = {name: value for name, value in vars(self).items() if name != "method"}
        return MAML(network, **arguments)


class MAML(NetworkLearner):
    """Adapts a network to each task by gradient descent on its support set, from parameters made for that.

    Inner loop, for each task: `adapted = initial - inner_lr * grad(support_loss)(initial)`, `inner_steps` times.
    Outer loop: `initial -= outer_lr * grad(mean over tasks of query_loss(adapted(initial)))(initial)`. The outer
    gradient goes *through* the inner one, exactly, unless `first_order`, which takes `d adapted / d initial`
    for the identity.

    All tasks of an episode are adapted side by side: `vmap` gives every task its own parameters, and since no
    task's loss depends on another's parameters, one call of `autograd.grad` on the sum of losses yields the
    gradient of each.

    Args:
        network: maps `[n, channel, height, width]` and `n_support` to logits `[n, way]`.
        inner_lr: step size of adaptation.
        inner_steps: steps of adaptation while training.
        test_inner_steps: steps of adaptation in evaluation mode (`learner.eval()`); default: `inner_steps`.
        first_order: leave the second derivatives out.
        adapt: which parameters the inner loop changes: `"all"` or only the last layer, `"head"` (ANIL).
        tasks_per_chunk: tasks adapted side by side; default: on a GPU all of an episode, on a CPU as many as keep
            the largest activation within 128 MiB. A matter of speed and memory, not of the result.

    Raises:
        ValueError: if an argument is out of range, or an episode has other ways than the network has outputs.

    Example:
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> learner = MAML(ConvNet(n_outputs=5, filters=8), inner_lr=0.4)
        >>> learner(Episode(images, labels, images, labels, n_way=5)).shape
        torch.Size([2, 5, 5])

    Reference:
        Finn, Abbeel & Levine (2017), algorithm 2 and equation 1; ANIL: Raghu et al. (2020).
    """

    def __init__(
        self,
        network: ConvNet,
        *,
        inner_lr: float = MAMLConfig.inner_lr,
        inner_steps: int = MAMLConfig.inner_steps,
        test_inner_steps: int | None = MAMLConfig.test_inner_steps,
        first_order: bool = MAMLConfig.first_order,
        adapt: Literal["all", "head"] = MAMLConfig.adapt,
        tasks_per_chunk: int | None = None,
    ) -> None:
        super().__init__(network)
        if tasks_per_chunk is not None and tasks_per_chunk < 1:
            raise ValueError(f"tasks_per_chunk must be positive, got {tasks_per_chunk}")
        self.config = MAMLConfig("maml", inner_lr, inner_steps, test_inner_steps, first_order, adapt)
        self.tasks_per_chunk = tasks_per_chunk

    def forward(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """Adapt to each support set, then answer the query images."""
        chunks = self._chunks(episode)
        return torch.cat([self.query_logits(chunk, self.adapt(chunk)) for chunk in chunks])

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """Mean cross-entropy of the query images after adaptation.

        With more than one chunk the meta-gradient is computed here, chunk by chunk, and handed over by `backward`.
        """
        chunks = list(self._chunks(episode))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            return super().meta_loss(episode)
        parameters = [p for p in self.parameters() if p.requires_grad]
        total, gradients = torch.zeros((), device=episode.query_images.device), None
        for chunk in chunks:
            loss = super().meta_loss(chunk) * (len(chunk) / len(episode))
            of_chunk = torch.autograd.grad(loss, parameters)
            gradients = of_chunk if gradients is None else [g.add_(c) for g, c in zip(gradients, of_chunk, strict=True)]
            total = total + loss.detach()
        return _KnownGradient.apply(total, gradients, *parameters)

    def adapt(self, episode: Episode, inner_steps: int | None = None) -> Parameters:
        """The adapted parameters of every task, `[task, ...]` by name.

        Args:
            episode: its support set is all that is read.
            inner_steps: steps of adaptation; default: those of training or of evaluation mode.

        Returns:
            Name to tensor; parameters that the inner loop leaves alone are the shared ones, repeated.
        """
        return self.adaptation_path(episode, inner_steps)[-1]

    def adaptation_path(self, episode: Episode, inner_steps: int | None = None) -> list[Parameters]:
        """The parameters of every task before the first inner step and after each."""
        self._check(episode)
        if inner_steps is None:
            inner_steps = self._inner_steps()
        meta_training = torch.is_grad_enabled()
        with torch.enable_grad():
            path = [{name: p.expand(len(episode), *p.shape) for name, p in self._initial(meta_training).items()}]
            for _ in range(inner_steps):
                path.append(self._inner_step(path[-1], episode, meta_training))
        return path if meta_training else [{n: p.detach() for n, p in step.items()} for step in path]

    def _inner_steps(self) -> int:
        in_test = self.config.test_inner_steps
        return self.config.inner_steps if self.training or in_test is None else in_test

    def _initial(self, meta_training: bool) -> Parameters:
        parameters: Parameters = dict(self.network.named_parameters())
        return parameters if meta_training else {n: p.detach().requires_grad_() for n, p in parameters.items()}

    def _inner_step(self, parameters: Parameters, episode: Episode, meta_training: bool) -> Parameters:
        moving = {n: p for n, p in parameters.items() if self.config.adapt == "all" or n.startswith("head.")}
        losses = self.support_losses(episode, parameters)
        second_order = meta_training and not self.config.first_order
        gradients = torch.autograd.grad(losses.sum(), list(moving.values()), create_graph=second_order)
        moved = {n: p - self.config.inner_lr * g for (n, p), g in zip(moving.items(), gradients, strict=True)}
        if not meta_training:
            moved = {n: p.detach().requires_grad_() for n, p in moved.items()}
        return parameters | moved

    def _chunks(self, episode: Episode) -> Iterator[Episode]:
        size = self.tasks_per_chunk or self._tasks_that_fit(episode)
        return (episode.tasks(slice(i, i + size)) for i in range(0, len(episode), size))

    def _tasks_that_fit(self, episode: Episode) -> int:
        """Chunks as equal as can be, and as few: larger ones would cost more in page faults than they save."""
        if episode.query_images.device.type != "cpu":
            return len(episode)
        n_images = episode.support_images.shape[1] + episode.query_images.shape[1]
        largest = getattr(self.network, "largest_activation", 0)  # other modules than ConvNet need not say
        n_chunks = math.ceil(len(episode) * n_images * largest * episode.query_images.element_size() / _CHUNK_BYTES)
        return math.ceil(len(episode) / max(1, min(n_chunks, len(episode))))

    def _check(self, episode: Episode) -> None:
        if episode.n_way != self.network.n_outputs:
            raise ValueError(
                f"the network has {self.network.n_outputs} outputs but the episode is {episode.n_way}-way; "
                f"MAML adapts one head, so build ConvNet(n_outputs={episode.n_way}) and train it"
            )


class _KnownGradient(torch.autograd.Function):
    """A scalar whose gradient in the parameters is already known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # create_graph
            raise RuntimeError("meta_loss in chunks can be differentiated once; for more, raise tasks_per_chunk")
        return None, None, *(scale * gradient for gradient in ctx.gradients)
