"""Many methods at once: errors against cost, and places of many tasks."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

from jaxtyping import Float
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter
from torch import Tensor

from metatutor.book.figures.style import COLOURS, GREY, MARKERS, Picture, picture, styled

Point = tuple[float, float, float]  # cost, error and half the width of its interval


@styled
def cost(families: Mapping[str, Mapping[str, Point]], *, x: str, y: str = "wrong answers") -> Picture:
    """Errors against a cost, both on logarithmic axes: the lower left corner is where one wants to be.

    The names are in a column on the right, from the worst to the best, each with a line of its family's colour to its
    point.

    Args:
        families: family, shown by colour and marker, to method to cost, error (0–1) and half the width of its interval.
        x, y: what the axes show, with the unit.
    """
    n_methods = sum(map(len, families.values()))
    figure = picture(max(3.2, 0.22 * n_methods + 1.2))
    axes = figure.subplots()
    places: list[tuple[float, float, str, str]] = []
    for (family, methods), colour, marker in zip(families.items(), COLOURS, MARKERS, strict=False):
        for name, (at, error, half) in methods.items():
            low = min(half, 0.9 * error)  # a logarithmic axis has no zero
            axes.errorbar(at, error, [[low], [half]], fmt=marker, color=colour, capsize=2, elinewidth=1)
            places.append((error, at, name, colour))
        axes.plot([], [], marker, color=colour, label=family)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    for axis, formatter in ((axes.xaxis, "{x:g}"), (axes.yaxis, PercentFormatter(1, symbol="%"))):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(formatter)
        axis.set_minor_locator(NullLocator())
    for i, (error, at, name, colour) in enumerate(sorted(places, reverse=True)):
        height = 1 - (i + 0.5) / len(places)
        line = {"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkA": 2, "shrinkB": 3, "relpos": (0, 0.5)}
        axes.annotate(name, (at, error), (1.06, height), "data", "axes fraction", line, size=9, va="center")
    figure.legend(loc="outside upper left", ncols=2, alignment="left")
    return figure


@styled
def places(groups: Mapping[str, Float[Tensor, "n 2"]], *, x: str, y: str) -> Picture:
    """Points in a plane, distinguished by group.

    Args:
        groups: name to points.
        x, y: what the axes show.
    """
    figure = picture(3.9)
    axes = figure.subplots()
    looks = zip(cycle(COLOURS), cycle(MARKERS + "*"), strict=False)  # seven and eight: no pair twice among 56
    for (name, points), (colour, marker) in zip(groups.items(), looks, strict=False):
        axes.plot(*points.numpy().T, marker, color=colour, label=name, ms=6, alpha=0.8, mew=0)
    axes.set(xlabel=x, ylabel=y)
    figure.legend(loc="outside lower left", ncols=2, alignment="left")
    return figure


@styled
def differences(rows: Mapping[str, tuple[float, float]], *, x: str) -> Picture:
    """Differences with their intervals, one line each, and zero: an interval that excludes it separates two.

    Args:
        rows: name to difference and half the width of its interval, both as fractions; shown in percentage points.
        x: what the axis shows.
    """
    figure = picture(0.3 * len(rows) + 0.9)
    axes = figure.subplots()
    axes.axvline(0, color=GREY, lw=1)
    for line, (mean, half) in enumerate(rows.values()):
        clear = abs(mean) > half
        axes.errorbar(100 * mean, line, xerr=100 * half, fmt="o", color=COLOURS[0] if clear else GREY, capsize=3)
    axes.set(yticks=range(len(rows)), yticklabels=list(rows), ylim=(len(rows) - 0.4, -0.6), xlabel=x)
    return figure
