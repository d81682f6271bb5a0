"""What the optimization-based methods share: every task gets parameters of its own, by steps on its support set."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metatutor.backbones import Network
from metatutor.episodes import Episode
from metatutor.learner import Loss, NetworkLearner, Parameters
from metatutor.optimization.engine import Compiled, chunks, with_known_gradient

Vectors = Float[Tensor, "task parameter"]  # all parameters of a task in a row


class AdaptingLearner(NetworkLearner):
    """Takes `inner_steps` steps on the support set of each task, and answers its query images with the outcome.

    A method says what a step is, `inner_step`; and if the outer loop is to learn from it otherwise than by
    differentiating through the steps, `meta_gradient`. All tasks of an episode take their steps side by side: `vmap`
    gives every task its own parameters, and since no task's loss depends on another's parameters, one call of
    `autograd.grad` on the sum of losses yields the gradient of each.

    Args:
        network: maps `[n, channel, height, width]` and `n_support` to logits `[n, way]`.
        inner_steps: steps of adaptation while training.
        test_inner_steps: steps of adaptation in evaluation mode (`learner.eval()`); default: `inner_steps`.
        compile: whether the meta-gradient is compiled in training, which takes minutes at the first call.
        tasks_per_chunk: tasks adapted side by side (see `engine.chunks`). This and `compile` are a matter of speed and
            memory, not of the result.
        loss: of outputs and labels; default: cross-entropy, or squared error where the labels are real numbers.

    Raises:
        ValueError: if an argument is out of range, or an episode has other ways than the network has outputs.

    Example:
        >>> from metatutor import MLP
        >>> class Descent(AdaptingLearner):
        ...     def inner_step(self, parameters, memory, episode, step):
        ...         _, gradients = self.support_gradients(parameters, episode)
        ...         return {n: p - 0.1 * gradients[n] for n, p in parameters.items()}, memory
        >>> x = torch.linspace(-1, 1, 5).view(1, 5, 1)
        >>> Descent(MLP(), inner_steps=3)(Episode(x, x**2, x, x**2, n_way=1)).shape
        torch.Size([1, 5, 1])

    Reference:
        Finn, Abbeel & Levine (2017), algorithm 1, lines 4 to 7.
    """

    own_gradient: bool = False
    """Whether `meta_gradient` is to be asked instead of autograd, even where that could tell."""

    def __init__(
        self,
        network: Network,
        *,
        inner_steps: int,
        test_inner_steps: int | None = None,
        compile: bool = False,
        tasks_per_chunk: int | None = None,
        loss: Loss | None = None,
    ) -> None:
        super().__init__(network, loss)
        if tasks_per_chunk is not None and tasks_per_chunk < 1:
            raise ValueError(f"tasks_per_chunk must be positive, got {tasks_per_chunk}")
        self.inner_steps, self.test_inner_steps, self.tasks_per_chunk = inner_steps, test_inner_steps, tasks_per_chunk
        self._compiled = Compiled(self._gradient_of_tensors) if compile else None

    @abstractmethod
    def inner_step(self, parameters: Parameters, memory: Any, episode: Episode, step: int) -> tuple[Parameters, Any]:
        """One step of adaptation of all tasks.

        Args:
            parameters: of every task, `[task, ...]` by name.
            memory: what the step before left; None at the first.
            episode: its support set is all that may be read.
            step: how many steps came before.

        Returns:
            The parameters after the step, and what the next one is to find.
        """

    def forward(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """Adapt to each support set, then answer the query images."""
        return torch.cat([self.query_logits(chunk, self.adapt(chunk)) for chunk in self.chunks(episode)])

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """Mean loss of the query images after adaptation.

        With more than one chunk, or if autograd is not to find the meta-gradient, it is computed here, chunk by chunk,
        and handed over by `backward`.
        """
        parts, weights = list(self.chunks(episode)), self.step_weights(episode)
        compiled = self._compiled is not None and self.training
        if not torch.is_grad_enabled() or not (self.own_gradient or compiled or len(parts) > 1):
            return self.outer_loss(episode, weights)
        gradient = self._compiled_gradient if compiled else self.meta_gradient
        known = [(len(chunk) / len(episode), *gradient(chunk, weights)) for chunk in parts]
        self.learn_besides(known)
        return with_known_gradient(known, self.meta_parameters())

    def learn_besides(self, known: list[tuple[float, Tensor, list[Tensor]]]) -> None:
        """Learn, from each chunk's weight, loss and gradient, what no optimizer learns: nothing, as a rule."""

    def step_weights(self, episode: Episode) -> Float[Tensor, " step"] | None:
        """How much the query loss after each inner step counts; None: only that after the last one does."""
        return None

    def outer_loss(self, episode: Episode, weights: Float[Tensor, " step"] | None) -> Float[Tensor, ""]:
        """The mean query loss after the last inner step, or the weighted sum of those after each."""
        if weights is None:
            return super().meta_loss(episode)
        losses = [self.query_loss(episode, parameters) for parameters in self.adaptation_path(episode)[1:]]
        return weights @ torch.stack(losses)

    def meta_gradient(
        self, episode: Episode, weights: Float[Tensor, " step"] | None = None
    ) -> tuple[Float[Tensor, ""], list[Tensor]]:
        """The meta-loss of one chunk, and its gradient in each of `meta_parameters`."""
        loss, parameters = self.outer_loss(episode, weights), self.meta_parameters()
        return loss.detach(), list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

    def meta_parameters(self) -> list[Tensor]:
        """What `meta_gradient` finds the gradient in."""
        return list(self.named_meta_parameters().values())

    def named_meta_parameters(self) -> Parameters:
        """The same by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def adapt(self, episode: Episode, inner_steps: int | None = None) -> Parameters:
        """The adapted parameters of every task, `[task, ...]` by name.

        Args:
            episode: its support set is all that is read.
            inner_steps: steps of adaptation; default: those of training or of evaluation mode.

        Returns:
            Name to tensor; parameters that the inner loop leaves alone are the shared ones, repeated.
        """
        return self._last_steps(episode, inner_steps, keep=1)[-1]

    def adaptation_path(self, episode: Episode, inner_steps: int | None = None) -> list[Parameters]:
        """The parameters of every task before the first inner step and after each."""
        return self._last_steps(episode, inner_steps, keep=None)

    def _last_steps(self, episode: Episode, inner_steps: int | None, keep: int | None) -> list[Parameters]:
        self.check_ways(episode)
        if inner_steps is None:
            in_training = self.training or self.test_inner_steps is None
            inner_steps = self.inner_steps if in_training else self.test_inner_steps
        memory, n_tasks = None, len(episode)
        path = deque([{n: p.expand(n_tasks, *p.shape) for n, p in self.network.named_parameters()}], keep)
        for step in range(inner_steps or 0):
            parameters, memory = self.inner_step(path[-1], memory, episode, step)
            path.append(parameters)
        if torch.is_grad_enabled():
            return list(path)
        return [{n: p.detach() for n, p in parameters.items()} for parameters in path]

    def support_gradients(
        self, parameters: Parameters, episode: Episode, *, moving: list[str] | None = None, create_graph: bool = False
    ) -> tuple[Float[Tensor, " task"], Parameters]:
        """Each task's loss on its support set, and the gradient of that in its own parameters; also under `no_grad`.

        Args:
            parameters: of every task, `[task, ...]` by name.
            episode: its support set is all that is read.
            moving: the names to differentiate in; default: all.
            create_graph: whether the gradients are to be differentiated in turn.
        """
        outside = torch.is_grad_enabled()
        with torch.enable_grad():
            # parameters that the outer loop leaves alone adapt all the same
            differentiable = {
                n: p if outside and p.requires_grad else p.detach().requires_grad_() for n, p in parameters.items()
            }
            wanted = {n: differentiable[n] for n in moving or differentiable}
            losses = self.support_losses(episode, differentiable)
            gradients = torch.autograd.grad(losses.sum(), list(wanted.values()), create_graph=create_graph)
        return losses if create_graph else losses.detach(), dict(zip(wanted, gradients, strict=True))

    def query_loss(self, episode: Episode, parameters: Parameters) -> Float[Tensor, ""]:
        """The mean loss of the query images of all tasks under given parameters."""
        return self.loss(self.query_logits(episode, parameters).flatten(0, 1), episode.query_labels.flatten(0, 1))

    def chunks(self, episode: Episode) -> Iterator[Episode]:
        """The tasks, as many at a time as are adapted side by side."""
        return chunks(episode, self.network, self.tasks_per_chunk)

    def check_ways(self, episode: Episode) -> None:
        """Raise a `ValueError` if an episode has other ways than the network has outputs."""
        if episode.n_way != self.network.n_outputs:
            raise ValueError(
                f"the network has {self.network.n_outputs} outputs but the episode is {episode.n_way}-way; "
                f"{type(self).__name__} adapts one head, so build ConvNet(n_outputs={episode.n_way}) and train it"
            )

    def _compiled_gradient(self, episode: Episode, weights: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """`meta_gradient`, compiled."""
        assert self._compiled is not None
        self.check_ways(episode)
        images_and_labels = (
            episode.support_images, episode.support_labels, episode.query_images, episode.query_labels
        )  # fmt: skip
        no_weights = torch.empty(0, device=episode.query_images.device)
        loss, *gradients = self._compiled(
            no_weights if weights is None else weights, *images_and_labels, *self.meta_parameters()
        )
        return loss, gradients

    def _gradient_of_tensors(self, weights: Tensor, *tensors: Tensor) -> list[Tensor]:
        """`meta_gradient` as a function of nothing but tensors."""
        images_and_labels, parameters = tensors[:4], tensors[4:]
        episode = Episode(*images_and_labels, n_way=self.network.n_outputs or 0)
        own = leaves(dict(zip(self.named_meta_parameters(), parameters, strict=True)))
        with torch.enable_grad():
            loss, gradients = self.under(own, self.meta_gradient, episode, weights if len(weights) else None)
        return [loss, *gradients]


def leaves(parameters: Parameters) -> Parameters:
    """The same parameters without their past."""
    return {n: p.detach().requires_grad_() for n, p in parameters.items()}


def as_vectors(tensors: Iterable[Tensor]) -> Vectors:
    """Tensors `[task, ...]`, one after the other, as a vector for each task."""
    return torch.cat([tensor.reshape(len(tensor), -1) for tensor in tensors], dim=1)


def as_parameters(vectors: Vectors, like: Parameters) -> Parameters:
    """The vectors taken apart again, by the names and shapes of some parameters."""
    parts = vectors.split([p[0].numel() for p in like.values()], dim=1)
    return {name: part.view_as(p) for part, (name, p) in zip(parts, like.items(), strict=True)}


def check_inner_loop(inner_lr: float, inner_steps: int, test_inner_steps: int | None) -> None:
    """Raise a `ValueError` if the arguments of an inner loop are out of range."""
    if not inner_lr > 0:
        raise ValueError(f"inner_lr must be positive, got {inner_lr}")
    if inner_steps < 0 or (test_inner_steps or 0) < 0:
        raise ValueError(f"inner steps must not be negative, got {inner_steps} and {test_inner_steps}")
