"""ProtoMAML: MAML whose last layer starts, in every task, as the classifier of Prototypical Networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.backbones import Embedding, backbone
from metatutor.checks import check_positive
from metatutor.episodes import Episode
from metatutor.functional import Parameters, call_method, class_means
from metatutor.learner import Loss
from metatutor.optimization.base import AdaptingLearner

_LAYER = ("prototype weight", "prototype bias")  # no parameter of a module can have such a name


class ProtoMAML(AdaptingLearner):
    """Starts each task as a Prototypical Network does, and continues with gradient descent on the support set.

    Minus the squared distance to a prototype `c` is linear in the embedding `f(x)`, up to a term that all classes
    share: `-|f(x) - c|² = 2 c · f(x) - |c|² - |f(x)|²`. So a last layer with the weights `2 c` and the bias `-|c|²`
    answers as Prototypical Networks do. From there all parameters, those of this layer included, take `inner_steps`
    steps. The outer gradient goes through the steps, unless `first_order`, and through the prototypes. Since the layer
    is made afresh for every task, one learner handles tasks with any number of ways.

    Args:
        network: the embedding `f`; a last layer, if it has one, is not used.
        inner_lr: step size of adaptation.
        inner_steps: steps of adaptation while training; 0 is a Prototypical Network.
        test_inner_steps: steps of adaptation in evaluation mode (`learner.eval()`); default: `inner_steps`.
        first_order: leave the second derivatives out.
        loss: function of outputs and labels; default: cross-entropy.
        inner_loss: what the inner loop minimises, if not `loss`.

    Example:
        >>> from metatutor import ConvNet
        >>> images, labels = torch.rand(2, 7, 1, 28, 28), torch.arange(7).repeat(2, 1)
        >>> ProtoMAML(ConvNet(filters=8))(Episode(images, labels, images, labels, n_way=7)).shape
        torch.Size([2, 7, 7])

    Reference:
        Triantafillou et al. (2020), section 3, and Snell, Swersky & Zemel (2017), equation 8.
    """

    network: Embedding  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        network: nn.Module,
        *,
        inner_lr: float = 0.01,
        inner_steps: int = 1,
        test_inner_steps: int | None = None,
        first_order: bool = False,
        loss: Loss | None = None,
        inner_loss: Loss | None = None,
    ) -> None:
        check_positive(inner_lr=inner_lr)
        super().__init__(backbone(network, head=""), inner_steps, test_inner_steps, loss=loss, inner_loss=inner_loss)
        self.ways = None
        self.moving += _LAYER
        self.inner_lr, self.first_order = inner_lr, first_order
        self.exact_gradient = not first_order

    @classmethod
    def outputs(cls, n_way: int, n_train_classes: int) -> None:
        """An embedding is enough."""

    def initial_parameters(self, episode: Episode) -> Parameters:
        """What every task starts from: the shared embedding, and the last layer made from its prototypes."""
        # not the same tensors that the inner loop moves: its gradient must not pass through the prototypes
        embeddings = self.map_tasks(self._embed, super().initial_parameters(episode), episode.support_images)
        prototypes = class_means(embeddings, episode.support_labels, episode.n_way)
        layer = dict(zip(_LAYER, (2 * prototypes, -prototypes.pow(2).sum(-1)), strict=True))
        return super().initial_parameters(episode) | layer

    def call_network(self, parameters: Parameters, *images: Any) -> Float[Tensor, "n way"]:
        """The logits of one task's images."""
        weight, bias = (parameters[name] for name in _LAYER)
        return F.linear(self._embed(parameters, *images), weight, bias)

    def _embed(self, parameters: Parameters, *images: Any) -> Float[Tensor, "n embedding"]:
        embedding = {n: p for n, p in parameters.items() if n not in _LAYER}
        return call_method(self.network, embedding, self.network.embed, *images)

    def inner_step(self, parameters: Parameters, state: Any, episode: Episode, step: int) -> tuple[Parameters, Any]:
        """One step of gradient descent on the support loss."""
        second_order = torch.is_grad_enabled() and not self.first_order
        _, gradients = self.support_gradients(parameters, episode, create_graph=second_order)
        return {n: p - self.inner_lr * gradients[n] for n, p in parameters.items()}, state
