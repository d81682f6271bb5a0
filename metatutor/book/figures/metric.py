"""Pictures of comparing: regions in the plane, embeddings, similarities, confusions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from matplotlib.colors import ListedColormap
from torch import Tensor

from metatutor.book.figures.images import stamp
from metatutor.book.figures.style import COLOURS, GREY, MARKERS, WIDTH, Picture, colour_of, picture, styled
from metatutor.episodes import Episode

REACH = 3.0  # of the plane, from its middle
Points = Float[Tensor, "_ 2"]


@styled
def plane(
    support: Points,
    labels: Int[Tensor, " n"],
    panels: Mapping[str, Callable[[Points], Float[Tensor, "_ way"]]],
    *,
    crosses: Mapping[str, Points] | None = None,
    query: Float[Tensor, " 2"] | None = None,
    weights: Mapping[str, Float[Tensor, " n"]] | None = None,
) -> Picture:
    """Points of the plane, and which class each of its places from -3 to 3 is assigned to.

    Args:
        support: the labelled points.
        labels: their classes.
        panels: title to a function from points to logits.
        crosses: title to further points, such as prototypes.
        query: a point to classify.
        weights: title to how much each support point counts for the query, 0–1, drawn as lines of that width.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = picture(rows * WIDTH / columns + 0.3 * rows)
    side = torch.linspace(-REACH, REACH, 121)
    grid = torch.cartesian_prod(side, side).flip(-1)  # rows of equal height
    n_way, extent = int(labels.max()) + 1, (-REACH, REACH, -REACH, REACH)
    for axes, (title, logits) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items(), strict=False):
        regions = logits(grid).argmax(-1).view(121, 121)
        colours = ListedColormap(COLOURS[:n_way])
        axes.imshow(regions.numpy(), cmap=colours, vmin=0, vmax=n_way - 1, alpha=0.25, extent=extent, origin="lower")
        if query is not None:
            for point, weight in zip(support, (weights or {}).get(title, []), strict=False):
                axes.plot(*zip(point.tolist(), query.tolist(), strict=True), color="black", lw=6 * float(weight))
            axes.plot(*query.tolist(), "*", color="black", ms=12, zorder=4)
        for label in range(n_way):
            axes.plot(*support[labels == label].T.numpy(), MARKERS[label], color=colour_of(label), mec="black", mew=0.5)
        if (more := (crosses or {}).get(title)) is not None:
            for label, point in enumerate(more.tolist()):
                axes.plot(*point, "X", color=colour_of(label), mec="black", ms=11)
        axes.set(title=title, xticks=[], yticks=[], xlim=extent[:2], ylim=extent[2:])
        axes.grid(visible=False)
    return figure


@styled
def embedding(
    episode: Episode, panels: Mapping[str, tuple[Float[Tensor, "support d"], Float[Tensor, "query d"]]]
) -> Picture:
    """One task in the two directions in which its embeddings differ most, one panel for each way to embed it.

    Args:
        episode: its first task is drawn; 1-shot or more.
        panels: title to embeddings of its support and of its query images.
    """
    figure = picture(3.6 * len(panels), 4.2)
    labels, asked = episode.support_labels[0].tolist(), episode.query_labels[0].tolist()
    for axes, (title, (support, query)) in zip(
        figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True
    ):
        both = torch.cat([support, query]).double()
        centred = both - both.mean(0)
        principal = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
        projected = centred @ principal.T
        share = projected.pow(2).sum() / centred.pow(2).sum()
        placed = projected / projected.abs().max()
        for (x, y), label in zip(placed[len(support) :].tolist(), asked, strict=True):
            axes.plot(x, y, MARKERS[label % len(MARKERS)], color=colour_of(label), mec="white", mew=0.4)
        for i, ((x, y), label) in enumerate(zip(placed[: len(support)].tolist(), labels, strict=True)):
            stamp(axes, episode.support_images[0, i], x, y, colour_of(label), side=0.22)
        axes.set(title=f"{title} ({share:.0%} of the variance)", xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)
    return figure


@styled
def matrices(panels: Mapping[str, Float[Tensor, "n n"]], *, classes: int, unit: str) -> Picture:
    """Square tables of numbers as shades: how similar each image is to each other one.

    Args:
        panels: title to a table; its rows and columns are sorted by class.
        classes: how many classes there are, of equal size; lines separate them.
        unit: what a shade means.
    """
    figure = picture(WIDTH / len(panels) + 1.3)
    shaded = None
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    low = min(table.min().item() for table in panels.values())
    for axes, (title, values) in zip(drawn, panels.items(), strict=True):
        n = len(values)
        shaded = axes.imshow(values.numpy(), cmap="cividis", vmin=low, vmax=1)
        for line in range(1, classes):
            at = line * n / classes - 0.5
            axes.axhline(at, color="white", lw=0.8)
            axes.axvline(at, color="white", lw=0.8)
        middles = [(i + 0.5) * n / classes - 0.5 for i in range(classes)]
        axes.set(title=title, xticks=middles, yticks=middles, xticklabels=range(classes), yticklabels=range(classes))
        axes.set(xlabel="class of the image")
        axes.tick_params(length=0)
        axes.grid(visible=False)
    assert shaded is not None
    figure.colorbar(shaded, ax=drawn, location="bottom", shrink=0.8, label=unit, ticks=[-1, -0.5, 0, 0.5, 1])
    return figure


@styled
def confusions(rows: Float[Tensor, "n 3 channel h w"]) -> Picture:
    """Query images that were misclassified, each beside the right support image and the one it was taken for.

    Args:
        rows: query image, support image of its class, support image of the class it was given.
    """
    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    figure = picture(lines * 3.3 * WIDTH / (1.15 * columns + 0.9))
    axes = figure.subplots()
    for i, images in enumerate(rows):
        x, top = 1.15 * (i % columns), 3.3 * (i // columns)
        for line, (image, colour) in enumerate(zip(images, (GREY, COLOURS[2], COLOURS[1]), strict=True)):
            stamp(axes, image, x + 0.5, -top - line - 0.5, colour)
    for line in range(lines):
        for row, name in enumerate(("query", "is", "taken for")):
            axes.text(-0.1, -3.3 * line - row - 0.5, name, ha="right", va="center", size=9)
    axes.set(xlim=(-0.9, 1.15 * columns), ylim=(-3.3 * lines + 0.2, 0.05), aspect="equal")
    axes.axis("off")
    return figure
