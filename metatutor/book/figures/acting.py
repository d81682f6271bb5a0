"""Pictures of acting: walks in a plane, and a goal that the reader moves."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from metatutor.applications.navigation import REACH, STRIDE
from metatutor.applications.policy_gradient import MetaPolicy
from metatutor.book.figures.shown import Shown, identity, widget
from metatutor.book.figures.style import BLUE, GREY, ORANGE, Picture, picture, styled


@styled
def walks(
    panels: Mapping[str, tuple[Float[Tensor, "walk time 2"], Float[Tensor, "walk time 2"]]],
    goals: Float[Tensor, "panel 2"],
) -> Picture:
    """Walks before and after adaptation, a panel for each goal.

    Args:
        panels: title of a panel to places before and after.
        goals: where they should lead.
    """
    figure = picture(2.7 * ((len(panels) + 1) // 2) + 0.4)
    drawn = figure.subplots((len(panels) + 1) // 2, 2, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, (title, (before, after)), goal in zip(drawn, panels.items(), goals, strict=False):
        for places, colour, name in ((before, GREY, "before"), (after, BLUE, "after")):
            for i, walk in enumerate(places):
                axes.plot(*walk.numpy().T, color=colour, lw=0.8, alpha=0.7, label=name if not i else None)
        axes.plot(*goal.tolist(), "*", color=ORANGE, ms=13, mec="black", mew=0.7, label="goal", ls="none")
        title = re.sub(r"(?<!\w)-(?=\d)", "−", title)
        axes.set(title=title, aspect="equal", xlim=(-0.75, 0.75), ylim=(-0.75, 0.75))
    for axes in drawn[len(panels) :]:
        axes.axis("off")
    legend = figure.legend(*drawn[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, alignment="left")
    for line in legend.get_lines():
        line.set_linewidth(2)
    return figure


def movable_goal(learner: MetaPolicy, *, goal: tuple[float, float] = (0.3, 0.25), steps: int = 2) -> Shown:
    """A goal that the reader sets, and how a policy walks before and after it has adapted to it by policy gradients.

    The script holds the policy and the rates of its steps, rounded to 6 digits; it samples walks and adapts as
    `MetaPolicy` does.

    Args:
        learner: the one whose policy it is.
        goal: the initial goal.
        steps: the most steps of adaptation that can be taken.

    Raises:
        ValueError: if the goal lies outside, or there is no step.
    """
    if not max(map(abs, goal)) <= REACH:
        raise ValueError(f"a goal has two coordinates from {-REACH:g} to {REACH:g}, got {goal}")
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}")
    names = [name for name, _ in learner.policy.named_parameters()]
    state = {
        "policy": {name: _numbers(p) for name, p in learner.policy.named_parameters()},
        "rates": {name: _numbers(rate) for name, rate in zip(names, learner.rates, strict=True)},
        "goal": list(goal),
        "walks": learner.n_walks,
        "horizon": learner.horizon,
        "stride": STRIDE,
        "reach": REACH,
    }
    text = json.dumps(state, separators=(",", ":"))
    return widget("goal", id=identity("goal", text), state=text, goal=ORANGE, steps=steps)


def _numbers(tensor: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in tensor.detach().flatten().tolist()]
