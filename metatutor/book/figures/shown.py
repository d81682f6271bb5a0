"""What a notebook shows that is not a plot: tables, pictures with buttons."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from zlib import crc32

from metatutor.book.figures.style import Picture


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


class _Widget(Template):
    """A piece of a page whose gaps, `FILL_name`, look like names to linters of HTML, CSS and JavaScript."""

    delimiter = "FILL_"
    flags = re.NOFLAG


def widget(name: str, **fill: object) -> Shown:
    """A file of `widgets/`, each `FILL_name` in it replaced by the text of that name.

    Args:
        name: name of the file, without `.html`.
        fill: gap to text; HTML where HTML belongs. Widgets share `FILL_theme`, their colours, and `FILL_scan`.

    Returns:
        HTML, which a notebook shows.

    Raises:
        KeyError: if there is no text for a gap.
    """
    text, theme, scan = (_file(file).strip() for file in (f"{name}.html", "theme.css", "scan.js"))
    return Shown(_Widget(_Widget(text).safe_substitute(theme=theme, scan=scan)).substitute(fill))


def _file(name: str) -> str:
    return files("metatutor.book").joinpath("widgets", name).read_text(encoding="utf-8")


def identity(kind: str, content: str) -> str:
    """An id for a widget of a page: the same for the same content, different for different content."""
    return f"{kind}-{crc32(content.encode()):08x}"


def table(head: Sequence[object], *rows: Sequence[object]) -> Shown:
    """A table in Markdown; columns of figures are aligned right, and a `|` in an entry divides nothing.

    Args:
        head: one title per column.
        rows: one entry per column; anything that can be printed; an empty text is shown as –.

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
    of_figures = [all(map(_FIGURE.match, column)) for column in zip(*texts, strict=True)]
    marks = ["--:" if right else ":--" for right in of_figures] or [":--"] * len(head)
    cells = [[re.sub(r"(?<!\\)\|", r"\\|", str(entry)) for entry in row] for row in (head, *texts)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return Shown("\n".join([lines[0], "|" + "|".join(marks) + "|", *lines[1:]]))


_FIGURE = re.compile(r"[\d+\-−–.](?!\d*-[a-z])")  # 5-way begins a name


def _entry(entry: object) -> str:
    """Thousands separated by commas, minus signs for minus signs, and no line break within −5.6 ± 0.4%."""
    text = f"{entry:,}" if type(entry) is int else str(entry) or "–"
    return re.sub(r"(?<![\w-])-(?=[\d.])", "−", text).replace(" ± ", "\u00a0±\u00a0")


def stepper(frames: Mapping[str, Picture], *, alt: str) -> Shown:
    """Pictures, one of which the reader chooses by a button, as HTML that needs no script, no kernel and no network.

    Args:
        frames: button to picture; all of one size.
        alt: what the pictures show, for readers who cannot see them; the button's text is added.

    Returns:
        HTML, which a notebook shows.
    """
    pictures = [base64.b64encode(picture.svg().encode()).decode() for picture in frames.values()]
    name = identity("steps", "".join(pictures))
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
    return widget("steps", id=name, buttons=buttons, images=images, chosen=chosen)


def live() -> bool:
    """Whether somebody uses this kernel and can use a widget: in Jupyter, Colab or VS Code, not in a build."""
    return any(name in os.environ for name in ("JPY_SESSION_NAME", "COLAB_RELEASE_TAG", "VSCODE_PID"))
