"""Write the pad of the landing page, `book/_static/alphabet.html`, from the recorded weights."""

from __future__ import annotations

from pathlib import Path

from metatutor.backbones import ConvNet
from metatutor.book import figures
from metatutor.runs import load_run

RUN = "omniglot-prototypical-20w1s"
PAGE = Path(__file__).parents[1] / "_static" / "alphabet.html"


def network() -> ConvNet:
    """The recorded embedding."""
    found = load_run(RUN).learner().network
    assert isinstance(found, ConvNet)
    return found


def main() -> None:
    """Write the page's piece."""
    PAGE.write_text(figures.drawn_alphabet(network()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
