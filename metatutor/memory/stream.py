"""Streams: every image is asked first and its label told one step later; and two controls that have no memory to write.

`PlainLSTM` remembers in its own state, `FeedForward` not at all. What a memory is worth is what it adds to them.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from metatutor.backbones import Embedding
from metatutor.episodes import Episode
from metatutor.learner import each_task, without_method
from metatutor.memory.base import Labels, Logits, MemoryLearner, check_memory

LabelCode = Literal["one-hot", "letters"]
N_LETTERS = 5  # letters in a string, and letters of the alphabet
State = tuple[Tensor, ...]  # every tensor begins with the task axis


class StreamLearner(MemoryLearner):
    """Reads a stream of images, the label of each coming one step after the image, and names every image it is shown.

    At step `t` it sees `(image[t], label[t - 1])` and answers `label[t]`. It can be right only by binding an image to
    the label that came after it, and finding it again when the class comes back. What it knows lies in a state that
    begins anew with every stream. `meta_loss` is the mean loss over the support set as a stream; `answer`
    asks each query image of the state that the stream has left, with the label of the last support image.

    Args:
        network: the embedding.
        n_way: classes in a task.
        labels: how a label is written: `"one-hot"`, or `"letters"`, a random string of five letters out of five for
            each class of each task, which takes any number of classes.
        finetune_steps: see `EmbeddingLearner`.
        finetune_lr: see `EmbeddingLearner`.

    Raises:
        ValueError: if an argument is out of range, or an episode has other ways.

    Example:
        >>> from metatutor import ConvNet
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> episode = Episode(images, labels, images, labels, n_way=5)
        >>> PlainLSTM(ConvNet(filters=8)).stream_answers(episode).shape
        torch.Size([2, 5])

    Reference:
        Santoro et al. (2016), section 2.2 and figure 1; strings of letters: section 4.1.2.
    """

    def __init__(
        self,
        network: Embedding,
        *,
        n_way: int = 5,
        labels: LabelCode = "one-hot",
        finetune_steps: int = 0,
        finetune_lr: float = 0.01,
    ) -> None:
        super().__init__(network, n_way=n_way, finetune_steps=finetune_steps, finetune_lr=finetune_lr)
        self.labels: LabelCode = labels
        self.code_size = n_way if labels == "one-hot" else N_LETTERS * N_LETTERS
        self.input_size = network.embedding_size + self.code_size

    @abstractmethod
    def prepare(self, seen: Float[Tensor, "task time input"]) -> Float[Tensor, "task time prepared"]:
        """What can be computed of all inputs before the first step."""

    @abstractmethod
    def start(self, n_tasks: int) -> State:
        """The state before the first image."""

    @abstractmethod
    def step(self, state: State, prepared: Float[Tensor, "task prepared"]) -> tuple[State, Float[Tensor, "task code"]]:
        """The state after one more image, and what is answered to it."""

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The mean loss of the answers to the support set as a stream; the query images take no part."""
        logits, labels = self.stream_logits(episode), episode.support_labels
        if self.labels == "letters":  # the letters of the string are answered independently
            return -logits.gather(-1, labels[..., None]).mean()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def finetune_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The mean cross-entropy of the query images."""
        return super().meta_loss(episode)

    def answer(self, episode: Episode) -> Logits:
        """Ask each query image of the state that the support set has left."""
        codes = self.codes(episode)
        support, query = self.embed(episode)
        state, _ = self.read(support, codes.of(episode.support_labels))
        n_tasks, n_query = query.shape[:2]
        last = codes.of(episode.support_labels[:, -1:]).expand(-1, n_query, -1)
        prepared = self.prepare(torch.cat([query, last], dim=-1)).flatten(0, 1)
        _, answers = self.step(tuple(of_task.repeat_interleave(n_query, 0) for of_task in state), prepared)
        return codes.logits(answers.unflatten(0, (n_tasks, n_query)))

    def stream_logits(self, episode: Episode) -> Float[Tensor, "task time way"]:
        """The logits of every support image, answered before its label is told."""
        codes = self.codes(episode)
        _, answers = self.read(self.embed_stream(episode.support_images), codes.of(episode.support_labels))
        return codes.logits(answers)

    def stream_answers(self, episode: Episode) -> Int[Tensor, "task time"]:
        """The label answered to every support image; -1: a string that none of the classes has."""
        codes = self.codes(episode)
        _, answers = self.read(self.embed_stream(episode.support_images), codes.of(episode.support_labels))
        return codes.named(answers)

    def embed_stream(self, images: Tensor) -> Float[Tensor, "task time embedding"]:
        """Embeddings of a stream's images; each task's are normalised by themselves."""
        return each_task(self.network.embed, images)

    def read(
        self, embeddings: Float[Tensor, "task time embedding"], codes: Float[Tensor, "task time code"]
    ) -> tuple[State, Float[Tensor, "task time code"]]:
        """The state that a stream leaves, and the answers on the way."""
        state, answers = self.start(len(embeddings)), []
        for prepared in self.prepare(torch.cat([embeddings, told_late(codes)], dim=-1)).unbind(1):
            state, answer = self.step(state, prepared)
            answers.append(answer)
        return state, torch.stack(answers, dim=1)

    def codes(self, episode: Episode) -> Codes:
        """How the labels of these tasks are written.

        Raises:
            ValueError: if the episode has other ways than this learner.
        """
        self.check_ways(episode)
        if self.labels == "letters":
            return Codes(strings(episode.support_labels, self.n_way), self.dtype)
        return Codes(None, self.dtype, self.n_way)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.parameters()).dtype


class Codes:
    """How labels are written for a batch of tasks: one-hot, or as the letters of each class's string.

    Args:
        strings: the letters of every class of every task, or None: one-hot.
        dtype: of the codes.
        n_way: classes in a task, for one-hot.

    Example:
        >>> Codes(None, torch.float32, 3).of(torch.tensor([[2, 0]])).tolist()
        [[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]
        >>> Codes(torch.tensor([[[0, 0, 0, 0, 4], [0, 0, 0, 0, 3]]]), torch.float32).of(torch.tensor([[1]])).shape
        torch.Size([1, 1, 25])

    Reference:
        Santoro et al. (2016), section 4.1.2.
    """

    def __init__(self, strings: Int[Tensor, "task way letter"] | None, dtype: torch.dtype, n_way: int = 0) -> None:
        self.strings, self.dtype, self.n_way = strings, dtype, n_way

    def of(self, labels: Labels) -> Float[Tensor, "task support code"]:
        """The codes of labels."""
        if self.strings is None:
            return F.one_hot(labels, self.n_way).to(self.dtype)
        spelled = self.strings.gather(1, labels[..., None].expand(-1, -1, N_LETTERS))  # [task, support, letter]
        return F.one_hot(spelled, N_LETTERS).to(self.dtype).flatten(2)

    def logits(self, answers: Float[Tensor, "task time code"]) -> Float[Tensor, "task time way"]:
        """The logit of every class: for strings, the log-probability that the answer spells its string."""
        if self.strings is None:
            return answers
        letters = answers.unflatten(2, (N_LETTERS, N_LETTERS)).log_softmax(-1).flatten(2)  # [task, time, letter]
        return letters @ F.one_hot(self.strings, N_LETTERS).to(self.dtype).flatten(2).mT

    def named(self, answers: Float[Tensor, "task time code"]) -> Int[Tensor, "task time"]:
        """The label that an answer names; -1 if it spells a string that no class has."""
        if self.strings is None:
            return answers.argmax(-1)
        spelled = answers.unflatten(2, (N_LETTERS, N_LETTERS)).argmax(-1)  # [task, time, letter]
        same = (spelled[:, :, None] == self.strings[:, None]).all(-1)  # [task, time, way]
        return torch.where(same.any(-1), same.int().argmax(-1), -1)


def told_late(codes: Float[Tensor, "task time code"]) -> Float[Tensor, "task time code"]:
    """What is told at every step of a stream: the label of the image before; nothing at the first.

    Args:
        codes: of the label of every image.

    Example:
        >>> told_late(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])).tolist()
        [[[0.0, 0.0], [1.0, 0.0]]]

    Reference:
        Santoro et al. (2016), section 2.2.
    """
    return F.pad(codes, (0, 0, 1, 0))[:, :-1]


def strings(labels: Labels, n_way: int) -> Int[Tensor, "task way letter"]:
    """A string of five letters for each class of each task: distinct within a task, and random.

    They are drawn from a generator that the order of the task's labels seeds, so that a task is always written alike.

    Args:
        labels: of each task's support set, in order.
        n_way: classes in a task.

    Returns:
        Letters, from 0 to 4.

    Raises:
        ValueError: if there are more classes than strings.

    Example:
        >>> strings(torch.tensor([[0, 1], [1, 0]]), n_way=2).shape
        torch.Size([2, 2, 5])

    Reference:
        Santoro et al. (2016), section 4.1.2.
    """
    n_strings = N_LETTERS**N_LETTERS
    if n_way > n_strings:
        raise ValueError(f"n_way = {n_way} exceeds the {n_strings} strings of five letters; lower n_way")
    drawn = []
    for of_task in labels.tolist():
        seed = 0
        for label in of_task:
            seed = (seed * n_way + label) % (2**61 - 1)
        drawn.append(torch.randperm(n_strings, generator=torch.Generator().manual_seed(seed))[:n_way])
    places = N_LETTERS ** torch.arange(N_LETTERS)
    return (torch.stack(drawn)[..., None] // places % N_LETTERS).to(labels.device)


# --- the controls -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ControlConfig:
    method: str = ""
    n_way: int = 5
    hidden_size: int = 200
    labels: LabelCode = "one-hot"
    finetune_steps: int = 0
    finetune_lr: float = 0.01

    def __post_init__(self) -> None:
        check_memory(self.n_way, self.finetune_steps, self.finetune_lr, hidden_size=self.hidden_size)
        check_label_code(self.labels)


@dataclass(frozen=True)
class PlainLSTMConfig(_ControlConfig):
    """The arguments of `PlainLSTM`, for a recorded run.

    Args:
        method: the tag of this learner in `config.json`.
        n_way: see `PlainLSTM`, as are the others.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> from metatutor import ConvNet
        >>> PlainLSTMConfig(n_way=3).build(ConvNet(filters=8)).n_way
        3

    Reference:
        Santoro et al. (2016), section 4.1.
    """

    method: Literal["plain_lstm"] = "plain_lstm"

    def build(self, network: Embedding) -> PlainLSTM:
        """The learner with these arguments."""
        return PlainLSTM(network, **without_method(self))


class PlainLSTM(StreamLearner):
    """The control with a short memory: an LSTM that has nothing but its own state.

    Args:
        network: the embedding.
        n_way: classes in a task.
        hidden_size: of the LSTM.
        labels: see `StreamLearner`.
        finetune_steps: see `EmbeddingLearner`.
        finetune_lr: see `EmbeddingLearner`.

    Raises:
        ValueError: if an argument is out of range, or an episode has other ways.

    Example:
        >>> from metatutor import ConvNet, Episode
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> PlainLSTM(ConvNet(filters=8))(Episode(images, labels, images, labels, n_way=5)).shape
        torch.Size([2, 5, 5])

    Reference:
        Santoro et al. (2016), section 4.1; Hochreiter, Younger & Conwell (2001).
    """

    def __init__(
        self,
        network: Embedding,
        *,
        n_way: int = PlainLSTMConfig.n_way,
        hidden_size: int = PlainLSTMConfig.hidden_size,
        labels: LabelCode = PlainLSTMConfig.labels,
        finetune_steps: int = PlainLSTMConfig.finetune_steps,
        finetune_lr: float = PlainLSTMConfig.finetune_lr,
    ) -> None:
        config = PlainLSTMConfig("plain_lstm", n_way, hidden_size, labels, finetune_steps, finetune_lr)
        super().__init__(network, n_way=n_way, labels=labels, finetune_steps=finetune_steps, finetune_lr=finetune_lr)
        self.config = config
        self.enter = nn.Linear(self.input_size, 4 * hidden_size)
        self.recur = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, self.code_size)
        remember(self.enter, hidden_size)

    def prepare(self, seen: Float[Tensor, "task time input"]) -> Float[Tensor, "task time gates"]:
        """What the images and labels add to the gates."""
        return self.enter(seen)

    def start(self, n_tasks: int) -> State:
        """Zeros: output and cell."""
        zeros = self.out.weight.new_zeros(n_tasks, self.config.hidden_size)
        return zeros, zeros

    def step(self, state: State, prepared: Float[Tensor, "task gates"]) -> tuple[State, Float[Tensor, "task code"]]:
        """One step of the LSTM."""
        h, c = lstm(prepared + self.recur(state[0]), state[1])
        return (h, c), self.out(h)


@dataclass(frozen=True)
class FeedForwardConfig(_ControlConfig):
    """The arguments of `FeedForward`, for a recorded run.

    Args:
        method: the tag of this learner in `config.json`.
        n_way: see `FeedForward`, as are the others.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> from metatutor import ConvNet
        >>> FeedForwardConfig(n_way=3).build(ConvNet(filters=8)).n_way
        3

    Reference:
        Santoro et al. (2016), section 4.1.
    """

    method: Literal["feed_forward"] = "feed_forward"

    def build(self, network: Embedding) -> FeedForward:
        """The learner with these arguments."""
        return FeedForward(network, **without_method(self))


class FeedForward(StreamLearner):
    """The control without any memory: two layers that see an image and the label of the one before.

    Since classes are numbered at random in every stream, there is nothing it could learn but to name another class
    than the one just told.

    Args:
        network: the embedding.
        n_way: classes in a task.
        hidden_size: of the hidden layer.
        labels: see `StreamLearner`.
        finetune_steps: see `EmbeddingLearner`.
        finetune_lr: see `EmbeddingLearner`.

    Raises:
        ValueError: if an argument is out of range, or an episode has other ways.

    Example:
        >>> from metatutor import ConvNet, Episode
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> FeedForward(ConvNet(filters=8))(Episode(images, labels, images, labels, n_way=5)).shape
        torch.Size([2, 5, 5])

    Reference:
        Santoro et al. (2016), section 4.1.
    """

    def __init__(
        self,
        network: Embedding,
        *,
        n_way: int = FeedForwardConfig.n_way,
        hidden_size: int = FeedForwardConfig.hidden_size,
        labels: LabelCode = FeedForwardConfig.labels,
        finetune_steps: int = FeedForwardConfig.finetune_steps,
        finetune_lr: float = FeedForwardConfig.finetune_lr,
    ) -> None:
        config = FeedForwardConfig("feed_forward", n_way, hidden_size, labels, finetune_steps, finetune_lr)
        super().__init__(network, n_way=n_way, labels=labels, finetune_steps=finetune_steps, finetune_lr=finetune_lr)
        self.config = config
        self.hidden = nn.Linear(self.input_size, hidden_size)
        self.out = nn.Linear(hidden_size, self.code_size)

    def prepare(self, seen: Float[Tensor, "task time input"]) -> Float[Tensor, "task time code"]:
        """The answers themselves: nothing depends on what came before."""
        return self.out(F.relu(self.hidden(seen)))

    def start(self, n_tasks: int) -> State:
        """No state."""
        return ()

    def step(self, state: State, prepared: Float[Tensor, "task code"]) -> tuple[State, Float[Tensor, "task code"]]:
        """The answer that `prepare` has given."""
        return (), prepared


# --- what controls and memory share -----------------------------------------------------------------------------


def lstm(
    gates: Float[Tensor, "task gates"], cell: Float[Tensor, "task hidden"]
) -> tuple[Float[Tensor, "task hidden"], Float[Tensor, "task hidden"]]:
    """Output and cell of an LSTM after one step; `gates` are what enters the input, forget, cell and output gates."""
    enter, forget, candidate, out = gates.chunk(4, dim=-1)
    cell = forget.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
    return out.sigmoid() * cell.tanh(), cell


def remember(enter: nn.Linear, hidden_size: int) -> None:
    """Open the forget gates of an LSTM at first, so that gradients reach far back."""
    with torch.no_grad():
        enter.bias[hidden_size : 2 * hidden_size] += 1.0


def check_label_code(labels: str) -> None:
    """Raise a `ValueError` if labels are to be written in an unknown way."""
    if labels not in ("one-hot", "letters"):
        raise ValueError(f"labels must be 'one-hot' or 'letters', got {labels!r}")
