"""Streams: every image is classified first, and its label is revealed one step later."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from metatutor.checks import check_choice
from metatutor.embedding import Logits
from metatutor.episodes import Episode
from metatutor.functional import Labels
from metatutor.memory.base import MemoryLearner

LabelCode = Literal["one-hot", "letters"]
N_LETTERS = 5  # letters in a string, and letters of the alphabet
State = tuple[Tensor, ...]  # every tensor begins with the task axis
Coded = Float[Tensor, "task time code"]  # labels, or answers
Hidden = Float[Tensor, "task hidden"]


class StreamLearner(MemoryLearner):
    """Reads a stream of images, each followed by its label one step later, and classifies every image as it comes.

    At step `t` it sees `(image[t], label[t - 1])` and answers `label[t]`. It can be right only by binding an image to
    the label that came after it, and finding it again when the class comes back. What it knows is kept in a state that
    is reset for every stream. `meta_loss` is the mean loss over the support set as a stream; `answer` classifies each
    query image from the state that the stream has left, given the label of the last support image.

    Labels are encoded as `"one-hot"`, or as `"letters"`, a random string of five letters out of five for each class of
    a task, which allows any number of classes. The network embeds images one by one, as `Pixels` does.

    Reference:
        Santoro et al. (2016), section 2.2 and figure 1; strings of letters: section 4.1.2.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        n_way: int = 5,
        labels: LabelCode = "one-hot",
        finetune_steps: int = 0,
        finetune_lr: float = 0.01,
    ) -> None:
        super().__init__(network, n_way=n_way, finetune_steps=finetune_steps, finetune_lr=finetune_lr)
        check_choice("labels", labels, ["one-hot", "letters"])
        if self.network.normalization not in ("group", "none"):
            raise ValueError(
                f"a stream is answered image by image, but with normalization = {self.network.normalization!r} a later "
                "image changes earlier answers; take ConvNet(normalization='group'), nn.GroupNorm, or Pixels"
            )
        self.labels: LabelCode = labels
        self.code_size = n_way if labels == "one-hot" else N_LETTERS * N_LETTERS
        self.input_size = self.embedding_size + self.code_size

    reads_streams = True

    @abstractmethod
    def prepare(self, seen: Float[Tensor, "task time input"]) -> Float[Tensor, "task time prepared"]:
        """What can be computed from all inputs before the first step."""

    @abstractmethod
    def start(self, n_tasks: int) -> State:
        """The state before the first image."""

    @abstractmethod
    def step(self, state: State, prepared: Float[Tensor, "task prepared"]) -> tuple[State, Float[Tensor, "task code"]]:
        """The state after one more image, and the answer to it."""

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The mean loss of the answers to the support set as a stream; the query images are not used."""
        logits, labels = self.stream_logits(episode), episode.support_labels
        if self.labels == "letters":  # the letters of the string are answered independently
            return -logits.gather(-1, labels[..., None]).mean()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def finetune_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The mean cross-entropy of the query images."""
        return super().meta_loss(episode)

    def answer(self, episode: Episode) -> Logits:
        """Classify each query image from the state that the support set has left."""
        codes = self.codes(episode)
        support, query = self.embed(episode)
        state, _ = self.read(support, codes.of(episode.support_labels))
        n_tasks, n_query = query.shape[:2]
        last = codes.of(episode.support_labels[:, -1:]).expand(-1, n_query, -1)
        prepared = self.prepare(torch.cat([query, last], dim=-1)).flatten(0, 1)
        _, answers = self.step(tuple(of_task.repeat_interleave(n_query, 0) for of_task in state), prepared)
        return codes.logits(answers.unflatten(0, (n_tasks, n_query)))

    def stream_logits(self, episode: Episode) -> Float[Tensor, "task time way"]:
        """The logits of every support image, answered before its label is revealed."""
        codes = self.codes(episode)
        _, answers = self.read(self.embed_stream(episode.support_images), codes.of(episode.support_labels))
        return codes.logits(answers)

    def stream_answers(self, episode: Episode) -> Int[Tensor, "task time"]:
        """The label answered for every support image; -1: a string that none of the classes has."""
        codes = self.codes(episode)
        _, answers = self.read(self.embed_stream(episode.support_images), codes.of(episode.support_labels))
        return codes.named(answers)

    def measure(self, episode: Episode, *, stream: bool = False) -> Float[Tensor, "task ..."]:
        """Each task's accuracy; for streams, on the first, second, … image of its classes, `[task, instance]`."""
        if not stream:
            return super().measure(episode)
        correct = self.stream_answers(episode) == episode.support_labels  # [task, time]
        k_shot = episode.support_labels.shape[1] // episode.n_way
        which = F.one_hot(instances(episode.support_labels, episode.n_way), k_shot)  # [task, time, instance]
        return (correct[..., None] * which).cpu().double().sum(1) / episode.n_way

    def embed_stream(self, images: Tensor) -> Float[Tensor, "task time embedding"]:
        """Embeddings of a stream's images."""
        return self.of_tasks(self.network.embed, images)

    def read(self, embeddings: Float[Tensor, "task time embedding"], codes: Coded) -> tuple[State, Coded]:
        """The state that a stream leaves, and the answers on the way."""
        state, answers = self.start(len(embeddings)), []
        for prepared in self.prepare(torch.cat([embeddings, shift_labels(codes)], dim=-1)).unbind(1):
            state, answer = self.step(state, prepared)
            answers.append(answer)
        return state, torch.stack(answers, dim=1)

    def codes(self, episode: Episode) -> Codes:
        """How the labels of these tasks are encoded."""
        self.check_ways(episode)
        if self.labels == "letters":
            return Codes(strings(episode.support_labels, self.n_way), self.dtype)
        return Codes(None, self.dtype, self.n_way)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype


