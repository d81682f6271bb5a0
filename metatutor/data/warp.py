"""Augmentation inside tasks: every image a little rotated, stretched, sheared and shifted."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from metatutor.episodes import Episode

_TURN, _STRETCH, _SHEAR, _SHIFT = math.radians(15), 0.15, 0.2, 0.1  # at most; the shift as a fraction of half the width


def warp(episode: Episode) -> Episode:
    """The same tasks with every image warped at random, by PyTorch's own random numbers: a `transform` for `train`.

    Each image is rotated by up to 15 degrees, stretched in either direction by up to 15%, sheared by up to 0.2 and
    shifted by up to a twentieth of its width, all uniformly and independently.

    Example:
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> warp(Episode(images, labels, images, labels)).query_images.shape
        torch.Size([2, 5, 1, 28, 28])

    Reference:
        Lake's alphabets were warped for training by Koch, Zemel & Salakhutdinov (2015), section 4.2.
    """
    return replace(episode, support_images=_warped(episode.support_images), query_images=_warped(episode.query_images))


def _warped(images: Float[Tensor, "task image c h w"]) -> Float[Tensor, "task image c h w"]:
    flat = images.flatten(0, 1)
    if not len(flat):  # mini-batches have no support set, and PyTorch has no grid for no images
        return images
    uniform = 2 * torch.rand(6, len(flat)) - 1
    angle, x, y = _TURN * uniform[0], 1 + _STRETCH * uniform[1], 1 + _STRETCH * uniform[2]
    across = torch.stack([x * angle.cos(), -y * angle.sin() + _SHEAR * uniform[3], _SHIFT * uniform[4]], dim=1)
    down = torch.stack([x * angle.sin(), y * angle.cos(), _SHIFT * uniform[5]], dim=1)
    places = F.affine_grid(torch.stack([across, down], dim=1).to(images), list(flat.shape), align_corners=False)
    return F.grid_sample(flat, places, align_corners=False).view_as(images)
