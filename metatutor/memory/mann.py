"""The memory-augmented neural network: a controller writes what it sees into a memory, and looks it up by content."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metatutor.checks import check_sizes
from metatutor.episodes import Episode
from metatutor.memory.stream import LabelCode, StreamLearner, lstm, remember, shift_labels

EPSILON = 1e-8
Matrix = Float[Tensor, "task slot width"]
Weights = Float[Tensor, "task head slot"]
Keys = Float[Tensor, "task head width"]


class Memory(NamedTuple):
    """What a MANN knows about its tasks: the controller's state, and the memory with its bookkeeping."""

    h: Float[Tensor, "task hidden"]
    cell: Float[Tensor, "task hidden"]
    matrix: Matrix
    usage: Float[Tensor, "task slot"]
    read_weights: Weights
    write_weights: Weights
    read: Keys


class MANN(StreamLearner):
    """An LSTM controller with an external memory: it writes where usage is least, and reads what resembles the key.

    At every step each head has a key `k` and a gate `a` from the controller, and, with `M` the memory,

        read weights = softmax over slots of cosine(k, M[i])
        read = sum over slots of read weights[i] * M[i]
        write = sigmoid(a) * previous read weights + (1 - sigmoid(a)) * least used
        M'[i] = (M[i], or 0 where slot i is least used) + sum over heads of write[i] * k
        usage' = decay * usage + sum over heads of (read weights + write)

    `least used` marks one slot per head: the slots of least usage, in order. So new things replace what has not been
    needed for a long time, or are added to what was just read; the gate decides. The answer is a linear function of the
    controller's output and of what was read, which also enters the controller at the next step.

    Two choices are ours. The memory is read before it is written: the other way round, what most resembles a key would
    be that key itself, just written. And with `sharpen`, the cosines are multiplied by a strength that the controller
    sets for each head, about 11 at first, as in the Neural Turing Machine: cosines of 1 and 0 alone, over 128 slots,
    would give the best slot a weight of only 2%.

    Args:
        network: the embedding: `Pixels(20)` in the paper.
        n_way: classes in a task.
        hidden_size: hidden units of the controller.
        slots: rows of the memory.
        width: numbers in a row.
        heads: how many heads read and write.
        usage_decay: how much of the usage remains after a step.
        sharpen: whether the controller decides how sharply to read; False: as in the paper.
        labels: how a label is encoded: `"one-hot"`, or `"letters"` (see `StreamLearner`).
        finetune_steps: steps of gradient descent on each support set at test time (see `EmbeddingLearner`).
        finetune_lr: learning rate of fine-tuning.

    Raises:
        ValueError: if the network normalises over several images, or an episode has a different `n_way`.

    Example:
        >>> from metatutor import Pixels
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> MANN(Pixels(20))(Episode(images, labels, images, labels, n_way=5)).shape
        torch.Size([2, 5, 5])

    Reference:
        Santoro et al. (2016), equations 2 to 8; strength: Graves, Wayne & Danihelka (2014), equation 5.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        n_way: int = 5,
        hidden_size: int = 200,
        slots: int = 128,
        width: int = 40,
        heads: int = 4,
        usage_decay: float = 0.99,
        sharpen: bool = True,
        labels: LabelCode = "one-hot",
        finetune_steps: int = 0,
        finetune_lr: float = 0.01,
    ) -> None:
        check_sizes(hidden_size=hidden_size, slots=slots, width=width, heads=heads)
        if not 0 <= usage_decay <= 1:
            raise ValueError(f"usage_decay must be from 0 to 1, got {usage_decay}")
        if heads > slots:
            raise ValueError(f"heads = {heads} exceeds slots = {slots}: each head needs a slot to write to")
        super().__init__(network, n_way=n_way, labels=labels, finetune_steps=finetune_steps, finetune_lr=finetune_lr)
        self.hidden_size, self.slots, self.width, self.heads = hidden_size, slots, width, heads
        self.usage_decay, self.sharpen = usage_decay, sharpen
        self.enter = nn.Linear(self.input_size, 4 * hidden_size)
        self.recur = nn.Linear(hidden_size + heads * width, 4 * hidden_size, bias=False)
        self.control = nn.Linear(hidden_size, heads * (width + 1 + sharpen))  # keys, gates, strengths
        self.out = nn.Linear(hidden_size + heads * width, self.code_size)
        remember(self.enter, hidden_size)
        if sharpen:  # strengths of about 11 at first
            nn.init.constant_(self.control.bias.detach()[-heads:], 10.0)

    def prepare(self, seen: Float[Tensor, "task time input"]) -> Float[Tensor, "task time gates"]:
        """What the images and labels contribute to the controller's gates."""
        return self.enter(seen)

    def start(self, n_tasks: int) -> Memory:
        """An empty memory, nothing used; each head looks at a slot of its own."""
        new = self.out.weight.new_zeros
        h, matrix = new(n_tasks, self.hidden_size), new(n_tasks, self.slots, self.width)
        looks_at = torch.eye(self.heads, self.slots, dtype=h.dtype, device=h.device).expand(n_tasks, -1, -1)
        read = new(n_tasks, self.heads, self.width)
        return Memory(h, h, matrix, new(n_tasks, self.slots), looks_at, new(n_tasks, *looks_at.shape[1:]), read)

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state: Memory | tuple[Tensor, ...], prepared: Float[Tensor, "task gates"]
    ) -> tuple[Memory, Float[Tensor, "task code"]]:
        """One image: the controller, then read, then write."""
        before, heads, width = Memory(*state), self.heads, self.width
        recurrent = self.recur(torch.cat([before.h, before.read.flatten(1)], dim=1))
        h, cell = lstm(prepared + recurrent, before.cell)
        keys, gates, *strengths = self.control(h).split([heads * width, heads, *[heads] * self.sharpen], dim=1)
        keys = keys.tanh().unflatten(1, (heads, width))
        similarity = cosine(keys, before.matrix)
        if strengths:
            similarity = similarity * (1 + F.softplus(strengths[0]))[..., None]
        read_weights = similarity.softmax(-1)
        read = read_weights @ before.matrix
        unused = least_used(before.usage, heads)
        gate = gates.sigmoid()[..., None].to(unused)
        write_weights = torch.lerp(unused, before.read_weights.to(unused), gate)
        matrix = write(before.matrix, unused, write_weights, keys)
        usage = self.usage_decay * before.usage + (read_weights + write_weights).sum(1)
        answer = self.out(torch.cat([h, read.flatten(1)], dim=1))
        return Memory(h, cell, matrix, usage, read_weights, write_weights, read), answer

    @torch.no_grad()
    def trace(self, episode: Episode) -> list[Memory]:
        """The memory after every image of the support set as a stream, for inspection."""
        told = shift_labels(self.codes(episode).of(episode.support_labels))
        state, states = self.start(len(episode)), []
        for prepared in self.prepare(torch.cat([self.embed_stream(episode.support_images), told], dim=-1)).unbind(1):
            state, _ = self.step(state, prepared)
            states.append(state)
        return states


