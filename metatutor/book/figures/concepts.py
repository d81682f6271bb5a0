"""The three families, side by side."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse, Rectangle

from metatutor.book.figures.images import stamp, support_by_class
from metatutor.book.figures.style import GREY, Picture, colour_of, picture, styled
from metatutor.episodes import Episode


@styled
def families(episode: Episode) -> Picture:
    """Three ways to learn a task, drawn with the characters of tasks; places and lengths are drawn, not measured.

    Args:
        episode: three tasks or more, of three classes or more, one support image of each, in any order.
    """
    figure = picture(7.2)
    titles = {
        "Compare. Learned: a space. A task is points in it.": _compare,
        "Adapt. Learned: a start. A task is a short walk from it.": _adapt,
        "Remember. Learned: to write and read. A task is a few rows.": _remember,
    }
    for axes, (title, draw) in zip(figure.subplots(len(titles)), titles.items(), strict=True):
        axes.set(xlim=(0, 10), ylim=(0, 3.8), aspect="equal", title=title, xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color="#CCCCCC")
        axes.grid(visible=False)
        draw(axes, episode)
    return figure


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, width: float = 1.4) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "lw": width, "shrinkA": 0})


def _compare(axes: Axes, episode: Episode) -> None:
    """Support images are points; the query image belongs to the nearest."""
    (support, _), query, places = support_by_class(episode), (5.7, 1.5), ((2.2, 2.9), (2.6, 0.9), (7.4, 2.6))
    for label, (x, y) in enumerate(places):
        nearest = label == len(places) - 1
        dash, width = ("-", 2.4) if nearest else (":", 1.2)
        axes.plot([query[0], x], [query[1], y], dash, lw=width, color=colour_of(label))
        axes.plot(x, y, "o", color=colour_of(label), ms=10, zorder=3)
        stamp(axes, support[label], x + (0.8 if nearest else -0.8), y, colour_of(label))
    axes.plot(*query, "X", color="black", ms=10, zorder=3)
    stamp(axes, episode.query_images[0, _first_query(episode, 0, 2)], query[0] + 0.1, query[1] - 0.85, "black")
    axes.text(6.75, 1.75, "nearest", color=colour_of(2), va="center")
    axes.text(query[0] + 0.7, query[1] - 0.85, "query", va="center")


def _adapt(axes: Axes, episode: Episode) -> None:
    """From the learned parameters a short path leads into the valley of each task."""
    start, valleys = (4.7, 1.7), ((2.6, 2.8), (2.9, 0.9), (7.2, 2.4))
    axes.plot([9.6, 8.3, 7.4, 6.2, 5.4, start[0]], [0.5, 0.35, 0.8, 0.75, 1.3, start[1]], color=GREY, lw=1.4, ls="--")
    axes.text(7.7, 0.75, "meta-training", color=GREY)
    for task, (x, y) in enumerate(valleys):
        for size in (0.5, 1.0, 1.5):
            axes.add_patch(
                Ellipse((x, y), 1.3 * size, 0.8 * size, fill=False, edgecolor=colour_of(task), lw=0.8, alpha=0.7)
            )
        _arrow(axes, start, (x, y), colour_of(task), 2)
        away = -1 if x < start[0] else 1
        support, _ = support_by_class(episode, task)
        for i in range(2):
            stamp(axes, support[i], x + away * (1.3 + 0.75 * i), y, colour_of(task), side=0.65)
    axes.plot(*start, "o", color="black", ms=9, zorder=3)
    axes.text(start[0], start[1] - 0.25, "learned\nstart θ", ha="center", va="top")


def _remember(axes: Axes, episode: Episode) -> None:
    """Support images are written into rows, with their labels; the query image reads the row that fits."""
    support, _ = support_by_class(episode)
    shades = torch.rand(4, 6, generator=torch.Generator().manual_seed(3)).tolist()
    for row, keys in enumerate(shades):
        y = 3.15 - 0.8 * row
        for column, shade in enumerate(keys):
            axes.add_patch(Rectangle((3.2 + 0.4 * column, y - 0.2), 0.4, 0.4, facecolor=str(0.45 + 0.5 * shade)))
        if row < 3:
            stamp(axes, support[row], 1, 3 - 1.15 * row, colour_of(row))
            _arrow(axes, (1.6, 3 - 1.15 * row), (3.1, y), colour_of(row))
            axes.text(5.75, y, f"class {row}", color=colour_of(row), va="center")
    stamp(axes, episode.query_images[0, _first_query(episode, 0, 2)], 9, 2.2, "black")
    _arrow(axes, (6.95, 1.6), (8.4, 2.1), colour_of(2), 2.4)
    for text, x, y in (("write", 2.3, 3.4), ("memory", 4.4, 0.25), ("read", 7.4, 2.3), ("query", 9, 1.4)):
        axes.text(x, y, text, color=GREY, ha="center", va="center")


def _first_query(episode: Episode, task: int, label: int) -> int:
    return int((episode.query_labels[task] == label).int().argmax())
