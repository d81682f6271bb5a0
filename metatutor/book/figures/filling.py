"""A memory that fills as a stream goes by; readers can step through it in the static page."""

from __future__ import annotations

import base64
import json

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metatutor.book.figures.images import to_show
from metatutor.book.figures.memory import KINDS, NOTICEABLE, Weights, bookkeeping, check_steps, chosen_slots
from metatutor.book.figures.shown import Shown, identity, widget
from metatutor.book.figures.style import BLUE, RED


def filling_memory(
    images: Float[Tensor, "time *channel height width"],
    labels: Int[Tensor, " time"],
    answers: Int[Tensor, " time"],
    matrix: Float[Tensor, "time slot number"],
    read_weights: Weights,
    write_weights: Weights,
    usage: Float[Tensor, "time slot"],
    *,
    rows: int = 24,
    start: int | None = None,
) -> Shown:
    """A MANN's memory as a stream goes by: what is shown, revealed and answered, and what is written and read.

    The reader goes from image to image by buttons or a slider, or lets the stream play. A row is a slot; the rows are
    those of `memory_steps`. The script holds the images and the numbers with 8 bits each.

    Args:
        images: the stream of one task.
        labels: their classes; the label of an image is revealed with the next one.
        answers: what the learner answers to each; -1: no class.
        matrix: the memory after every image.
        read_weights, write_weights: those of every head.
        usage: that of every slot.
        rows: the most slots that are drawn.
        start: the image shown at first, from 0; default: the last one.

    Raises:
        ValueError: if `start` is not in the stream, or `rows` not positive.

    Reference:
        Santoro et al. (2016), figure 1.
    """
    start = len(images) - 1 if start is None else start
    check_steps([start], len(images))
    pixels = torch.stack([to_show(image) for image in images])
    slots = chosen_slots(read_weights, write_weights, rows)
    state = {
        "size": list(pixels.shape[1:]),
        "images": _packed(255 * pixels.clamp(0, 1)),
        "labels": labels.tolist(),
        "answers": answers.tolist(),
        "slots": slots,
        "colours": [BLUE, RED],
    }
    state |= _memory(matrix[:, slots], bookkeeping(read_weights, write_weights, usage, slots))
    state["shares"] = _shares(write_weights, read_weights, slots)
    text = json.dumps(state, separators=(",", ":"))
    colours = {"written": KINDS["written"], "read": KINDS["read"], "low": BLUE, "high": RED}
    sizes = {"last": len(images) - 1, "start": start, "rows": len(slots), "all": matrix.shape[1]}
    pitch = max(3, min(14, 420 // max(1, len(slots))))  # of the rows, in CSS pixels
    fill = {"state": text, "pitch": pitch, "row": f"{pitch}px", **colours, **sizes}
    return widget("memory", id=identity("memory", text), **fill)


def _memory(matrix: Float[Tensor, "time row number"], bars: Float[Tensor, "3 time row"]) -> dict[str, object]:
    """The numbers of the memory and the lengths of the bars, packed, with their scales."""
    largest, longest = matrix.abs().max().item(), bars.amax((1, 2))
    written = bars[0] > NOTICEABLE
    when = torch.arange(len(matrix))[:, None].where(written, -1).cummax(0).values
    return {
        "width": matrix.shape[2],
        "largest": largest,
        "matrix": _packed(127 * matrix / max(largest, 1e-12)),
        "longest": longest.tolist(),
        "bars": _packed(255 * bars / longest.clamp_min(1e-12)[:, None, None]),
        "when": when.tolist(),  # each row was last written
    }


def _shares(write_weights: Weights, read_weights: Weights, slots: list[int]) -> list[list[int]]:
    """How much of the writing and of the reading goes to the rows drawn, in percent."""
    both = torch.stack([write_weights, read_weights]).sum(2)  # [2, time, slot]
    return (100 * both[:, :, slots].sum(-1) / both.sum(-1).clamp_min(1e-12)).round().int().T.tolist()


def _packed(values: Tensor) -> str:
    """Whole numbers from -127 to 255 as bytes, in base64."""
    bytes_ = (values.round().int() % 256).to(torch.uint8).cpu().numpy().tobytes()
    return base64.b64encode(bytes_).decode()
