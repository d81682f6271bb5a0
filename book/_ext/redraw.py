"""Write what the pad of the chapter on generation loads, `book/_static/redraw.js`, from the recorded model."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from metatutor.applications.generation import ConditionalVAE
from metatutor.book.figures.redraw import script
from metatutor.runs import results_folder

SCRIPT = Path(__file__).parents[1] / "_static" / "redraw.js"


def model() -> ConditionalVAE:
    """The recorded model."""
    found, weights = ConditionalVAE(), load_file(results_folder() / "studies/generation.safetensors")
    found.load_state_dict({name: value.float() for name, value in weights.items()})
    return found.eval()


def main() -> None:
    """Write the file."""
    SCRIPT.write_text(script(model()), encoding="utf-8")


if __name__ == "__main__":
    main()
