"""Both editions while they are built: every message is translated, and pages have a link to their other language.

A Sphinx extension. In the English build it warns of every message without a translation, and collects them for
`make translations`. In the Chinese one it does what Sphinx leaves undone: words in formulas, the order of the glossary,
emphasis. In both, headings keep the anchors of their English.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from chinese import (
    ENGLISH_ONLY,
    FOLDERS,
    OUTPUTS,
    figure_texts,
    is_words,
    messages_of,
    pad_texts,
    shown_texts,
    translations,
)
from docutils import nodes
from sphinx import addnodes
from sphinx.search import languages
from sphinx.util import logging
from sphinx.util.nodes import extract_messages

NAMES = {"en": "English", "zh_CN": "中文"}
_WORDS_IN_FORMULA = re.compile(r"\\text\{[^{}]*\}")
_CHINESE = re.compile("[\u2e80-\U0010ffff]")


def _collect(app: Any, doctree: Any) -> None:
    """Remember the messages of a page that was read, and of its outputs; warn of those without a translation."""
    page = app.env.docname
    if app.config.language != "en" or page in ENGLISH_ONLY:
        return
    found = [message for node, message in extract_messages(doctree) if not _is_output(node)]
    found += [words for formula in _formulas(doctree) for words in _WORDS_IN_FORMULA.findall(formula.astext())]
    source = Path(app.srcdir, f"{page}.ipynb")
    if source.exists():
        notebook = json.loads(source.read_text(encoding="utf-8"))
        found += figure_texts(notebook)
        _remember(app, OUTPUTS, messages_of(shown_texts(notebook)))
        # entries are computed, and data that stand in are named, so that elsewhere others may be shown
        heads = messages_of(shown_texts(notebook, entries=False))
        _warn(app, OUTPUTS, [message for message in heads if "Strokes" not in message])
    found = [message for message in dict.fromkeys(found) if is_words(message)]
    _remember(app, page, found)
    _warn(app, page, found)


def _collect_pads(app: Any) -> None:
    if app.config.language == "en":
        found = messages_of(pad_texts(Path(app.srcdir, "book/_static")))
        _remember(app, OUTPUTS, found)
        _warn(app, OUTPUTS, found)


def _remember(app: Any, page: str, found: list[str]) -> None:
    app.env.metatutor_messages = getattr(app.env, "metatutor_messages", {})
    app.env.metatutor_messages.setdefault(page, []).extend(found)


def _warn(app: Any, page: str, found: list[str]) -> None:
    known = translations(page, Path(app.srcdir))
    for message in found:
        if message not in known and not app.config.metatutor_collect:
            logging.getLogger(__name__).warning(
                "not translated into Chinese (run `make translations`): %s", message[:80], location=page
            )


def _formulas(doctree: Any) -> list[Any]:
    return [node for kind in (nodes.math_block, nodes.math) for node in doctree.findall(kind)]


def _translate_formulas(app: Any, doctree: Any) -> None:
    """Sphinx translates no formula, so words in them are messages of their own."""
    if app.config.language != "zh_CN":
        return
    known = translations(app.env.docname, Path(app.srcdir))
    for formula in _formulas(doctree):
        text = _WORDS_IN_FORMULA.sub(lambda match: known.get(match[0], match[0]), formula.astext())
        formula.children = []
        formula += nodes.Text(text)


def _keep_anchors(app: Any, doctree: Any) -> None:
    """Headings keep the anchors of their English, which links name; MyST forgets them where a heading is translated."""
    headings = [section for section in doctree.findall(nodes.section) if "slug" in section]
    anchors = {section["slug"]: (section.line, section["ids"][0], section[0].astext()) for section in headings}
    if anchors:
        app.env.metadata[app.env.docname]["myst_slugs"] = anchors


def _sort_glossary(app: Any, doctree: Any) -> None:
    """Chinese terms in the order of their sounds, which common characters also have by their codes in GB 18030."""
    if app.config.language != "zh_CN":
        return
    for terms in doctree.findall(addnodes.glossary):
        for entries in terms.findall(nodes.definition_list):
            entries.children.sort(key=lambda entry: entry[0].astext().casefold().encode("gb18030"))


def _mark_latin(app: Any, doctree: Any) -> None:
    """Emphasis of words in Latin letters is slanted in a Chinese text too; that of Chinese words is dotted."""
    for emphasis in doctree.findall(nodes.emphasis) if app.config.language == "zh_CN" else ():
        if not _CHINESE.search(emphasis.astext()):
            emphasis["classes"].append("latin")


def _is_output(node: Any) -> bool:
    while node is not None:
        if "cell_output" in node.get("classes", []):
            return True
        node = node.parent
    return False


def _other_language(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """A button to the same page in the other language, and where both are, for search engines."""
    root, in_both = app.config.metatutor_address, page.startswith(("book/", "notebooks/")) or page == "search"
    if app.builder.format != "html" or not root or not in_both:  # without an address there is one edition only
        return
    [other] = set(NAMES) - {app.config.language}
    up = "../" * (page.count("/") + 1)
    button = {"type": "link", "url": f"{up}{FOLDERS[other]}/{page}.html", "text": NAMES[other], "label": "language"}
    context.setdefault("header_buttons", []).insert(0, button)
    links = [f'<link rel="alternate" hreflang="{FOLDERS[x]}" href="{root}{FOLDERS[x]}/{page}.html" />' for x in NAMES]
    context["metatags"] = context.get("metatags", "") + "\n".join(links)


def _write(app: Any, exception: Exception | None) -> None:
    if app.config.metatutor_collect and exception is None:
        messages = {page: list(dict.fromkeys(found)) for page, found in app.env.metatutor_messages.items()}
        Path(app.outdir, "messages.json").write_text(json.dumps(messages), encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Connect the extension to Sphinx."""
    languages["zh"] = "chinese_search.ChineseSearch"
    app.add_config_value("metatutor_collect", False, "env")
    app.add_config_value("metatutor_address", "", "html")
    app.connect("env-before-read-docs", lambda app, env, names: _collect_pads(app))
    app.connect("doctree-read", _collect)
    app.connect("doctree-read", _translate_formulas)
    app.connect("doctree-read", _keep_anchors)
    app.connect("doctree-read", _sort_glossary)
    app.connect("doctree-read", _mark_latin)
    app.connect("html-page-context", _other_language, priority=900)
    app.connect("build-finished", _write)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
