"""Notebooks as committed: no outputs, short cells, one kernel."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import sources
from sources import NOTEBOOKS, ROOT

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
def test_a_chapter_says_how_long_it_takes(notebook: Path) -> None:
    """200 words or 12 lines of shown code a minute."""
    said = re.search(r"About (\d+) minutes to read and \d+ seconds to run", sources.markdown(notebook))
    shown = [
        c
        for c in sources.cells(notebook, "code")
        if not {"hide-cell", "hide-input"} & set(c["metadata"].get("tags", []))
    ]
    lines = sum(bool(line.strip()) for cell in shown for line in sources.source(cell).splitlines())
    minutes = len(sources.markdown(notebook).split()) / 200 + lines / 12
    assert said and minutes / 1.25 < int(said[1]) < 1.25 * minutes, f"it takes {minutes:.0f} minutes"


def nbstripout(*arguments: str) -> int:
    """Its exit status, with the options of `make format`."""
    [options] = re.findall(
        r"^STRIP := \$\(BIN\)/nbstripout (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M
    )
    return subprocess.run([sys.executable, "-m", "nbstripout", *shlex.split(options), *arguments]).returncode


def test_there_is_nothing_to_clear() -> None:
    assert nbstripout("--verify", *map(str, NOTEBOOKS)) == 0, "make format"


def test_clearing_removes_what_running_leaves_and_nothing_else(tmp_path: Path) -> None:
    kept = {"tags": ["hide-input"], "mystnb": {"figure": {"caption": "Look at the slope.", "name": "fig-a"}}}
    ran = {"cell_type": "code", "execution_count": 3, "id": "slopes", "source": ["1 + 1"]}
    ran["metadata"] = kept | {"collapsed": True, "execution": {"iopub.execute_input": "now"}, "outputId": "x"}
    ran["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["2"]}]
    usual = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    usual["mystnb"] = {"render_markdown_format": "gfm"}
    metadata = usual | {"widgets": {}, "language_info": {"name": "python"}, "colab": {"provenance": []}}
    path = tmp_path / "notebook.ipynb"
    path.write_text(json.dumps({"cells": [ran], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
    assert nbstripout("--verify", str(path)) == 1
    assert nbstripout(str(path)) == nbstripout("--verify", str(path)) == 0
    cleared = json.loads(path.read_text())
    assert cleared["metadata"] == usual
    assert cleared["cells"] == [ran | {"execution_count": None, "outputs": [], "metadata": kept}]
