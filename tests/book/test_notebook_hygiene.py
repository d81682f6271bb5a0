"""Notebooks as committed: no outputs, short cells, one kernel, a first cell that makes them run on Colab."""

from __future__ import annotations

import json
from pathlib import Path

import clear_outputs
import pytest
import sources
from sources import NOTEBOOKS

LONGEST_CELL = 30  # lines; aim for a dozen

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=sources.name)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@each_notebook
def test_no_outputs(notebook: Path) -> None:
    code = sources.cells(notebook, "code")
    left = [sources.source(cell)[:60] for cell in code if cell["outputs"] or cell["execution_count"] is not None]
    assert left == [], "clear the outputs: make format"


@each_notebook
def test_no_widget_state_and_the_usual_kernel(notebook: Path) -> None:
    metadata = json.loads(notebook.read_text(encoding="utf-8"))["metadata"]
    assert "widgets" not in metadata
    assert metadata["kernelspec"]["name"] == "python3"


@each_notebook
def test_cells_are_short(notebook: Path) -> None:
    code = [sources.source(cell) for cell in sources.cells(notebook, "code")]
    assert [cell.splitlines()[0] for cell in code if len(cell.splitlines()) > LONGEST_CELL] == []
    assert not [cell for cell in code if not cell.strip()], "remove the empty cell"


@each_notebook
def test_first_code_cell_installs_the_package_where_it_is_missing(notebook: Path) -> None:
    first = sources.source(sources.cells(notebook, "code")[0])
    assert "metatutor" in first and "git+https://" in first


def test_clearing_removes_outputs_and_nothing_else(tmp_path: Path) -> None:
    ran = {
        "cell_type": "code",
        "execution_count": 3,
        "id": "a",
        "metadata": {"collapsed": True, "tags": ["hide-input"]},
    }
    ran |= {"source": ["1 + 1"], "outputs": [{"output_type": "stream", "name": "stdout", "text": ["2"]}]}
    path = tmp_path / "notebook.ipynb"
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}, "widgets": {}}
    path.write_text(json.dumps({"cells": [ran], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
    assert clear_outputs.clear(path)
    [cell] = sources.cells(path, "code")
    assert cell["outputs"] == [] and cell["execution_count"] is None
    assert sources.source(cell) == "1 + 1" and cell["metadata"] == {"tags": ["hide-input"]}
    assert "widgets" not in json.loads(path.read_text())["metadata"]
    assert not clear_outputs.clear(path)
