"""The one style of all pictures: crisp SVG, about as wide as a phone at its natural size."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import Any, ParamSpec

from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, RED, GREEN, ORANGE, PURPLE, SKY, GREY = (  # Okabe and Ito's, and a grey
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#56B4E9",
    "#666666",
)


COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, GREY)


MARKERS, DASHES = "osD^vPX", ("-", "--", "-.", ":", "-", "--", "-.")


WIDTH = 4.7  # inches


STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "svg.hashsalt": "metatutor",
}


# the usual fonts with Chinese characters of Linux, macOS and Windows
CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "PingFang HK",
    "Hiragino Sans GB",
    "Heiti TC",
    "Microsoft YaHei",
    "SimHei",
    "Arial Unicode MS",
)


# the fonts above have one weight each; matplotlib would say so in the middle of a chapter
logging.getLogger("matplotlib.font_manager").addFilter(lambda record: "font weight" not in record.getMessage())


P = ParamSpec("P")


class Picture(Figure):
    """A figure that a notebook shows as SVG, whatever plotting backend is set, or none."""

    def svg(self) -> str:
        """The figure as SVG; the same figure gives the same text."""
        with rc_context(settings()), io.StringIO() as file:
            self.savefig(file, format="svg", metadata={"Date": None})
            return file.getvalue()

    def _repr_svg_(self) -> str:
        return self.svg()


def settings() -> dict[Any, Any]:
    """The style, with the fonts of this system."""
    return STYLE | {"font.family": font_families(font_manager.get_font_names())}


def font_families(installed: Collection[str]) -> list[str]:
    """Matplotlib's own font, and those used for the characters it lacks; only fonts that are installed.

    Args:
        installed: the names of all fonts.

    Example:
        >>> font_families(["DejaVu Sans", "SimHei"])
        ['sans-serif', 'SimHei']
    """
    return ["sans-serif", *(name for name in CJK_FONTS if name in installed)]


def styled(draw: Callable[P, Picture]) -> Callable[P, Picture]:
    """Let a function draw in the book's style, and leave everyone else's as it is."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Picture:
        with rc_context(settings()):
            return draw(*args, **kwargs)

    return styled


def picture(height: float, width: float = WIDTH) -> Picture:
    """An empty figure, its size in inches."""
    return Picture(figsize=(width, height), layout="constrained")


def colour_of(label: int) -> str:
    """The colour of a class."""
    return COLOURS[label % len(COLOURS)]


def draw_levels(axes: Axes, levels: Mapping[str, float] | None, right: Collection[str] = ()) -> None:
    """Thin horizontal lines with their names, at the left or, those named in `right`, at the right."""
    for name, height in (levels or {}).items():
        axes.axhline(height, color=GREY, lw=1, ls=":")
        at, side = (0.98, "right") if name in right else (0.02, "left")
        place = ("axes fraction", "data"), "offset points"
        axes.annotate(name, (at, height), (0, 3), *place, color=GREY, ha=side, annotation_clip=False)
