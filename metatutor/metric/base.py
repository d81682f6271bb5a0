"""What the metric-based methods share: which support images are of which class."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

SupportLabels = Int[Tensor, "task support"]


def of_other_classes(labels: SupportLabels, n_way: int) -> Tensor:
    """Where a support image is not of a class: `[task, 1, way, support]`."""
    return (labels[:, None] != torch.arange(n_way, device=labels.device)[:, None])[:, None]
