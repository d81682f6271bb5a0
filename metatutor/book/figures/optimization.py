"""Pictures of adapting by gradient: where methods start, how long and how far they step, where they go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from metatutor.book.figures.style import COLOURS, DASHES, GREY, MARKERS, WIDTH, Picture, picture, styled


@styled
def beginnings(
    tasks: Mapping[str, tuple[Float[Tensor, " n"], Float[Tensor, " n"]]],
    starts: Mapping[str, float],
    *,
    x: str,
    y: str,
) -> Picture:
    """Loss curves of tasks, and below them where each method starts.

    Args:
        tasks: name to horizontal and vertical values.
        starts: method to a place on the horizontal axis.
        x, y: what the axes show, with the unit.
    """
    figure = picture(2.4 + 0.33 * len(starts))
    above, below = figure.subplots(2, sharex=True, height_ratios=[2, 0.33 * len(starts)])
    for (name, (xs, ys)), dash in zip(tasks.items(), DASHES, strict=False):
        above.plot(xs.numpy(), ys.numpy(), dash, color=GREY, label=name)
    above.set(ylabel=y)
    above.legend(loc="upper left")
    for row, (start, colour, marker) in enumerate(zip(starts.values(), COLOURS, MARKERS, strict=False)):
        above.axvline(start, color=colour, lw=1, alpha=0.6)
        below.axvline(start, color=colour, lw=1, alpha=0.6)
        below.plot(start, row, marker, color=colour, ms=8, mec="white")
    below.set(xlabel=x, yticks=range(len(starts)), yticklabels=list(starts), ylim=(len(starts) - 0.5, -0.5))
    return figure


@styled
def heat(
    values: Float[Tensor, "row column"], *, rows: Sequence[object], columns: Sequence[object], y: str, x: str
) -> Picture:
    """A table of fractions as shades, each with its percentage.

    Args:
        values: 0–1.
        rows, columns: what is written beside and under them.
        y, x: what these are.
    """
    figure = picture(1.2 + 0.42 * len(rows), width=max(WIDTH, 0.5 * len(columns)))
    axes = figure.subplots()
    axes.imshow(values.numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in zip(
        torch.cartesian_prod(*map(torch.arange, values.shape)), values.flatten(), strict=True
    ):
        ink = "black" if value > 0.55 else "white"
        axes.text(int(column), int(row), f"{100 * value:.0f}", ha="center", va="center", color=ink, size=9)
    axes.set(xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=rows)
    axes.set(xlabel=x, ylabel=y)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    return figure


@styled
def journeys(
    lines: Mapping[str, tuple[float, float]],
    paths: Mapping[str, Float[Tensor, "n 2"]],
    *,
    x: str,
    y: str,
    reach: float = 2.0,
) -> Picture:
    """Paths through a plane in which every point of a line solves a task.

    Args:
        lines: task to the slope and height at 0 of its line.
        paths: name to the points on the way.
        x, y: what the axes show.
        reach: from the middle to the border.
    """
    figure = picture(4.4)
    axes = figure.subplots()
    ends = torch.tensor([-reach, reach])
    for (name, (slope, height)), dash in zip(lines.items(), DASHES, strict=False):
        axes.plot(ends.numpy(), (slope * ends + height).numpy(), dash, color=GREY, lw=1.4, label=name)
    for (name, points), colour, marker in zip(paths.items(), COLOURS, MARKERS, strict=False):
        axes.plot(*points.T.numpy(), "-", color=colour, lw=1, marker=marker, ms=3, label=name)
        axes.plot(*points[-1].tolist(), marker, color=colour, ms=9, mec="white")
    axes.set(xlabel=x, ylabel=y, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    figure.legend(loc="outside upper left", ncols=2, alignment="left")
    return figure
