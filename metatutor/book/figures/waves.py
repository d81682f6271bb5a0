"""Waves and the networks that learn them: curves after some steps, drawn, or to try in the static page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from itertools import cycle

from jaxtyping import Float
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from metatutor.backbones import MLP
from metatutor.book.figures.shown import Shown, identity, widget
from metatutor.book.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, Picture, picture, styled
from metatutor.data.sinusoids import Sinusoids

MOST_POINTS = 20
LOOKS = {"-": BLUE, "-.": GREEN, ":": PURPLE, (0, (6, 1)): RED, (0, (3, 1, 1, 1)): SKY}  # dash to colour, after a step


@styled
def waves(
    panels: Mapping[str, Mapping[int, Float[Tensor, " x"]]],
    x: Float[Tensor, " x"],
    *,
    points: Float[Tensor, "n 2"],
    truth: Float[Tensor, " x"],
) -> Picture:
    """A wave, its known points, and a network's curves after some inner steps, panel below panel.

    Args:
        panels: title, such as the name of the initial parameters, to inner steps to the outputs for each `x`.
        x: where the curves are drawn, ascending.
        points: the support set, `x` and `y` of each.
        truth: the heights of the wave.
    """
    figure = picture(2.1 * len(panels) + 0.8)
    drawn = figure.subplots(len(panels), sharex=True, sharey=True, squeeze=False)[:, 0]
    known = {"color": ORANGE, "mec": "black", "ms": 6, "zorder": 3}
    for axes, (title, curves) in zip(drawn, panels.items(), strict=True):
        axes.plot(x.numpy(), truth.numpy(), color="black", lw=0.8, label="true wave")
        axes.plot(*points.T.numpy(), "o", **known, label="support points")
        looks = cycle(LOOKS.items())
        for steps, heights in curves.items():
            dash, colour = next(looks) if steps else ("--", GREY)
            name = f"after {steps} step{'s' * (steps > 1)}" if steps else "before adaptation"
            axes.plot(x.numpy(), heights.numpy(), ls=dash, color=colour, label=name)
        axes.set(title=title, ylabel="y")
    drawn[-1].set(xlabel="x", xlim=(x[0].item(), x[-1].item()))
    names = {name: handle for axes in drawn for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(names.values()), list(names), loc="outside upper left", ncols=2, alignment="left")
    return figure


def adapting_wave(
    networks: Mapping[str, MLP],
    points: Float[Tensor, "n 2"],
    *,
    inner_lr: float,
    steps: int = 10,
    wave: Float[Tensor, " 2"] | None = None,
    waves: Sinusoids | None = None,
) -> Shown:
    """Points that the reader sets and moves, and the curve that a network draws after some gradient steps on them.

    The reader chooses the points, the initial parameters, the number of steps and their size. Each step goes down the
    mean squared error of all points, as in `MAML`; an error above 10,000 counts as diverged. The script holds the
    networks, rounded to 6 digits.

    Args:
        networks: name to initial parameters; one input and one output.
        points: the initial support set, `x` and `y` of each; 20 at most.
        inner_lr: initial step size; the reader can choose from a tenth of it to ten times as much.
        steps: how many steps can be taken.
        wave: amplitude and phase of the wave that the points come from, if it is to be drawn.
        waves: where new waves come from, and how far the axes reach; default: those of the MAML paper.

    Raises:
        ValueError: if there is no network or one with another shape, or an argument is out of range.

    Reference:
        Finn, Abbeel & Levine (2017), section 5.1 and figure 2.
    """
    waves = waves or Sinusoids()
    reach = (waves.x, (-1.2 * waves.amplitude[1], 1.2 * waves.amplitude[1]))
    _check(networks, points, inner_lr, steps, reach)
    state = {
        "networks": [_layers(network) for network in networks.values()],
        "points": _rounded(points.tolist()),
        "wave": None if wave is None else _rounded(wave.tolist()),
        "rate": inner_lr,
        "steps": steps,
        "most": MOST_POINTS,
        "waves": vars(waves),
        "reach": reach,
        "ticks": [_ticks(*ends) for ends in reach],
    }
    text = json.dumps(state, separators=(",", ":"))
    name = identity("wave", text)
    radios = "".join(
        f'<input type="radio" name="{name}" id="{name}-{i}"{" checked" * (i == 0)}>'
        f'<label for="{name}-{i}">{escape(title)}</label>'
        for i, title in enumerate(networks)
    )
    return widget("wave", id=name, radios=radios, steps=steps, state=text, point=ORANGE)


def _check(
    networks: Mapping[str, MLP], points: Tensor, inner_lr: float, steps: int, reach: tuple[tuple[float, float], ...]
) -> None:
    if not networks:
        raise ValueError("networks must name at least one network")
    for name, network in networks.items():
        inputs = _linears(network)[0].in_features if isinstance(network, MLP) else None
        if inputs != 1 or network.n_outputs != 1:
            raise ValueError(
                f"networks[{name!r}] must be an MLP with one input and one output, "
                f"got {type(network).__name__} with {inputs} and {network.n_outputs}"
            )
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points must be [n, 2], an x and a y in each row, got {list(points.shape)}")
    if len(points) > MOST_POINTS:
        raise ValueError(f"there is room for {MOST_POINTS} points, got {len(points)}")
    low, high = points.new_tensor(reach).T
    if not ((low <= points) & (points <= high)).all():
        raise ValueError(f"points must lie within x from {reach[0][0]} to {reach[0][1]}, y up to ±{reach[1][1]}")
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    if not inner_lr > 0:
        raise ValueError(f"inner_lr must be positive, got {inner_lr}")


def _ticks(low: float, high: float) -> list[float]:
    return [float(tick) for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]


def _linears(network: MLP) -> list[nn.Linear]:
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear)]


def _layers(network: MLP) -> list[tuple[list[float], list[float]]]:
    """Weights, row after row, and biases of every layer."""
    return [(_rounded(layer.weight.flatten().tolist()), _rounded(layer.bias.tolist())) for layer in _linears(network)]


def _rounded(values: list) -> list:
    """The numbers of a list of lists to six digits."""
    return [_rounded(v) if isinstance(v, list) else float(f"{v:.6g}") for v in values]
