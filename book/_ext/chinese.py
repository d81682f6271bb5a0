"""The Chinese edition: catalogues of messages, what of a notebook is a message, and how notebooks become Chinese.

    python book/_ext/chinese.py update           # after a change of the English: `make translations`
    python book/_ext/chinese.py notebooks FOLDER # notebooks with Chinese text, for Colab

Messages are the blocks of text that Sphinx finds in pages and Markdown cells, the words in their formulas, and the
captions and alternative texts of figures, which are in the metadata and the code of notebooks. Their translations are
gettext catalogues, one for each page, in `book/locale/zh_CN/LC_MESSAGES`. Two are of no page: `outputs`, of the pads
and of the widgets and tables that cells show, and `theme`, of the theme's own words. While a book is built,
`two_languages.py` asks for them.
"""

from __future__ import annotations

import ast
import html
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from babel.messages.catalog import Catalog
from babel.messages.pofile import read_po, write_po

ROOT = Path(__file__).resolve().parents[2]
CATALOGUES = Path("book/locale/zh_CN/LC_MESSAGES")
OUTPUTS, THEME = "outputs", "theme"
ENGLISH_ONLY = {"book/api"}  # the reference, which speaks of code
PADS = ("task.html", "alphabet.html", "task.js")  # in `book/_static`
FOLDERS = {"en": "en", "zh_CN": "zh"}

Notebook = dict[str, Any]


# --- catalogues ---


def catalogue(page: str, root: Path = ROOT) -> Catalog:
    """The catalogue of a page, such as `notebooks/02_metric`; an empty one if there is none."""
    path = root / CATALOGUES / f"{page}.po"
    if not path.exists():
        return Catalog(locale="zh_CN")
    with path.open("rb") as file:
        return read_po(file, locale="zh_CN", abort_invalid=True)


def translations(page: str, root: Path = ROOT) -> dict[str, str]:
    """English messages of a page and their translations; fuzzy and empty ones are none."""
    messages = catalogue(page, root)
    return {str(m.id): str(m.string) for m in messages if m.id and m.string and not m.fuzzy}


def is_words(message: str) -> bool:
    """Whether there is something to translate: a term, or more than formulas, code, references and names of files.

    Example:
        >>> is_words("$N$"), is_words("`n_way`"), is_words("{cite:t}`finn2017model`"), is_words("classes in a task")
        (False, False, False, True)
    """
    left = message if "{term}" in message else re.sub(r"\{[\w:]+\}`[^`]*`|`[^`]*`|\$[^$]*\$|<[^>]*>", "", message)
    return not message.startswith("\n") and bool(re.search(r"[A-Za-z]{2}", left))


def updated(messages: list[str], catalogue: Catalog, elsewhere: dict[str, str]) -> Catalog:
    """A catalogue that has become one of these messages, in their order; translations of similar ones are fuzzy.

    A message that came from another page brings its translation along: `elsewhere` has those of all pages.
    """
    template = Catalog(locale="zh_CN")
    for message in messages:
        template.add(message)
    catalogue.update(template)
    catalogue.obsolete.clear()
    catalogue.fuzzy = False  # its header
    for message in catalogue:
        if message.id in elsewhere and (message.fuzzy or not message.string):
            message.string = elsewhere[str(message.id)]
            message.flags.discard("fuzzy")
    return catalogue


def write_catalogue(page: str, messages: Catalog, root: Path = ROOT) -> None:
    """Write the catalogue of a page: one line a message, no dates or places, so that a change is read as it is."""
    path = root / CATALOGUES / f"{page}.po"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        write_po(file, messages, width=0, omit_header=False, no_location=True)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    dated = ('"POT-Creation-Date', '"PO-Revision-Date', '"Generated-By', '"Last-Translator', '"Report-Msgid', "# ")
    path.write_text("".join(line for line in lines if not line.startswith(dated)), encoding="utf-8")


# --- notebooks ---


