"""Pictures of pictures: characters, tasks, and what their query images are taken for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from metatutor.book.figures.style import BLUE, GREY, RED, WIDTH, Picture, colour_of, picture, styled
from metatutor.episodes import Episode


@styled
def characters(rows: Mapping[str, Float[Tensor, "n h w"]]) -> Picture:
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
            axes.imshow(
                image.numpy(), cmap="gray_r", vmin=0, vmax=1, extent=(i + 0.04, i + 0.96, 1, 0), interpolation="none"
            )
    return figure


@styled
def task(episode: Episode, index: int = 0) -> Picture:
    """One task: the labelled support images, and below them the query images, in an order that gives nothing away.

    Args:
        episode: its first channel is drawn.
        index: which of its tasks.
    """
    support, query = episode.support_images[index, :, 0].cpu(), episode.query_images[index, :, 0].cpu()
    names, answers = episode.support_labels[index].tolist(), episode.query_labels[index].tolist()
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
        image, answer = episode.query_images[0, query, 0].cpu(), int(episode.query_labels[0, query])
        at = (column - 0.45, column + 0.45, -0.55, -1.45)
        axes.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1, extent=at, interpolation="none")
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
    """One task at one moment: the support images, and what chosen query images are taken for, and how surely.

    Args:
        episode: its first task is drawn.
        probabilities: predicted for the query images.
        shown: which query images.
    """
    support, query = episode.support_images[0, :, 0].cpu(), episode.query_images[0, :, 0].cpu()
    labels, truth = episode.support_labels[0].tolist(), episode.query_labels[0].tolist()
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


def tiles(
    axes: Axes, images: Float[Tensor, "n h w"], columns: int, captions: Sequence[str], colours: Sequence[str]
) -> None:
    """Images row by row, each in a frame of its colour over its caption."""
    rows = -(-len(images) // columns)
    axes.set(xlim=(-0.05, columns + 0.05), ylim=(1.3 * rows, -0.05), aspect="equal")
    axes.axis("off")
    for i, (image, caption, colour) in enumerate(zip(images, captions, colours, strict=True)):
        x, y = i % columns + 0.05, 1.3 * (i // columns)
        axes.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1, extent=(x, x + 0.9, y + 0.9, y), interpolation="none")
        axes.plot([x, x + 0.9, x + 0.9, x, x], [y, y, y + 0.9, y + 0.9, y], color=colour, lw=1.2)
        axes.text(x + 0.45, y + 0.93, caption, ha="center", va="top", size=9, color=colour)


def stamp(axes: Axes, image: Float[Tensor, "1 h w"], x: float, y: float, colour: str, side: float = 0.9) -> None:
    """A small image in a frame, its middle at (x, y)."""
    left, right, low, high = x - side / 2, x + side / 2, y - side / 2, y + side / 2
    pixels, extent = image[0].cpu().numpy(), (left, right, low, high)
    axes.imshow(pixels, cmap="gray_r", vmin=0, vmax=1, extent=extent, interpolation="none", zorder=3)
    axes.add_patch(Rectangle((left, low), side, side, fill=False, edgecolor=colour, lw=1.6, zorder=4))
