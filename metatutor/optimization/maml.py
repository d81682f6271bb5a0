"""Model-Agnostic Meta-Learning: learn the initial parameters from which one gradient step learns a task.

Also the variants that change a line of it: first-order MAML, ANIL (only the head adapts), BOIL (all but the head),
Meta-SGD (a learned rate for every parameter), and, from MAML++, learned rates for every layer and step, and the loss
after every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from metatutor.checks import check_choice, check_not_negative, check_positive
from metatutor.episodes import Episode
from metatutor.functional import Parameters, call_method, gradients_of, leaves, with_gradient
from metatutor.learner import Loss
from metatutor.optimization.base import AdaptingLearner
from metatutor.optimization.chunks import Compiled, tasks_that_fit

_OTHER_DROPOUT = "a recomputed step would have different dropout; leave out recompute or the dropout"


class MAML(AdaptingLearner):
    """Adapts a network to each task by gradient descent on its support set, from parameters trained to be adapted.

    Inner loop, for each task: `adapted = initial - inner_lr * grad(support_loss)(initial)`, `inner_steps` times.
    Outer loop: `initial -= outer_lr * grad(mean over tasks of query_loss(adapted(initial)))(initial)`. The outer
    gradient goes *through* the inner one, exactly, unless `first_order`, which treats `d adapted / d initial` as the
    identity.

    Args:
        network: maps `[n, channel, height, width]` and `n_support` to logits `[n, way]`.
        inner_lr: step size of adaptation; where it is learned, the initial one.
        inner_steps: steps of adaptation while training.
        test_inner_steps: steps of adaptation in evaluation mode (`learner.eval()`); default: `inner_steps`.
        test_inner_lr: step size in evaluation mode; default: `inner_lr`. First-order gradients cannot tell the outer
            loop that the steps overshoot.
        first_order: leave the second derivatives out.
        adapt: which parameters the inner loop changes: `"all"`; `"head"`, only the last layer (ANIL); or `"body"`, all
            but the last layer (BOIL).
        learned_lr: whether the outer loop learns step sizes too: one for every `"parameter"` (Meta-SGD), or one for
            every tensor of a `"layer"` and every step (MAML++); at test time, steps beyond those of training use the
            rates of the last one.
        multi_step_iterations: the outer loop starts by minimising the mean of the query losses after every inner step,
            and shifts within this many of its steps to the loss after the last one (MAML++).
        fixed_head: whether the outer loop leaves the last layer's initial values alone, unlike the inner loop.
            If the initial layer comes to prefer a label, first-order gradients do not pull it back to zero.
        recompute: whether `meta_loss` keeps only the parameters between inner steps and recomputes each step when its
            gradient is needed, at the cost of one more pass per step. On a CPU, the more steps there are, the fewer
            tasks run side by side, so that memory does not grow with the steps. Not for networks with dropout, which
            would differ the second time.
        compiled: whether `meta_loss` is compiled in training, which takes a minute or more at the first call. This and
            `recompute` affect speed and memory, not the result.
        loss, inner_loss: functions of outputs and labels (see `AdaptingLearner`).

    Raises:
        ValueError: if an episode does not have as many ways as the network has outputs.

    Example:
        >>> from metatutor import ConvNet
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> MAML(ConvNet(n_outputs=5, filters=8), inner_lr=0.4)(Episode(images, labels, images)).shape
        torch.Size([2, 5, 5])

    Reference:
        Finn, Abbeel & Levine (2017), algorithm 2 and equation 1; ANIL: Raghu et al. (2020); BOIL: Oh et al.
        (2021); Meta-SGD: Li et al. (2017); MAML++: Antoniou et al. (2019), section 4.
    """

    multi_step_calls: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        inner_lr: float = 0.4,
        inner_steps: int = 1,
        test_inner_steps: int | None = None,
        test_inner_lr: float | None = None,
        first_order: bool = False,
        adapt: Literal["all", "head", "body"] = "all",
        learned_lr: Literal["none", "parameter", "layer"] = "none",
        multi_step_iterations: int = 0,
        fixed_head: bool = False,
        recompute: bool = False,
        compiled: bool = False,
        loss: Loss | None = None,
        inner_loss: Loss | None = None,
    ) -> None:
        check_positive(inner_lr=inner_lr, test_inner_lr=test_inner_lr)
        check_not_negative(multi_step_iterations=multi_step_iterations)
        check_choice("adapt", adapt, ["all", "head", "body"])
        check_choice("learned_lr", learned_lr, ["none", "parameter", "layer"])
        if test_inner_lr is not None and learned_lr != "none":
            raise ValueError("where rates are learned, the test uses them too; leave test_inner_lr out")
        if inner_steps == 0 and (learned_lr != "none" or multi_step_iterations):
            raise ValueError("without inner steps there are no rates to learn and no steps to weight; see inner_steps")
        super().__init__(network, inner_steps, test_inner_steps, fixed_head, loss, inner_loss)
        self.inner_lr, self.test_inner_lr, self.first_order = inner_lr, test_inner_lr, first_order
        self.learned_lr, self.multi_step_iterations, self.recompute = learned_lr, multi_step_iterations, recompute
        self.exact_gradient = not first_order
        if adapt != "all":
            self.moving = [n for n in self.moving if (n in self.head_names()) == (adapt == "head")]
        if recompute and any(map(_drops_out, self.modules())):
            raise ValueError(_OTHER_DROPOUT)
        self.rates = self._initial_rates()
        if multi_step_iterations:
            self.register_buffer("multi_step_calls", torch.zeros(()))
        self._compiled = Compiled(self._gradient_of_tensors) if compiled else None

    def tasks_at_once(self, episode: Episode) -> int:
        """As many as fit, given that `recompute` keeps the parameters of every step."""
        kept = self.inner_steps if self.recompute and self.training else 0
        return min(super().tasks_at_once(episode), tasks_that_fit(episode, self.network, kept))

    def outer_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The mean query loss after the last inner step, or the weighted sum of those after each."""
        weights = self.step_weights(episode)
        if torch.is_grad_enabled() and self.training and self._compiled is not None:
            return self._compiled_loss(self._compiled, episode, weights)
        if torch.is_grad_enabled() and self.recompute:
            return with_gradient(*self._recomputed_gradient(episode, weights, dict(self.meta_parameters())))
        return self._weighted_loss(episode, weights)

    def _weighted_loss(self, episode: Episode, weights: Float[Tensor, " step"] | None) -> Float[Tensor, ""]:
        if weights is None:
            return super().outer_loss(episode)
        losses = [self.query_loss(episode, parameters) for parameters in self.adaptation_path(episode)[1:]]
        return weights @ torch.stack(losses)

    def inner_step(self, parameters: Parameters, state: Any, episode: Episode, step: int) -> tuple[Parameters, Any]:
        """One step of gradient descent on the support loss."""
        second_order = torch.is_grad_enabled() and not self.first_order
        rates = {n: rate for n, rate in zip(self.moving, self._rates(step), strict=True) if n in parameters}
        _, gradients = self.support_gradients(parameters, episode, moving=list(rates), create_graph=second_order)
        return parameters | {n: parameters[n] - rate * gradients[n] for n, rate in rates.items()}, state

    # --- learned step sizes ---

    def _initial_rates(self) -> nn.ParameterList:
        moving = [self.network.get_parameter(name) for name in self.moving]
        of_layers = [(self.inner_steps,)] * len(moving)
        shapes = {"none": [], "parameter": [p.shape for p in moving], "layer": of_layers}[self.learned_lr]
        return nn.ParameterList(torch.full(shape, self.inner_lr, dtype=moving[0].dtype) for shape in shapes)

    def _rates(self, step: int) -> list[Tensor] | list[float]:
        """The step size of each moving parameter."""
        if self.learned_lr == "layer":
            return [rates[min(step, self.inner_steps - 1)] for rates in self.rates]
        rate = self.inner_lr if self.training else self.test_inner_lr or self.inner_lr
        return list(self.rates) or [rate] * len(self.moving)

    # --- the loss after every step ---

    def step_weights(self, episode: Episode) -> Float[Tensor, " step"] | None:
        """The weights of the query losses after each inner step, or None for only the last one."""
        n_steps, until = self.inner_steps, self.multi_step_iterations
        if not self.training or not until or self.multi_step_calls >= until:
            return None
        earlier = (1 - self.multi_step_calls.item() / until) / n_steps
        return episode.query_images.new_tensor([earlier] * (n_steps - 1) + [1 - (n_steps - 1) * earlier])

    def after_step(self) -> None:
        """Count the steps of the outer loop."""
        if self.multi_step_iterations and self.training:
            self.multi_step_calls += 1

    # --- the meta-gradient, one step at a time ---

    def _recomputed_gradient(
        self, episode: Episode, weights: Tensor | None, wanted: Parameters
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Loss, wanted meta-parameters and gradients, by the chain rule from the last step to the first."""
        chance = _random_state(episode)
        with torch.no_grad():
            path = self.adaptation_path(episode)
        if not torch.equal(_random_state(episode), chance):
            raise ValueError(_OTHER_DROPOUT)  # by a function, which no layer shows
        n_steps = len(path) - 1
        others = {n: p for n, p in wanted.items() if not n.startswith("network.")}  # rates, or parameters of a loss
        of_path = {n: torch.zeros_like(p) for n, p in path[-1].items()}  # d loss / d parameters after this step
        of_others = {n: torch.zeros_like(p) for n, p in others.items()}
        total = torch.zeros((), dtype=episode.query_images.dtype, device=episode.query_images.device)
        for step in range(n_steps, -1, -1):
            here = leaves(path[step])
            if step == n_steps or (weights is not None and step > 0):
                weight = 1 if weights is None else weights[step - 1]
                loss = weight * self.query_loss(episode, here)
                gradients = gradients_of(loss, [*here.values(), *others.values()])
                of_path = _added(of_path, gradients[: len(here)])
                of_others = _added(of_others, gradients[len(here) :])
                total = total + loss.detach()
            if step > 0:
                before = leaves(path[step - 1])
                after, _ = self.inner_step(before, None, episode, step - 1)
                inputs, pulls = [*before.values(), *others.values()], [of_path[n] for n in after]
                gradients = gradients_of(list(after.values()), inputs, pulls)
                of_path = dict(zip(before, gradients, strict=False))
                of_others = _added(of_others, gradients[len(before) :])
        found = of_others | {f"network.{n}": g.sum(0) for n, g in of_path.items()}
        return total, list(wanted.values()), [found[name] for name in wanted]

    # --- the meta-gradient, compiled ---

    def _compiled_loss(self, compiled: Compiled, episode: Episode, weights: Tensor | None) -> Float[Tensor, ""]:
        parameters = list(self.meta_parameters().values())
        no_weights = torch.empty(0, device=episode.query_images.device)
        support, query = (episode.support_images, episode.support_labels), (episode.query_images, episode.query_labels)
        loss, *gradients = compiled(no_weights if weights is None else weights, *support, *query, *parameters)
        return with_gradient(loss, parameters, gradients)

    def _gradient_of_tensors(self, weights: Tensor, *tensors: Tensor) -> list[Tensor]:
        """The meta-loss and its gradients as a function of nothing but tensors."""
        episode = Episode.unchecked(*tensors[:4], n_way=self.network.n_outputs or 0)
        own = leaves(dict(zip(self.meta_parameters(), tensors[4:], strict=True)))
        given = weights if len(weights) else None
        with torch.enable_grad():
            if self.recompute:
                loss, _, gradients = call_method(self, own, self._recomputed_gradient, episode, given, own)
                return [loss, *gradients]
            loss = call_method(self, own, self._weighted_loss, episode, given)
            return [loss, *gradients_of(loss, list(own.values()))]


def _random_state(episode: Episode) -> Tensor:
    device = episode.query_images.device
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _added(sums: Parameters, terms: Sequence[Tensor]) -> Parameters:
    return {name: value + term for (name, value), term in zip(sums.items(), terms, strict=True)}


def _drops_out(layer: nn.Module) -> bool:
    p = layer.p if isinstance(layer, _DropoutNd) else getattr(layer, "dropout", 0.0)
    return isinstance(p, int | float) and p > 0
