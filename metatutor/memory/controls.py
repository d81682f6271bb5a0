"""Two controls without a memory to write to: a memory is worth what it adds to them."""

from __future__ import annotations

from abc import abstractmethod

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.checks import check_sizes
from metatutor.memory.stream import LabelCode, State, StreamLearner, lstm, remember


class _Control(StreamLearner):
    """The arguments that the controls share."""

    def __init__(
        self,
        network: nn.Module,
        *,
        n_way: int = 5,
        hidden_size: int = 200,
        labels: LabelCode = "one-hot",
        finetune_steps: int = 0,
        finetune_lr: float = 0.01,
    ) -> None:
        check_sizes(hidden_size=hidden_size)
        super().__init__(network, n_way=n_way, labels=labels, finetune_steps=finetune_steps, finetune_lr=finetune_lr)
        self.hidden_size = hidden_size
        self.build(hidden_size)

    @abstractmethod
    def build(self, hidden_size: int) -> None:
        """Make the layers, from `input_size` through `hidden_size` to `code_size` numbers."""


class PlainLSTM(_Control):
    """The control with a short memory: an LSTM with nothing but its own state.

    Args:
        network: the embedding, which treats images one by one: `Pixels`, or `ConvNet(normalization="group")`.
        n_way: classes in a task.
        hidden_size: hidden units of the LSTM.
        labels: how a label is encoded: `"one-hot"`, or `"letters"` (see `StreamLearner`).
        finetune_steps: steps of gradient descent on each support set at test time (see `EmbeddingLearner`).
        finetune_lr: learning rate of fine-tuning.

    Raises:
        ValueError: if the network normalises over several images, or an episode has a different `n_way`.

    Example:
        >>> import torch
        >>> from metatutor import Episode, Pixels
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> PlainLSTM(Pixels(20))(Episode(images, labels, images)).shape
        torch.Size([2, 5, 5])

    Reference:
        Santoro et al. (2016), section 4.1; Hochreiter, Younger & Conwell (2001).
    """

    def build(self, hidden_size: int) -> None:
        """The LSTM and what is read from it."""
        self.enter = nn.Linear(self.input_size, 4 * hidden_size)
        self.recur = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, self.code_size)
        remember(self.enter, hidden_size)

    def prepare(self, seen: Float[Tensor, "task time input"]) -> Float[Tensor, "task time gates"]:
        """What the images and labels contribute to the gates."""
        return self.enter(seen)

    def start(self, n_tasks: int) -> State:
        """Zeros: output and cell."""
        zeros = self.out.weight.new_zeros(n_tasks, self.hidden_size)
        return zeros, zeros

    def step(self, state: State, prepared: Float[Tensor, "task gates"]) -> tuple[State, Float[Tensor, "task code"]]:
        """One step of the LSTM."""
        h, c = lstm(prepared + self.recur(state[0]), state[1])
        return (h, c), self.out(h)


class FeedForward(_Control):
    """The control without any memory: two layers that see an image and the label of the one before.

    Since classes are numbered at random in every stream, all it can learn is to name a class other than the one just
    revealed.

    Args:
        network: the embedding, which treats images one by one: `Pixels`, or `ConvNet(normalization="group")`.
        n_way: classes in a task.
        hidden_size: units of the hidden layer.
        labels: how a label is encoded: `"one-hot"`, or `"letters"` (see `StreamLearner`).
        finetune_steps: steps of gradient descent on each support set at test time (see `EmbeddingLearner`).
        finetune_lr: learning rate of fine-tuning.

    Raises:
        ValueError: if the network normalises over several images, or an episode has a different `n_way`.

    Example:
        >>> import torch
        >>> from metatutor import Episode, Pixels
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> FeedForward(Pixels(20))(Episode(images, labels, images)).shape
        torch.Size([2, 5, 5])

    Reference:
        Santoro et al. (2016), section 4.1.
    """

    def build(self, hidden_size: int) -> None:
        """The two layers."""
        self.hidden = nn.Linear(self.input_size, hidden_size)
        self.out = nn.Linear(hidden_size, self.code_size)

    def prepare(self, seen: Float[Tensor, "task time input"]) -> Float[Tensor, "task time code"]:
        """The answers themselves: nothing depends on what came before."""
        return self.out(F.relu(self.hidden(seen)))

    def start(self, n_tasks: int) -> State:
        """No state."""
        return ()

    def step(self, state: State, prepared: Float[Tensor, "task code"]) -> tuple[State, Float[Tensor, "task code"]]:
        """The answer that `prepare` gave."""
        return (), prepared
