"""Streams and their learners, small and in float64; linear layers, LSTMs and inputs by hand, one number at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from metatutor.backbones import Pixels
from metatutor.episodes import Episode
from metatutor.memory import MANN, FeedForward, PlainLSTM
from metatutor.memory.stream import StreamLearner

small_mann = partial(MANN, hidden_size=5, slots=7, width=3, heads=2)
METHODS: dict[str, Callable[..., StreamLearner]] = {
    "mann": small_mann,
    "mann, as in the paper": partial(small_mann, sharpen=False),
    "mann, letters": partial(small_mann, labels="letters"),
    "plain lstm": partial(PlainLSTM, hidden_size=5),
    "plain lstm, letters": partial(PlainLSTM, hidden_size=5, labels="letters"),
    "feed-forward": partial(FeedForward, hidden_size=5),
    "feed-forward, letters": partial(FeedForward, hidden_size=5, labels="letters"),
}


def vivid(method: nn.Module, seed: int = 0) -> None:
    """Make every parameter random and large, so that nothing that is computed fails to matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in method.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)


def learner(name: str, *, n_way: int = 3, **more) -> StreamLearner:
    method = METHODS[name](Pixels(2), n_way=n_way, **more).double().eval()
    vivid(method)
    return method


def mann(**more) -> MANN:
    method = small_mann(Pixels(2), n_way=3, **more).double().eval()
    vivid(method)
    return method


def stream(n_tasks: int = 2, n_way: int = 3, k_shot: int = 2, n_query: int = 2, seed: int = 0) -> Episode:
    """Random float64 pixels, the support images in random order; two images of a class have nothing in common."""
    generator = torch.Generator().manual_seed(seed)
    labels = [torch.arange(n_way).repeat_interleave(n).repeat(n_tasks, 1) for n in (k_shot, n_query)]
    images = [torch.rand(*of.shape, 1, 8, 8, generator=generator, dtype=torch.float64) for of in labels]
    orders = [torch.randperm(n_way * k_shot, generator=generator) for _ in range(n_tasks)]
    support_labels = torch.stack([of_task[order] for of_task, order in zip(labels[0], orders, strict=True)])
    return Episode(images[0], support_labels, images[1], labels[1], n_way)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


Vector = list[float]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def dot(a: Vector, b: Vector) -> float:
    return sum((x * y for x, y in zip(a, b, strict=True)), 0.0)


def linear(layer: nn.Linear, x: Vector) -> Vector:
    bias = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    return [dot(row, x) + b for row, b in zip(layer.weight.tolist(), bias, strict=True)]


def lstm_by_hand(gates: Vector, cell: Vector) -> tuple[Vector, Vector]:
    """Output and cell; the gates are those of input, forgetting, the new and output, one block after the other."""
    n = len(cell)
    kept = [sigmoid(gates[n + j]) * cell[j] + sigmoid(gates[j]) * math.tanh(gates[2 * n + j]) for j in range(n)]
    return [sigmoid(gates[3 * n + j]) * math.tanh(kept[j]) for j in range(n)], kept


def inputs_by_hand(method: StreamLearner, task: Episode) -> list[Vector]:
    """What a learner of one-hot labels sees of one task at each step: an image, and the label of the one before."""
    told, inputs = [0.0] * task.n_way, []
    for image, label in zip(task.support_images[0], task.support_labels[0].tolist(), strict=True):
        inputs.append(method.network.embed(image[None])[0].tolist() + told)
        told = [1.0 if way == label else 0.0 for way in range(task.n_way)]
    return inputs
