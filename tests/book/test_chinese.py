"""The Chinese edition: complete, its markup that of the English, its notebooks whole; what is missing is told."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import chinese
import editions
import pytest
import sources
import two_languages
import yaml
from babel.messages.catalog import Catalog
from chinese_search import ChineseSearch, terms
from docutils import nodes
from sources import NOTEBOOKS, PAGES, ROOT

EVERY_PAGE = [sources.name(p.with_suffix("")) for p in (*PAGES, *NOTEBOOKS)]
TRANSLATED = [page for page in EVERY_PAGE if page not in chinese.ENGLISH_ONLY]
OF_NO_PAGE = [chinese.OUTPUTS, chinese.THEME]
WIDGETS = sorted((ROOT / "metatutor/book/widgets").glob("*.html"))
each_page = pytest.mark.parametrize("page", TRANSLATED)
SHOWN = chinese.translations(chinese.OUTPUTS)
each_catalogue = pytest.mark.parametrize("page", TRANSLATED + OF_NO_PAGE)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=sources.name)

ROLE = re.compile(r"\{([\w:]+)\}`([^`]*)`")
CODE = re.compile(r"(`+)[^`]+\1")
FORMULA = re.compile(r"\$[^$]+\$")


def kept(message: str) -> dict[str, Counter[Any]]:
    """What a translation must have as it is: targets of references and links, code, formulas, tags."""
    roles = Counter((name, re.sub(r".*<(.*)>", r"\1", body, flags=re.S)) for name, body in ROLE.findall(message))
    message = ROLE.sub("", message)
    code = Counter(match[0] for match in CODE.finditer(message))
    message = CODE.sub("", message)
    formulas = Counter(" ".join(formula.split()) for formula in FORMULA.findall(message))
    message = FORMULA.sub("", message)
    message = re.sub(r"/blob/(?:main|zh)/(?=notebooks/)", "/blob/", message)  # Colab finds Chinese ones elsewhere
    links, tags = Counter(re.findall(r"\]\(([^)\s]*)\)", message)), Counter(re.findall(r"</?[a-z][^>]*>", message))
    return {"roles": roles, "code": code, "formulas": formulas, "links": links, "tags": tags}


# --- the catalogues ---


@each_catalogue
def test_every_message_is_translated(page: str) -> None:
    messages = [m for m in chinese.catalogue(page) if m.id]
    assert messages and [m.id for m in messages if m.fuzzy or not m.string] == []


@each_page
def test_a_translation_refers_to_what_the_english_does(page: str) -> None:
    wrong = {en: zh for en, zh in chinese.translations(page).items() if kept(en) != kept(zh)}
    assert wrong == {}


@each_page
def test_a_translation_is_chinese_and_no_list(page: str) -> None:
    for english, translated in chinese.translations(page).items():
        words = re.search(r"[a-z]{3,} [a-z]{2,} [a-z]{2,}", ROLE.sub("", CODE.sub("", english)))
        assert not words or re.search(r"[\u4e00-\u9fff]", translated), english
        list_like = re.compile(r"([-*+]|\d+[.)]) ")  # Sphinx would read a list, and drop the translation
        assert list_like.match(english) or not list_like.match(translated), translated


@each_page
def test_a_term_of_the_glossary_is_shown_in_chinese(page: str) -> None:
    glossary = chinese.translations("book/glossary")
    for text in chinese.translations(page).values():
        for name, body in ROLE.findall(text):
            shown, target = re.fullmatch(r"(.*?)(?: <(.*)>)?", body, re.DOTALL).groups()  # type: ignore[union-attr]
            if name == "term" and re.search(r"[\u4e00-\u9fff]", glossary[target or shown]):
                assert re.search(r"[\u4e00-\u9fff]", shown), text


@pytest.mark.parametrize("page", OF_NO_PAGE)
def test_numbers_and_gaps_have_a_place_in_what_is_shown_in_chinese(page: str) -> None:
    places = re.compile(r"#|\$\{[^}]*\}|<[^>]*>")
    shown = chinese.translations(page)
    wrong = [en for en, zh in shown.items() if Counter(places.findall(en)) != Counter(places.findall(zh))]
    assert wrong == [] and not any("#" in gap for text in shown for gap in re.findall(r"\$\{[^}]*\}", text))


@pytest.mark.parametrize("path", WIDGETS, ids=sources.name)
def test_every_text_of_a_widget_is_translated(path: Path) -> None:
    filled = re.sub(r"FILL_\w+", "1", path.read_text(encoding="utf-8"))
    assert set(chinese.messages_of(chinese.texts_in(partial(chinese.in_page, filled)))) <= set(SHOWN)


def test_every_text_of_the_pads_is_translated() -> None:
    assert set(chinese.messages_of(chinese.pad_texts(ROOT / "book/_static"))) <= set(SHOWN)


def test_no_catalogue_is_left_of_a_page_that_is_gone() -> None:
    found = {path.relative_to(ROOT / chinese.CATALOGUES).with_suffix("").as_posix() for path in _catalogues()}
    assert found == {*TRANSLATED, *OF_NO_PAGE}


def _catalogues() -> list[Path]:
    return sorted((ROOT / chinese.CATALOGUES).rglob("*.po"))


def test_a_changed_message_is_fuzzy_a_new_one_empty_and_one_that_is_gone_is_gone() -> None:
    old = Catalog(locale="zh_CN")
    for english, translated in {"A task has five classes.": "一", "It was here.": "二", "It stays.": "三"}.items():
        old.add(english, translated)
    wanted = ["It stays.", "A task has ten classes.", "Nothing of the kind.", "It came from another page."]
    new = chinese.updated(wanted, old, {"It came from another page.": "四", "It stays.": "五"})
    found = {m.id: (m.string or "", m.fuzzy) for m in new if m.id}
    assert found == {
        "It stays.": ("三", False),
        "A task has ten classes.": ("一", True),
        "Nothing of the kind.": ("", False),
        "It came from another page.": ("四", False),
    }


def test_a_catalogue_is_read_as_it_was_written_and_holds_no_date(tmp_path: Path) -> None:
    messages = Catalog(locale="zh_CN", fuzzy=False)
    messages.add('Say "five" or\ttwo: 100%', "说“五”：100%")
    chinese.write_catalogue("book/page", messages, tmp_path)
    assert chinese.translations("book/page", tmp_path) == {'Say "five" or\ttwo: 100%': "说“五”：100%"}
    assert "20" not in (tmp_path / chinese.CATALOGUES / "book/page.po").read_text(encoding="utf-8").replace("%", "")


# --- notebooks ---


@each_notebook
def test_every_message_of_a_notebook_has_its_place(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    messages = chinese.translations(f"notebooks/{path.stem}")
    translated, missing = chinese.in_chinese(notebook, messages)
    assert missing == []
    assert set(chinese.figure_texts(notebook)) <= set(messages)
    code = [[c for c in n["cells"] if c["cell_type"] == "code"] for n in (notebook, translated)]
    assert code[0] == code[1]
    prose = "".join("".join(c["source"]) for c in translated["cells"] if c["cell_type"] == "markdown")
    left = re.sub(r"```.*?```|\$\$.*?\$\$|`[^`]*`|\$[^$]*\$|\{[^}]*\}|\([^)]*\)|<[^>]*>", "", prose, flags=re.S)
    assert not re.search(r"(?:\b[a-z]{2,} ){6}", left), "English is left"


def cell(kind: str, source: str, **more: Any) -> dict[str, Any]:
    return {"cell_type": kind, "source": source.splitlines(keepends=True), "metadata": {}, **more}


def test_words_in_formulas_of_a_notebook_are_replaced() -> None:
    notebook = {"cells": [cell("markdown", "So\n\n$$\na \\text{if} b\n$$\n")]}
    found, missing = chinese.in_chinese(
        notebook, {"So": "于是", r"\text{if}": r"\text{若}", r"\text{no}": r"\text{否}"}
    )
    assert "".join(found["cells"][0]["source"]) == "于是\n\n$$\na \\text{若} b\n$$\n" and missing == [r"\text{no}"]


def test_blocks_are_found_however_they_are_broken_and_marked() -> None:
    table, tip = "| head | two |\n|---|---|\n| head over | x |", "```{tip} Do\n> A\n> quote.\n```"
    text = f"# A title\n\nTwo\nlines.\n\n- an item\n  on two\n\n{table}\n\n{tip}"
    words = {
        "A title": "标题",
        "Two lines.": "两行。",
        "an item on two": "项",
        "head": "头",
        "two": "二",
        "Do": "做",
        "A quote.": "引。",
    }
    notebook, missing = chinese.in_chinese({"cells": [cell("markdown", text)]}, words | {"nowhere": "无"})
    expected = "# 标题\n\n两行。\n\n- 项\n\n| 头 | 二 |\n|---|---|\n| head over | x |\n\n```{tip} 做\n> 引。\n```"
    assert "".join(notebook["cells"][0]["source"]) == expected and missing == ["nowhere"]


def test_alternative_texts_of_metadata_and_of_pages_are_replaced() -> None:
    drawn = cell("code", "%pip x\nstepper(frames, alt=\"Three 'panels'\")")
    drawn["outputs"] = [{"data": {"text/html": ['<img alt="Three &#x27;panels&#x27;: ', '1 step">']}}]
    plot = cell("code", "plot()")
    plot["metadata"] = {"mystnb": {"image": {"alt": "A line."}, "figure": {"caption": "It rises."}}}
    notebook = {"cells": [drawn, plot]}
    assert list(chinese.figure_texts(notebook)) == ["Three 'panels'", "It rises.", "A line."]
    assert chinese.messages_of(chinese.shown_texts(notebook)) == ["# step"]
    found = chinese.with_figure_texts(notebook, {"Three 'panels'": "三幅图", "A line.": "一条线。"}, {"# step": "# 步"})
    assert found["cells"][0]["outputs"][0]["data"]["text/html"] == '<img alt="三幅图：1 步">'
    assert found["cells"][1]["metadata"]["mystnb"]["image"]["alt"] == "一条线。"
    assert "A line." in json.dumps(notebook)  # the English one stays as it is


def test_texts_of_widgets_and_entries_of_tables_are_replaced_and_nothing_else() -> None:
    page = '<style>.old{}</style><b title="old" class="old"> old\nwords: 3 &amp; 4</b><script>old + `old ${x}`</script>'
    table = "| old | a \\| b |\n|:--|--:|\n| 7 old |  |\n| old: 1.5 | −2 ± 1 |\n"
    widget, shown = {"data": {"text/html": [page]}}, {"data": {"text/markdown": [table]}}
    notebook = {"cells": [cell("code", "show()", outputs=[widget, shown])]}
    words = {"old": "旧", "old words: # & #": "旧词：# & #", "old ${x}": "旧 ${x}", "# old": "# 旧", "old: #": "旧：#"}
    assert chinese.messages_of(chinese.shown_texts(notebook)) == list(words)
    assert "7 old" not in list(chinese.shown_texts(notebook, entries=False))
    found = chinese.with_figure_texts(notebook, {}, words)["cells"][0]["outputs"]
    said = '<style>.old{}</style><b title="旧" class="old"> 旧词：3 &amp; 4</b><script>old + `旧 ${x}`</script>'
    assert found[0]["data"]["text/html"] == said
    assert found[1]["data"]["text/markdown"] == "| 旧 | a \\| b |\n|:--|--:|\n| 7 旧 |  |\n| 旧：1.5 | −2 ± 1 |\n"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("$N$", False),
        ("`n_way`", False),
        ("{cite:t}`finn2017model`", False),
        ("{term}`adapted parameters`", True),
        ("\n\\begin{aligned}", False),
        ("a task", True),
    ],
)
def test_formulas_code_and_references_need_no_translation(message: str, words: bool) -> None:
    assert chinese.is_words(message) == words


# --- both editions ---


def test_editions_differ_in_language_and_know_their_addresses() -> None:
    english, translated = editions.config("en"), editions.config("zh_CN")
    assert english["sphinx"]["config"]["language"] == "en" and translated["sphinx"]["config"]["language"] == "zh_CN"
    assert [c["html"]["baseurl"].split("/")[-2] for c in (english, translated)] == ["en", "zh"]
    assert english["execute"] == translated["execute"] and english["execute"]["execute_notebooks"] == "off"
    written = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    ours = {"metatutor_address": "", "metatutor_collect": False, "ogp_site_url": ""}
    assert english["sphinx"]["config"] | ours == written["sphinx"]["config"] | ours


def test_messages_are_not_collected_from_notebooks_that_show_nothing(tmp_path: Path) -> None:
    for name, outputs in (("shown", ["a figure"]), ("silent", [])):
        cells = [{"cell_type": "markdown"}, {"cell_type": "code", "outputs": outputs}]
        (tmp_path / f"{name}.ipynb").write_text(json.dumps({"cells": cells}))
    with pytest.raises(SystemExit, match="^not executed: silent.ipynb; delete "):
        editions.write_sources(tmp_path, tmp_path / "sources", collect=True)
    assert not (tmp_path / "sources").exists()


def test_a_site_has_both_editions_a_map_and_a_page_for_wrong_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editions, "lighten", lambda edition: None)
    for name in ("en", "zh"):
        page = tmp_path / name / "_build/html/book/index.html"
        page.parent.mkdir(parents=True)
        page.write_text(name)
    editions.write_site(tmp_path)
    site = tmp_path / "html"
    assert [(site / name / "book/index.html").read_text() for name in ("en", "zh")] == ["en", "zh"]
    address = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["html"]["baseurl"]
    site_map = (site / "sitemap.xml").read_text()
    assert all(f"<loc>{address}{name}/book/index.html</loc>" in site_map for name in ("en", "zh"))
    assert all(f'hreflang="{name}"' in site_map for name in ("en", "zh"))
    assert "en/book/index.html" in (site / "index.html").read_text()
    assert f'href="{address}zh/' in (site / "404.html").read_text(encoding="utf-8")


def test_what_a_cell_prints_is_no_message() -> None:
    shown, said = nodes.paragraph(text="shown"), nodes.paragraph(text="said")
    nodes.container("", nodes.container("", shown), classes=["cell_output"])
    nodes.container("", said, classes=["cell_input"])
    assert two_languages._is_output(shown) and not two_languages._is_output(said)


def test_terms_of_the_glossary_are_words_of_the_search() -> None:
    assert {"元学习", "任务", "嵌入"} <= set(terms())
    assert {"元学习", "MAML"} <= set(ChineseSearch({}).split("元学习的 MAML"))


def built(folder: Path, language: str, page: str) -> tuple[nodes.document, str]:
    """A page of which `Old title`, two formulas and two terms are translated, and what the build told."""
    from sphinx.application import Sphinx

    (folder / "conf.py").write_text(
        f"extensions = ['two_languages']\nlanguage = '{language}'\nlocale_dirs = ['book/locale']\n"
    )
    (folder / "index.rst").write_text(page, encoding="utf-8")
    messages = Catalog(locale="zh_CN", fuzzy=False)
    known = {
        "Old title": "旧题",
        r"\text{if}": r"\text{若}",
        r"\text{so}": r"\text{故}",
        "query": "查询",
        "task": "任务",
    }
    for english, translated in known.items():
        messages.add(english, translated)
    chinese.write_catalogue("index", messages, folder)
    with (folder / "warnings").open("w") as warnings:
        source, out, trees = str(folder), str(folder / "out"), str(folder / "trees")
        app = Sphinx(source, source, out, trees, "dummy", status=None, warning=warnings, freshenv=True)
        app.build()
    return app.env.get_doctree("index"), (folder / "warnings").read_text()


def test_a_message_without_translation_is_warned_of(tmp_path: Path) -> None:
    """In the English build, where whoever changed it sees it."""
    _, told = built(tmp_path, "en", "Old title\n=========\n\nNew, :math:`a \\text{but}`.\n")
    assert told.count("not translated into Chinese") == 2 and "New" in told and r"\text{but}" in told


def test_words_in_formulas_are_chinese(tmp_path: Path) -> None:
    page = "Old title\n=========\n\n:math:`a \\text{if} b`\n\n.. math::\n\n   x \\text{so} y_\\text{ReLU}\n"
    doctree, told = built(tmp_path, "zh_CN", page)
    text = doctree.astext()
    assert r"a \text{若} b" in text and r"x \text{故} y_\text{ReLU}" in text and "not translated" not in told
    assert r"\text{if}" in built(tmp_path, "en", page)[0].astext()


def test_the_glossary_is_in_the_order_of_dictionaries(tmp_path: Path) -> None:
    """By sound: chá, rèn; by the numbers of the characters, 任 comes before 查."""
    page = (
        "Old title\n=========\n\n.. glossary::\n   :sorted:\n\n   task\n     1\n\n   query\n     2\n\n   MAML\n     3\n"
    )
    doctree, _ = built(tmp_path, "zh_CN", page)
    assert [term.astext() for term in doctree.findall(nodes.term)] == ["MAML", "查询", "任务"]
    assert sorted(["查询", "任务"]) == ["任务", "查询"]


def test_only_emphasis_of_chinese_words_is_dotted(tmp_path: Path) -> None:
    page = "Old title\n=========\n\nNow *Strokes*, and *旧题*.\n"
    doctree, _ = built(tmp_path, "zh_CN", page)
    assert [emphasis["classes"] for emphasis in doctree.findall(nodes.emphasis)] == [["latin"], []]
