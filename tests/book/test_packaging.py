"""What `pip install` brings: every subpackage, the recorded runs, and every dependency, none of them capped."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import sources
import yaml
from packaging.requirements import Requirement
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
    optional = {"gymnasium", "tensorboard", "torchvision"}  # asked for by name in an error message where it is missing
    assert package - optional <= DECLARED


def test_every_import_of_a_chapter_is_a_dependency() -> None:
    helpers = imported((ROOT / "metatutor/book").rglob("*.py"))
    cells = [sources.source(cell) for path in NOTEBOOKS for cell in sources.cells(path, "code")]
    code = [re.sub(r"^\s*%.*", "", cell, flags=re.MULTILINE) for cell in cells if "%pip" not in cell]
    of_cells = {package for cell in code for package in sources.imported_packages(cell)}
    extras = {distribution(requirement) for requirement in PROJECT["optional-dependencies"]["chapters"]}
    others = PROJECT["optional-dependencies"]["photos"] + PROJECT["optional-dependencies"]["acting"]
    optional = {distribution(requirement) for requirement in others}  # what parts of the package need
    assert extras <= foreign(of_cells) | helpers | optional <= DECLARED | extras


def test_no_dependency_of_the_package_is_capped() -> None:
    assert [requirement for requirement in PROJECT["dependencies"] if re.search(r"<|==|~=", requirement)] == []


def test_the_tested_set_pins_every_direct_dependency() -> None:
    extras = PROJECT["optional-dependencies"]
    tested = [*PROJECT["dependencies"], *extras["photos"], *extras["chapters"], *extras["book"], *extras["dev"]]
    direct = {distribution(line) for line in tested}
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+(?:\[\w+\])?==[\w.]+", pin)] == []
    assert sorted(distribution(pin) for pin in pins) == sorted(direct)


HOLDS = {".ci", ".github", "benchmarks", "book", "metatutor", "notebooks", "results", "studies", "tests"}
NOISE = {"__pycache__", ".pytest_cache", ".ipynb_checkpoints"}
RUN = ("config.json", "history.csv", "model.safetensors")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with one run of its own, without the others' weights; a wheel and a source distribution of it."""
    root = tmp_path_factory.mktemp("build") / "checkout"
    root.mkdir()
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copyfile(path, root / path.name)
        elif path.name in HOLDS:
            shutil.copytree(path, root / path.name, ignore=shutil.ignore_patterns(*NOISE, "*.safetensors"))
    run = root / "results" / "omniglot-test-5w1s"
    run.mkdir()
    for name in RUN:
        (run / name).write_text("{}")
    build = "from setuptools import build_meta as b; b.build_sdist('../built'); b.build_wheel('../built')"
    subprocess.run([sys.executable, "-c", build], cwd=root, check=True, capture_output=True)
    return root


def test_the_recorded_runs_come_with_the_installation(checkout: Path) -> None:
    [wheel] = checkout.parent.glob("built/*.whl")
    installed = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"metatutor/results/omniglot-test-5w1s/{name}" for name in RUN}
    expected |= {f"metatutor/results/{name}" for name in ("published.json", "published_streams.json")}
    for kind in ("html", "zip"):
        expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "metatutor").rglob(f"*.{kind}")}
    assert expected | {"metatutor/episodes.py", "metatutor/py.typed"} <= installed
    parts = {name for name in installed if name.startswith("metatutor/")}
    kinds = {".py", ".typed", ".html", ".css", ".js", ".json", ".csv", ".safetensors", ".zip"}
    assert {Path(name).suffix for name in parts} == kinds
    assert {name.split("/")[0] for name in installed - parts} == {f"metatutor-{PROJECT['version']}.dist-info"}


def test_a_source_distribution_holds_what_the_repository_holds(checkout: Path) -> None:
    [archive] = checkout.parent.glob("built/*.tar.gz")
    with tarfile.open(archive) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    ours = {path.relative_to(checkout).as_posix() for path in checkout.rglob("*") if path.is_file()}
    ours = {name for name in ours if name.split("/")[0] not in ("build", "metatutor.egg-info")}
    assert {"CHANGELOG.md", "tests/conftest.py", "tests/book/sources.py", "notebooks/01_concepts.ipynb"} <= ours
    assert {"book/_static/task.js", ".ci/run", f"results/omniglot-test-5w1s/{RUN[2]}"} <= ours
    assert sorted(ours - inside) == []


def test_the_pytorch_that_is_there_stays() -> None:
    """Nothing that the package needs, however indirectly, asks for another PyTorch than the package itself does."""
    asked: dict[str, dict[str, Requirement]] = {}
    waiting = set(DECLARED)
    while waiting:
        name = waiting.pop()
        lines = [Requirement(line) for line in importlib.metadata.requires(name) or []]
        asked[name] = {line.name: line for line in lines if not line.marker or line.marker.evaluate({"extra": ""})}
        if name != "torch":
            waiting |= asked[name].keys() - asked.keys()
    [own] = [Requirement(line) for line in PROJECT["dependencies"] if distribution(line) == "torch"]
    [oldest] = [bound.version for bound in own.specifier]
    narrow = {
        name: str(needed["torch"])
        for name, needed in asked.items()
        if "torch" in needed and not {oldest, "99"} <= set(needed["torch"].specifier.filter([oldest, "99"]))
    }
    assert narrow == {}
