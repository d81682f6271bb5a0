"""Reptile: move the initial parameters towards those that each task ends with; no gradient of a gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from metatutor.backbones import Network
from metatutor.episodes import Episode
from metatutor.learner import Loss, Parameters
from metatutor.optimization.base import AdaptingLearner, as_parameters, as_vectors, check_inner_loop

_BETA, _EPSILON = 0.999, 1e-8  # Adam's second decay rate and what keeps it from dividing by zero


@dataclass(frozen=True)
class ReptileConfig:
    """The arguments of `Reptile`, for a recorded run.

    Args:
        method: the tag of this learner in `config.json`.
        inner_lr: see `Reptile`, as are the others.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> from metatutor import ConvNet
        >>> ReptileConfig(inner_steps=10).build(ConvNet(n_outputs=5, filters=8)).config.inner_steps
        10

    Reference:
        Nichol, Achiam & Schulman (2018).
    """

    method: Literal["reptile"] = "reptile"
    inner_lr: float = 0.001
    inner_steps: int = 5
    test_inner_steps: int | None = 50
    shots_per_step: int | None = 2
    compile: bool = False

    def __post_init__(self) -> None:
        check_inner_loop(self.inner_lr, self.inner_steps, self.test_inner_steps)
        if self.shots_per_step is not None and self.shots_per_step < 1:
            raise ValueError(f"shots_per_step must be positive, got {self.shots_per_step}")

    def build(self, network: Network) -> Reptile:
        """The learner with these arguments."""
        arguments = {name: value for name, value in vars(self).items() if name != "method"}
        return Reptile(network, **arguments)


class Reptile(AdaptingLearner):
    """Adapts by steps of Adam on mini-batches of the support set; the outer loop moves to where they lead.

    Outer loop: `initial += outer_lr * (mean over tasks of adapted - initial)`. As a gradient for any optimizer:
    `meta_loss = 1/2 * mean over tasks of |initial - adapted|^2`, with `adapted` held fixed, has the gradient
    `initial - mean of adapted`. Query images are not used in training: give tasks of more shots instead.

    Inner loop: Adam without momentum, `p -= inner_lr * g / (sqrt(v / (1 - 0.999^t)) + 1e-8)`, where `v` decays by 0.999
    and gains `0.001 * g^2`. In training, a step sees `shots_per_step` images of each class, the next ones in turn; at
    the test, where there are few, all. As in the authors' code, Adam goes on where the tasks before have left it on the
    average, also at the test. Were it to start anew with every task, its first steps would be of full length however
    small the gradient, also where there is nothing but noise to follow.

    To be transductive or not is a matter of the network's normalisation of the query images, `"batch"` or `"support"`;
    training is the same.

    Args:
        network: maps `[n, channel, height, width]` and `n_support` to logits `[n, way]`.
        inner_lr: of the inner Adam.
        inner_steps: steps of adaptation while training.
        test_inner_steps: steps of adaptation in evaluation mode (`learner.eval()`); None: `inner_steps`.
        shots_per_step: support images of each class in a mini-batch of training; None: the whole support set.
        compile: whether the meta-gradient is compiled in training, which takes minutes at the first call.
        tasks_per_chunk: tasks adapted side by side (see `engine.chunks`). This and `compile` are a matter of speed and
            memory, not of the result.
        loss: of outputs and labels; default: cross-entropy, or squared error where the labels are real numbers.

    Raises:
        ValueError: if an argument is out of range, or an episode has other ways than the network has outputs.

    Example:
        >>> from metatutor import ConvNet
        >>> images, labels = torch.rand(2, 10, 1, 28, 28), torch.arange(5).repeat(2, 2)
        >>> learner = Reptile(ConvNet(n_outputs=5, filters=8))
        >>> learner.meta_loss(Episode(images, labels, images[:, :5], labels[:, :5], n_way=5)).shape
        torch.Size([])

    Reference:
        Nichol, Achiam & Schulman (2018), algorithm 2; more shots in training and Adam: section 6.
    """

    own_gradient = True
    squares: Tensor
    filled: Tensor

    def __init__(
        self,
        network: Network,
        *,
        inner_lr: float = ReptileConfig.inner_lr,
        inner_steps: int = ReptileConfig.inner_steps,
        test_inner_steps: int | None = ReptileConfig.test_inner_steps,
        shots_per_step: int | None = ReptileConfig.shots_per_step,
        compile: bool = ReptileConfig.compile,
        tasks_per_chunk: int | None = None,
        loss: Loss | None = None,
    ) -> None:
        self.config = ReptileConfig("reptile", inner_lr, inner_steps, test_inner_steps, shots_per_step, compile)
        super().__init__(
            network,
            inner_steps=inner_steps,
            test_inner_steps=test_inner_steps,
            compile=compile,
            tasks_per_chunk=tasks_per_chunk,
            loss=loss,
        )
        flat = torch.cat([p.detach().flatten() for p in network.parameters()])
        self.register_buffer("squares", torch.zeros_like(flat))
        self.register_buffer("filled", flat.new_zeros(()))

    def outer_loss(self, episode: Episode, weights: Float[Tensor, " step"] | None = None) -> Float[Tensor, ""]:
        """Half the mean squared distance from the initial to the adapted parameters."""
        return self.meta_gradient(episode)[0]

    def meta_gradient(
        self, episode: Episode, weights: Float[Tensor, " step"] | None = None
    ) -> tuple[Float[Tensor, ""], list[Tensor]]:
        """That distance, and minus the mean of the ways that the tasks went."""
        self.check_ways(episode)
        with torch.no_grad():
            initial = {n: p.expand(len(episode), *p.shape) for n, p in self.network.named_parameters()}
            parameters, memory = initial, self._initial_memory(initial)
            for step in range(self.config.inner_steps):
                parameters, memory = self.inner_step(parameters, memory, episode, step)
            ways = {f"network.{n}": p - parameters[n] for n, p in initial.items()}
            loss = torch.stack([way.pow(2).sum() for way in ways.values()]).sum() / (2 * len(episode))
            gradients = {n: way.mean(0) for n, way in ways.items()}
            gradients["squares"] = self.squares - as_vectors(memory[0].values()).mean(0)
            gradients["filled"] = self.filled - memory[1]
        return loss, [gradients[n] for n in self.named_meta_parameters()]

    def named_meta_parameters(self) -> Parameters:
        """The parameters of the network, and how far Adam is."""
        return super().named_meta_parameters() | dict(self.named_buffers())

    def learn_besides(self, known: list[tuple[float, Tensor, list[Tensor]]]) -> None:
        """Leave Adam where the tasks, on the average, have left it."""
        if not self.training:
            return
        for weight, _, gradients in known:
            of_squares, of_filled = gradients[-2:]
            self.squares -= weight * of_squares
            self.filled -= weight * of_filled

    def inner_step(self, parameters: Parameters, memory: Any, episode: Episode, step: int) -> tuple[Parameters, Any]:
        """One step of Adam without momentum on the next mini-batch; the memory is its mean squared gradient."""
        before, filled = memory or self._initial_memory(parameters)
        _, gradients = self.support_gradients(parameters, self._mini_batch(episode, step))
        squares = {n: _BETA * before[n] + (1 - _BETA) * g**2 for n, g in gradients.items()}
        filled = _BETA * filled + (1 - _BETA)  # the same mean of ones: what Adam divides by, as it began at zero
        scales = {n: (s / filled).sqrt() + _EPSILON for n, s in squares.items()}
        moved = {n: p - self.config.inner_lr * gradients[n] / scales[n] for n, p in parameters.items()}
        return moved, (squares, filled)

    def _initial_memory(self, parameters: Parameters) -> tuple[Parameters, Tensor]:
        """Where the tasks before left Adam."""
        n_tasks = len(next(iter(parameters.values())))
        return as_parameters(self.squares.expand(n_tasks, -1), parameters), self.filled

    def _mini_batch(self, episode: Episode, step: int) -> Episode:
        """In training, the next shots of every class; after the last one, the first."""
        shots = self.config.shots_per_step if self.training else None
        n_support, labels, n_classes = episode.support_images.shape[1], episode.support_labels, episode.n_way
        if labels.is_floating_point():  # a regression: one class, the points as they come
            n_classes, labels = 1, torch.zeros_like(labels[..., 0])
        k_shot = n_support // n_classes
        if shots is None or shots >= k_shot:
            return episode
        by_class = labels.argsort(dim=1, stable=True).unflatten(1, (n_classes, k_shot))
        at = torch.arange(step * shots, (step + 1) * shots, device=by_class.device) % k_shot
        chosen = by_class[:, :, at].flatten(1)  # [task, way * shots]
        tasks = torch.arange(len(episode), device=chosen.device)[:, None]
        return replace(
            episode,
            support_images=episode.support_images[tasks, chosen],
            support_labels=episode.support_labels[tasks, chosen],
        )