def least_used(usage: Float[Tensor, "task slot"], heads: int) -> Weights:
    """A slot for each head, marked by 1: the least used one, the next, …; among equals the first (equation 6).

    Example:
        >>> least_used(torch.tensor([[0.3, 0.1, 0.2]]), heads=2).tolist()
        [[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]
    """
    slots = usage.sort(stable=True).indices[:, :heads]
    return F.one_hot(slots, usage.shape[1]).to(usage.dtype)


def write(matrix: Matrix, unused: Weights, weights: Weights, keys: Keys) -> Matrix:
    """The memory with its least used slots erased and every head's key added by its weights (equation 8 and before).

    Example:
        >>> one = torch.tensor([[[0.0, 1.0]]])
        >>> write(torch.ones(1, 2, 3), one, one, torch.full((1, 1, 3), 0.5)).tolist()
        [[[1.0, 1.0, 1.0], [0.5, 0.5, 0.5]]]
    """
    return torch.baddbmm(matrix * (1 - unused.sum(1))[..., None], weights.mT, keys)


def cosine(keys: Keys, matrix: Matrix) -> Weights:
    """The cosine of every key with every row of the memory; 0 with an empty row (equation 2).

    Example:
        >>> cosine(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])).tolist()
        [[[1.0, 0.0]]]
    """
    lengths = keys.norm(dim=-1).clamp_min(EPSILON)[..., None] * matrix.norm(dim=-1).clamp_min(EPSILON)[:, None]
    return keys @ matrix.mT / lengths
