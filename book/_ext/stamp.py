"""Write the repository's public address into every file that repeats it: `make stamp URL=https://github.com/you/fork`.

The address stands in one place, `[project.urls] Repository` of `pyproject.toml`. Other files must repeat it (the book's
settings, badges, `CITATION.cff`), and the first code cell of every notebook, which installs the package on Colab, the
version too: it is written here. `tests/book/test_repository_address.py` finds disagreements. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
TEXT_FILES = {".md", ".ipynb", ".toml", ".yml", ".yaml", ".cff", ".py", ".html", ".js", ".svg", ".po"}

# A file of each kind that cannot do without the address, and what it must say.
MUST_REPEAT = {
    "_config.yml": ("url: {repository}", "baseurl: {pages}"),
    "CITATION.cff": ("repository-code: {repository}", "url: {pages}"),
    "README.md": ("git+{repository}", "{colab}/blob/main/", "{pages}"),
    "book/index.md": ("git+{repository}", "{colab}/blob/main/"),
}
FIRST_CELL = """\
# Where the package is missing, as on Colab, install it; a PyTorch already there stays.
from importlib import metadata, util

spec = util.find_spec("metatutor")
if not (any(metadata.distributions(name="metatutor")) or getattr(spec, "origin", None)):
    %pip install -q "metatutor[chapters] @ git+{repository}@v{version}"
if not getattr(util.find_spec("metatutor"), "origin", None):
    raise ImportError("metatutor is missing: pip says why, or a folder hides it")
"""


@dataclass(frozen=True)
class Address:
    """Where a project lives on GitHub, and the other addresses that follow from it.

    Example:
        >>> Address.parse("https://github.com/you/fork.git").pages
        'https://you.github.io/fork/'
    """

    owner: str
    name: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read `https://github.com/owner/name`.

        Raises:
            ValueError: if `url` is anything else.
        """
        match = re.fullmatch(r"https://github\.com/([\w.-]+)/([\w.-]+?)(?:\.git)?/?", url)
        if match is None:
            raise ValueError(f"the address must look like https://github.com/owner/name, got {url!r}")
        return cls(*match.groups())

    @property
    def repository(self) -> str:
        return f"https://github.com/{self.owner}/{self.name}"

    @property
    def colab(self) -> str:
        return f"https://colab.research.google.com/github/{self.owner}/{self.name}"

    @property
    def pages(self) -> str:
        host = f"{self.owner.lower()}.github.io"
        return f"https://{host}/" if self.name.lower() == host else f"https://{host}/{self.name}/"

    def fill(self, template: str) -> str:
        """`template` with {repository}, {colab} and {pages} replaced."""
        return template.format(repository=self.repository, colab=self.colab, pages=self.pages)


def _project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read_address(root: Path) -> Address:
    """The address as `pyproject.toml` has it."""
    return Address.parse(_project(root)["urls"]["Repository"])


def first_cell(root: Path) -> str:
    """What the first code cell of every notebook must be, by the address and the version in `pyproject.toml`."""
    return FIRST_CELL.format(repository=read_address(root).repository, version=_project(root)["version"]).rstrip()


def _notebooks(root: Path) -> dict[Path, tuple[dict[str, Any], dict[str, Any]]]:
    """Every notebook, and its first code cell."""
    read = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(root.glob("notebooks/*.ipynb"))}
    return {path: (book, next(c for c in book["cells"] if c["cell_type"] == "code")) for path, book in read.items()}


def project_files(root: Path) -> list[Path]:
    """The text files of the project: what git tracks or would track, or every file where there is no git."""
    git = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(git, check=True, capture_output=True, text=True).stdout.split("\0")
        paths = {root / name for name in listed if name}
    except (OSError, subprocess.CalledProcessError):
        hidden = (".venv", "_build", "build", ".git")
        paths = {path for path in root.rglob("*") if path.relative_to(root).parts[0] not in hidden}
    return sorted(path for path in paths if path.suffix in TEXT_FILES and path.is_file())


def _address_pattern(address: Address) -> re.Pattern[str]:
    """Every way in which a file may name `address`; the first group tells which."""
    slug = rf"{re.escape(address.owner)}/{re.escape(address.name)}"
    pages = re.escape(address.pages.rstrip("/"))
    return re.compile(rf"(?:(github\.com/|colab\.research\.google\.com/github/){slug}|{pages})(?![\w-])", re.IGNORECASE)


def stamp(root: Path, new: Address) -> list[Path]:
    """Replace the project's address by `new` in every file, and the first cells; return the files that changed."""
    pattern = _address_pattern(read_address(root))

    def replacement(match: re.Match[str]) -> str:
        host = match.group(1)
        return f"{host}{new.owner}/{new.name}" if host else new.pages.rstrip("/")

    changed = set()
    for path in project_files(root):
        before = path.read_bytes()
        after = pattern.sub(replacement, before.decode("utf-8")).encode("utf-8")
        if after != before:
            path.write_bytes(after)
            changed.add(path)
    install = first_cell(root)
    for path, (notebook, cell) in _notebooks(root).items():
        if "".join(cell["source"]) != install:
            cell["source"] = install.splitlines(keepends=True)
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            changed.add(path)
    return sorted(changed)


def disagreements(root: Path) -> list[str]:
    """What contradicts the address in `pyproject.toml`, one line each; empty if all agree."""
    address = read_address(root)
    required = {root / name: templates for name, templates in MUST_REPEAT.items()}
    found = []
    for path, templates in required.items():
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        missing = [address.fill(template) for template in templates if address.fill(template) not in text]
        found += [f"{path.relative_to(root)} lacks '{line}'" for line in missing]
    install = first_cell(root)
    for path, (_, cell) in _notebooks(root).items():
        if "".join(cell["source"]) != install:
            found.append(f"{path.relative_to(root)} begins with another code cell; run `make stamp`")
    host = r"(?:github\.com|google\.com/github)"
    namesake = re.compile(rf"{host}/([\w.-]+)/{re.escape(address.name)}(?![\w-])", re.IGNORECASE)
    for path in project_files(root):
        owners = set(namesake.findall(path.read_text(encoding="utf-8"))) - {address.owner}
        found += [f"{path.relative_to(root)} names github.com/{owner}/{address.name}" for owner in sorted(owners)]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Stamp the address given, or the present one; with `--check` only say where a file disagrees."""
    parser = argparse.ArgumentParser(description="Write the repository's public address everywhere it is repeated.")
    parser.add_argument("url", nargs="?", help="https://github.com/owner/name; default: the one in pyproject.toml")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a file disagrees")
    options = parser.parse_args(arguments)
    if options.url is not None and options.check:
        parser.error("give either an address or --check")
    if not options.check:
        try:
            address = Address.parse(options.url) if options.url else read_address(REPOSITORY_ROOT)
        except ValueError as error:
            parser.error(str(error))
        changed = stamp(REPOSITORY_ROOT, address)
        print("\n".join(f"stamped {path.relative_to(REPOSITORY_ROOT)}" for path in changed) or "nothing to change")
    lines = disagreements(REPOSITORY_ROOT)
    print("\n".join(lines), file=sys.stderr, end="\n" if lines else "")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
