"""Figures that a reader can play with in the static page: a script, without kernel or network."""

from __future__ import annotations

import json

from jaxtyping import Float, Int
from torch import Tensor

from metatutor.book.figures.metric import REACH
from metatutor.book.figures.shown import Shown, identity, widget
from metatutor.book.figures.style import COLOURS


def movable_plane(
    support: Float[Tensor, "n 2"], labels: Int[Tensor, " n"], query: Float[Tensor, " 2"], *, scale: float = 10.0
) -> Shown:
    """Support points and a query point to be moved, by pointer or arrow keys, and how three methods answer.

    Args:
        support: places from -3 to 3 in both directions.
        labels: their classes.
        query: the place of the query point.
        scale: factor of the cosines.
    """
    state = {
        "support": [[round(v, 4) for v in point] for point in support.tolist()],
        "labels": labels.tolist(),
        "query": [round(v, 4) for v in query.tolist()],
        "scale": scale,
        "reach": REACH,
        "colours": COLOURS[: int(labels.max()) + 1],
    }
    text = json.dumps(state, separators=(",", ":"))
    return widget("plane", id=identity("plane", text), state=text)
