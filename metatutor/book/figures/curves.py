"""Curves, intervals and points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from metatutor.book.figures.style import (
    BLUE,
    COLOURS,
    DASHES,
    GREY,
    MARKERS,
    ORANGE,
    RED,
    Picture,
    draw_levels,
    picture,
    styled,
)
from metatutor.evaluation import confidence95

Row = Mapping[str, float]


@styled
def lines(
    series: Mapping[str, tuple[Sequence[float], ...]],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    percent: bool = False,
    levels: Mapping[str, float] | None = None,
) -> Picture:
    """Curves over one another, distinguished by colour, dash and marker.

    Args:
        series: name to horizontal and vertical values and, if wanted, half the widths of their intervals.
        x, y: what the axes show, with the unit.
        log_x: whether the horizontal axis is logarithmic.
        percent: whether the vertical values, fractions, are written as percentages.
        levels: name to height of thin horizontal lines, such as that of guessing.
    """
    figure = picture(3.2)
    axes = figure.subplots()
    for (name, (xs, ys, *halves)), colour, dash, marker in zip(series.items(), COLOURS, DASHES, MARKERS, strict=False):
        axes.errorbar(xs, ys, *halves, fmt=marker + dash, color=colour, capsize=3 * len(halves), label=name)
    first, last = ([ys[end] for _, ys, *_ in series.values()] for end in (0, -1))
    draw_levels(axes, levels, right=[n for n, at in (levels or {}).items() if _nearest(first, at) < _nearest(last, at)])
    axes.set(xlabel=x, ylabel=y, xscale="log" if log_x else "linear")
    if not log_x and all(isinstance(at, int) for xs, *_ in series.values() for at in xs):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # a scale brings its own
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    if len(series) > 1:
        figure.legend(loc="outside upper left", ncols=2, alignment="left")
    return figure


def _nearest(heights: Sequence[float], level: float) -> float:
    return min(abs(height - level) for height in heights)


@styled
def slopes(
    panels: Mapping[str, tuple[Float[Tensor, " n"], Float[Tensor, " n"], float, Mapping[str, float]]], *, x: str, y: str
) -> Picture:
    """Curves with straight lines through a point of each: tangents, if they are what they claim to be.

    Args:
        panels: title to horizontal values (ascending), vertical values, the place of the point, and name to slope.
        x, y: what the axes show, with the unit.
    """
    figure = picture(2.7)
    for axes, (title, (xs, ys, at, lines_)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        height = ys[(xs - at).abs().argmin()].item()
        reach = 0.3 * (xs[-1] - xs[0]).item()
        axes.plot(xs.numpy(), ys.numpy(), color=GREY)
        for (name, slope), colour, dash in zip(lines_.items(), COLOURS, DASHES, strict=False):
            rise = slope * reach
            axes.plot([at - reach, at + reach], [height - rise, height + rise], dash, color=colour, label=name)
        axes.plot(at, height, "o", color="black", zorder=3)
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.legend(loc="upper right", handlelength=1.6)
    return figure


@styled
def learning_curve(history: Sequence[Row], *, levels: Mapping[str, float] | None = None) -> Picture:
    """Meta-loss and accuracy over the iterations of the outer loop.

    Args:
        history: rows as `metatutor.train` returns them.
        levels: name to height of thin lines among the accuracies, such as that of guessing.
    """
    figure = picture(4.2)
    above, below = figure.subplots(2, sharex=True, height_ratios=[2, 3])
    iterations = [row["iteration"] for row in history]
    above.plot(iterations, [row["meta_loss"] for row in history], color=GREY)
    above.set(ylabel="meta-loss (nats)", ylim=(0, None))
    train, validation = ([row[f"{split}_accuracy"] for row in history] for split in ("train", "validation"))
    below.plot(iterations, train, "--", color=ORANGE, lw=1.2, label="the tasks of that iteration")
    below.plot(iterations, validation, color=BLUE, marker="o" if len(history) < 30 else None, label="meta-validation")
    draw_levels(below, levels)
    below.set(xlabel="iteration of the outer loop", ylabel="accuracy")
    below.yaxis.set_major_formatter(PercentFormatter(1))
    below.legend(loc="lower right")
    return figure


@styled
def intervals(groups: Mapping[str, Mapping[str, tuple[float, float | None]]], *, x: str = "accuracy") -> Picture:
    """Accuracies as points with their intervals, one line per method, in separate groups.

    Args:
        groups: group to method to accuracy (0–1) and half the width of its interval; None where there is none.
        x: what the axis shows.
    """
    rows = [len(group) + 0.7 for group in groups.values()]
    figure = picture(0.37 * sum(rows) + 0.4 * len(rows) + 0.3)
    drawn = figure.subplots(len(rows), sharex=True, height_ratios=rows, squeeze=False)[:, 0]
    for axes, (title, group), colour, marker in zip(drawn, groups.items(), COLOURS, MARKERS, strict=False):
        axes.set(title=title, yticks=range(len(group)), yticklabels=[], ylim=(len(group) - 0.6, -0.9))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        for line, (name, (value, half)) in enumerate(group.items()):
            axes.errorbar(value, line, xerr=half or 0, fmt=marker, color=colour, capsize=3, elinewidth=1.5)
            for text, side, x_at in ((name, "left", 0), (f"{value:.1%}", "right", 1)):
                axes.annotate(text, (x_at, line), (0, 7), ("axes fraction", "data"), "offset points", ha=side, size=9)
    drawn[-1].xaxis.set_major_formatter(PercentFormatter(1))
    drawn[-1].set(xlabel=x, xlim=(None, 1.02))
    return figure


@styled
def by_layer(panels: Mapping[str, Mapping[str, Float[Tensor, " n"]]]) -> Picture:
    """Numbers of every layer, one per task or parameter, in panels side by side, each with zero on its axis.

    A tick is a number, a point the mean of a layer.

    Args:
        panels: what the axis shows to layer to values; the same layers in each.
    """
    names = list(next(iter(panels.values())))
    figure = picture(0.36 * len(names) + 1)
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, layers), colour in zip(row, panels.items(), COLOURS, strict=False):
        for y, values in enumerate(layers.values()):
            axes.plot(values.numpy(), [y] * len(values), "|", color=colour, alpha=0.5, ms=9)
            axes.plot(values.mean().item(), y, "o", color=colour, ms=7, markeredgecolor="white")
        axes.set(xlabel=title, yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        low, high = torch.cat(list(layers.values())).aminmax()
        room = 0.07 * max(high - low, high, -low).item()
        axes.set_xlim(low.item() - room if low < 0 else 0, high.item() + room)
    return figure


@styled
def bands(
    series: Mapping[str, Float[Tensor, "x task"]],
    at: Sequence[float],
    *,
    x: str,
    y: str = "accuracy",
    percent: bool = True,
    levels: Mapping[str, float] | None = None,
) -> Picture:
    """Mean accuracies, or other means, with their 95% intervals: few as points with bars, many as a line with a band.

    Args:
        series: name to accuracies (0–1), one per task, at each place of the horizontal axis.
        at: these places.
        x, y: what the axes show, with the unit.
        percent: whether the values are fractions, written as percentages.
        levels: name to height of thin horizontal lines, such as that of guessing.
    """
    figure = picture(3.3)
    axes = figure.subplots()
    looks = zip(COLOURS, DASHES, MARKERS, strict=True)
    for (name, values), (colour, dash, marker) in zip(series.items(), looks, strict=False):
        means, halves = values.mean(1).numpy(), torch.tensor([confidence95(of_tasks) for of_tasks in values]).numpy()
        if len(at) <= 8:
            axes.errorbar(at, means, halves, fmt=marker + dash, color=colour, capsize=3, elinewidth=1.2, label=name)
        else:
            axes.plot(at, means, dash, color=colour, label=name)
            axes.fill_between(at, means - halves, means + halves, color=colour, alpha=0.2, lw=0)
    for name, height in (levels or {}).items():
        axes.axhline(height, color=GREY, lw=1, ls=":")
        axes.text(1.01, height, name, transform=axes.get_yaxis_transform(), color=GREY, va="center", size=9)
    axes.set(xlabel=x, ylabel=y, ylim=(0, 1.03 if percent else None))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside upper left", ncols=2, alignment="left")
    return figure


@styled
def certainty(accuracies: Float[Tensor, " task"], n: int) -> Picture:
    """How much tasks differ, and how certain the mean of `n` of them is: what two kinds of ± say.

    Above, the first `n` accuracies; below, the interval of every `n`, and whether it holds the mean of all.

    Args:
        accuracies: one per task, 0–1.
        n: tasks in a measurement.
    """
    figure = picture(5)
    above, below = figure.subplots(2, height_ratios=[2, 3])
    measurements = accuracies[: len(accuracies) // n * n].view(-1, n)
    means, deviations = measurements.mean(1), measurements.std(1)
    halves, truth = 1.96 * deviations / n**0.5, accuracies.mean().item()
    values, counts = measurements[0].round(decimals=4).unique(return_counts=True)
    above.bar(values.numpy(), counts.numpy(), width=0.012, color=GREY)
    for half, colour, alpha, name in ((deviations, ORANGE, 0.3, "mean ± s"), (halves, BLUE, 0.6, "mean ± 1.96 s / √n")):
        low, high = (means - half)[0].item(), (means + half)[0].item()
        above.axvspan(low, high, color=colour, alpha=alpha, lw=0, zorder=0, label=name)
    above.set(title=f"One measurement: {n} tasks", xlabel="accuracy on one task", ylabel="tasks", xlim=(0, 1))
    order, hold = means.argsort(), (means - truth).abs() <= halves
    for colour, marker, name, which in ((BLUE, "o", "hold it", hold), (RED, "D", "miss it", ~hold)):
        rows, chosen = which[order].nonzero()[:, 0].numpy(), order[which[order]]
        bars = {"xerr": halves[chosen].numpy(), "fmt": marker, "ms": 3, "lw": 1.2, "color": colour}
        below.errorbar(means[chosen].numpy(), rows, **bars, label=f"{len(rows)} {name}")
    below.axvline(truth, color="black", lw=1, ls="--", label="mean of all tasks")
    below.set(title=f"{len(means)} measurements of {n} tasks, sorted", xlabel="mean accuracy", yticks=[])
    for axes in (above, below):
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(loc="upper left", handlelength=1.2)
    return figure
