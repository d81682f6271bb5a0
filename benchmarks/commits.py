"""One meta-gradient in two or more commits: what a change did to speed and memory.

    python benchmarks/commits.py 4705f28 HEAD --settings strided-1q-1s --json commits.json

Every commit is checked out into a folder of its own and runs its own `maml_step.py` there, without peers. They take
turns, a few rounds each, so that whatever else the machine does meets all alike. A commit stands where other tables
have the implementation; ratios are to the first one.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import tyro
from harness import Row

Name = tuple[str, str]  # a setting and a commit


def git(*words: str | Path, root: Path) -> str:
    """What git answers.

    Raises:
        SystemExit: with git's own words, if it refuses.
    """
    done = subprocess.run(["git", "-C", root, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    return done.stdout.strip()


@contextmanager
def checked_out(commits: Sequence[str], root: Path) -> Iterator[dict[str, Path]]:
    """A folder for each commit, by its short name, for as long as this lasts."""
    with TemporaryDirectory() as temporary:
        folders: dict[str, Path] = {}
        try:
            for commit in commits:
                name = git("rev-parse", "--short", "--verify", f"{commit}^{{commit}}", root=root)
                if name not in folders:
                    git("worktree", "add", "--detach", Path(temporary) / name, name, root=root)
                    folders[name] = Path(temporary) / name
            yield folders
        finally:
            for folder in folders.values():
                git("worktree", "remove", "--force", folder, root=root)


def rows_in(folder: Path, settings: Sequence[str], rounds: int, threads: int | None) -> list[dict[str, Any]]:
    """The rows that a commit's own benchmark writes."""
    file = folder / "rows.json"
    words = ["--peers", "--settings", *settings, "--rounds", str(rounds), "--json", str(file)]
    words += [] if threads is None else ["--threads", str(threads)]
    command = [sys.executable, "benchmarks/maml_step.py", *words]
    subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)}, check=True, stdout=subprocess.DEVNULL
    )
    return json.loads(file.read_text())


def summary(taken: dict[Name, list[dict[str, Any]]]) -> list[Row]:
    """Medians over all turns."""
    medians = {
        name: [statistics.median(row[key] for row in rows) for key in ("milliseconds", "peak_mib")]
        for name, rows in taken.items()
    }
    first = {setting: milliseconds for (setting, _), (milliseconds, _) in reversed(medians.items())}
    return [Row(s, commit, ms, ms / first[s], peak) for (s, commit), (ms, peak) in medians.items()]


def main(
    commits: Annotated[tuple[str, ...], tyro.conf.Positional],
    settings: tuple[str, ...] = ("strided-1q-1s", "strided-15q-5s"),
    turns: int = 3,
    rounds: int = 10,
    threads: int | None = None,
    json_: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    root: Path = Path(__file__).parent.parent,
) -> None:
    """Measure, print one table, and write it as JSON if asked to.

    Args:
        commits: names that git knows, such as HEAD~3.
        settings: as in maml_step.py.
        turns: how often each commit is measured.
        rounds: timed steps of every turn.
        threads: threads of every process; default: PyTorch's choice.
        json_: a file to write the rows to.
        root: the repository.
    """
    taken: dict[Name, list[dict[str, Any]]] = {}
    with checked_out(commits, root) as folders:
        for _ in range(turns):
            for commit, folder in folders.items():
                for row in rows_in(folder, settings, rounds, threads):
                    taken.setdefault((row["setting"], commit), []).append(row)
    rows = summary(taken)
    print(f"{'setting':<15} {'commit':<12} {'median ms':>9} {'ratio':>7} {'peak MiB':>9}")
    for row in rows:
        numbers = f"{row.milliseconds:>9.1f} {row.ratio:>7.2f} {row.peak_mib:>9.0f}"
        print(f"{row.setting:<15} {row.implementation:<12} {numbers}")
    if json_:
        json_.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
