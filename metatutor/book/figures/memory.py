"""Pictures of memories: which slots are written and read, what attention looks at, weights that last for one task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from metatutor.book.figures.images import Drawing, draw, stamp
from metatutor.book.figures.style import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    WIDTH,
    Picture,
    picture,
    styled,
)

NOTICEABLE = 0.1  # a weight, summed over the heads
PITCH = 0.17  # from bar to bar of an attention, where an image with its bars has a width of 1
KINDS = {"written": GREEN, "read": PURPLE, "usage": GREY}
DIVERGING = LinearSegmentedColormap.from_list("blue, white, red", (BLUE, "white", RED))
Weights = Float[Tensor, "time head slot"]


# --- a memory with slots ---


@styled
def memory_steps(
    matrix: Float[Tensor, "time slot width"],
    read_weights: Weights,
    write_weights: Weights,
    usage: Float[Tensor, "time slot"],
    steps: Sequence[int],
    *,
    rows: int = 24,
) -> Picture:
    """A MANN's memory after chosen images of a stream: what its slots hold, and how they are written, read and used.

    A row is a slot. The rows are those that are read most, in the order in which they are first written. The
    longest bar of a kind stands for the largest of its numbers in the whole stream.

    Args:
        matrix: the memory after every image of one task.
        read_weights, write_weights: of every head.
        usage: of every slot.
        steps: which images of the stream, from 0; up to three stand side by side.
        rows: the most slots that are drawn.

    Raises:
        ValueError: if a step is not in the stream.
    """
    check_steps(steps, len(matrix))
    slots = chosen_slots(read_weights, write_weights, rows)
    bars = bookkeeping(read_weights, write_weights, usage, slots)
    shown, lines = matrix[:, slots], -(-len(steps) // 3)
    columns = -(-len(steps) // lines)
    figure = picture(lines * (0.15 * len(slots) + 0.9) + 0.7)
    drawn = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    largest, shaded = shown.abs().max().item(), None
    for axes, step in zip(drawn.flat, steps, strict=False):
        shaded = _memory(axes, shown[step], bars[:, step], bars.amax((1, 2)), largest)
        axes.set_title(f"image {step + 1}")
    for axes in drawn.flat[len(steps) :]:
        axes.axis("off")
    for axes in drawn[:, 0]:
        axes.set(yticks=range(len(slots)), yticklabels=slots, ylabel=f"slot ({len(slots)} of {matrix.shape[1]})")
        axes.tick_params(axis="y", labelsize=8)
    _scale(figure, shaded, "number in the memory")
    return figure


def _memory(
    axes: Axes, matrix: Float[Tensor, "row width"], bars: Float[Tensor, "3 row"], longest: Tensor, largest: float
) -> AxesImage:
    """The rows of a memory as shades, and beside each how it is written, read and used."""
    n, width = matrix.shape
    step, shaded = width / 4, _shades(axes, matrix, largest)
    starts = [1.08 * width + i * step for i in range(3)]
    for start, lengths, full, colour in zip(starts, bars, longest, KINDS.values(), strict=True):
        axes.barh(range(n), (0.85 * step * lengths / full.clamp_min(1e-12)).numpy(), left=start, color=colour)
        axes.axvline(start, color=GREY, lw=0.6)
    axes.set(xlim=(-0.5, 1.08 * width + 3 * step), ylim=(n - 0.5, -0.5))
    axes.set_xticks([width / 2, *(start + step / 3 for start in starts)])
    axes.set_xticklabels(["numbers", *KINDS], rotation=90)
    axes.tick_params(length=0, labelbottom=True)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    return shaded


def chosen_slots(read_weights: Weights, write_weights: Weights, rows: int) -> list[int]:
    """The slots that are read most and, among those never read, the ones written most, sorted by first writing.

    Args:
        read_weights, write_weights: of every head after every image.
        rows: the most slots that are chosen; slots that are never written or read noticeably are left out.

    Raises:
        ValueError: if rows is not positive, or no slot is left.

    Example:
        >>> write = torch.tensor([[[0.0, 0.0, 0.9, 0.1]], [[0.8, 0.0, 0.2, 0.0]]])
        >>> chosen_slots(torch.zeros(2, 1, 4), write, rows=24)
        [2, 0]
    """
    if rows < 1:
        raise ValueError(f"rows must be positive, got {rows}")
    both = torch.stack([read_weights, write_weights]).sum(2)  # [2, time, slot]
    read, written = both.where(both > NOTICEABLE, 0).sum(1).tolist()
    noticed = [slot for slot in range(len(read)) if read[slot] or written[slot]]
    most = sorted(noticed, key=lambda slot: (read[slot], written[slot]), reverse=True)[:rows]
    if not most:
        raise ValueError(f"no slot is ever written or read with a weight above {NOTICEABLE}")
    first = first_written(write_weights).tolist()
    return sorted(most, key=lambda slot: (first[slot], slot))


def first_written(write_weights: Weights) -> Int[Tensor, " slot"]:
    """The image at which each slot is first written noticeably; the length of the stream if there is none.

    Args:
        write_weights: of every head after every image.

    Example:
        >>> first_written(torch.tensor([[[0.0, 0.0, 0.9]], [[0.8, 0.0, 0.2]]])).tolist()
        [1, 2, 0]
    """
    written = write_weights.sum(1) > NOTICEABLE
    return torch.where(written.any(0), written.int().argmax(0), len(written))


def bookkeeping(
    read_weights: Weights, write_weights: Weights, usage: Float[Tensor, "time slot"], slots: Sequence[int]
) -> Float[Tensor, "3 time row"]:
    """How much each of some slots is written and read by all heads, and its usage, after every image.

    Args:
        read_weights, write_weights: of every head.
        usage: of every slot.
        slots: which of them.

    Example:
        >>> weights = torch.full((2, 4, 9), 0.1)
        >>> bookkeeping(weights, weights, torch.ones(2, 9), [3])[:, 0, 0].tolist()
        [0.4..., 0.4..., 1.0]
    """
    return torch.stack([write_weights.sum(1), read_weights.sum(1), usage])[:, :, list(slots)]


def check_steps(steps: Sequence[int], length: int) -> None:
    """Raise a `ValueError` if a step is not in a stream of that length."""
    if wrong := [step for step in steps if not 0 <= step < length]:
        raise ValueError(f"steps must be from 0 to {length - 1}, the images of the stream, got {wrong[0]}")


def _shades(axes: Axes, table: Float[Tensor, "row column"], largest: float) -> AxesImage:
    """A table of numbers from -largest to largest, blue to red."""
    return axes.imshow(table.numpy(), cmap=DIVERGING, vmin=-largest, vmax=largest, aspect="auto", interpolation="none")


def _scale(figure: Figure, shaded: AxesImage | None, label: str) -> None:
    """A colour bar below."""
    assert shaded is not None
    ticks = MaxNLocator(4, symmetric=True)
    figure.colorbar(shaded, ax=figure.axes, location="bottom", shrink=0.6, aspect=25, label=label, ticks=ticks)


@styled
def usage_over_time(usage: Float[Tensor, "time slot"], write_weights: Weights) -> Picture:
    """The usage of all slots of a MANN's memory over a stream, with a dot wherever a slot is written.

    The larger the dot, the more is written. Slots are sorted by the image at which they are first written.

    Args:
        usage: of every slot after every image of one task.
        write_weights: of every head.
    """
    order = first_written(write_weights).argsort(stable=True)
    usage, written = usage[:, order], write_weights.sum(1)[:, order]
    time, slots = usage.shape
    figure = picture(4.3)
    axes = figure.subplots()
    extent = (0.5, time + 0.5, slots + 0.5, 0.5)
    shaded = axes.imshow(usage.T.numpy(), cmap="cividis", vmin=0, extent=extent, aspect="auto", interpolation="none")
    when, which = (written > NOTICEABLE).nonzero().T
    sizes = 10 * written[when, which].clamp_max(1)
    axes.scatter(when.numpy() + 1, which.numpy() + 1, s=sizes.numpy(), color="white", ec="black", lw=0.4)
    axes.set(xlabel="image of the stream", ylabel="slot, in the order of first writing")
    axes.grid(visible=False)
    figure.colorbar(shaded, ax=axes, pad=0.02, label="usage")
    dot = Line2D([], [], ls="", marker="o", ms=4, color="white", mec="black", mew=0.6, label="written")
    figure.legend(handles=[dot], loc="outside upper right")
    return figure


# --- a memory that is the support set itself ---


@styled
def attention_on_support(
    support_images: Float[Tensor, "support *channel h w"],
    support_labels: Int[Tensor, " support"],
    query_image: Drawing,
    weights: Float[Tensor, "block seen"],
    names: Sequence[str],
    *,
    query_label: int | None = None,
) -> Picture:
    """A query image, and below every support image how much it attends to it in each attention block.

    Args:
        support_images: one task's, in any order; drawn class by class.
        support_labels: their classes.
        query_image: the image to classify.
        weights: its attention to every support image and, last, to itself: rows that add up to 1.
        names: of the blocks, four at most.
        query_label: its class; the support images of that class are marked.
    """
    columns, height = 5, 0.75 + PITCH * len(names)
    lines = -(-len(support_images) // columns)
    figure = picture((lines + 1) * height * WIDTH / columns)
    axes, largest = figure.subplots(), weights.max().item()
    _attended(axes, (0, 0), query_image, "query\n(itself)", weights[:, -1], largest)
    for i, of in enumerate(support_labels.argsort(stable=True).tolist()):
        place, label = (i % columns, -(i // columns + 1) * height), int(support_labels[of])
        caption, marked = f"class\n{label}", label == query_label
        _attended(axes, place, support_images[of], caption, weights[:, of], largest, marked=marked)
    bars = [Line2D([], [], color=colour, lw=6, label=name) for name, colour in zip(names, COLOURS, strict=False)]
    if query_label is not None:
        bars.append(Line2D([], [], ls="", marker="s", ms=8, mew=2.5, mec="black", mfc="none", label="of its class"))
    axes.legend(handles=bars, loc="upper left", bbox_to_anchor=(1.1, 0), bbox_transform=axes.transData, borderaxespad=0)
    axes.set(xlim=(-0.04, columns), ylim=(-(lines + 1) * height + 0.05, 0.04), aspect="equal")
    axes.axis("off")
    return figure


def _attended(
    axes: Axes,
    place: tuple[float, float],
    image: Drawing,
    caption: str,
    weights: Float[Tensor, " block"],
    largest: float,
    *,
    marked: bool = False,
) -> None:
    """An image with its caption, and below it a bar for each weight; `place` is the upper left corner."""
    x, y = place
    stamp(axes, image, x + 0.3, y - 0.3, "black" if marked else "#BBBBBB", side=0.56)
    ink, weight = ("black", "bold") if marked else (GREY, "normal")
    axes.text(x + 0.63, y - 0.3, caption, va="center", size=8, color=ink, weight=weight)
    for i, (weight, colour) in enumerate(zip(weights.tolist(), COLOURS, strict=False)):
        middle, length = y - 0.6 - (i + 0.6) * PITCH, 0.56 * weight / largest
        axes.barh(middle, length, 0.7 * PITCH, left=x + 0.02, color=colour)
        axes.plot([x + 0.02] * 2, [middle - PITCH / 2, middle + PITCH / 2], color=GREY, lw=0.6)
        axes.text(x + length + 0.05, middle, f"{weight:.0%}", va="center", size=8)


# --- a memory of weights ---


@styled
def fast_weights(
    fast: Float[Tensor, "support row column"],
    support_images: Float[Tensor, "support *channel h w"],
    labels: Int[Tensor, " support"],
    read: Float[Tensor, "row column"],
    attention: Float[Tensor, " support"],
    query_image: Drawing,
) -> Picture:
    """The fast weights that every support image leaves in a Meta Network, and what a query image reads from them.

    Args:
        fast: those of one layer, one matrix per image; a row is an output.
        support_images: one task's, few of them, in any order; drawn class by class.
        labels: their classes.
        read: the sum of the matrices, weighted by the attention.
        attention: how much the query image takes of each, 0–1.
        query_image: the image to classify.
    """
    labels, order = labels.sort(stable=True)
    tables, images = torch.cat([fast[order], read[None]]), torch.cat([support_images[order], query_image[None]])
    captions = [f"class {label}" for label in labels.tolist()] + ["query"]
    figure = picture(0.68 * len(tables) + 1.4)
    drawn = figure.subplots(len(tables), 3, width_ratios=[0.75, 0.75, 3.6], squeeze=False)
    largest, shaded = tables.abs().max().item(), None
    for (left, _, right), image, caption, table in zip(drawn, images, captions, tables, strict=True):
        draw(left, image)
        left.set(xticks=[], yticks=[], ylabel=caption)
        shaded = _shades(right, table, largest)
        right.set(xticks=[], yticks=[0, len(table) - 1], ylabel="output")
        for axes in (left, right):
            axes.grid(visible=False)
            axes.spines[:].set_visible(True)
    _shares(list(drawn[:, 1]), attention[order])
    drawn[0, 2].set_title("fast weights that it leaves")
    drawn[-1, 2].set_title("fast weights that it reads: the sum")
    drawn[-1, 2].set(xticks=[0, tables.shape[2] - 1], xlabel="input (hidden unit)")
    _scale(figure, shaded, "fast weight")
    return figure


def _shares(column: Sequence[Axes], attention: Float[Tensor, " support"]) -> None:
    """How much of each row is taken, as a bar with its percentage; and a Σ in the last row."""
    for axes, weight in zip(column[:-1], attention.tolist(), strict=True):
        axes.barh(0, weight, 0.3, color=ORANGE)
        axes.text(0, 0.25, f"{weight:.0%}", va="bottom", size=9)
        axes.set(xlim=(0, 1), ylim=(-0.5, 0.8), xticks=[], yticks=[])
        axes.spines["bottom"].set_visible(False)
    column[0].set_title("attention", size=9)
    column[-1].axis("off")
