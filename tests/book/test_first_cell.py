"""The first cell of a notebook, run as Jupyter runs it, wherever a reader may open one; pip is played by a stub."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import sources
from sources import NOTEBOOKS, ROOT

# Runs the cell on standard input where nothing but IPython is installed, and says what `import metatutor` then finds.
JUPYTER = """
import sys
from pathlib import Path
from IPython.core.interactiveshell import InteractiveShell

shell, cell = InteractiveShell.instance(colors="NoColor"), sys.stdin.read()
shell.system("exit 0")
shell.run_cell("raise ValueError")  # now all is imported that IPython itself will need
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
if "editable" in sys.argv[1:]:
    from importlib.util import spec_from_file_location

    class Editable:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return spec_from_file_location(name, "checkout/metatutor/__init__.py") if name == "metatutor" else None

    sys.meta_path.append(Editable)
standard = [path for path in sys.path if path.startswith(sys.base_prefix) and "packages" not in path]
sys.path[:] = ["", *standard, str(Path("installed").absolute())]
if shell.run_cell(cell).success:
    import metatutor
    print("found:", metatutor.__file__)
"""
PIP = """
import os, pathlib, sys
pathlib.Path("asked").write_text("\\n".join(sys.argv[1:]))
if os.environ["PIP"] == "fails":
    sys.exit("ERROR: Could not resolve host")
pathlib.Path("installed/metatutor").mkdir(parents=True)
pathlib.Path("installed/metatutor/__init__.py").touch()
"""


@dataclass
class Outcome:
    succeeded: bool
    asked: str  # of pip
    said: str


def put(package: Path) -> None:
    package.mkdir(parents=True)
    (package / "__init__.py").touch()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the notebook is opened."""
    put(tmp_path / "stub/pip")
    (tmp_path / "stub/pip/__main__.py").write_text(PIP)
    (tmp_path / "opened/installed").mkdir(parents=True)
    return tmp_path / "opened"


def run(folder: Path, *installed: str, pip: str = "works") -> Outcome:
    """What the first cell does in a folder."""
    cell = sources.source(sources.cells(NOTEBOOKS[0], "code")[0])
    environment = os.environ | {"PYTHONPATH": str(folder.parent / "stub"), "PIP": pip, "IPYTHONDIR": str(folder.parent)}
    command = [sys.executable, "-c", JUPYTER, *installed]
    ran = subprocess.run(command, cwd=folder, env=environment, input=cell, text=True, capture_output=True, timeout=60)
    asked = (folder / "asked").read_text() if (folder / "asked").exists() else ""
    return Outcome("found: " in ran.stdout, asked, ran.stdout + ran.stderr)


def test_every_notebook_begins_with_the_same_short_cell() -> None:
    first = {sources.source(sources.cells(path, "code")[0]) for path in NOTEBOOKS}
    assert len(first) == 1
    assert len(first.pop().splitlines()) <= 8


def test_installs_the_version_of_the_notebook(folder: Path) -> None:
    outcome = run(folder)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    source = f"git+{project['urls']['Repository']}@v{project['version']}"
    assert outcome.asked.splitlines() == ["install", "-q", f"metatutor[chapters] @ {source}"]
    assert outcome.succeeded and re.search(r"found: .*installed/metatutor/__init__\.py", outcome.said)


def test_says_so_in_one_sentence_where_pip_fails(folder: Path) -> None:
    outcome = run(folder, pip="fails")
    assert outcome.asked and not outcome.succeeded
    assert "ERROR: Could not resolve host" in outcome.said
    assert "ImportError: metatutor is missing: pip says why" in outcome.said


@pytest.mark.parametrize("pip", ["works", "fails"])
def test_a_folder_of_that_name_is_not_the_package(folder: Path, pip: str) -> None:
    (folder / "metatutor/notebooks").mkdir(parents=True)  # a clone, seen from above
    outcome = run(folder, pip=pip)
    assert outcome.asked
    assert outcome.succeeded == (pip == "works")


def test_installs_nothing_where_the_package_is(folder: Path) -> None:
    put(folder / "metatutor")
    outcome = run(folder, pip="fails")
    assert outcome.succeeded and not outcome.asked


def editable(folder: Path) -> None:
    put(folder / "checkout/metatutor")
    about = folder / "installed/metatutor-9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: metatutor\nVersion: 9\n")


def test_installs_nothing_over_an_editable_installation(folder: Path) -> None:
    editable(folder)
    outcome = run(folder, "editable", pip="fails")
    assert outcome.succeeded and not outcome.asked
    assert re.search(r"found: .*checkout/metatutor/__init__\.py", outcome.said)


def test_says_so_where_a_folder_hides_an_editable_installation(folder: Path) -> None:
    editable(folder)
    (folder / "metatutor").mkdir()
    outcome = run(folder, "editable", pip="works")
    assert not outcome.asked and not outcome.succeeded
    assert "a folder hides it" in outcome.said
