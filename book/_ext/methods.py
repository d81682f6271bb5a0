"""The index of methods: everything in it is read from the package, the notebooks, the bibliography and `results/`.

A method's chapter is the notebook named like its folder, `NN_folder`, which `NNb_…` and `NNc_…` continue. A method
without a folder belongs to the first notebook that uses its module.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from stamp import read_address

from metatutor.config import known
from metatutor.runs import run_folders


@dataclass
class Section:
    """A section of a notebook: its heading, that heading's level, and the code under it."""

    level: int
    heading: str
    code: list[str] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """Its address within the page, as MyST makes it of the heading."""
        return re.sub(r"[^\w -]", "", self.heading.lower()).replace(" ", "-")


def sections(notebook: Path) -> list[Section]:
    """The sections of a notebook, its title the first."""
    found: list[Section] = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            found += [Section(len(marks), title) for marks, title in re.findall(r"^(#{1,3}) (.+)$", text, re.MULTILINE)]
        elif found:
            found[-1].code.append(text)
    return found


def chapter_of(cls: type, root: Path) -> Path:
    """The notebook named like the folder of a method, or else the first that uses its module."""
    folder, *file = cls.__module__.split(".")[1:]
    notebooks = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if file:
        named = [path for path in notebooks if path.stem.partition("_")[2] == folder]
        if not named:
            raise ValueError(f"{cls.__name__} lies in metatutor/{folder}/, but no notebook is named NN_{folder}.ipynb")
        return named[0]
    own = "|".join(c.of.__name__ for c in known("method").values() if c.of.__module__ == cls.__module__)
    return next(path for path in notebooks if re.search(rf"\b({own})\b", path.read_text(encoding="utf-8")))


def section_of(cls: type, tag: str, chapter: Path) -> tuple[Path, Section]:
    """Where a chapter, or a page that continues it, treats a method: under its name, else where code first uses it."""
    number = chapter.stem.partition("_")[0]
    pages = [chapter, *sorted(chapter.parent.glob(f"{number}[a-z]_*.ipynb"))]
    found = [(page, section) for page in pages for section in sections(page)]
    rest = [(page, section) for page, section in found if section.level > 1]
    first = tag.partition("-")[0]
    named = [(page, s) for page, s in rest if re.sub(r"[^\w ]", "", s.heading.lower()).startswith(first)]
    used = [(page, s) for page, s in rest if any(re.search(rf"\b{cls.__name__}\b", code) for code in s.code)]
    return next(iter(named + used), found[0])


@cache
def bibliography(root: Path) -> dict[str, tuple[str, str]]:
    """The surname of the first author and the year of every entry, by its key."""
    text = (root / "book/references.bib").read_text(encoding="utf-8")
    entries = re.findall(r"^@\w+\{([^,\s]+),(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    first = re.compile(r"\bauthor\s*=\s*\{([^,]+),.*?\byear\s*=\s*\{(\d{4})", re.DOTALL)
    return {key: (match[1], match[2]) for key, about in entries if (match := first.search(about))}


def papers(reference: str, known_papers: dict[str, tuple[str, str]]) -> Iterator[str]:
    """The keys of the works that a `Reference:` names as `Surname … (year)`, in its order."""
    for before, year in re.findall(r"([^()]*)\((\d{4})\)", reference):
        named = re.split(r"[;:]", before)[-1]
        of_year = [(key, surname) for key, (surname, published) in known_papers.items() if published == year]
        yield from [key for key, surname in of_year if re.search(rf"\b{re.escape(surname)}\b", named)][:1]


def entry(tag: str, cls: type, chapter: Path, runs: list[str], root: Path) -> str:
    """What the index says of one method: a term, and what belongs to it line by line."""
    blob = f"{read_address(root).repository}/blob/main"
    file = Path(*cls.__module__.split(".")).with_suffix(".py")
    page, section = section_of(cls, tag, chapter)
    anchor = f"#{section.anchor}" if section.level > 1 else ""
    reference = " ".join((inspect.getdoc(cls) or "").partition("Reference:")[2].split())
    cited = [f"{{cite:t}}`{key}`" for key in dict.fromkeys(papers(reference, bibliography(root)))]
    tests = [Path("tests", f"test_{name}.py") for name in (file.stem, file.parent.name)]
    test = next((path for path in tests if (root / path).exists()), None)
    code = [f"[`{path.as_posix()}`]({blob}/{path.as_posix()})" for path in (file, test) if path]
    about = {
        "explained": f"[{section.heading}](../notebooks/{page.name}{anchor})",
        "papers": ", ".join(cited) or reference,
        "code and tests": ", ".join(code),
        "recorded runs": ", ".join(f"`{name}`" for name in runs),
    }
    lines = "\\\n  ".join(f"*{what}:* {value}" for what, value in about.items() if value)
    return f"{{py:class}}`~{cls.__module__}.{cls.__name__}`\n: {lines}\n"


def methods_index(root: Path) -> str:
    """A part for every chapter that has methods, with an entry for each that the package exports."""
    runs: dict[str, list[str]] = {}
    for folder in run_folders(root / "results"):
        method = json.loads((folder / "config.json").read_text(encoding="utf-8"))["learner"]["method"]
        runs.setdefault(method, []).append(folder.name)
    of_chapter: dict[Path, list[str]] = {}
    for tag, config in known("method").items():
        chapter = chapter_of(config.of, root)
        of_chapter.setdefault(chapter, []).append(entry(tag, config.of, chapter, runs.get(tag, []), root))
    parts = [f"## {sections(path)[0].heading}\n\n" + "\n".join(of_chapter[path]) for path in sorted(of_chapter)]
    return "\n".join(parts).strip()
