"""Two hundred bad command lines: each costs one line and exit status 2, and leaves everything as it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from metatutor import config, runs
from metatutor.cli import main
from metatutor.data import Strokes
from tests.bad_commands import TRAIN, bad_commands, bad_files, kinds


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """With a recorded run, tiny-5w1s, under `results/`, and damaged ones to be named by their paths."""
    strokes = Strokes.load(n_alphabets=6, characters_per_alphabet=8, drawings=8)
    monkeypatch.setattr(config, "_strokes", lambda: strokes)
    monkeypatch.setattr(runs, "results_folder", lambda: tmp_path / "results")
    monkeypatch.setenv("METATUTOR_DATA", str(tmp_path / "nowhere"))
    folder = tmp_path / "inside"
    folder.mkdir()
    monkeypatch.chdir(folder)
    main(["train", "tiny-5w1s", *TRAIN[2:], "--runs", str(tmp_path / "results")])
    bad_files(folder, tmp_path / "results" / "tiny-5w1s")
    yield folder
    shutil.rmtree(tmp_path, ignore_errors=True)


def tree(folder: Path) -> dict[Path, float]:
    """Everything in a folder, with the time of its last change."""
    return {path: path.lstat().st_mtime for path in folder.rglob("*")}


def test_every_bad_command_line_costs_one_line(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = list(bad_commands(working_folder))
    assert len(commands) >= 120 and len(kinds(commands)) >= 8
    before, wrong = tree(working_folder.parent), []
    capsys.readouterr()
    for command in commands:
        try:
            main(command.arguments)
            status = 0
        except SystemExit as end:
            status = end.code
        except Exception as error:  # noqa: BLE001 - whatever it is, it is one too many
            status = repr(error)[:200]
        out, error = capsys.readouterr()
        one_line = error.startswith("metatutor: ") and error.count("\n") == 1 and error.rstrip("\n").isprintable()
        if status != 2 or not one_line or len(error) > 2100 or out:
            wrong.append((command.kind, [a[:80] for a in command.arguments][-6:], status, error[:200], out[:80]))
    assert not wrong, "\n".join(map(str, wrong))
    assert tree(working_folder.parent) == before


def test_the_same_seed_draws_the_same_commands(working_folder: Path) -> None:
    assert list(bad_commands(working_folder, 3)) == list(bad_commands(working_folder, 3))
    assert list(bad_commands(working_folder, 3)) != list(bad_commands(working_folder, 4))
