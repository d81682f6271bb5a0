"""Every picture and table of the book, in one style; the only place that draws.

Each function returns a figure that a notebook shows by naming it, as crisp SVG, about as wide as a phone at its natural
size, in colours that colour-blind readers can tell apart. Images are `[height, width]`, 0 (paper) to 1 (ink).
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from html import escape
from typing import Any, ParamSpec
from zlib import crc32

import torch
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, Rectangle
from torch import Tensor

from metatutor.episodes import Episode
from metatutor.evaluation import confidence95

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
_MARKERS, _DASHES = "osD^vPX", ("-", "--", "-.", ":", "-", "--", "-.")
_WIDTH = 4.7  # inches
_STYLE: dict[Any, Any] = {
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

Row = Mapping[str, float]
P = ParamSpec("P")


class Picture(Figure):
    """A figure that a notebook shows as SVG, whatever plotting backend is set, or none.

    Example:
        >>> Picture(figsize=(1, 1)).svg().startswith("<?xml")
        True
    """

    def svg(self) -> str:
        """The figure as SVG; the same figure, the same text."""
        with rc_context(_STYLE), io.StringIO() as file:
            self.savefig(file, format="svg", metadata={"Date": None})
            return file.getvalue()

    def _repr_svg_(self) -> str:
        return self.svg()


def _styled(draw: Callable[P, Picture]) -> Callable[P, Picture]:
    """Let a function draw in the book's style, and leave everyone else's as it is."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Picture:
        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def _picture(height: float, width: float = _WIDTH) -> Picture:
    """An empty figure, its size in inches."""
    return Picture(figsize=(width, height), layout="constrained")


class Shown(str):
    """Text that a notebook shows as what it means: a table in Markdown, or HTML.

    Example:
        >>> Shown("<b>bold</b>")._repr_html_()
        '<b>bold</b>'
    """

    def _repr_html_(self) -> str | None:
        return self if self.startswith("<") else None

    def _repr_markdown_(self) -> str | None:
        return self if self.startswith("|") else None


def table(head: Sequence[object], *rows: Sequence[object]) -> Shown:
    """A table in Markdown; columns of figures stand to the right.

    Args:
        head: a title a column.
        rows: one entry a column; anything that can be printed.

    Raises:
        ValueError: if a row is longer or shorter than the head.

    Example:
        >>> print(table(("method", "accuracy"), ("MAML", "95.6%")))
        | method | accuracy |
        |:--|--:|
        | MAML | 95.6% |
    """
    if wrong := [row for row in rows if len(row) != len(head)]:
        raise ValueError(f"the head has {len(head)} columns but a row has {len(wrong[0])}: {wrong[0]}")
    texts = [[_entry(entry) for entry in row] for row in rows]
    of_figures = [all(not text or text[0] in _FIGURES for text in column) for column in zip(*texts, strict=True)]
    marks = ["--:" if right else ":--" for right in of_figures] or [":--"] * len(head)
    lines = ["| " + " | ".join(str(entry) for entry in row) + " |" for row in (head, *texts)]
    return Shown("\n".join([lines[0], "|" + "|".join(marks) + "|", *lines[1:]]))


_FIGURES = "0123456789+-−–."


def _entry(entry: object) -> str:
    """Thousands parted by commas, and no line break within 95.6 ± 0.4%."""
    text = f"{entry:,}" if type(entry) is int else str(entry)
    return text.replace(" ± ", "\u00a0±\u00a0")


# --- images ---


def _tiles(
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


@_styled
def characters(rows: Mapping[str, Float[Tensor, "n h w"]]) -> Picture:
    """Rows of images, each under its title.

    Args:
        rows: title to images; all rows as long as the longest look best.

    Example:
        >>> figure = characters({"Omniglot": torch.rand(8, 28, 28), "Strokes": torch.rand(8, 28, 28)})
    """
    longest = max(len(images) for images in rows.values())
    figure = _picture(len(rows) * (_WIDTH / longest + 0.3))
    for axes, (title, images) in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows.items(), strict=True):
        axes.set(title=title, xlim=(0, longest), ylim=(1, 0), aspect="equal")
        axes.axis("off")
        for i, image in enumerate(images):
            axes.imshow(
                image.numpy(), cmap="gray_r", vmin=0, vmax=1, extent=(i + 0.04, i + 0.96, 1, 0), interpolation="none"
            )
    return figure


