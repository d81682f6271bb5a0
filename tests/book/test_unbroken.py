"""Where lines of a page must not break."""

from __future__ import annotations

from docutils import nodes, utils
from unbroken import give_room, keep_together


def kept(*children: nodes.Node) -> list[str]:
    """What is kept together of a paragraph, whose text stays the same."""
    document = utils.new_document("page")
    document += nodes.paragraph("", "", *children)
    before = document.astext()
    keep_together(None, document, "page")
    assert document.astext() == before
    return [found.astext() for found in document.findall(nodes.inline)]


def test_the_shape_of_a_task() -> None:
    text = "Of 5-way 1-shot tasks, and few-shot ones."
    assert kept(nodes.Text(text), nodes.literal("", "5-way"), nodes.emphasis("", "20-way")) == [
        "5-way",
        "1-shot",
        "20-way",
    ]


def test_a_formula_and_what_touches_it() -> None:
    x, y = nodes.math("", "x"), nodes.math("", "y")
    assert kept(nodes.Text("with ("), x, nodes.Text(", or "), y, nodes.Text("-way) it is")) == ["(x,", "y-way)"]
    x, y = nodes.math("", "x"), nodes.math("", "y")
    assert kept(x, nodes.Text("/"), y, nodes.strong("", "bold")) == ["x/y"]


def test_chinese_words_touch_no_formula() -> None:
    x, y = nodes.math("", "x"), nodes.math("", "y")
    assert kept(nodes.Text("参数（"), x, nodes.Text("）。再看"), y, nodes.Text("的值")) == ["（x）。"]


def test_a_value_and_its_interval_outside_tables() -> None:
    text = "It is 98.7 ± 0.4% (or ± 0.2%)."
    assert kept(nodes.Text(text)) == ["98.7 ± 0.4%", "± 0.2%"]
    assert kept(nodes.Text(text), nodes.table("", nodes.paragraph("", text))) == ["98.7 ± 0.4%", "± 0.2%"]


def test_cells_with_sentences_get_room() -> None:
    document = utils.new_document("page")
    cells = [
        "98.7 ± 0.4",
        "twice as long, stopped on the way",
        "每步的任务更多，与论文一样大的网络",
        "关系网络是什么？",
    ]
    document += [nodes.entry("", nodes.paragraph("", text)) for text in cells]
    give_room(None, document, "page")
    assert ["mt-sentence" in cell["classes"] for cell in document.findall(nodes.entry)] == [False, True, True, False]
