"""Draw the picture of README.md: a task of characters that the package draws, answered with recorded weights."""

from __future__ import annotations

from pathlib import Path

import torch

from metatutor.book import figures
from metatutor.data import Strokes
from metatutor.episodes import EpisodeSpec
from metatutor.runs import load_run


def main() -> None:
    """Write `book/_static/one_shot.svg`."""
    learner = load_run("strokes-maml-5w1s").learner()
    episode = Strokes.load().split().test.sampler(EpisodeSpec(5, 1, 2), seed=8).sample(1)
    with torch.no_grad():
        probabilities = learner(episode)[0].softmax(-1)
    path = Path(__file__).parents[1] / "_static" / "one_shot.svg"
    path.write_text(figures.answers(episode, probabilities, range(10)).svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
