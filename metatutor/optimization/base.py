"""What the optimization-based methods share: every task gets parameters of its own, by steps on its support set."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.backbones import network_name
from metatutor.episodes import Episode
from metatutor.functional import Parameters, gradients_of
from metatutor.learner import Loss, NetworkLearner
from metatutor.optimization.chunks import tasks_that_fit


class AdaptingLearner(NetworkLearner):
    """Takes `inner_steps` steps on the support set of each task, then answers its query images.

    A method defines what a step is, `inner_step`, and, if the outer loop should learn other than by differentiating
    through the steps, `outer_loss`. All tasks of an episode take their steps side by side: `vmap` gives every task its
    own parameters, and since no task's loss depends on another's parameters, one call of `autograd.grad` on the sum of
    losses yields the gradient of each. Parameters that do not require gradients stay unchanged in both loops.

    Args:
        network: any module from images `[n, channel, height, width]` to logits `[n, way]`.
        inner_steps: steps of adaptation while training.
        test_inner_steps: steps of adaptation in evaluation mode (`learner.eval()`); default: `inner_steps`.
        fixed_head: whether the outer loop leaves the last layer's initial values alone; inner loops still change it.
        loss: function of outputs and labels; default: cross-entropy, or squared error where the labels are real
            numbers.
        inner_loss: what the inner loop minimises, if not `loss`.

    Example:
        Gradient descent with momentum as the inner loop; the state is the velocity.

        >>> from metatutor import MLP
        >>> class Momentum(AdaptingLearner):
        ...     def inner_step(self, parameters, state, episode, step):
        ...         _, gradients = self.support_gradients(parameters, episode, create_graph=True)
        ...         velocity = {n: 0.9 * state[n] + g if state else g for n, g in gradients.items()}
        ...         return {n: p - 0.01 * velocity[n] for n, p in parameters.items()}, velocity
        >>> x = torch.linspace(-1, 1, 5).view(1, 5, 1)
        >>> Momentum(MLP(), inner_steps=3)(Episode(x, x**2, x)).shape
        torch.Size([1, 5, 1])

    Reference:
        Finn, Abbeel & Levine (2017), algorithm 1, lines 4 to 7; a fixed head: Kao, Chiu & Chen (2022), MAML is a noisy
        contrastive learner in classification.
    """

    moving: list[str]
    """The names of the parameters that the inner loop changes."""

    def __init__(
        self,
        network: nn.Module,
        inner_steps: int = 1,
        test_inner_steps: int | None = None,
        fixed_head: bool = False,
        loss: Loss | None = None,
        inner_loss: Loss | None = None,
    ) -> None:
        super().__init__(network, loss)
        if inner_steps < 0 or (test_inner_steps or 0) < 0:
            raise ValueError(f"inner steps must not be negative, got {inner_steps} and {test_inner_steps}")
        self.inner_steps, self.test_inner_steps, self.fixed_head = inner_steps, test_inner_steps, fixed_head
        self.inner_loss: Loss = self.loss if inner_loss is None else inner_loss
        self.ways = self.network.n_outputs
        self.moving = list(self._adaptable())
        if fixed_head:
            self.head_names()  # or an error now

    @classmethod
    def outputs(cls, n_way: int, n_train_classes: int) -> int | None:
        """One output per class of a task."""
        return n_way

    @abstractmethod
    def inner_step(self, parameters: Parameters, state: Any, episode: Episode, step: int) -> tuple[Parameters, Any]:
        """One step of adaptation of all tasks.

        Args:
            parameters: those of every task, `[task, ...]` by name.
            state: what the previous step returned; None at the first step.
            episode: the tasks; only their support sets may be read.
            step: how many steps came before.

        Returns:
            The parameters after the step, and the state for the next one.
        """

    def forward(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """Adapt to each support set, then answer the query images."""
        return torch.cat([self.query_logits(chunk, self.adapt(chunk)) for chunk in self.chunks(episode)])

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """Mean loss of the query images after adaptation."""
        self.check_ways(episode)
        return self.outer_loss(episode)

    def outer_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """What `meta_loss` returns; overridden where a method finds its gradient in another way."""
        return self.query_loss(episode, self.adapt(episode))

    def query_loss(self, episode: Episode, parameters: Parameters) -> Float[Tensor, ""]:
        """The mean loss of the query images of all tasks under given parameters."""
        return self.loss(self.query_logits(episode, parameters).flatten(0, 1), episode.query_labels.flatten(0, 1))

    def measure(self, episode: Episode, *, stream: bool = False) -> Float[Tensor, "task ..."]:
        """Each task's accuracy; for regressions, the squared error before the first inner step and after each."""
        if not episode.query_labels.is_floating_point():
            return super().measure(episode, stream=stream)
        path = self.adaptation_path(episode)
        errors = [(self.query_logits(episode, p) - episode.query_labels).cpu().double() for p in path]
        return torch.stack([error.pow(2).mean((1, 2)) for error in errors], dim=1)

    def tasks_at_once(self, episode: Episode) -> int:
        """All on a GPU, on a CPU as many as fit its cache and memory; one if they cannot run side by side."""
        return tasks_that_fit(episode, self.network) if self.map_tasks.side_by_side else 1

    def meta_parameters(self) -> dict[str, nn.Parameter]:
        """What the outer loop changes, by name."""
        fixed = {f"network.{name}" for name in self.head_names()} if self.fixed_head else set()
        return {name: p for name, p in super().meta_parameters().items() if name not in fixed}

    def adapt(self, episode: Episode, inner_steps: int | None = None) -> Parameters:
        """The adapted parameters of every task, `[task, ...]` by name, after `inner_steps` steps or those of its mode.

        Only the support set is read. Parameters that the inner loop leaves alone are the shared ones, repeated.
        """
        return self.adaptation_path(episode, inner_steps, last=1)[-1]

    def adaptation_path(
        self, episode: Episode, inner_steps: int | None = None, last: int | None = None
    ) -> list[Parameters]:
        """The parameters of every task before the first inner step and after each; all of them, or the `last` ones."""
        self.check_ways(episode)
        if inner_steps is None:
            in_training = self.training or self.test_inner_steps is None
            inner_steps = self.inner_steps if in_training else self.test_inner_steps
        state, path = None, deque([self.initial_parameters(episode)], last)
        for step in range(inner_steps or 0):
            parameters, state = self.inner_step(path[-1], state, episode, step)
            path.append(parameters)
        if torch.is_grad_enabled():
            return list(path)
        return [{n: p.detach() for n, p in parameters.items()} for parameters in path]

    def initial_parameters(self, episode: Episode) -> Parameters:
        """What every task starts from, `[task, ...]` by name; parameters that do not require gradients are left out."""
        initial = self._adaptable()
        if self.fixed_head:
            initial |= {n: initial[n].detach() for n in self.head_names()}
        return {n: p.expand(len(episode), *p.shape) for n, p in initial.items()}

    def _adaptable(self) -> Parameters:
        initial: Parameters = {n: p for n, p in self.network.named_parameters() if p.requires_grad}
        if not initial:
            raise ValueError(f"{network_name(self.network)} has no parameter that could adapt; unfreeze some")
        return initial

    def head_names(self) -> list[str]:
        """The names of the last layer's parameters in the network; a ValueError if there are none that could adapt."""
        prefix, every = self.network.head_prefix, self.network.named_parameters(remove_duplicate=False)
        of_head = {p for n, p in every if prefix and n.startswith(prefix)}  # which may be tied to others
        names = [n for n, p in self.network.named_parameters() if p in of_head and p.requires_grad]
        if not names:
            raise ValueError(
                f"{network_name(self.network)} has no last layer that could adapt; say which it is with "
                "backbone(network, head=the name of a layer)"
            )
        return names

    def support_gradients(
        self, parameters: Parameters, episode: Episode, *, moving: list[str] | None = None, create_graph: bool = False
    ) -> tuple[Float[Tensor, " task"], Parameters]:
        """Each task's loss on its support set and its gradient in the task's own parameters; also under `no_grad`.

        `moving` names the parameters to differentiate in, by default all; `create_graph`: gradients are differentiable
        too.
        """
        outside = torch.is_grad_enabled()
        with torch.enable_grad():
            # what the outer loop leaves alone still adapts
            differentiable = {
                n: p if outside and p.requires_grad else p.detach().requires_grad_() for n, p in parameters.items()
            }
            wanted = {n: differentiable[n] for n in moving or differentiable}
            losses = self.support_losses(episode, differentiable, self.inner_loss)
            gradients = gradients_of(losses.sum(), list(wanted.values()), create_graph=create_graph)
        return losses if create_graph else losses.detach(), dict(zip(wanted, gradients, strict=True))

    def check_ways(self, episode: Episode) -> None:
        """Raise a `ValueError` if an episode does not have as many ways as the network has outputs."""
        if self.ways is not None:
            self.check_outputs(self.ways, episode)


def check_loss(learner: AdaptingLearner) -> None:
    """Raise a `ValueError` if the loss has parameters that the outer loop would not learn."""
    if not all(name.startswith("network.") for name in learner.meta_parameters()):
        raise ValueError(f"{type(learner).__name__} learns parameters of the network only; freeze those of the loss")
