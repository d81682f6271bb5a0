"""An alphabet that the reader draws: a recorded network, small enough for a page, embeds it in the browser."""

from __future__ import annotations

import base64
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from metatutor.backbones import ConvNet
from metatutor.book.figures.shown import Shown, identity, widget

_LEVELS = 127  # of an 8-bit weight, on either side of zero


def drawn_alphabet(network: ConvNet) -> Shown:
    """A pad to draw on, and what an embedding network makes of the drawings, computed in the page.

    Args:
        network: four max-pooling blocks of 64 filters with group normalisation for images of 28 × 28 pixels and nothing
            after them, meta-trained. The page gets its filters in 8 bits (see `eight_bits`).

    Returns:
        HTML that needs neither kernel nor network connection.

    Raises:
        ValueError: if the page cannot compute such a network.
    """
    weights = base64.b64encode(packed(network)).decode()
    return widget("alphabet", id=identity("alphabet", weights), weights=weights)


def eight_bits(filters: Float[Tensor, "*weight"]) -> tuple[Tensor, Float[Tensor, " out"]]:
    """Whole numbers from -127 to 127 and a step for each filter, whose product is close to the filter.

    Example:
        >>> levels, step = eight_bits(torch.tensor([0.5, -0.25, 0.1]).repeat(3, 1).view(1, 1, 3, 3))
        >>> levels[0, 0, 0].tolist(), round(step.item(), 5)
        ([127, -64, 25], 0.00394)
    """
    step = filters.flatten(1).abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / _LEVELS
    return (filters / step.view(-1, *[1] * (filters.ndim - 1))).round().to(torch.int8), step


def as_in_the_page(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters with each filter rounded to 8 bits and back: the network that the page computes."""
    found = dict(parameters)
    for name, filters in parameters.items():
        if filters.ndim == 4:
            levels, step = eight_bits(filters)
            found[name] = levels * step[:, None, None, None]
    return found


def packed(network: ConvNet) -> bytes:
    """What the page reads: for every block, steps, scales and shifts in float32; then the levels of every block."""
    wanted = {"filters": 64, "n_blocks": 4, "n_halving": None, "pooling": "max", "normalization": "group"}
    wanted |= {"hidden": (), "n_outputs": None, "in_channels": 1, "image_size": 28}
    have = {name: network.arguments[name] for name in wanted}
    have["hidden"] = tuple(have["hidden"])
    if wrong := [f"{name}={have[name]!r}" for name, value in wanted.items() if have[name] != value]:
        raise ValueError(f"the page cannot compute a ConvNet with {', '.join(wrong)}; its own has {wanted}")
    numbers, levels = [], []
    for name, parameter in network.named_parameters():
        if parameter.ndim == 4:
            of_block, step = eight_bits(parameter.detach())
            levels.append(of_block)
            numbers.append(step)
        else:
            assert name.endswith((".scale", ".shift")), name
            numbers.append(parameter.detach())
    floats = torch.cat(numbers).numpy().astype(np.dtype("<f4"))
    return floats.tobytes() + torch.cat([of_block.flatten() for of_block in levels]).numpy().tobytes()
