"""SNAIL: temporal convolutions gather what came before, causal attention picks out what is needed."""

from __future__ import annotations

from math import ceil, log2

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metatutor.checks import check_sizes
from metatutor.embedding import Logits
from metatutor.episodes import Episode
from metatutor.memory.base import MemoryLearner

Sequence = Float[Tensor, "task place channel"]
Longer = Float[Tensor, "task place longer"]  # items with what a block has appended to them


class SNAIL(MemoryLearner):
    """The support set is a sequence of labelled images; a query image is its last item, without a label.

    Nothing is written down and looked up: the sequence itself is the memory. Two kinds of blocks alternate. Dilated
    causal convolutions combine what is 1, 2, 4, … places apart, so that a few of them see the whole sequence. Attention
    compares an item with every item before it, however far back. Each block appends its outputs to its inputs:

        attention, convolutions, attention, convolutions, attention, and a linear layer for the logits.

    Every query image is at the same place, right after the support set, and none sees another: all are answered in one
    pass.

    Args:
        network: the embedding.
        n_way: classes in a task.
        max_shot: support images per class that the convolutions reach back to; attention reaches any number.
        embedding: the size that embeddings are reduced to.
        filters: filters of every convolution; 128 in the paper.
        attention: size of the keys and values of each attention block; (32, 128, 256) in the paper.
        finetune_steps: steps of gradient descent on each support set at test time (see `EmbeddingLearner`).
        finetune_lr: learning rate of fine-tuning.

    Raises:
        ValueError: if an episode has a different `n_way`.

    Example:
        >>> from metatutor import ConvNet
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> SNAIL(ConvNet(filters=8))(Episode(images, labels, images, labels, n_way=5)).shape
        torch.Size([2, 5, 5])

    Reference:
        Mishra et al. (2018), sections 3 and 5.1, figure 2; dilations 1, 2, 4, …: van den Oord et al. (2016).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        n_way: int = 5,
        max_shot: int = 1,
        embedding: int = 64,
        filters: int = 32,
        attention: tuple[int, ...] = (32, 64, 64),
        finetune_steps: int = 0,
        finetune_lr: float = 0.01,
    ) -> None:
        check_sizes(max_shot=max_shot, embedding=embedding, filters=filters)
        check_sizes(**{f"attention[{i}]": size for i, size in enumerate(attention)})
        if not attention:
            raise ValueError("attention must name the size of at least one block")
        super().__init__(network, n_way=n_way, finetune_steps=finetune_steps, finetune_lr=finetune_lr)
        self.reduce = nn.Linear(self.embedding_size, embedding)
        channels, length = embedding + n_way, n_way * max_shot + 1
        blocks: list[Attention | TemporalConvolutions] = []
        for size in attention:
            if blocks:
                blocks.append(TemporalConvolutions(channels, length, filters))
                channels = blocks[-1].out_channels
            blocks.append(Attention(channels, size, size))
            channels = blocks[-1].out_channels
        self.blocks = nn.ModuleList(blocks)
        self.out = nn.Linear(channels, n_way)

    def answer(self, episode: Episode) -> Logits:
        """The logits at the place after the support set, for every query image there."""
        items, n_support = self.items(episode)
        for block in self.blocks:
            items = block(items, n_support)
        return self.out(items[:, n_support:])

    def items(self, episode: Episode) -> tuple[Sequence, int]:
        """Support images with their labels, then query images without; and how many of them are support images."""
        self.check_ways(episode)
        support, query = self.embed(episode)
        labels = F.one_hot(episode.support_labels, self.n_way).to(support.dtype)
        labelled = torch.cat([self.reduce(support), labels], dim=-1)
        asked = F.pad(self.reduce(query), (0, self.n_way))
        return torch.cat([labelled, asked], dim=1), support.shape[1]

    @torch.no_grad()
    def attention(self, episode: Episode) -> list[Float[Tensor, "task query seen"]]:
        """How much each query image attends to every support image and, last, to itself: one tensor per block."""
        items, n_support = self.items(episode)
        found = []
        for block in self.blocks:
            if isinstance(block, Attention):
                weights = block.weights(items, n_support)[:, n_support:]  # [task, query, place]
                itself = weights[:, :, n_support:].diagonal(dim1=1, dim2=2)
                found.append(torch.cat([weights[:, :, :n_support], itself[..., None]], dim=-1))
            items = block(items, n_support)
        return found


class Attention(nn.Module):
    """Appends to each item what it reads from the items that it may see, by the similarity of keys (figure 2c).

    `read = softmax(query · keys / sqrt(size)) values`: Vaswani et al. (2017), equation 1. Keys and queries start as the
    same function, with weights four times as large as usual, so that from the start like attends to like, and to little
    else.
    """

    def __init__(self, channels: int, key_size: int, value_size: int) -> None:
        super().__init__()
        self.key, self.query = nn.Linear(channels, key_size), nn.Linear(channels, key_size)
        self.value = nn.Linear(channels, value_size)
        with torch.no_grad():
            self.key.weight.mul_(4)
            self.key.bias.zero_()
        self.query.load_state_dict(self.key.state_dict())
        self.out_channels = channels + value_size

    def weights(self, items: Sequence, n_support: int) -> Float[Tensor, "task place seen"]:
        """How much every item attends to every other; 0 where it may not look."""
        likeness = self.query(items) @ self.key(items).mT / self.key.out_features**0.5
        return likeness.masked_fill(~visible(items.shape[1], n_support, items.device), -torch.inf).softmax(-1)

    def forward(self, items: Sequence, n_support: int) -> Longer:
        """`[task, place, channel]` -> `[task, place, channel + value]`."""
        return torch.cat([items, self.weights(items, n_support) @ self.value(items)], dim=-1)


class TemporalConvolutions(nn.Module):
    """Gated causal convolutions with two taps, 1, 2, 4, … places apart, each seeing the outputs of all before it.

    `out = tanh(filter * items) sigmoid(gate * items)`, appended to the items (figures 2a and 2b); the last one sees
    `length` items.
    """

    def __init__(self, channels: int, length: int, filters: int) -> None:
        super().__init__()
        n_layers = max(1, ceil(log2(length)))
        inputs = [channels + n * filters for n in range(n_layers)]
        self.here = nn.ModuleList(nn.Linear(i, 2 * filters) for i in inputs)  # the tap at the item itself
        self.there = nn.ModuleList(nn.Linear(i, 2 * filters, bias=False) for i in inputs)  # the one before it
        self.out_channels = channels + n_layers * filters

    def forward(self, items: Sequence, n_support: int) -> Longer:
        """`[task, place, channel]` -> `[task, place, channel + layer * filter]`."""
        for layer, (here, there) in enumerate(zip(self.here, self.there, strict=True)):
            filtered, gates = (here(items) + earlier(there(items), 2**layer, n_support)).chunk(2, dim=-1)
            items = torch.cat([items, filtered.tanh() * gates.sigmoid()], dim=-1)
        return items


def visible(n_items: int, n_support: int, device: torch.device) -> Bool[Tensor, "place seen"]:
    """Which items each item may look at: itself and the support items before it; query items come after all of these.

    Example:
        >>> visible(4, 2, torch.device("cpu")).int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    """
    places = torch.arange(n_items, device=device)
    before = places < places.clamp_max(n_support)[:, None]
    return before | torch.eye(n_items, dtype=torch.bool, device=device)


def earlier(items: Sequence, distance: int, n_support: int) -> Sequence:
    """For each item, the one `distance` places before it; zeros before the sequence starts.

    All query items are at place `n_support`.

    Example:
        >>> earlier(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]), 1, n_support=2).flatten().tolist()
        [0.0, 1.0, 2.0, 2.0]
    """
    n_query = items.shape[1] - n_support
    support = F.pad(items[:, :n_support], (0, 0, distance, 0))  # place p is now at p + distance
    behind = support[:, n_support : n_support + 1].expand(-1, n_query, -1)
    return torch.cat([support[:, :n_support], behind], dim=1)