@_styled
def task(episode: Episode, index: int = 0) -> Picture:
    """One task: the labelled support images, and below them the query images, in an order that gives nothing away.

    Args:
        episode: its first channel is drawn.
        index: which of its tasks.

    Example:
        >>> images, labels = torch.rand(1, 5, 1, 28, 28), torch.arange(5).repeat(1, 1)
        >>> figure = task(Episode(images, labels, images, labels, n_way=5))
    """
    support, query = episode.support_images[index, :, 0].cpu(), episode.query_images[index, :, 0].cpu()
    names, answers = episode.support_labels[index].tolist(), episode.query_labels[index].tolist()
    order = torch.randperm(len(query), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [-(-len(images) // episode.n_way) for images in (support, query)]
    figure = _picture(1.1 * sum(rows) + 0.5, 4.4)
    above, below = figure.subplots(2, height_ratios=rows)
    above.set_title("Support: what the task is learned from")
    _tiles(above, support, episode.n_way, [f"class {n}" for n in names], [_of(n) for n in names])
    below.set_title("Query: which class is it? (the answer in grey)")
    _tiles(below, query[order], episode.n_way, [str(answers[i]) for i in order], [GREY] * len(order))
    return figure


def _of(label: int) -> str:
    """The colour of a class."""
    return COLOURS[label % len(COLOURS)]


# --- curves and points ---


@_styled
def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    log_x: bool = False,
    percent: bool = False,
    levels: Mapping[str, float] | None = None,
) -> Picture:
    """Curves over one another, told apart by colour, dash and marker.

    Args:
        series: name to horizontal and vertical values.
        x, y: what the axes show, with the unit.
        log_x: whether the horizontal axis is logarithmic.
        percent: whether the vertical values, fractions, are written as percentages.
        levels: name to height of thin horizontal lines, such as that of guessing.

    Example:
        >>> figure = lines({"MAML": ([0, 1, 2], [0.2, 0.9, 0.95])}, x="inner steps", y="accuracy")
    """
    figure = _picture(3.2)
    axes = figure.subplots()
    for (name, (xs, ys)), colour, dash, marker in zip(series.items(), COLOURS, _DASHES, _MARKERS, strict=False):
        axes.plot(xs, ys, dash, color=colour, marker=marker, label=name)
    _levels(axes, levels)
    axes.set(xlabel=x, ylabel=y, xscale="log" if log_x else "linear")
    if percent:
        axes.yaxis.set_major_formatter("{x:.0%}")
    if len(series) > 1:
        figure.legend(loc="outside upper left", ncols=2, alignment="left")
    return figure


@_styled
def slopes(
    panels: Mapping[str, tuple[Float[Tensor, " n"], Float[Tensor, " n"], float, Mapping[str, float]]], *, x: str, y: str
) -> Picture:
    """Curves with straight lines through a point of each: tangents, if they are what they claim to be.

    Args:
        panels: title to horizontal values (ascending), vertical values, the place of the point, and name to slope.
        x, y: what the axes show, with the unit.

    Example:
        >>> w = torch.linspace(-1, 1, 21)
        >>> figure = slopes({"a parabola": (w, w**2, 0.5, {"tangent": 1.0})}, x="w", y="loss")
    """
    figure = _picture(2.7)
    for axes, (title, (xs, ys, at, lines_)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        height = ys[(xs - at).abs().argmin()].item()
        reach = 0.3 * (xs[-1] - xs[0]).item()
        axes.plot(xs.numpy(), ys.numpy(), color=GREY)
        for (name, slope), colour, dash in zip(lines_.items(), COLOURS, _DASHES, strict=False):
            rise = slope * reach
            axes.plot([at - reach, at + reach], [height - rise, height + rise], dash, color=colour, label=name)
        axes.plot(at, height, "o", color="black", zorder=3)
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.legend(loc="upper right", handlelength=1.6)
    return figure


@_styled
def learning_curve(history: Sequence[Row], *, levels: Mapping[str, float] | None = None) -> Picture:
    """Meta-loss and accuracy over the iterations of the outer loop.

    Args:
        history: rows as `metatutor.train` returns them.
        levels: name to height of thin lines among the accuracies, such as that of guessing.

    Example:
        >>> row = {"iteration": 1, "seconds": 1, "meta_loss": 1.6, "train_accuracy": 0.2, "validation_accuracy": 0.2}
        >>> figure = learning_curve([row], levels={"guessing": 0.2})
    """
    figure = _picture(4.2)
    above, below = figure.subplots(2, sharex=True, height_ratios=[2, 3])
    iterations = [row["iteration"] for row in history]
    above.plot(iterations, [row["meta_loss"] for row in history], color=GREY)
    above.set(ylabel="meta-loss (nats)", ylim=(0, None))
    train, validation = ([row[f"{split}_accuracy"] for row in history] for split in ("train", "validation"))
    below.plot(iterations, train, "--", color=ORANGE, lw=1.2, label="the tasks of that iteration")
    below.plot(iterations, validation, color=BLUE, marker="o" if len(history) < 30 else None, label="meta-validation")
    _levels(below, levels)
    below.set(xlabel="iteration of the outer loop", ylabel="accuracy")
    below.yaxis.set_major_formatter("{x:.0%}")
    below.legend(loc="lower right")
    return figure


def _levels(axes: Axes, levels: Mapping[str, float] | None) -> None:
    for name, height in (levels or {}).items():
        axes.axhline(height, color=GREY, lw=1, ls=":")
        axes.annotate(
            name, (0.02, height), (0, 3), ("axes fraction", "data"), "offset points", color=GREY, annotation_clip=False
        )


@_styled
def intervals(groups: Mapping[str, Mapping[str, tuple[float, float | None]]], *, x: str = "accuracy") -> Picture:
    """Accuracies as points with their intervals, one line a method, in groups that are told apart.

    Args:
        groups: group to method to accuracy (0–1) and half the width of its interval; None where there is none.
        x: what the axis shows.

    Example:
        >>> figure = intervals({"here": {"MAML": (0.95, 0.004)}, "published": {"MAML": (0.987, None)}})
    """
    rows = [len(group) + 0.7 for group in groups.values()]
    figure = _picture(0.37 * sum(rows) + 0.4 * len(rows) + 0.3)
    drawn = figure.subplots(len(rows), sharex=True, height_ratios=rows, squeeze=False)[:, 0]
    for axes, (title, group), colour, marker in zip(drawn, groups.items(), COLOURS, _MARKERS, strict=False):
        axes.set(title=title, yticks=range(len(group)), yticklabels=[], ylim=(len(group) - 0.6, -0.9))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        for line, (name, (value, half)) in enumerate(group.items()):
            axes.errorbar(value, line, xerr=half or 0, fmt=marker, color=colour, capsize=3, elinewidth=1.5)
            for text, side, x_at in ((name, "left", 0), (f"{value:.1%}", "right", 1)):
                axes.annotate(text, (x_at, line), (0, 7), ("axes fraction", "data"), "offset points", ha=side, size=9)
    drawn[-1].xaxis.set_major_formatter("{x:.0%}")
    drawn[-1].set(xlabel=x, xlim=(None, 1.02))
    return figure


# --- adaptation, step by step ---


@_styled
def adaptation(episode: Episode, path: Float[Tensor, "step query way"], shown: Sequence[int]) -> Picture:
    """What one task's query images are taken for, before the first inner step and after each.

    Args:
        episode: its first task is drawn.
        path: predicted probabilities, before the first step and after each.
        shown: which query images.

    Example:
        >>> images, labels = torch.rand(1, 5, 1, 28, 28), torch.arange(5).repeat(1, 1)
        >>> path = torch.rand(4, 5, 5).softmax(-1)
        >>> figure = adaptation(Episode(images, labels, images, labels, n_way=5), path, shown=[0, 2, 4])
    """
    figure = _picture(0.52 * (len(path) + 1.4))
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


@_styled
def answers(episode: Episode, probabilities: Float[Tensor, "query way"], shown: Sequence[int]) -> Picture:
    """One task at one moment: the support images, and what chosen query images are taken for, and how surely.

    Args:
        episode: its first task is drawn.
        probabilities: predicted for the query images.
        shown: which query images.

    Example:
        >>> images, labels = torch.rand(1, 5, 1, 28, 28), torch.arange(5).repeat(1, 1)
        >>> episode = Episode(images, labels, images, labels, n_way=5)
        >>> figure = answers(episode, torch.eye(5), shown=[0, 1, 2, 3, 4])
    """
    support, query = episode.support_images[0, :, 0].cpu(), episode.query_images[0, :, 0].cpu()
    labels, truth = episode.support_labels[0].tolist(), episode.query_labels[0].tolist()
    probability, predicted = (of_query.tolist() for of_query in probabilities.max(-1))
    rows = [-(-len(support) // episode.n_way), -(-len(shown) // episode.n_way)]
    figure = _picture(1.1 * sum(rows) + 0.5, 4.4)
    above, below = figure.subplots(2, height_ratios=rows)
    right = sum(predicted[i] == truth[i] for i in shown)
    above.set_title("Support")
    _tiles(above, support, episode.n_way, [f"class {n}" for n in labels], [GREY] * len(labels))
    below.set_title(f"Query: {right} of {len(shown)} right")
    captions = [f"{'✓' if predicted[i] == truth[i] else '✗'} {predicted[i]} ({probability[i]:.0%})" for i in shown]
    _tiles(below, query[list(shown)], episode.n_way, captions, [BLUE if c[0] == "✓" else RED for c in captions])
    return figure


def stepper(frames: Mapping[str, Picture], *, alt: str) -> Shown:
    """Pictures of which the reader chooses one by a button, as HTML that needs no script, no kernel and no network.

    Args:
        frames: button to picture; all of one size.
        alt: what the pictures show, for those who cannot see; the button's text is added.

    Returns:
        HTML, which a notebook shows.

    Example:
        >>> "step 1" in stepper({"step 0": Picture(), "step 1": Picture()}, alt="An empty figure")
        True
    """
    pictures = [base64.b64encode(picture.svg().encode()).decode() for picture in frames.values()]
    name = f"steps-{crc32(''.join(pictures).encode()):08x}"
    buttons = "".join(
        f'<input type="radio" name="{name}" id="{name}-{i}"{" checked" * (i == 0)}>'
        f'<label for="{name}-{i}">{escape(text)}</label>'
        for i, text in enumerate(frames)
    )
    images = "".join(
        f'<img src="data:image/svg+xml;base64,{picture}" alt="{escape(f"{alt}: {text}")}">'
        for text, picture in zip(frames, pictures, strict=True)
    )
    chosen = ",".join(
        f"#{name} input:nth-of-type({i}):checked~div img:nth-child({i})" for i in range(1, len(pictures) + 1)
    )
    style = _STEPPER.replace("#it", f"#{name}") + chosen + "{display:block}"
    body = f'<div id="{name}" role="radiogroup" aria-label="step">{buttons}<div>{images}</div></div>'
    return Shown(f"<style>{style}</style>{body}")


_STEPPER = """
#it{max-width:28rem;margin:1rem 0}
#it input{position:absolute;opacity:0}
#it label{display:inline-block;cursor:pointer;padding:.3rem .8rem;margin:0 .3rem .5rem 0;border-radius:.5rem;
border:1px solid var(--pst-color-border,#aaa)}
#it input:checked+label{background:var(--pst-color-primary,#0072B2);color:var(--pst-color-background,#fff)}
#it input:focus-visible+label{outline:3px solid var(--pst-color-primary,#0072B2);outline-offset:2px}
#it img{display:none;width:100%;background:#fff}
"""


def live() -> bool:
    """Whether somebody sits at this kernel and can use a widget: in Jupyter, Colab or VS Code, not in a build.

    Example:
        >>> live() in (True, False)
        True
    """
    return any(name in os.environ for name in ("JPY_SESSION_NAME", "COLAB_RELEASE_TAG", "VSCODE_PID"))


# --- what moved ---


@_styled
def by_layer(panels: Mapping[str, Mapping[str, Float[Tensor, " task"]]]) -> Picture:
    """One number a layer and task, in panels side by side: small points for the tasks, a large one for their mean.

    Args:
        panels: what the axis shows to layer to values; the same layers in each.

    Example:
        >>> figure = by_layer({"relative change": {"conv 1": torch.rand(8), "fully connected 1": torch.rand(8)}})
    """
    names = list(next(iter(panels.values())))
    figure = _picture(0.36 * len(names) + 1)
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, layers), colour in zip(row, panels.items(), COLOURS, strict=False):
        for y, values in enumerate(layers.values()):
            axes.plot(values.numpy(), [y] * len(values), "|", color=colour, alpha=0.5, ms=9)
            axes.plot(values.mean().item(), y, "o", color=colour, ms=7, markeredgecolor="white")
        axes.set(xlabel=title, yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        axes.set_xlim(0, None)
    return figure


# --- what an accuracy is worth ---


@_styled
def bands(
    series: Mapping[str, Float[Tensor, "x task"]],
    at: Sequence[float],
    *,
    x: str,
    y: str = "accuracy",
    levels: Mapping[str, float] | None = None,
) -> Picture:
    """Mean accuracies with their 95% intervals: few as points with bars, many as a line with a band.

    Args:
        series: name to accuracies (0–1), one a task, at each place of the horizontal axis.
        at: these places.
        x, y: what the axes show, with the unit.
        levels: name to height of thin horizontal lines, such as that of guessing.

    Example:
        >>> figure = bands({"CNN": torch.rand(3, 50)}, at=[1, 2, 5], x="shots", levels={"guessing": 0.2})
    """
    figure = _picture(3.3)
    axes = figure.subplots()
    looks = zip(COLOURS, _DASHES, _MARKERS, strict=True)
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
    axes.set(xlabel=x, ylabel=y, ylim=(0, 1.03))
    axes.yaxis.set_major_formatter("{x:.0%}")
    figure.legend(loc="outside upper left", ncols=2, alignment="left")
    return figure


@_styled
def certainty(accuracies: Float[Tensor, " task"], n: int) -> Picture:
    """How far tasks lie apart, and how sure the mean of `n` of them is: what two kinds of ± say.

    Above, the first `n` accuracies; below, the interval of every `n`, and whether it holds the mean of all.

    Args:
        accuracies: one a task, 0–1.
        n: tasks in a measurement.

    Example:
        >>> figure = certainty(torch.rand(400), n=20)
    """
    figure = _picture(5)
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
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.legend(loc="upper left", handlelength=1.2)
    return figure


# --- the three families ---


@_styled
def families(episode: Episode) -> Picture:
    """Three ways to learn a task, drawn with the characters of tasks; places and lengths are drawn, not measured.

    Args:
        episode: three tasks or more, of three classes or more, one support image of each.

    Example:
        >>> images, labels = torch.rand(3, 5, 1, 28, 28), torch.arange(5).repeat(3, 1)
        >>> figure = families(Episode(images, labels, images, labels, n_way=5))
    """
    figure = _picture(7.2)
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


def _stamp(axes: Axes, image: Float[Tensor, "1 h w"], x: float, y: float, colour: str, side: float = 0.9) -> None:
    """A small image in a frame, its middle at (x, y)."""
    left, right, low, high = x - side / 2, x + side / 2, y - side / 2, y + side / 2
    pixels, extent = image[0].cpu().numpy(), (left, right, low, high)
    axes.imshow(pixels, cmap="gray_r", vmin=0, vmax=1, extent=extent, interpolation="none", zorder=3)
    axes.add_patch(Rectangle((left, low), side, side, fill=False, edgecolor=colour, lw=1.6, zorder=4))


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, width: float = 1.4) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "lw": width, "shrinkA": 0})


def _compare(axes: Axes, episode: Episode) -> None:
    """Support images are points; the query image belongs to the nearest."""
    query, places = (5.7, 1.5), ((2.2, 2.9), (2.6, 0.9), (7.4, 2.6))
    for label, (x, y) in enumerate(places):
        nearest = label == len(places) - 1
        dash, width = ("-", 2.4) if nearest else (":", 1.2)
        axes.plot([query[0], x], [query[1], y], dash, lw=width, color=_of(label))
        axes.plot(x, y, "o", color=_of(label), ms=10, zorder=3)
        _stamp(axes, episode.support_images[0, label], x + (0.8 if nearest else -0.8), y, _of(label))
    axes.plot(*query, "X", color="black", ms=10, zorder=3)
    _stamp(axes, episode.query_images[0, _first_query(episode, 0, 2)], query[0] + 0.1, query[1] - 0.85, "black")
    axes.text(6.75, 1.75, "nearest", color=_of(2), va="center")
    axes.text(query[0] + 0.7, query[1] - 0.85, "query", va="center")


def _adapt(axes: Axes, episode: Episode) -> None:
    """From the learned parameters a short way leads into the valley of each task."""
    start, valleys = (4.7, 1.7), ((2.6, 2.8), (2.9, 0.9), (7.2, 2.4))
    axes.plot([9.6, 8.3, 7.4, 6.2, 5.4, start[0]], [0.5, 0.35, 0.8, 0.75, 1.3, start[1]], color=GREY, lw=1.4, ls="--")
    axes.text(7.7, 0.75, "meta-training", color=GREY)
    for task, (x, y) in enumerate(valleys):
        for size in (0.5, 1.0, 1.5):
            axes.add_patch(Ellipse((x, y), 1.3 * size, 0.8 * size, fill=False, edgecolor=_of(task), lw=0.8, alpha=0.7))
        _arrow(axes, start, (x, y), _of(task), 2)
        away = -1 if x < start[0] else 1
        for i in range(2):
            _stamp(axes, episode.support_images[task, i], x + away * (1.3 + 0.75 * i), y, _of(task), side=0.65)
    axes.plot(*start, "o", color="black", ms=9, zorder=3)
    axes.text(start[0], start[1] - 0.25, "learned\nstart θ", ha="center", va="top")


def _remember(axes: Axes, episode: Episode) -> None:
    """Support images are written into rows, with their labels; the query image reads the row that fits."""
    shades = torch.rand(4, 6, generator=torch.Generator().manual_seed(3)).tolist()
    for row, keys in enumerate(shades):
        y = 3.15 - 0.8 * row
        for column, shade in enumerate(keys):
            axes.add_patch(Rectangle((3.2 + 0.4 * column, y - 0.2), 0.4, 0.4, facecolor=str(0.45 + 0.5 * shade)))
        if row < 3:
            _stamp(axes, episode.support_images[0, row], 1, 3 - 1.15 * row, _of(row))
            _arrow(axes, (1.6, 3 - 1.15 * row), (3.1, y), _of(row))
            axes.text(5.75, y, f"class {row}", color=_of(row), va="center")
    _stamp(axes, episode.query_images[0, _first_query(episode, 0, 2)], 9, 2.2, "black")
    _arrow(axes, (6.95, 1.6), (8.4, 2.1), _of(2), 2.4)
    for text, x, y in (("write", 2.3, 3.4), ("memory", 4.4, 0.25), ("read", 7.4, 2.3), ("query", 9, 1.4)):
        axes.text(x, y, text, color=GREY, ha="center", va="center")


def _first_query(episode: Episode, task: int, label: int) -> int:
    return int((episode.query_labels[task] == label).int().argmax())
