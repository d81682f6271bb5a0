"""No line breaks within "5-way" or, outside tables, "98.7 ± 0.4%", or between a formula and what touches it.

On a phone, the cells of a table that hold much text stay wide enough to be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from docutils import nodes

TASK = re.compile(r"(\b\d+-(?:way|shot)\b)")
WITH_INTERVAL = re.compile(r"((?:\b\d[\d.]*\s)?±\s[\d.]*\d%?)")  # which may break in the narrow columns of a table
# what touches a formula; Chinese words do not, as Chinese has no spaces
AFTER = re.compile(r"(?:[^\s\u2e80-\U0010ffff]|[、。，；：！？）》」])*")
BEFORE = re.compile(r"(?:[^\s\u2e80-\U0010ffff]|[（《「])*\Z")
MUCH = 24  # characters; a cell with more of them needs room
VERBATIM = (nodes.literal, nodes.math, nodes.raw, nodes.FixedTextElement)


def keep_together(app: Any, doctree: nodes.document, page: str) -> None:
    """Put what belongs on one line into an element of its own; the text stays the one that readers search for."""
    for parent in dict.fromkeys(formula.parent for formula in doctree.findall(nodes.math)):
        pieces = list(_pieces(parent))
        parent.clear()
        for touching, group in groupby(pieces, key=lambda piece: piece[0]):
            children = [child for _, child in group]
            parent += [_whole(*children)] if touching and len(children) > 1 else children
    for pattern in (TASK, WITH_INTERVAL):
        for text in list(doctree.findall(nodes.Text)):
            spared = isinstance(text.parent, VERBATIM) or (pattern is WITH_INTERVAL and _in_table(text))
            parts = [part for part in enumerate(pattern.split(text)) if part[1]]
            if any(n % 2 for n, _ in parts) and not spared:
                pieces = [_whole(nodes.Text(part)) if n % 2 else nodes.Text(part) for n, part in parts]
                text.parent.replace(text, pieces)


def give_room(app: Any, doctree: nodes.document, page: str) -> None:
    """Mark cells of more than 24 characters, a Chinese one counting twice."""
    for cell in doctree.findall(nodes.entry):
        if sum(1 + (letter >= "\u2e80") for letter in cell.astext()) > MUCH:
            cell["classes"].append("mt-sentence")


def _in_table(node: nodes.Node | None) -> bool:
    while node is not None and not isinstance(node, nodes.table):
        node = node.parent
    return node is not None


def _pieces(parent: nodes.Element) -> Iterator[tuple[bool, nodes.Node]]:
    """What a parent of formulas contains, and whether it is a formula or touches one; texts are cut accordingly."""
    formula = [isinstance(child, nodes.math) for child in parent]
    beside = zip([False, *formula[:-1]], [*formula[1:], False], strict=True)
    for child, is_formula, (follows, precedes) in zip(parent, formula, beside, strict=True):
        if not isinstance(child, nodes.Text):
            yield is_formula, child
            continue
        begin = next(AFTER.finditer(child)).end() if follows else 0
        end = next(BEFORE.finditer(child, begin)).start() if precedes else len(child)
        parts = (True, child[:begin]), (False, child[begin:end]), (True, child[end:])
        yield from ((touching, nodes.Text(part)) for touching, part in parts if part)


def _whole(*children: nodes.Node) -> nodes.inline:
    return nodes.inline("", "", *children, classes=["mt-whole"])


def setup(app: Any) -> dict[str, bool]:
    """Connect the extension to Sphinx."""
    app.connect("doctree-resolved", keep_together)
    app.connect("doctree-resolved", give_room)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
