"""Remove what running leaves in notebooks: `python book/_ext/clear_outputs.py FILE...` (`make format` does it)."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat

LEFT_BY_EDITORS = ("collapsed", "execution", "ExecuteTime", "scrolled", "outputId", "colab")


def clear(path: Path) -> bool:
    """Rewrite the notebook at `path` without outputs; return whether it changed."""
    before = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(before, as_version=4)
    notebook.metadata = {
        name: notebook.metadata[name] for name in ("kernelspec", "mystnb") if name in notebook.metadata
    }
    for cell in notebook.cells:
        for name in LEFT_BY_EDITORS:
            cell.metadata.pop(name, None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    after = nbformat.writes(notebook) + "\n"
    if after != before:
        path.write_text(after, encoding="utf-8")
    return after != before


if __name__ == "__main__":
    for name in sys.argv[1:]:
        if clear(Path(name)):
            print(f"cleared {name}")
