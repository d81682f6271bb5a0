"""Draw the picture of README.md, and the one that is shown with links to the book.

Of the same task: characters that the package draws, answered with recorded weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure

from metatutor.book import figures
from metatutor.data import Strokes
from metatutor.episodes import Episode, EpisodeSpec
from metatutor.runs import load_run

STATIC = Path(__file__).parents[1] / "_static"
INK, BLUE = "#222222", "#2f5d9e"


def preview(episode: Episode) -> Figure:
    """The question on 1200 × 630 pixels: five characters, and a sixth drawing."""
    figure = Figure(figsize=(12, 6.3), dpi=100, facecolor="white")
    figure.text(0.06, 0.86, "metatutor", size=30, color=BLUE, weight="bold")
    figure.text(0.06, 0.71, "How does a CNN learn a new class from one picture?", size=29, color=INK)
    shown = [*episode.support_images[0][episode.support_labels[0].argsort()], episode.query_images[0, 0]]
    for n, image in enumerate(shown):
        axes = figure.add_axes((0.06 + 0.125 * n + 0.09 * (n == 5), 0.32, 0.115, 0.115 * 12 / 6.3))
        axes.imshow(1 - image[0], cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=BLUE if n == 5 else "#bbbbbb", linewidth=4 if n == 5 else 1.5)
    figure.text(0.06, 0.2, "one drawing of each", size=20, color="#555555")
    figure.text(0.775, 0.2, "which is it?", size=20, color=BLUE)
    figure.text(
        0.06, 0.08, "An executable book on meta-learning, with a tested PyTorch package", size=20, color="#555555"
    )
    return figure


def main() -> None:
    """Write `book/_static/one_shot.svg` and `book/_static/preview.png`."""
    learner = load_run("strokes-maml-5w1s").learner()
    episode = Strokes.load().split().test.sampler(EpisodeSpec(5, 1, 2), seed=8).sample(1)
    with torch.no_grad():
        probabilities = learner(episode)[0].softmax(-1)
    picture = figures.answers(episode, probabilities, range(10))
    (STATIC / "one_shot.svg").write_text(picture.svg(), encoding="utf-8")
    preview(episode).savefig(STATIC / "preview.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
