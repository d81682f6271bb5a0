"""Reptile: move the initial parameters towards those that each task ends with; no gradient of a gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.checks import check_positive
from metatutor.episodes import Episode
from metatutor.functional import Parameters, flatten_tasks, unflatten_tasks
from metatutor.learner import Loss
from metatutor.optimization.base import AdaptingLearner, check_loss

_BETA, _EPSILON = 0.999, 1e-8  # Adam's second decay rate and what keeps it from dividing by zero


class Reptile(AdaptingLearner):
    """Adapts by steps of Adam on mini-batches of the support set; the outer loop moves towards where they lead.

    Outer loop: `initial += outer_lr * (mean over tasks of adapted - initial)`. As a gradient for any optimizer:
    `meta_loss = 1/2 * mean over tasks of |initial - adapted|^2`, with `adapted` held fixed, has the gradient
    `initial - mean of adapted`. Query images are not used in training: give tasks with more shots instead.

    Inner loop: Adam without momentum, `p -= inner_lr * g / (sqrt(v / (1 - 0.999^t)) + 1e-8)`, where `v` decays by 0.999
    and gains `0.001 * g^2`. In training, a step sees the next `shots_per_step` images of each class, in turn; at test
    time, where there are few, it sees all. As in the authors' code, Adam continues from where, on average, previous
    tasks left it, at test time too. If it were reset for every task, its first steps would have full length however
    small the gradient, even with nothing but noise to follow.

    Whether it is transductive depends on the network's normalisation of the query images, `"batch"` or `"support"`;
    training is the same.

    Args:
        network: maps `[n, channel, height, width]` and `n_support` to logits `[n, way]`.
        inner_lr: learning rate of the inner Adam.
        inner_steps: steps of adaptation while training.
        test_inner_steps: steps of adaptation in evaluation mode (`learner.eval()`); None: `inner_steps`.
        shots_per_step: support images of each class in a training mini-batch; None: the whole support set.
        fixed_head: whether the outer loop leaves the last layer's initial values alone, unlike the inner loop.
        loss: function of outputs and labels (see `AdaptingLearner`).

    Raises:
        ValueError: if an episode does not have as many ways as the network has outputs.

    Example:
        >>> from metatutor import ConvNet
        >>> images, labels = torch.rand(2, 10, 1, 28, 28), torch.arange(5).repeat(2, 2)
        >>> learner = Reptile(ConvNet(n_outputs=5, filters=8))
        >>> learner.meta_loss(Episode(images, labels, images[:, :5], labels[:, :5], n_way=5)).shape
        torch.Size([])

    Reference:
        Nichol, Achiam & Schulman (2018), algorithm 2; more shots in training and Adam: section 6.
    """

    exact_gradient = False
    squares: Tensor
    filled: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        inner_lr: float = 0.001,
        inner_steps: int = 5,
        test_inner_steps: int | None = 50,
        shots_per_step: int | None = 2,
        fixed_head: bool = False,
        loss: Loss | None = None,
    ) -> None:
        check_positive(inner_lr=inner_lr, shots_per_step=shots_per_step)
        super().__init__(network, inner_steps, test_inner_steps, fixed_head, loss)
        check_loss(self)
        self.inner_lr, self.shots_per_step = inner_lr, shots_per_step
        flat = torch.cat([p.detach().flatten() for p in self.network.parameters()])
        self.register_buffer("squares", torch.zeros_like(flat))
        self.register_buffer("filled", flat.new_zeros(()))
        self._left: list[tuple[int, Tensor, Tensor]] = []  # left by the tasks since the last outer step

    def outer_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """Half the mean squared distance from the initial to the adapted parameters, which are held fixed."""
        initial = self.initial_parameters(episode)
        with torch.no_grad():
            parameters, state = {n: p.detach() for n, p in initial.items()}, None
            for step in range(self.inner_steps):
                parameters, state = self.inner_step(parameters, state, episode, step)
        if state is not None and self.training and torch.is_grad_enabled():
            left = self._of_tasks_before() | {n: squares.mean(0, keepdim=True) for n, squares in state[0].items()}
            self._left.append((len(episode), flatten_tasks(left.values())[0], state[1]))
        distances = [(p - parameters[n]).pow(2).sum() for n, p in initial.items()]
        return torch.stack(distances).sum() / (2 * len(episode))

    def after_step(self) -> None:
        """Set Adam's state to the average of the states that the tasks have left."""
        if self._left:
            sizes, squares, filled = zip(*self._left, strict=True)
            shares = torch.tensor(sizes).to(self.filled) / sum(sizes)
            self.squares.copy_(shares @ torch.stack(squares))
            self.filled.copy_(shares @ torch.stack(filled))
            self._left.clear()

    def inner_step(self, parameters: Parameters, state: Any, episode: Episode, step: int) -> tuple[Parameters, Any]:
        """One step of Adam without momentum on the next mini-batch; the state is its mean squared gradient."""
        before, filled = state or (self._of_tasks_before(), self.filled)  # where previous tasks left Adam
        _, gradients = self.support_gradients(parameters, self._mini_batch(episode, step))
        squares = {n: _BETA * before[n] + (1 - _BETA) * g**2 for n, g in gradients.items()}
        filled = _BETA * filled + (1 - _BETA)  # the same mean of ones: Adam divides by it, having started at zero
        scales = {n: (s / filled).sqrt() + _EPSILON for n, s in squares.items()}
        moved = {n: p - self.inner_lr * gradients[n] / scales[n] for n, p in parameters.items()}
        return moved, (squares, filled)

    def _of_tasks_before(self) -> Parameters:
        """The mean squared gradients that previous tasks left, `[1, ...]` by name, including frozen parameters."""
        return unflatten_tasks(self.squares[None], {n: p[None] for n, p in self.network.named_parameters()})

    def _mini_batch(self, episode: Episode, step: int) -> Episode:
        """In training, the next shots of every class; after the last one, the first."""
        shots = self.shots_per_step if self.training else None
        labels, n_classes = episode.support_labels, episode.n_way
        if labels.is_floating_point():  # a regression: one class, the points in order
            n_classes, labels = 1, torch.zeros_like(labels[..., 0], dtype=torch.long)
        if shots is None or shots * n_classes >= labels.shape[1]:
            return episode
        counts = F.one_hot(labels, n_classes).sum(1)  # [task, way]
        turns = torch.arange(step * shots, (step + 1) * shots, device=labels.device) % counts[..., None]
        at = turns + (counts.cumsum(1) - counts)[..., None]  # among the images in the order of their classes
        chosen = labels.argsort(dim=1, stable=True).gather(1, at.flatten(1))  # [task, way * shots]
        tasks = torch.arange(len(episode), device=chosen.device)[:, None]
        return replace(
            episode,
            support_images=episode.support_images[tasks, chosen],
            support_labels=episode.support_labels[tasks, chosen],
        )
