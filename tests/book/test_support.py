"""How a chapter begins: Omniglot if it can be had, Strokes if not, and the reader is told; fast or full."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metatutor.book.support import load_characters, preset, sample_pictures
from metatutor.data import DownloadError, Omniglot, Strokes

NAMES = tuple(f"alphabet{i // 35}/character{i % 35}" for i in range(1623))


def test_omniglot_where_it_can_be_had(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def load(root: Path | None) -> Omniglot:
        asked.append(root)
        return Omniglot(torch.zeros(1623, 20, 1, 28, 28, dtype=torch.uint8), NAMES, 964)

    monkeypatch.setattr(Omniglot, "load", load)
    name, splits = load_characters(Path("here"))
    assert (name, splits.id, len(splits.test), asked) == ("Omniglot", "random-0", 1692, [Path("here")])
    assert capsys.readouterr().out == "Omniglot: 1623 characters, 20 drawings of each; split random-0.\n"
    assert load_characters(rotations=False)[1].id == "random-0-upright"


def test_strokes_where_no_source_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def load(root: Path | None) -> Omniglot:
        raise DownloadError("cannot download images_background: tried everything")

    few = Strokes.load(n_alphabets=3, characters_per_alphabet=2, drawings=4)
    monkeypatch.setattr(Omniglot, "load", load)
    monkeypatch.setattr(Strokes, "load", lambda: few)
    name, splits = load_characters()
    assert (name, splits.id) == ("Strokes", "strokes-0-3x2-0")
    said = capsys.readouterr().out
    assert said.startswith("Strokes: 6 characters, 4 drawings of each") and "tried everything" in said


def test_a_place_that_somebody_named_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="does not hold images_background"):
        load_characters(tmp_path)
    monkeypatch.setenv("METATUTOR_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="METATUTOR_DATA"):
        load_characters()


@pytest.mark.parametrize(("said", "chosen"), [(None, "fast"), ("", "fast"), ("fast", "fast"), ("full", "full")])
def test_a_chapter_is_fast_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, said: str | None, chosen: str
) -> None:
    monkeypatch.delenv("METATUTOR_PRESET", raising=False)
    if said is not None:
        monkeypatch.setenv("METATUTOR_PRESET", said)
    assert preset() == chosen


def test_there_is_no_third_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METATUTOR_PRESET", "Full")
    with pytest.raises(ValueError, match="METATUTOR_PRESET must be fast or full, got 'Full'"):
        preset()


def test_pictures_come_with_their_licence_and_in_folders_of_classes(unchecked_types: None) -> None:
    folder = sample_pictures("grocery")
    parts = ("support", "query", "other")
    counts = {part: [len(list(of.iterdir())) for of in (folder / part).iterdir()] for part in parts}
    assert counts == {"support": [10] * 8, "query": [10] * 8, "other": [10] * 4}
    assert "MIT" in (folder / "LICENSE").read_text() and "Klasson" in (folder / "SOURCES.txt").read_text()
    with pytest.raises(ValueError, match="no pictures 'cars'; choose"):
        sample_pictures("cars")  # pyright: ignore[reportArgumentType]