def figure_texts(notebook: Notebook) -> Iterator[str]:
    """Captions, alternative texts and what unfolds code: in the metadata of cells, and as `alt="..."` in their code."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            about = cell["metadata"].get("mystnb", {})
            yield from (about[part][name] for part, name in _FIGURE_TEXTS if name in about.get(part, {}))
            yield from (about[name] for name in _PROMPTS if name in about)
            yield from _alternative_texts("".join(cell["source"]))


_FIGURE_TEXTS = (("figure", "caption"), ("image", "alt"))
_PROMPTS = ("code_prompt_show", "code_prompt_hide")


def _alternative_texts(source: str) -> Iterator[str]:
    without_magics = re.sub(r"^([ \t]*)[%!].*", r"\1pass", source, flags=re.MULTILINE)
    for node in ast.walk(ast.parse(without_magics)):
        if isinstance(node, ast.keyword) and node.arg == "alt":
            if not isinstance(node.value, ast.Constant):
                raise ValueError(f"alt={ast.unparse(node.value)} cannot be translated; write its text there")
            yield str(node.value.value)


def with_figure_texts(notebook: Notebook, chinese: dict[str, str], shown: dict[str, str]) -> Notebook:
    """An executed notebook whose figures, tables and folded cells speak Chinese; captions are translated by Sphinx."""
    notebook = json.loads(json.dumps(notebook))
    for cell in notebook["cells"]:
        about = cell["metadata"].get("mystnb", {})
        for texts, names in ((about, _PROMPTS), (about.get("image", {}), ("alt",))):
            texts.update({name: chinese[texts[name]] for name in names if texts.get(name) in chinese})
        say = speaker(shown | {text: chinese[text] for text in _texts_of(cell) if text in chinese})
        for data, kind in _outputs(cell):
            data[kind] = _READERS[kind]("".join(data[kind]), say)
    return notebook


def _texts_of(cell: dict[str, Any]) -> list[str]:
    return list(_alternative_texts("".join(cell["source"]))) if cell["cell_type"] == "code" else []


def _outputs(cell: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """The outputs that are a widget or a table."""
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        yield from ((data, kind) for kind in _READERS if kind in data)


def in_chinese(notebook: Notebook, chinese: dict[str, str]) -> tuple[Notebook, list[str]]:
    """A notebook whose Markdown cells are Chinese; and the messages that are in none of them."""
    notebook, missing = json.loads(json.dumps(notebook)), []
    figures = set(figure_texts(notebook))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    texts = ["".join(cell["source"]) for cell in cells]
    placed: list[str] = []
    for message, translated in sorted(chinese.items(), key=lambda item: -len(item[0])):
        in_formula = message.startswith("\\text{")
        pattern = re.compile(r"(?P<before>)" + re.escape(message)) if in_formula else _block(message)
        mark, found = f"\0{len(placed)}\0", 0
        placed.append(translated)
        for n, text in enumerate(texts):
            texts[n], times = pattern.subn(lambda match, mark=mark: match["before"] + mark, text)
            found += times
        if not found and message not in figures:
            missing.append(message)
    for cell, text in zip(cells, texts, strict=True):
        text = re.sub(r"\0(\d+)\0", lambda match: placed[int(match[1])], text)
        cell["source"] = text.splitlines(keepends=True)
    return notebook, missing


def _block(message: str) -> re.Pattern[str]:
    """Finds a message where it is a whole block, cell of a table or title, however its lines are broken."""
    begin = r"(?P<before>^[ \t>]*(?:#{1,6} +|[-*+] +|\d+\. +|: +|[`:]{3,}\{[^}\n]+\} *)?|\| *)"
    words = r"(?:[ \t]+|[ \t]*\n[ \t>]*)".join(map(re.escape, message.split()))
    return re.compile(begin + words + r"(?=[ \t]*(?:\||$))", re.MULTILINE)


# --- what is shown: widgets, pads and tables ---

Say = Callable[[str], str]
_PARTS = re.compile(
    r"<style.*?</style>|<script.*?</script>|(?<=>)[^<>]+(?=<)"
    r'|(?<![\w-])(?:alt|title|data-bs-title|placeholder|aria-label|aria-roledescription)="[^"]*"',
    re.DOTALL,
)
_LITERAL, _NUMBER = re.compile(r"`([^`]*)`"), re.compile(r"(?<![A-Za-z\d])\d+(?:[.,]\d+)*")


def in_page(page: str, say: Say) -> str:
    """A piece of a page in which every text is what `say` makes of it; scripts have texts in template literals only."""

    def part(match: re.Match[str]) -> str:
        if match[0].startswith("<"):
            return in_script(match[0], say) if match[0].startswith("<script") else match[0]
        begin, text, end = _WORDS.fullmatch(match[0]).groups()  # type: ignore[union-attr]
        text = " ".join(html.unescape(text).split())
        return match[0] if (said := say(text)) == text else begin + html.escape(said) + end

    return _PARTS.sub(part, page)


_WORDS = re.compile(r'([\w-]+="|\s*)(.*?)(\s*|")', re.DOTALL)


def in_script(script: str, say: Say) -> str:
    """A script in which every template literal is what `say` makes of it."""
    return _LITERAL.sub(lambda match: f"`{say(match[1])}`", script)


def in_table(table: str, say: Say) -> str:
    """A table in Markdown in which every entry is what `say` makes of it."""
    return re.sub(r"(?<=\| )(?:\\.|[^|\\\n])+(?= \|)", lambda match: say(match[0]), table)


_READERS: dict[str, Callable[[str, Say], str]] = {"text/html": in_page, "text/markdown": in_table}


def speaker(chinese: dict[str, str]) -> Say:
    """Says in Chinese what is known; a number, which the next run may change, is `#` in a message.

    Example:
        >>> say = speaker({"# steps": "# 步", "Curves": "曲线"})
        >>> say("5 steps"), say("Curves: 5 steps"), say("5 of them")
        ('5 步', '曲线：5 步', '5 of them')
    """

    def say(text: str) -> str:
        if text in chinese:
            return chinese[text]
        if message := chinese.get(_NUMBER.sub("#", text)):
            numbers = iter(_NUMBER.findall(text))
            return re.sub("#", lambda _: next(numbers), message)
        what, colon, which = text.rpartition(": ")  # an alternative text, and the button's
        return f"{chinese[what]}：{say(which)}" if colon and what in chinese else text

    return say


def shown_texts(notebook: Notebook, *, entries: bool = True) -> Iterator[str]:
    """Texts in the widgets and tables of an executed notebook; without entries, only the heads of the tables."""
    for cell in notebook["cells"]:
        own = set(_texts_of(cell))
        for data, kind in _outputs(cell):
            shown = "".join(data[kind])
            shown = shown if entries or kind == "text/html" else shown.partition("\n")[0]
            for text in texts_in(partial(_READERS[kind], shown)):
                what, _, which = text.rpartition(": ")
                yield which if what in own else text


def texts_in(read: Callable[[Say], str]) -> list[str]:
    """What is asked to be said."""
    found: list[str] = []
    read(lambda text: found.append(text) or text)
    return found


def in_pad(path: Path, say: Say) -> str:
    """A file of a page's pad in which every text is what `say` makes of it."""
    return (in_script if path.suffix == ".js" else in_page)(path.read_text(encoding="utf-8"), say)


