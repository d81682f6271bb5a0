"""What a notebook shows that is not a plot: tables, pictures with buttons."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from html import escape
from zlib import crc32

from metatutor.figures.style import Picture


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
