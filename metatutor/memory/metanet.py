"""Meta Networks: small networks turn the gradients of the support loss into weights that last for one task."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, vmap

from metatutor.checks import check_sizes
from metatutor.embedding import Logits, Query, Support
from metatutor.episodes import Episode
from metatutor.functional import Parameters, preprocess
from metatutor.memory.base import MemoryLearner


class FastMemory(NamedTuple):
    """What a task left in the memories M and R: fast weights of the base learner, each under its image's key."""

    keys: Float[Tensor, "task support hidden"]
    fast: dict[str, Tensor]  # by name of the base learner's weights, [task, support, ...]
    key_fast: dict[str, Tensor]  # of the key function, [task, ...]


class MetaNet(MemoryLearner):
    """Every support image leaves fast weights in a memory; a query image reads those of the images it resembles.

    Two small networks sit on top of the embedding: the base learner `b`, which classifies, and the key function `u`,
    which says what an image resembles. Both have slow weights, learned by the outer loop, and fast ones, made for a
    task:

    1. The gradients of `u`'s loss on `n_gradients` support images go through an LSTM, weight by weight, and come out
       as `u`'s fast weights.
    2. The gradient of `b`'s loss on each support image goes through a small network, weight by weight, and comes out as
       fast weights of `b`: one set per image. They are stored, each under its image's key.
    3. A query image's key is compared with the stored ones. The fast weights, weighted by `softmax(cosine)`, are added
       up, and `b` answers with these and its slow weights side by side.

    A layer with slow and fast weights applies both to its input and adds the results (layer augmentation):
    `relu(x · slow) + relu(x · fast)`, or without `relu` in the last layer. Gradients are treated as constants, as in
    the authors' code: the outer loop does not differentiate them. So the last layer of `u`, which serves only its loss,
    keeps its random initial weights.

    Three things differ from the paper. The convolutions are shared by `b` and `u` and have slow weights only; layer
    augmentation is for the fully connected layers. Cosines are multiplied by a learned factor. And the mean of a
    layer's fast weights is subtracted from them: embeddings are never negative, so fast weights of one sign would
    switch a ReLU on or off for all images alike, and one that is off for all images stays off for good.

    Args:
        network: the embedding.
        n_way: classes in a task.
        hidden_size: hidden units of `b` and of `u`, whose outputs are the keys.
        generator_size: hidden units of the two networks that make fast weights.
        n_gradients: how many support images, the first ones, give the gradients that make `u`'s fast weights.
        finetune_steps: steps of gradient descent on each support set at test time (see `EmbeddingLearner`).
        finetune_lr: learning rate of fine-tuning.

    Raises:
        ValueError: if an episode has a different `n_way`.

    Example:
        >>> from metatutor import ConvNet
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> MetaNet(ConvNet(filters=8))(Episode(images, labels, images, labels, n_way=5)).shape
        torch.Size([2, 5, 5])

    Reference:
        Munkhdalai & Yu (2017), algorithm 1 and equations 1 to 12.
    """

    exact_gradient = False

    def __init__(
        self,
        network: nn.Module,
        *,
        n_way: int = 5,
        hidden_size: int = 64,
        generator_size: int = 20,
        n_gradients: int = 5,
        finetune_steps: int = 0,
        finetune_lr: float = 0.01,
    ) -> None:
        check_sizes(hidden_size=hidden_size, generator_size=generator_size, n_gradients=n_gradients)
        super().__init__(network, n_way=n_way, finetune_steps=finetune_steps, finetune_lr=finetune_lr)
        self.n_gradients = n_gradients
        self.base = TwoLayers(self.embedding_size, hidden_size, n_way)
        self.key = TwoLayers(self.embedding_size, hidden_size, n_way)
        self.make_base = nn.Sequential(
            nn.Linear(2, generator_size),
            nn.ReLU(),
            nn.Linear(generator_size, generator_size),
            nn.ReLU(),
            nn.Linear(generator_size, 1, bias=False),
        )
        self.watch = nn.LSTM(2, generator_size)
        self.make_key = nn.Linear(generator_size, 1, bias=False)
        self.log_sharpness = nn.Parameter(torch.tensor(2.0))

    def answer(self, episode: Episode) -> Logits:
        """Classify each query image with slow weights and the fast weights it finds."""
        self.check_ways(episode)
        support, query = self.embed(episode)
        fast = self.recall(self.remember(support, episode), query)
        return vmap(vmap(self.base.with_fast))(query, fast)

    def memory(self, episode: Episode) -> FastMemory:
        """What the support set leaves in the memory."""
        self.check_ways(episode)
        return self.remember(self.embed(episode)[0], episode)

    def remember(self, support: Support, episode: Episode) -> FastMemory:
        """Fast weights of every support image, and its key (steps 1 and 2)."""
        labels = episode.support_labels
        of_key = self.gradients(self.key, support[:, : self.n_gradients], labels[:, : self.n_gradients])
        key_fast = {"first": self.key_weights(of_key["first"])}
        fast = {name: self.base_weights(g) for name, g in self.gradients(self.base, support, labels).items()}
        keys = vmap(self.key.hidden)(support, key_fast["first"])
        return FastMemory(keys, fast, key_fast)

    def recall(self, memory: FastMemory, query: Query) -> Parameters:
        """For each query image the fast weights of the support images it resembles, `[task, query, ...]` (step 3)."""
        attention = self.attend(memory, query)
        return {
            name: (attention @ stored.flatten(2)).unflatten(2, stored.shape[2:]) for name, stored in memory.fast.items()
        }

    def attend(self, memory: FastMemory, query: Query) -> Float[Tensor, "task query support"]:
        """How much of each support image's fast weights each query image takes."""
        asked = vmap(self.key.hidden)(query, memory.key_fast["first"])
        cosines = F.normalize(asked, dim=-1) @ F.normalize(memory.keys, dim=-1).mT
        return (self.log_sharpness.exp() * cosines).softmax(-1)

    def gradients(self, layers: TwoLayers, support: Tensor, labels: Tensor) -> Parameters:
        """The gradients of each support image's cross-entropy, `[task, support, ...]`, as constants."""
        slow = {name: p.detach() for name, p in layers.named_parameters()}

        def loss(weights: Parameters, embedding: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(layers.slow(weights, embedding), label)

        return vmap(vmap(grad(loss), (None, 0, 0)), (None, 0, 0))(slow, support.detach(), labels)

    def base_weights(self, gradient: Float[Tensor, "task support *weight"]) -> Float[Tensor, "task support *weight"]:
        """Fast weights of the base learner: each from its own gradient alone."""
        return centred(self.make_base(preprocess(gradient.flatten())).view_as(gradient))

    def key_weights(self, gradients: Float[Tensor, "task seen *weight"]) -> Float[Tensor, "task ..."]:
        """Fast weights of the key function: each from its gradients on several images, one after another."""
        n_seen = gradients.shape[1]
        seen = preprocess(gradients.transpose(0, 1).flatten()).view(n_seen, -1, 2)
        watched = self.watch(seen)[0][-1]
        return centred(self.make_key(watched).view(gradients[:, 0].shape))


def centred(weights: Float[Tensor, "... output input"]) -> Float[Tensor, "... output input"]:
    """The weights of a layer minus their mean.

    Example:
        >>> centred(torch.tensor([[1.0, 2.0], [3.0, 6.0]])).tolist()
        [[-2.0, -1.0], [0.0, 3.0]]
    """
    return weights - weights.mean((-2, -1), keepdim=True)


class TwoLayers(nn.Module):
    """Two fully connected layers without biases, for use with fast weights: layer augmentation (section 3.3)."""

    def __init__(self, n_inputs: int, hidden_size: int, n_outputs: int) -> None:
        super().__init__()
        check_sizes(n_inputs=n_inputs, hidden_size=hidden_size, n_outputs=n_outputs)
        self.first = nn.Parameter(torch.empty(hidden_size, n_inputs))
        self.last = nn.Parameter(torch.empty(n_outputs, hidden_size))
        for weight in (self.first, self.last):
            nn.init.kaiming_uniform_(weight, a=5**0.5)  # as in torch.nn.Linear

    def slow(self, weights: Parameters, inputs: Float[Tensor, "*n input"]) -> Float[Tensor, "*n output"]:
        """The outputs with one set of weights."""
        return F.relu(inputs @ weights["first"].mT) @ weights["last"].mT

    def hidden(
        self, inputs: Float[Tensor, "*n input"], fast: Float[Tensor, "hidden input"]
    ) -> Float[Tensor, "*n hidden"]:
        """The outputs of the first layer, with slow and fast weights side by side."""
        return F.relu(inputs @ self.first.mT) + F.relu(inputs @ fast.mT)

    def with_fast(self, inputs: Float[Tensor, "*n input"], fast: Parameters) -> Float[Tensor, "*n output"]:
        """The outputs with slow and fast weights side by side."""
        hidden = self.hidden(inputs, fast["first"])
        return hidden @ self.last.mT + hidden @ fast["last"].mT
