"""The LSTM optimizer: gradient descent whose step sizes, and forgetting, are learned by a recurrent network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metatutor.checks import check_positive
from metatutor.episodes import Episode
from metatutor.functional import Parameters, flatten_tasks, preprocess, unflatten_tasks
from metatutor.learner import Loss
from metatutor.optimization.base import AdaptingLearner


class MetaLSTM(AdaptingLearner):
    """An LSTM is the optimizer: the parameters of the task's network are its cell state.

    The cell of an LSTM changes by `c' = f * c + i * candidate`. With `c` the parameters and minus the gradient of the
    support loss as the candidate, this *is* gradient descent, `i` being the step size and `1 - f` a decay. Here both
    gates are learned: for every parameter,

        forget = sigmoid(w_f · [h, parameter, previous forget] + b_f)
        enter = sigmoid(w_i · [h, parameter, previous enter] + b_i)
        parameter' = forget * parameter - enter * gradient

    where `h` is the output of an ordinary LSTM that watches the gradient and the loss, both preprocessed. All
    parameters share the weights of these networks, but each has a state of its own. The outer loop learns the weights,
    and the initial parameters: the initial cell state. Gradients of the support loss are treated as constants, so there
    are no second derivatives.

    Args:
        network: maps `[n, channel, height, width]` and `n_support` to logits `[n, way]`.
        inner_steps: steps of adaptation while training, each on the whole support set.
        test_inner_steps: steps of adaptation in evaluation mode (`learner.eval()`); default: `inner_steps`.
        hidden_size: hidden units of the LSTM that watches.
        fixed_head: whether the outer loop leaves the last layer's initial values alone, unlike the inner loop.
        loss, inner_loss: functions of outputs and labels (see `AdaptingLearner`).

    Raises:
        ValueError: if an episode does not have as many ways as the network has outputs.

    Example:
        >>> from metatutor import ConvNet
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> MetaLSTM(ConvNet(n_outputs=5, filters=8))(Episode(images, labels, images)).shape
        torch.Size([2, 5, 5])

    Reference:
        Ravi & Larochelle (2017), section 3; preprocessing: Andrychowicz et al. (2016), appendix A.
    """

    exact_gradient = False

    def __init__(
        self,
        network: nn.Module,
        *,
        inner_steps: int = 5,
        test_inner_steps: int | None = None,
        hidden_size: int = 20,
        fixed_head: bool = False,
        loss: Loss | None = None,
        inner_loss: Loss | None = None,
    ) -> None:
        super().__init__(network, inner_steps, test_inner_steps, fixed_head, loss, inner_loss)
        check_positive(hidden_size=hidden_size)
        self.watch = nn.LSTMCell(4, hidden_size)
        self.forget, self.enter = (nn.Linear(hidden_size + 2, 1) for _ in range(2))
        # Initially nearly everything is kept and little enters: gradient descent with a rate of about 0.01.
        for gate, (low, high) in ((self.forget, (4.0, 6.0)), (self.enter, (-5.0, -4.0))):
            nn.init.uniform_(gate.weight, -0.01, 0.01)
            nn.init.uniform_(gate.bias, low, high)

    def inner_step(self, parameters: Parameters, state: Any, episode: Episode, step: int) -> tuple[Parameters, Any]:
        """One step of the LSTM; the state is that of `watch`, and the two gates."""
        with torch.no_grad():
            losses, gradients = self.support_gradients(parameters, episode)
            gradient = flatten_tasks(gradients.values()).flatten()  # [task * parameter]
            n_parameters = len(gradient) // len(episode)
            seen = torch.cat([preprocess(gradient), preprocess(losses.repeat_interleave(n_parameters))], dim=1)
        cell = flatten_tasks(parameters.values()).flatten()
        watched, forget, enter = state or (None, torch.zeros_like(cell), torch.zeros_like(cell))
        watched = self.watch(seen, watched)
        forget = self._gate(self.forget, watched[0], cell, forget)
        enter = self._gate(self.enter, watched[0], cell, enter)
        cells = (forget * cell - enter * gradient).unflatten(0, (len(episode), n_parameters))
        return unflatten_tasks(cells, parameters), (watched, forget, enter)

    def _gate(self, gate: nn.Module, h: Tensor, cell: Tensor, before: Tensor) -> Tensor:
        return gate(torch.cat([h, cell[:, None], before[:, None]], dim=1)).squeeze(1).sigmoid()
