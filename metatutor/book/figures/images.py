"""Pictures of pictures: characters, tasks, and what their query images are taken for.

Images of three channels are drawn in their colours, all others as ink on paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from metatutor.book.figures.style import BLUE, GREY, RED, WIDTH, Picture, colour_of, picture, styled
from metatutor.episodes import Episode

Drawing = Float[Tensor, "*channel h w"]
Drawings = Float[Tensor, "n *channel h w"]


@styled
def characters(rows: Mapping[str, Drawings]) -> Picture:
    """Rows of images, each under its title.

    Args:
        rows: title to images; all rows as long as the longest look best.
    """
    longest = max(len(images) for images in rows.values())
    figure = picture(len(rows) * (WIDTH / longest + 0.3))
    for axes, (title, images) in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows.items(), strict=True):
        axes.set(title=title, xlim=(0, longest), ylim=(1, 0), aspect="equal")
        axes.axis("off")
        for i, image in enumerate(images):
            draw(axes, image, (i + 0.04, i + 0.96, 1, 0))
    return figure


@styled
def redrawn(rows: Sequence[tuple[Drawing, Drawings]]) -> Picture:
    """Rows of drawings: the one that was seen, framed, and beside it others of the same character.

    Args:
        rows: what was seen, and the others, the same number in each row.
    """
    n = len(rows[0][1])
    figure = picture(len(rows) * WIDTH / (n + 1.4))
    axes = figure.subplots()
    axes.set(xlim=(-0.6, n + 0.9), ylim=(-len(rows) + 0.4, 0.6), aspect="equal")
    axes.axis("off")
    for row, (seen, others) in enumerate(rows):
        stamp(axes, seen, 0, -row, BLUE)
        for i, other in enumerate(others):
            draw(axes, other, (i + 0.95, i + 1.85, -row - 0.45, -row + 0.45))
    return figure


@styled
def task(episode: Episode, index: int = 0) -> Picture:
    """One task: the support images by class, and below them the query images, in an order that gives nothing away.

    Args:
        episode: a batch of tasks.
        index: which of them.
    """
    (support, names), query = support_by_class(episode, index), episode.query_images[index]
    answers = episode.query_labels[index].tolist()
    order = torch.randperm(len(query), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [-(-len(images) // episode.n_way) for images in (support, query)]
    figure = picture(1.1 * sum(rows) + 0.5, 4.4)
    above, below = figure.subplots(2, height_ratios=rows)
    above.set_title("Support: what the task is learned from")
    tiles(above, support, episode.n_way, [f"class {n}" for n in names], [colour_of(n) for n in names])
    below.set_title("Query: which class is it? (the answer in grey)")
    tiles(below, query[order], episode.n_way, [str(answers[i]) for i in order], [GREY] * len(order))
    return figure


@styled
def adaptation(episode: Episode, path: Float[Tensor, "step query way"], shown: Sequence[int]) -> Picture:
    """What one task's query images are taken for, before the first inner step and after each.

    Args:
        episode: its first task is drawn.
        path: predicted probabilities, before the first step and after each.
        shown: which query images.
    """
    figure = picture(0.52 * (len(path) + 1.4))
    axes = figure.subplots()
    probability, predicted = path.max(-1)
    for column, query in enumerate(shown):
        image, answer = episode.query_images[0, query], int(episode.query_labels[0, query])
        draw(axes, image, (column - 0.45, column + 0.45, -0.55, -1.45))
        axes.text(column, -1.55, str(answer), ha="center", va="bottom", color=GREY)
        for step in range(len(path)):
            _cell(axes, column, step, int(predicted[step, query]), probability[step, query].item(), answer)
    axes.set(xlim=(-0.5, len(shown) - 0.5), ylim=(len(path) - 0.5, -2.1), xticks=[], aspect="equal")
    axes.set(yticks=[-1.8, -1, *range(len(path))], yticklabels=["class", "query", *_steps(len(path))])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return figure


def _cell(axes: Axes, x: int, y: int, predicted: int, probability: float, answer: int) -> None:
    """A predicted label: blue if right, orange and hatched if wrong, the darker the surer."""
    right = predicted == answer
    colour = BLUE if right else RED
    corner, side = (x - 0.46, y - 0.46), 0.92
    axes.add_patch(Rectangle(corner, side, side, color=colour, alpha=0.15 + 0.6 * probability, lw=0))
    if not right:
        axes.add_patch(Rectangle(corner, side, side, fill=False, hatch="////", edgecolor="white", lw=0))
    weight = "bold" if right else "normal"
    axes.text(x, y, str(predicted), ha="center", va="center", weight=weight, color="black")


def _steps(n: int) -> list[str]:
    """Names of the states of an adaptation of `n - 1` steps."""
    return ["before"] + [f"{i} step{'s' if i > 1 else ''}" for i in range(1, n)]


@styled
def answers(episode: Episode, probabilities: Float[Tensor, "query way"], shown: Sequence[int]) -> Picture:
    """One task at one moment: the support images by class; what chosen query images are taken for, and how confidently.

    Args:
        episode: its first task is drawn.
        probabilities: predicted for the query images.
        shown: which query images.
    """
    (support, labels), query = support_by_class(episode), episode.query_images[0]
    truth = episode.query_labels[0].tolist()
    probability, predicted = (of_query.tolist() for of_query in probabilities.max(-1))
    rows = [-(-len(support) // episode.n_way), -(-len(shown) // episode.n_way)]
    figure = picture(1.1 * sum(rows) + 0.5, 4.4)
    above, below = figure.subplots(2, height_ratios=rows)
    right = sum(predicted[i] == truth[i] for i in shown)
    above.set_title("Support")
    tiles(above, support, episode.n_way, [f"class {n}" for n in labels], [GREY] * len(labels))
    below.set_title(f"Query: {right} of {len(shown)} right")
    captions = [f"{'✓' if predicted[i] == truth[i] else '✗'} {predicted[i]} ({probability[i]:.0%})" for i in shown]
    tiles(below, query[list(shown)], episode.n_way, captions, [BLUE if c[0] == "✓" else RED for c in captions])
    return figure


def support_by_class(episode: Episode, index: int = 0) -> tuple[Float[Tensor, "support channel h w"], list[int]]:
    """The support images of a task with their labels: in class order, whatever order they come in."""
    labels, order = episode.support_labels[index].sort(stable=True)
    return episode.support_images[index, order], labels.tolist()


def tiles(axes: Axes, images: Drawings, columns: int, captions: Sequence[str], colours: Sequence[str]) -> None:
    """Images row by row, each in a frame of its colour over its caption."""
    rows = -(-len(images) // columns)
    axes.set(xlim=(-0.05, columns + 0.05), ylim=(1.3 * rows, -0.05), aspect="equal")
    axes.axis("off")
    for i, (image, caption, colour) in enumerate(zip(images, captions, colours, strict=True)):
        x, y = i % columns + 0.05, 1.3 * (i // columns)
        draw(axes, image, (x, x + 0.9, y + 0.9, y))
        axes.plot([x, x + 0.9, x + 0.9, x, x], [y, y, y + 0.9, y + 0.9, y], color=colour, lw=1.2)
        axes.text(x + 0.45, y + 0.93, caption, ha="center", va="top", size=9, color=colour)


def stamp(axes: Axes, image: Drawing, x: float, y: float, colour: str, side: float = 0.9) -> None:
    """A small image in a frame, its middle at (x, y)."""
    left, right, low, high = x - side / 2, x + side / 2, y - side / 2, y + side / 2
    draw(axes, image, (left, right, low, high), zorder=3)
    axes.add_patch(Rectangle((left, low), side, side, fill=False, edgecolor=colour, lw=1.6, zorder=4))


def draw(
    axes: Axes, image: Drawing, extent: tuple[float, float, float, float] | None = None, zorder: float = 0
) -> None:
    """An image on some axes."""
    pixels, look = to_show(image).numpy(), {"cmap": "gray_r", "vmin": 0, "vmax": 1}
    axes.imshow(pixels, **look, extent=extent, interpolation="none", zorder=zorder)


def to_show(image: Drawing) -> Float[Tensor, "h w *rgb"]:
    """What is shown of an image: the colours, `[h, w, 3]`, of three channels, else the first channel, `[h, w]`, as ink.

    Example:
        >>> to_show(torch.zeros(3, 20, 28)).shape, to_show(torch.zeros(1, 20, 28)).shape
        (torch.Size([20, 28, 3]), torch.Size([20, 28]))
    """
    if image.dim() == 2:
        return image.cpu()
    return image.movedim(0, -1).clamp(0, 1).cpu() if len(image) == 3 else image[0].cpu()