class Codes:
    """How labels are encoded for a batch of tasks: one-hot, or as the letters of each class's string.

    With strings, a code is one one-hot letter after the other, and `n_way` is not needed: Santoro et al. (2016),
    section 4.1.2.
    """

    def __init__(self, strings: Int[Tensor, "task way letter"] | None, dtype: torch.dtype, n_way: int = 0) -> None:
        self.strings, self.dtype, self.n_way = strings, dtype, n_way

    def of(self, labels: Labels) -> Float[Tensor, "task support code"]:
        """The codes of labels."""
        if self.strings is None:
            return F.one_hot(labels, self.n_way).to(self.dtype)
        spelled = self.strings.gather(1, labels[..., None].expand(-1, -1, N_LETTERS))  # [task, support, letter]
        return F.one_hot(spelled, N_LETTERS).to(self.dtype).flatten(2)

    def logits(self, answers: Coded) -> Float[Tensor, "task time way"]:
        """The logit of every class: for strings, the log-probability that the answer spells its string."""
        if self.strings is None:
            return answers
        letters = answers.unflatten(2, (N_LETTERS, N_LETTERS)).log_softmax(-1).flatten(2)  # [task, time, letter]
        return letters @ F.one_hot(self.strings, N_LETTERS).to(self.dtype).flatten(2).mT

    def named(self, answers: Coded) -> Int[Tensor, "task time"]:
        """The label that an answer names; -1 if it spells a string that no class has."""
        if self.strings is None:
            return answers.argmax(-1)
        spelled = answers.unflatten(2, (N_LETTERS, N_LETTERS)).argmax(-1)  # [task, time, letter]
        same = (spelled[:, :, None] == self.strings[:, None]).all(-1)  # [task, time, way]
        return torch.where(same.any(-1), same.int().argmax(-1), -1)


def strings(labels: Labels, n_way: int) -> Int[Tensor, "task way letter"]:
    """A string of five letters, from 0 to 4, for each class of each task: distinct within a task, and random.

    They are drawn from a generator seeded by the order of the task's labels, so that a task is always encoded the same.
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


def shift_labels(codes: Coded) -> Coded:
    """What is revealed at every step of a stream: the label of the image before; nothing at the first.

    Example:
        >>> shift_labels(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])).tolist()
        [[[0.0, 0.0], [1.0, 0.0]]]
    """
    return F.pad(codes, (0, 0, 1, 0))[:, :-1]


def instances(labels: Int[Tensor, "task time"], n_way: int) -> Int[Tensor, "task time"]:
    """How many images of the same class came before each image of a stream.

    Example:
        >>> instances(torch.tensor([[1, 0, 1, 1, 0]]), n_way=2).tolist()
        [[0, 0, 1, 2, 1]]
    """
    members = F.one_hot(labels, n_way)
    return (members.cumsum(1) * members).sum(-1) - 1


def lstm(gates: Float[Tensor, "task gates"], cell: Hidden) -> tuple[Hidden, Hidden]:
    """Output and cell of an LSTM after one step; `gates` are what enters the input, forget, cell and output gates."""
    enter, forget, candidate, out = gates.chunk(4, dim=-1)
    cell = forget.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
    return out.sigmoid() * cell.tanh(), cell


def remember(enter: nn.Linear, hidden_size: int) -> None:
    """Start with the forget gates of an LSTM open, so that gradients reach far back."""
    with torch.no_grad():
        enter.bias[hidden_size : 2 * hidden_size] += 1.0
