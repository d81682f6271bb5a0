"""The sources of the book as text, and what the tests look for in them; all pure, so that tests can fail them."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = sorted((ROOT / "book").glob("*.md"))
MACHINE_PATH = re.compile(r"(?<![\w.~/-])(?:/(?:work|home|root|Users)/\w|[A-Z]:\\Users\\)")


def name(path: Path) -> str:
    """`path` as seen from the root of the repository, for messages and test ids."""
    return path.relative_to(ROOT).as_posix()


def cells(notebook: Path, kind: str) -> list[dict]:
    """The cells of one kind, `"code"` or `"markdown"`."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    """The text of a cell, however the file splits it."""
    return "".join(cell["source"])


def markdown(path: Path) -> str:
    """The prose of a page or a notebook."""
    if path.suffix == ".ipynb":
        return "\n\n".join(source(cell) for cell in cells(path, "markdown"))
    return path.read_text(encoding="utf-8")


def toc_files(toc: str) -> list[str]:
    """Every file that a `_toc.yml` names, its root first."""

    def walk(node: object) -> list[str]:
        if isinstance(node, dict):
            own = [node[key] for key in ("root", "file") if key in node]
            return own + [file for value in node.values() for file in walk(value)]
        return [file for item in node for file in walk(item)] if isinstance(node, list) else []

    return walk(yaml.safe_load(toc))


def pictures_without_text(text: str) -> list[str]:
    """Pictures of a MyST text that say nothing to those who cannot see them."""
    plain = [link for alt, link in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)", text) if not alt.strip()]
    fence = re.compile(r"^([`:]{3,})\{(?:figure|image)\}[ ]*(\S*)\n(.*?)^\1", re.MULTILINE | re.DOTALL)
    directives = [link for _, link, body in fence.findall(text) if not re.search(r"^:?alt: *\S", body, re.MULTILINE)]
    tags = [tag for tag in re.findall(r"<img\b[^>]*>", text) if not re.search(r'\balt="[^"]+"', tag)]
    hidden_or_named = re.compile(r'aria-hidden="true"|aria-label="[^"]+"')
    drawings = [tag for tag in re.findall(r"<svg\b[^>]*>", text) if not hidden_or_named.search(tag)]
    return plain + directives + tags + drawings


def cited_keys(text: str) -> set[str]:
    """The bibliography keys that a text cites."""
    return {key.strip() for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text) for key in keys.split(",")}


def bibliography_keys(bibtex: str) -> list[str]:
    """The keys of a BibTeX file, repeated ones repeatedly."""
    return re.findall(r"^@\w+\{([^,\s]+),", bibtex, re.MULTILINE)


def used_terms(text: str) -> set[str]:
    """The glossary terms that a text links to."""
    roles = re.findall(r"\{term\}`([^`]+)`", text)
    return {match.group(1) if (match := re.search(r"<(.+)>", role)) else role for role in roles}


def glossary_terms(page: str) -> set[str]:
    """The terms that the glossary page defines."""
    body = re.search(r"^```\{glossary\}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = body.group(1).splitlines() if body else []
    return {line.strip() for line in lines if line.strip() and not line.startswith((" ", ":"))}


def machine_paths(text: str) -> list[str]:
    """Paths that exist on one machine only."""
    return [text[match.start() : match.start() + 40].splitlines()[0] for match in MACHINE_PATH.finditer(text)]


def imported_packages(code: str) -> set[str]:
    """The top-level packages that a module imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found
