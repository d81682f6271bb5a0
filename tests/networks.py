"""Networks that are not ours, each with something that a network may have: for images of 1×8×8."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

SIZE = 8


def sequential(n_outputs: int) -> nn.Module:
    """With dropout."""
    layers = nn.Linear(SIZE * SIZE, 12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, n_outputs)
    return nn.Sequential(nn.Flatten(), *layers)


def with_running_statistics(n_outputs: int) -> nn.Module:
    """As a ResNet has them, with an integer buffer too."""
    layers = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4 * (SIZE // 2) ** 2, n_outputs))


def frozen(n_outputs: int) -> nn.Module:
    """The first layer does not learn."""
    network = sequential(n_outputs)
    network.get_submodule("1").requires_grad_(False)
    return network


class Tied(nn.Module):
    """Two layers share a matrix; and a buffer says in which order pixels are read."""

    order: Tensor

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(SIZE * SIZE, SIZE * SIZE), nn.Linear(SIZE * SIZE, SIZE * SIZE)
        self.again.weight = self.first.weight
        self.last = nn.Linear(SIZE * SIZE, n_outputs)
        self.register_buffer("order", torch.arange(SIZE * SIZE).flip(0))

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.again(self.first(images.flatten(1)[:, self.order]).relu()).relu())


class Recurrent(nn.Module):
    """Reads an image row by row; `vmap` cannot do it."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.rows, self.last = nn.LSTM(SIZE, 6, batch_first=True), nn.Linear(6, n_outputs)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.rows(images[:, 0])[0][:, -1])


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "sequential": sequential,
    "running statistics": with_running_statistics,
    "frozen": frozen,
    "tied": Tied,
    "recurrent": Recurrent,
}
