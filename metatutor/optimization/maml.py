"""Model-Agnostic Meta-Learning: learn the initial parameters from which one gradient step learns a task.

And the variants that change a line of it: first-order MAML, ANIL (only the head adapts), Meta-SGD (learned rates of
every parameter), and of MAML++ the learned rates of every layer and step, and the loss after every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.backbones import Network
from metatutor.episodes import Episode
from metatutor.learner import Loss, Parameters
from metatutor.optimization.base import AdaptingLearner, check_inner_loop, leaves
from metatutor.optimization.engine import chunks


@dataclass(frozen=True)
class MAMLConfig:
    """The arguments of `MAML`, for a recorded run.

    Args:
        method: the tag of this learner in `config.json`.
        inner_lr: see `MAML`, as are the others.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> from metatutor import ConvNet
        >>> MAMLConfig(inner_lr=0.1).build(ConvNet(n_outputs=5, filters=8)).config.inner_lr
        0.1

    Reference:
        Finn, Abbeel & Levine (2017).
    """

    method: Literal["maml"] = "maml"
    inner_lr: float = 0.4
    inner_steps: int = 1
    test_inner_steps: int | None = None
    test_inner_lr: float | None = None
    first_order: bool = False
    adapt: Literal["all", "head"] = "all"
    learned_lr: Literal["none", "parameter", "layer"] = "none"
    multi_step_iterations: int = 0
    recompute: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        check_inner_loop(self.inner_lr, self.inner_steps, self.test_inner_steps)
        if self.test_inner_lr is not None and not self.test_inner_lr > 0:
            raise ValueError(f"test_inner_lr must be positive, got {self.test_inner_lr}")
        if self.test_inner_lr is not None and self.learned_lr != "none":
            raise ValueError("where rates are learned, the test takes them too; leave test_inner_lr out")
        if self.adapt not in ("all", "head"):
            raise ValueError(f"adapt must be 'all' or 'head', got {self.adapt!r}")
        if self.learned_lr not in ("none", "parameter", "layer"):
            raise ValueError(f"learned_lr must be 'none', 'parameter' or 'layer', got {self.learned_lr!r}")
        if self.multi_step_iterations < 0:
            raise ValueError(f"multi_step_iterations must not be negative, got {self.multi_step_iterations}")
        if self.inner_steps == 0 and (self.learned_lr != "none" or self.multi_step_iterations):
            raise ValueError("without inner steps there are no rates to learn and no steps to weight; see inner_steps")

    def build(self, network: Network) -> MAML:
        """The learner with these arguments."""
        arguments = {name: value for name, value in vars(self).items() if name != "method"}
        return MAML(network, **arguments)


class MAML(AdaptingLearner):
    """Adapts a network to each task by gradient descent on its support set, from parameters made for that.

    Inner loop, for each task: `adapted = initial - inner_lr * grad(support_loss)(initial)`, `inner_steps` times.
    Outer loop: `initial -= outer_lr * grad(mean over tasks of query_loss(adapted(initial)))(initial)`. The outer
    gradient goes *through* the inner one, exactly, unless `first_order`, which takes `d adapted / d initial`
    for the identity.

    Args:
        network: maps `[n, channel, height, width]` and `n_support` to logits `[n, way]`.
        inner_lr: step size of adaptation; where it is learned, the initial one.
        inner_steps: steps of adaptation while training.
        test_inner_steps: steps of adaptation in evaluation mode (`learner.eval()`); default: `inner_steps`.
        test_inner_lr: step size in evaluation mode; default: `inner_lr`. First-order gradients do not tell the outer
            loop that its steps lead too far.
        first_order: leave the second derivatives out.
        adapt: which parameters the inner loop changes: `"all"` or only the last layer, `"head"` (ANIL).
        learned_lr: whether the outer loop learns step sizes too: one for every `"parameter"` (Meta-SGD), or one for
            every tensor of a `"layer"` and every step (MAML++); a step of the test beyond those of training takes the
            last one's.
        multi_step_iterations: the outer loop begins by minimising the mean of the query losses after every inner step,
            and moves within this many calls of `meta_loss` to that after the last one (MAML++).
        recompute: whether `meta_loss` keeps only the parameters between inner steps and computes each step again when
            its gradient is due, for the time of one more pass each. On a CPU, fewer tasks go side by side the more
            steps there are, so that memory does not grow with them.
        compile: whether `meta_loss` is compiled, which takes a minute or more at the first call.
        tasks_per_chunk: tasks adapted side by side (see `engine.chunks`). This and the two before are a matter of
            speed and memory, not of the result.
        loss: of outputs and labels; default: cross-entropy, or squared error where the labels are real numbers.

    Raises:
        ValueError: if an argument is out of range, or an episode has other ways than the network has outputs.

    Example:
        >>> from metatutor import ConvNet
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> learner = MAML(ConvNet(n_outputs=5, filters=8), inner_lr=0.4)
        >>> learner(Episode(images, labels, images, labels, n_way=5)).shape
        torch.Size([2, 5, 5])

    Reference:
        Finn, Abbeel & Levine (2017), algorithm 2 and equation 1; ANIL: Raghu et al. (2020); Meta-SGD: Li et al. (2017);
        MAML++: Antoniou et al. (2019), section 4.
    """

    multi_step_calls: Tensor

    def __init__(
        self,
        network: Network,
        *,
        inner_lr: float = MAMLConfig.inner_lr,
        inner_steps: int = MAMLConfig.inner_steps,
        test_inner_steps: int | None = MAMLConfig.test_inner_steps,
        test_inner_lr: float | None = MAMLConfig.test_inner_lr,
        first_order: bool = MAMLConfig.first_order,
        adapt: Literal["all", "head"] = MAMLConfig.adapt,
        learned_lr: Literal["none", "parameter", "layer"] = MAMLConfig.learned_lr,
        multi_step_iterations: int = MAMLConfig.multi_step_iterations,
        recompute: bool = MAMLConfig.recompute,
        compile: bool = MAMLConfig.compile,
        tasks_per_chunk: int | None = None,
        loss: Loss | None = None,
    ) -> None:
        self.config = MAMLConfig(
            "maml",
            inner_lr,
            inner_steps,
            test_inner_steps,
            test_inner_lr,
            first_order,
            adapt,
            learned_lr,
            multi_step_iterations,
            recompute,
            compile,
        )
        super().__init__(
            network,
            inner_steps=inner_steps,
            test_inner_steps=test_inner_steps,
            compile=compile,
            tasks_per_chunk=tasks_per_chunk,
            loss=loss,
        )
        self.own_gradient = recompute
        self.rates = self._initial_rates()
        if multi_step_iterations:
            self.register_buffer("multi_step_calls", torch.zeros(()))

    def chunks(self, episode: Episode) -> Iterator[Episode]:
        """The tasks, as many at a time as are adapted side by side; `recompute` keeps parameters of every step."""
        kept = self.inner_steps if self.config.recompute and self.training else 0
        return chunks(episode, self.network, self.tasks_per_chunk, kept)

    def inner_step(self, parameters: Parameters, memory: Any, episode: Episode, step: int) -> tuple[Parameters, Any]:
        """One step of gradient descent on the support loss."""
        second_order = torch.is_grad_enabled() and not self.config.first_order
        moving = self._moving()
        _, gradients = self.support_gradients(parameters, episode, moving=moving, create_graph=second_order)
        moves = zip(moving, self._rates(step), strict=True)
        return parameters | {n: parameters[n] - rate * gradients[n] for n, rate in moves}, memory

    def _moving(self) -> list[str]:
        names = [name for name, _ in self.network.named_parameters()]
        return [name for name in names if self.config.adapt == "all" or name.startswith("head.")]

    # --- learned step sizes ---

    def _initial_rates(self) -> nn.ParameterList:
        moving = [self.network.get_parameter(name) for name in self._moving()]
        shapes = {
            "none": [],
            "parameter": [p.shape for p in moving],
            "layer": [(self.config.inner_steps,)] * len(moving),
        }
        dtype = moving[0].dtype if moving else None
        return nn.ParameterList(
            torch.full(shape, self.config.inner_lr, dtype=dtype) for shape in shapes[self.config.learned_lr]
        )

    def _rates(self, step: int) -> list[Tensor] | list[float]:
        """The step size of each moving parameter."""
        if self.config.learned_lr == "layer":
            return [rates[min(step, self.config.inner_steps - 1)] for rates in self.rates]
        rate = self.config.inner_lr if self.training else self.config.test_inner_lr or self.config.inner_lr
        return list(self.rates) or [rate] * len(self._moving())

    # --- the loss after every step ---

    def step_weights(self, episode: Episode) -> Float[Tensor, " step"] | None:
        """The weights of the query losses after each inner step, or None: only that after the last."""
        n_steps, until = self.config.inner_steps, self.config.multi_step_iterations
        if not self.training or not until or self.multi_step_calls >= until:
            return None
        earlier = (1 - self.multi_step_calls.item() / until) / n_steps
        if torch.is_grad_enabled():
            self.multi_step_calls += 1
        return episode.query_images.new_tensor([earlier] * (n_steps - 1) + [1 - (n_steps - 1) * earlier])

    # --- the meta-gradient, computed here ---

    def meta_gradient(
        self, episode: Episode, weights: Float[Tensor, " step"] | None = None
    ) -> tuple[Float[Tensor, ""], list[Tensor]]:
        """The meta-loss of one chunk, and its gradient in each of `meta_parameters`."""
        if self.config.recompute:
            return self._recomputed_gradient(episode, weights)
        return super().meta_gradient(episode, weights)

    def _recomputed_gradient(self, episode: Episode, weights: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """By the chain rule from the last step to the first, with the graph of one step at a time."""
        with torch.no_grad():
            path = self.adaptation_path(episode)
        n_steps, rates = len(path) - 1, list(self.rates)
        of_path = {n: torch.zeros_like(p) for n, p in path[-1].items()}  # d loss / d parameters after this step
        of_rates = [torch.zeros_like(rate) for rate in rates]
        total = torch.zeros((), dtype=episode.query_images.dtype, device=episode.query_images.device)
        for step in range(n_steps, -1, -1):
            here = leaves(path[step])
            if step == n_steps or (weights is not None and step > 0):
                weight = 1 if weights is None else weights[step - 1]
                loss = weight * self.query_loss(episode, here)
                gradients = torch.autograd.grad(loss, list(here.values()))
                of_path = {n: v + g for (n, v), g in zip(of_path.items(), gradients, strict=True)}
                total = total + loss.detach()
            if step > 0:
                before = leaves(path[step - 1])
                after, _ = self.inner_step(before, None, episode, step - 1)
                inputs, pulls = [*before.values(), *rates], [of_path[n] for n in after]
                gradients = torch.autograd.grad(
                    list(after.values()), inputs, pulls, allow_unused=True, materialize_grads=True
                )
                of_path = dict(zip(before, gradients, strict=False))
                of_rates = [v + g for v, g in zip(of_rates, gradients[len(before) :], strict=True)]
        of_shared = dict(zip(map(id, self.network.parameters()), (g.sum(0) for g in of_path.values()), strict=True))
        of_shared |= dict(zip(map(id, rates), of_rates, strict=True))
        return total, [of_shared[id(p)] for p in self.meta_parameters()]
