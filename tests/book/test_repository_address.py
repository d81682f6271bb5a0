"""The public address stands in one place, and every file that repeats it agrees."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import stamp
from sources import ROOT

ELSEWHERE = stamp.Address("you", "a-fork")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project's text files, in a folder of their own."""
    for path in stamp.project_files(ROOT):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return tmp_path


def test_every_file_agrees_with_pyproject() -> None:
    assert stamp.disagreements(ROOT) == []


def test_stamping_changes_every_place_and_can_be_undone(copy: Path) -> None:
    address = stamp.read_address(copy)
    before = {path: path.read_bytes() for path in stamp.project_files(copy)}
    changed = stamp.stamp(copy, ELSEWHERE)
    assert {copy / "pyproject.toml", copy / "_config.yml", copy / "README.md", copy / "CITATION.cff"} <= set(changed)
    assert {*copy.glob("notebooks/*.ipynb")} <= set(changed)
    assert stamp.disagreements(copy) == []
    assert stamp.stamp(copy, ELSEWHERE) == []
    assert not [path for path in stamp.project_files(copy) if address.repository in path.read_text(encoding="utf-8")]
    stamp.stamp(copy, address)
    assert {path: path.read_bytes() for path in stamp.project_files(copy)} == before


@pytest.mark.parametrize("file", ["_config.yml", "README.md", "CITATION.cff", "book/index.md"])
def test_a_file_that_disagrees_is_named(copy: Path, file: str) -> None:
    path = copy / file
    path.write_text(path.read_text(encoding="utf-8").replace(stamp.read_address(copy).owner + "/", "stranger/"))
    assert any(line.startswith(file) for line in stamp.disagreements(copy))


def test_a_notebook_that_installs_from_elsewhere_is_named_and_put_right(copy: Path) -> None:
    name = stamp.read_address(copy).name
    path = copy / "notebooks/99_extra.ipynb"
    cell = {"cell_type": "code", "source": [f"%pip install git+https://github.com/stranger/{name}"]}
    path.write_text(json.dumps({"cells": [cell, cell | {"source": ["1 + 1"]}]}))
    assert len([line for line in stamp.disagreements(copy) if line.startswith("notebooks/99_extra")]) == 2
    assert stamp.stamp(copy, stamp.read_address(copy)) == [path]
    assert stamp.disagreements(copy) == []
    assert json.loads(path.read_text())["cells"][1]["source"] == ["1 + 1"]


def test_another_version_is_stamped_into_every_notebook(copy: Path) -> None:
    project = copy / "pyproject.toml"
    project.write_text(re.sub(r"^version = .*", 'version = "9.8.7"', project.read_text(), flags=re.MULTILINE))
    notebooks = sorted(copy.glob("notebooks/*.ipynb"))
    assert len(stamp.disagreements(copy)) == len(notebooks)
    assert stamp.stamp(copy, stamp.read_address(copy)) == notebooks
    assert all("@v9.8.7" in path.read_text() for path in notebooks)
    assert stamp.disagreements(copy) == []


@pytest.mark.parametrize(
    "url", ["github.com/a/b", "https://github.com/a", "https://example.org/a/b", "https://github.com/a/b/c"]
)
def test_only_a_repository_address_is_accepted(url: str) -> None:
    with pytest.raises(ValueError, match=r"https://github\.com/owner/name"):
        stamp.Address.parse(url)


def test_addresses_that_follow() -> None:
    address = stamp.Address.parse("https://github.com/You/book.git")
    assert address.repository == "https://github.com/You/book"
    assert address.colab == "https://colab.research.google.com/github/You/book"
    assert address.pages == "https://you.github.io/book/"
    assert stamp.Address("You", "you.github.io").pages == "https://you.github.io/"
