"""What `pip install` brings: every subpackage, the recorded runs, and every dependency, none of them capped."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import sources
import yaml
from sources import NOTEBOOKS, ROOT

import metatutor

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
IMPORTED_AS = {"PIL": "pillow", "sklearn": "scikit-learn"}


def distribution(requirement: str) -> str:
    """The package that a requirement asks for, without version and extras."""
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None, requirement
    return match.group().lower()


DECLARED = {distribution(requirement) for requirement in PROJECT["dependencies"]}


def foreign(packages: set[str]) -> set[str]:
    """The distributions of packages that are neither ours nor Python's."""
    return {IMPORTED_AS.get(package, package) for package in packages - {"metatutor"} - sys.stdlib_module_names}


def imported(files: Iterable[Path]) -> set[str]:
    """The distributions that files import."""
    return foreign({package for path in files for package in sources.imported_packages(path.read_text("utf-8"))})


def test_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert metatutor.__version__ == PROJECT["version"] == citation["version"]


def test_every_subpackage_is_listed() -> None:
    folders = {path.parent for path in (ROOT / "metatutor").rglob("*.py")}
    expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"metatutor.results"}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == expected


def test_every_import_of_the_package_is_a_dependency() -> None:
    chapters = set((ROOT / "metatutor/book").rglob("*.py"))
    package = imported(set((ROOT / "metatutor").rglob("*.py")) - chapters)
    optional = {"tensorboard", "torchvision"}  # asked for by name in an error message where it is missing
    assert package - optional <= DECLARED


def test_every_import_of_a_chapter_is_a_dependency() -> None:
    helpers = imported((ROOT / "metatutor/book").rglob("*.py"))
    cells = [sources.source(cell) for path in NOTEBOOKS for cell in sources.cells(path, "code")]
    code = [re.sub(r"^\s*%.*", "", cell, flags=re.MULTILINE) for cell in cells if "%pip" not in cell]
    of_cells = {package for cell in code for package in sources.imported_packages(cell)}
    extras = {distribution(requirement) for requirement in PROJECT["optional-dependencies"]["chapters"]}
    assert extras <= foreign(of_cells) | helpers <= DECLARED | extras


def test_no_dependency_of_the_package_is_capped() -> None:
    assert [requirement for requirement in PROJECT["dependencies"] if re.search(r"<|==|~=", requirement)] == []


def test_the_tested_set_pins_every_direct_dependency() -> None:
    extras = PROJECT["optional-dependencies"]
    tested = [*PROJECT["dependencies"], *extras["chapters"], *extras["book"], *extras["dev"]]
    direct = {distribution(line) for line in tested}
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+(?:\[\w+\])?==[\w.]+", pin)] == []
    assert sorted(distribution(pin) for pin in pins) == sorted(direct)


def test_the_recorded_runs_come_with_the_installation(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "metatutor", tmp_path / "metatutor", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "results", tmp_path / "results")
    run = tmp_path / "results" / "omniglot-test-5w1s"
    run.mkdir()
    for name in ("config.json", "history.csv", "model.safetensors"):
        (run / name).write_text("{}")
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    installed = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"metatutor/results/{run.name}/{name}" for name in ("config.json", "history.csv", "model.safetensors")}
    expected |= {f"metatutor/results/{name}" for name in ("published.json", "published_streams.json")}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "metatutor").rglob("*.html")}
    assert expected | {"metatutor/episodes.py", "metatutor/py.typed"} <= installed
    assert not [name for name in installed if name.startswith(("tests/", "book/", "results/"))]
