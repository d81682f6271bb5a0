"""A character that the reader draws once, drawn again in the page by a model of few-shot generation."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from metatutor.applications.generation import ConditionalVAE
from metatutor.book.figures.alphabet import eight_bits
from metatutor.book.figures.shown import Shown, identity, live, widget

SOURCE = "../_static/redraw.js"  # from a chapter's page


def drawn_again(model: ConditionalVAE) -> Shown:
    """A pad to draw a character on, and twelve new drawings of it, computed in the page.

    The weights, in 8 bits (see `eight_bits`), come with the figure where somebody uses this kernel; in the built book
    they are a separate file, which is loaded when the reader draws something (see `script`).

    Args:
        model: the model that draws.
    """
    layers, weights = layers_of(model), packed(model)
    size = f"{len(weights) / 1e6:.1f}"
    inline, source = (weights, "") if live() else ("", SOURCE)
    shapes = json.dumps([(name, shape_of(weight)) for name, (weight, _) in layers.items()], separators=(",", ":"))
    gaps = {
        "shapes": shapes,
        "latent": model.latent,
        "places": model.places.tolist(),
        "weights": inline,
        "source": source,
        "size": size,
    }
    return widget("redraw", id=identity("redraw", weights), **gaps)


def script(model: ConditionalVAE) -> str:
    """The file that the built book loads the weights from, `SOURCE`."""
    return f'globalThis.metatutorRedraw = "{packed(model)}";\n'


def layers_of(model: ConditionalVAE) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights and biases of what is needed to draw: everything except what recognises."""
    named = dict(model.named_parameters())
    names = [n.removesuffix(".weight") for n in named if n.endswith(".weight") and not n.startswith("posterior.")]
    return {name: (named[f"{name}.weight"].detach(), named[f"{name}.bias"].detach()) for name in names}


def shape_of(weight: Tensor) -> tuple[int, int, int]:
    """Outputs, inputs, and the side of a filter; of a linear map, 1."""
    return weight.shape[0], weight.shape[1], weight.shape[2] if weight.ndim == 4 else 1


def packed(model: ConditionalVAE) -> str:
    """What the page reads, in base64: for every layer, steps of its outputs and biases, in float32; then levels."""
    layers = layers_of(model).values()
    levels, steps = zip(*(eight_bits(weight) for weight, _ in layers), strict=True)
    floats = torch.cat([*steps, *(bias for _, bias in layers)]).numpy().astype(np.dtype("<f4"))
    whole = torch.cat([of_layer.flatten() for of_layer in levels]).numpy()
    return base64.b64encode(floats.tobytes() + whole.tobytes()).decode()


def as_in_the_page(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters with every weight rounded to 8 bits and back: the model that the page computes."""
    found = dict(parameters)
    for name, weight in parameters.items():
        if name.endswith(".weight"):
            levels, step = eight_bits(weight)
            found[name] = levels * step.view(-1, *[1] * (weight.ndim - 1))
    return found