def pad_texts(folder: Path) -> Iterator[str]:
    """Texts in the pads of pages."""
    for path in (folder / name for name in PADS):
        if path.exists():
            yield from texts_in(partial(in_pad, path))


def messages_of(texts: Iterable[str]) -> list[str]:
    """What of these texts is to be translated, once each: more than numbers, units and names with capitals.

    Example:
        >>> messages_of(["5 steps", "10 steps", "MAML++", "1.1 GiB", "Conv-4", "${n} of ${all}", "M${x}"])
        ['# steps', '${n} of ${all}']
    """
    found = dict.fromkeys(_NUMBER.sub("#", text) for text in texts)
    word = re.compile(r"(?<![A-Za-z])(?:[A-Z][a-z]+|[a-z]{2,})(?![A-Za-z]|-?[A-Z\d#])")
    return [message for message in found if word.search(re.sub(r"\$\{[^}]*\}|<[^>]*>", "", message))]


# --- the commands ---


def update(folder: Path) -> int:
    """Bring the catalogues up to date with the messages that a build wrote into `folder`; list what is to be done."""
    pages = (path.relative_to(ROOT / CATALOGUES).with_suffix("") for path in (ROOT / CATALOGUES).rglob("*.po"))
    todo, everywhere = 0, {id: string for page in pages for id, string in translations(page.as_posix()).items()}
    for page, messages in json.loads((folder / "messages.json").read_text(encoding="utf-8")).items():
        write_catalogue(page, updated(messages, catalogue(page), everywhere))
        for message in catalogue(page):
            if message.id and (message.fuzzy or not message.string):
                todo += 1
                print(f"{page}: {'fuzzy' if message.fuzzy else 'untranslated'}: {str(message.id)[:100]}")
    print(f"{todo} messages to translate" if todo else "every message is translated")
    return 1 if todo else 0


def notebooks(folder: Path) -> int:
    """Write every notebook with Chinese text into a folder; a message that cannot be placed is a fault."""
    faults = 0
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        translated, missing = in_chinese(notebook, translations(f"notebooks/{path.stem}"))
        faults += len(missing)
        for message in missing:
            print(f"{path.name}: no such block: {message[:100]}", file=sys.stderr)
        (folder / path.name).write_text(json.dumps(translated, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit({"update": update, "notebooks": notebooks}[sys.argv[1]](Path(sys.argv[2])))
