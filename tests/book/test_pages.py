"""The pages of the book: complete, described for those who cannot see, and true to their references."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sources
import stamp
from sources import NOTEBOOKS, PAGES, ROOT

PROSE = PAGES + NOTEBOOKS


def test_toc_lists_every_page_and_notebook_once() -> None:
    listed = sources.toc_files((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in PROSE)


@pytest.mark.parametrize("path", PROSE, ids=sources.name)
def test_every_picture_has_a_text(path: Path) -> None:
    assert sources.pictures_without_text(sources.markdown(path)) == []


@pytest.mark.parametrize("path", sorted((ROOT / "book/_static").glob("*.html")), ids=sources.name)
def test_every_included_drawing_has_a_text(path: Path) -> None:
    assert sources.pictures_without_text(path.read_text(encoding="utf-8")) == []


def test_bibliography_keys_are_unique() -> None:
    keys = sources.bibliography_keys((ROOT / "book/references.bib").read_text(encoding="utf-8"))
    assert len(keys) > 10
    assert sorted(keys) == sorted(set(keys))


@pytest.mark.parametrize("path", PROSE, ids=sources.name)
def test_every_cited_work_is_in_the_bibliography(path: Path) -> None:
    keys = sources.bibliography_keys((ROOT / "book/references.bib").read_text(encoding="utf-8"))
    assert sources.cited_keys(sources.markdown(path)) <= set(keys)


@pytest.mark.parametrize("path", PROSE, ids=sources.name)
def test_every_linked_term_is_in_the_glossary(path: Path) -> None:
    terms = {term.lower() for term in sources.glossary_terms((ROOT / "book/glossary.md").read_text(encoding="utf-8"))}
    assert {term.lower() for term in sources.used_terms(sources.markdown(path))} <= terms


def test_the_reference_names_every_public_module() -> None:
    files = [path for path in (ROOT / "metatutor").rglob("*.py") if not path.name.startswith("_")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files} - {"metatutor.cli"}
    page = (ROOT / "book/api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\.\. automodule:: (\S+)", page, re.MULTILINE)) == modules


def test_no_file_names_a_path_of_one_machine() -> None:
    found = {sources.name(path): sources.machine_paths(path.read_text(encoding="utf-8")) for path in _tracked()}
    assert {file: paths for file, paths in found.items() if paths} == {}


def _tracked() -> list[Path]:
    more = [ROOT / "Makefile", ROOT / "requirements.txt", ROOT / ".ci/run", ROOT / "book/references.bib"]
    return stamp.project_files(ROOT) + more
