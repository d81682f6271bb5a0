"""Whatever lies where Omniglot's archives should: one line says what is wrong, at once, in little memory."""

from __future__ import annotations

import hashlib
import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metatutor.data.omniglot import DownloadError, Omniglot, _Part, download, info, verify
from tests import damaged_archives
from tests.damaged_archives import Damage, by_chance, certain, intact

CERTAIN, BY_CHANCE = list(certain()), list(by_chance(seed=0))
MIB = 1 << 20


def digest(name: str) -> str:
    content = intact()[name]
    pixels = (np.packbits(np.asarray(Image.open(io.BytesIO(content[n])))).tobytes() for n in sorted(content))
    return hashlib.sha256(
        b"".join(n.encode() + b"\0" + p for n, p in zip(sorted(content), pixels, strict=True))
    ).hexdigest()


PARTS = tuple(_Part(name, len(characters), digest(name)) for name, characters in damaged_archives.CHARACTERS.items())


@pytest.fixture(scope="module")
def intact_omniglot(tmp_path_factory) -> Omniglot:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METATUTOR_CACHE", str(tmp_path_factory.mktemp("cache")))
        damaged_archives.write_intact(folder := tmp_path_factory.mktemp("intact") / "data")
        return Omniglot.load(folder, parts=PARTS)


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A folder with intact archives; no cache, and no network."""
    monkeypatch.setenv("METATUTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("METATUTOR_OMNIGLOT_URL", "")
    monkeypatch.setattr("metatutor.data.omniglot._OFFICIAL", "http://127.0.0.1:9")
    damaged_archives.write_intact(tmp_path / "data")
    return tmp_path / "data"


def files(folder: Path) -> list[Path]:
    """And links, pipes and the like."""
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def test_there_are_enough_of_them():
    assert len(CERTAIN) >= 100 and len(BY_CHANCE) >= 100
    assert len({damage.name for damage in CERTAIN + BY_CHANCE}) == len(CERTAIN + BY_CHANCE)


def test_the_intact_one_is_read(intact_omniglot):
    assert intact_omniglot.images.shape == (3, 20, 1, 28, 28)


@pytest.mark.parametrize("damage", CERTAIN, ids=lambda damage: damage.name)
def test_one_line_says_what_is_wrong(root, damage: Damage):
    damage.write(root)
    before = files(root.parent)
    reads: list[Callable[..., object]] = [Omniglot.load, verify, info, download]
    tracemalloc.start()
    try:
        for read in reads:
            with pytest.raises(ValueError) as caught:
                read(root, parts=PARTS)
            message = str(caught.value)
            assert caught.type in (ValueError, DownloadError)
            assert message.isprintable() and 20 < len(message) <= 2000
            assert str(root) in message or caught.type is DownloadError
        assert tracemalloc.get_traced_memory()[1] < 40 * MIB
    finally:
        tracemalloc.stop()
    assert files(root.parent) == before


@pytest.mark.parametrize("damage", BY_CHANCE, ids=lambda damage: damage.name)
def test_damage_by_chance_is_found_or_does_no_harm(root, intact_omniglot, damage: Damage):
    damage.write(root)
    try:
        found = Omniglot.load(root, parts=PARTS)
    except ValueError as error:
        assert type(error) is ValueError and str(error).isprintable() and str(root) in str(error)
    else:
        assert torch.equal(found.images, intact_omniglot.images) and found.names == intact_omniglot.names


def test_most_damage_by_chance_is_found(root):
    refused = 0
    intact_zip = (root / "images_background.zip").read_bytes()
    for damage in (damage for damage in BY_CHANCE if damage.name.startswith("zip")):
        damage.write(root)
        try:
            verify(root, parts=PARTS)
        except ValueError:
            refused += 1
    (root / "images_background.zip").write_bytes(intact_zip)
    assert refused >= 100
    assert verify(root, parts=PARTS).characters == 3
