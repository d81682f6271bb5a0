"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each.

In reading order: find the archives, download them, compare every pixel with the published ones, resize and cache
once, split. Archives are trusted for what they hold, not for where they came from.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from metatutor.episodes import ClassImages, Episode
from metatutor.files import decoding, entries, expanded, members, one_line, replacing
from metatutor.files import download as download_file


@dataclass(frozen=True)
class _Part:
    """One published archive: its name, how many folders of 20 drawings it holds, and the digest of all of them."""

    name: str
    folders: int
    digest: str

    @property
    def inside(self) -> str:
        """What the names of its files begin with."""
        return "" if self.name == _RUNS.name else f"{self.name}/"


_PARTS = (  # a folder is a character
    _Part("images_background", 964, "72b29e700cff186ed4eec511699ee2b6466aab8e2fa6daf852264b72ab606d32"),
    _Part("images_evaluation", 659, "3bccfcf54110b862e4f04c62a4d7d432b0f2bf145889b45d9b824cbd9191ccd5"),
)
# Two folders a run: 20 drawings to learn from, 20 to recognise.
_RUNS = _Part("all_runs", 40, "b7cfef7670164bbe6bf582d0345164b92a2aff4e7e6ce86f555ef9854509f4dc")
_OFFICIAL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"  # the address torchvision has too
_DRAWINGS = 20  # of each character, each by a different person
_TRAIN, _VALIDATION, _VALIDATION_ALPHABETS = 1100, 100, 5
# Alphabets of the split of Vinyals et al. (2016) that later papers choose their settings on.
_VINYALS_VALIDATION = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
_CACHE_FORMAT = "v2"  # changes when decoding does, or what is kept from it
_ZIP_BYTES = 32_000_000  # at most; the largest one published has 9,464,212


class DownloadError(ValueError):
    """No source gave an intact archive; the message names every address tried and what to do without a network."""


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Whatever is wrong with a zip or a folder becomes a message that names it and says what to do."""
    try:
        yield
    except OSError as error:
        advice = "make it readable, or name another folder in METATUTOR_DATA"
        reason = f"{error.filename or source}: {error.strerror or error}"
        raise ValueError(one_line(f"cannot read {reason}; {advice}")) from error
    except ValueError as damage:
        advice = "delete it and put an intact copy in its place (`metatutor data download` fetches one)"
        raise ValueError(one_line(f"{source} is damaged or incomplete: {damage}; {advice}")) from damage


# --- where the archives are ---


def _folder(root: Path | str | None) -> tuple[Path, str]:
    """Where to look, and who said so ("" if nobody did, and it is the cache)."""
    if root is not None:
        return expanded(root, origin := "the given root"), origin
    if named := os.environ.get("METATUTOR_DATA"):
        return expanded(named, origin := "METATUTOR_DATA"), origin
    return _cache_folder(), ""


def _cache_folder() -> Path:
    from platformdirs import user_cache_path

    return expanded(os.environ.get("METATUTOR_CACHE") or user_cache_path("metatutor"), "METATUTOR_CACHE")


def _find(folder: Path, part: _Part) -> Path | None:
    for base in (folder, folder / "omniglot-py"):
        archive, unpacked = base / f"{part.name}.zip", base / part.name
        with _reading(archive):
            if archive.is_file():
                if (size := archive.stat().st_size) > _ZIP_BYTES:
                    raise ValueError(f"it has {size:,} bytes, expected at most {_ZIP_BYTES:,}")
                return archive
            if unpacked.is_dir():
                return unpacked
    return None


def _locate(root: Path | str | None, part: _Part, download: bool) -> Path:
    """The zip or folder of a part; it is downloaded only when nobody named a place where it should be."""
    folder, origin = _folder(root)
    if found := _find(folder, part):
        return found
    if download and not origin:
        return _fetch(folder, part)
    with _reading(folder):
        held = sorted(map(_kind, folder.iterdir())) if folder.exists() else ["no such folder"]
    found = ", ".join(held[:8]) or "an empty folder"
    name, command = part.name, "" if part == _RUNS else f" (`metatutor data download --data {folder}` does)"
    message = (
        f"{folder} ({origin or 'the cache'}) does not hold {name}: expected {name}.zip or a folder {name}, there or in "
        f"omniglot-py; found {found}; put {_urls(part)[0]} there{command}, or name another folder in METATUTOR_DATA"
    )
    raise ValueError(one_line(message))


def _kind(path: Path) -> str:
    """The name of what is in a folder, and what it is if not a file."""
    return path.name + ("" if path.is_file() else "/" if path.is_dir() else " (no regular file)")


def _urls(part: _Part) -> list[str]:
    inside = "/one-shot-classification" if part == _RUNS else ""
    mirrors = os.environ.get("METATUTOR_OMNIGLOT_URL", "").split()
    return [f"{folder.rstrip('/')}/{part.name}.zip" for folder in (_OFFICIAL + inside, *mirrors)]


def _fetch(folder: Path, part: _Part) -> Path:
    """Download an archive from the first address where it is intact."""
    from requests import RequestException

    target, failures = folder / "omniglot-py" / f"{part.name}.zip", []
    with replacing(target) as temporary:
        for url in _urls(part):
            try:
                download_file(url, temporary, _ZIP_BYTES)
                _check(temporary, part)
                return target
            except RequestException as error:
                status = error.response is not None and f"HTTP {error.response.status_code}"
                failures.append(f"{url} ({status or type(error).__name__})")
            except ValueError as error:  # damage, or not an address
                failures.append(f"{url} ({error})")
        message = (
            f"cannot download {part.name}: tried {', '.join(failures)}; set METATUTOR_DATA to a folder that holds "
            f"{part.name}.zip, METATUTOR_OMNIGLOT_URL to a mirror, or use Strokes, which needs no data"
        )
        raise DownloadError(one_line(message))


# --- what the archives hold ---


def _bitmap(read: Callable[[str], bytes], name: str) -> Bool[np.ndarray, "105 105"]:
    """A drawing; paper is True."""
    from PIL.PngImagePlugin import PngImageFile  # no other format; and no memory for pixels before they are asked for

    with decoding(f"cannot read {name}"):
        image = PngImageFile(io.BytesIO(read(name)))
        if image.size != (105, 105):
            raise ValueError(f"{image.width} × {image.height} pixels, expected 105 × 105")
        return np.asarray(image.convert("1"))


def _bitmaps(source: Path, part: _Part) -> Iterator[tuple[str, Bool[np.ndarray, "105 105"]]]:
    """Every drawing with its path, in order; raises, at the latest at the end, if they are not the published ones."""
    digest = hashlib.sha256()
    with members(source, source.parent if part.inside else source) as (files, read):
        names = [name for name in files if name.startswith(part.inside) and name.endswith(".png") and "/." not in name]
        folders = Counter(name.rpartition("/")[0] for name in names)
        for folder, count in folders.items():
            if count != _DRAWINGS:
                raise ValueError(f"{count} drawings of {folder}, expected {_DRAWINGS}")
        if len(folders) != part.folders:
            raise ValueError(f"{len(folders)} folders of drawings, expected {part.folders}")
        for name in names:
            bitmap = _bitmap(read, name)
            digest.update(name.encode() + b"\0" + np.packbits(bitmap).tobytes())
            yield name, bitmap
    if digest.hexdigest() != part.digest:
        raise ValueError(
            f"the pixels or names of its {len(names)} drawings differ from those published "
            f"(digest {digest.hexdigest()[:12]}…, expected {part.digest[:12]}…)"
        )


def _check(source: Path, part: _Part) -> None:
    for _ in _bitmaps(source, part):
        pass
    if part == _RUNS:
        _labels(source)


def _labels(source: Path) -> Int64[Tensor, "20 20"]:
    """For each of Lake's runs, which support image each query image matches."""
    labels = []
    with members(source, source) as (_, read):
        for run in (f"run{i:02}" for i in range(1, 21)):
            with decoding(f"cannot read {run}/class_labels.txt"):
                text = read(f"{run}/class_labels.txt").decode()
            pairs = dict(re.findall(rf"{run}/test/item(\d\d)\.png\s+{run}/training/class(\d\d)\.png", text))
            labels.append([int(drawn) - 1 for _, drawn in sorted(pairs.items())])
            if sorted(labels[-1]) != list(range(20)):
                found = f"pairs {len(pairs)} items, expected each of 20 items with one class"
                raise ValueError(f"{run}/class_labels.txt {found}")
    return torch.tensor(labels)


# --- pixels, once ---


def check_image_size(image_size: int) -> None:
    """Raise a `ValueError` if Omniglot's images, of 105×105 pixels, cannot be read in this size."""
    if not 1 <= image_size <= 105:
        raise ValueError(f"image_size must be from 1 to 105 pixels, got {image_size}")


def _ink(bitmap: Bool[np.ndarray, "105 105"], image_size: int) -> UInt8[np.ndarray, "size size"]:
    """Ink 255, paper 0; in grey levels, because a 1-bit image would be resized by nearest pixels."""
    from PIL import Image

    grey = Image.fromarray(bitmap).convert("L").resize((image_size, image_size), Image.Resampling.LANCZOS)
    return 255 - np.asarray(grey)


def _decode(source: Path, part: _Part, image_size: int) -> tuple[list[str], UInt8[Tensor, "folder 20 1 size size"]]:
    """The folders of a part, and the ink of their drawings."""
    with _reading(source):
        drawings = [(name, _ink(bitmap, image_size)) for name, bitmap in _bitmaps(source, part)]
    names = [name.removeprefix(part.inside).rpartition("/")[0] for name, _ in drawings[::_DRAWINGS]]
    images = torch.from_numpy(np.stack([ink for _, ink in drawings]))
    return names, images.view(-1, _DRAWINGS, 1, image_size, image_size)


def _fingerprint(source: Path) -> str:
    """Changes when the source does: the bytes of a zip; the path, size and times of everything in a folder."""
    with _reading(source):
        if source.is_file():
            return hashlib.sha256(source.read_bytes()).hexdigest()
        digest = hashlib.sha256(os.fsencode(source.resolve()))
        for path in sorted(entries(source)):
            status = os.stat(path)
            digest.update(os.fsencode(f"{path}\0{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\0"))
        return digest.hexdigest()


def _cache_file(sources: Mapping[_Part, Path], image_size: int) -> Path:
    """Named after what was decoded, so that no source is ever answered with the pixels of another."""
    key = "".join(_fingerprint(source) + part.digest for part, source in sources.items())
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return _cache_folder() / f"omniglot-{_CACHE_FORMAT}-{image_size}px-{digest}.npz"


def _read_cache(path: Path) -> tuple[Tensor, tuple[str, ...]] | None:
    """The cached images and their names; None if there are none, or not as written: they are then decoded again."""
    with suppress(Exception), np.load(path, allow_pickle=False) as kept:  # a zip, which has checksums
        return torch.from_numpy(kept["images"]), tuple(kept["names"].tolist())


# --- the dataset, its splits, and Lake's one-shot runs ---


Source = TypeVar("Source")  # what tasks are drawn from


@dataclass(frozen=True, eq=False)
class Splits(Generic[Source]):
    """The classes for meta-training, meta-validation and meta-test, in this order when iterated.

    No character, rotated or not, is in two of them: Ravi and Larochelle (2017), section 2.

    Args:
        train, validation, test: classes to meta-train on, to choose settings by, and to report accuracy on.
        id: names the split in records, such as `random-0`: the same id means the same classes.
    """

    train: Source
    validation: Source
    test: Source
    id: str

    def __iter__(self) -> Iterator[Source]:
        return iter((self.train, self.validation, self.test))


@dataclass(frozen=True, eq=False)
class Alphabets:
    """Images of characters, and their names: what `Omniglot` and `Strokes` have in common."""

    images: UInt8[Tensor, "character drawing 1 height width"]
    names: tuple[str, ...]

    @property
    def alphabets(self) -> tuple[str, ...]:
        """The names of the alphabets, in the order of their characters."""
        return tuple(dict.fromkeys(name.partition("/")[0] for name in self.names))

    def _numbers(self) -> Int64[Tensor, " character"]:
        """For each character, the number of its alphabet."""
        number = {name: i for i, name in enumerate(self.alphabets)}
        return torch.tensor([number[name.partition("/")[0]] for name in self.names])

    def _splits(self, parts: Iterable[Tensor], name: str, rotations: bool) -> Splits:
        """Classes of the characters whose numbers are given for each part."""

        def classes(part: Tensor) -> ClassImages:
            part = part.sort().values
            return ClassImages(self.images[part], tuple(self.names[i] for i in part.tolist()), rotations)

        return Splits(*map(classes, parts), id=name if rotations else f"{name}-upright")


@dataclass(frozen=True, eq=False)
class Omniglot(Alphabets):
    """All characters of Omniglot as one tensor, pixels 0 (paper) to 255 (ink): the 964 background, then the 659 others.

    Args:
        images: `[character, drawing, channel, height, width]`, uint8.
        names: one per character, such as `Greek/character03`; sorted within background and evaluation.
        n_background: how many characters, the first ones, are from the background alphabets.

    Example:
        >>> names = tuple(f"alphabet{i // 35}/character{i % 35}" for i in range(1623))
        >>> omniglot = Omniglot(torch.zeros(1623, 20, 1, 1, 1, dtype=torch.uint8), names, n_background=964)
        >>> [len(classes) for classes in omniglot.split("random", seed=0)]
        [4400, 400, 1692]

    Reference:
        Lake, Salakhutdinov and Tenenbaum (2015), Human-level concept learning through probabilistic program
        induction, Science 350.
    """

    images: UInt8[Tensor, "character 20 1 height width"]
    n_background: int

    @classmethod
    def load(
        cls,
        root: Path | str | None = None,
        *,
        download: bool = True,
        image_size: int = 28,
        parts: Sequence[_Part] = _PARTS,
    ) -> Omniglot:
        """Read Omniglot from `root`, else METATUTOR_DATA, else the user's cache folder, into which it is downloaded.

        The first time, every drawing is compared with the published ones and resized with antialiasing; the result is
        kept in the cache folder (METATUTOR_CACHE names another one) for as long as the source stays unchanged.

        Args:
            root: a folder with the two official zips or the folders they unpack to, directly or in `omniglot-py`.
            download: whether to fetch what is missing, if neither `root` nor METATUTOR_DATA says where it should be.
            image_size: height and width in pixels, at most the 105 of the originals.
            parts: the archives expected.

        Raises:
            ValueError: if the data are missing, incomplete or not Omniglot, or the cache cannot be written.
            DownloadError: if no source gives an intact copy.
        """
        check_image_size(image_size)
        sources = {part: _locate(root, part, download) for part in parts}
        path = _cache_file(sources, image_size)
        if kept := _read_cache(path):
            return cls(*kept, parts[0].folders)
        with replacing(path, " (METATUTOR_CACHE names the cache)") as temporary, temporary.open("wb") as file:
            names, images = zip(*(_decode(source, part, image_size) for part, source in sources.items()), strict=True)
            names, images = tuple(chain(*names)), torch.cat(images)
            np.savez(file, images=images.numpy(), names=np.array(names))
        return cls(images, names, parts[0].folders)

    def split(self, protocol: str = "random", *, seed: int = 0, rotations: bool = True) -> Splits:
        """Divide the characters into meta-training, meta-validation and meta-test classes.

        `random` shuffles all characters: 1,100 / 100 / 423, as in the MAML paper (Finn et al., 2017, section 5.2).
        `lake` keeps alphabets whole: the 659 evaluation characters are for meta-test, five background alphabets chosen
        by `seed` for meta-validation. `vinyals` is the split of Matching and Prototypical Networks (Vinyals et al.,
        2016; Snell et al., 2017): the first 1,200 characters, minus five alphabets for meta-validation, and the last
        423 for meta-test, all but four of them from alphabets that were never seen; it has no seed: 1,028 / 172 / 423.
        The split's id is `random-0` for example, `random-0-upright` without rotations, or `vinyals`.

        Args:
            protocol: `random`, `lake` or `vinyals`.
            seed: another seed gives another split; `vinyals` ignores it.
            rotations: whether each character rotated by 90, 180 and 270 degrees counts as three more classes of its
                split, in all three splits, as in the MAML code.

        Raises:
            ValueError: if the protocol is unknown, or there are too few characters for it.
        """
        generator = torch.Generator().manual_seed(seed)
        if protocol == "random":
            parts = self._random(generator)
        elif protocol == "lake":
            parts = self._lake(generator)
        elif protocol == "vinyals":
            return self._splits(self._vinyals(), protocol, rotations)
        else:
            raise ValueError(f"no split {protocol!r}; choose 'random', 'lake' or 'vinyals'")
        return self._splits(parts, f"{protocol}-{seed}", rotations)

    def _random(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        n_test = len(self.names) - _TRAIN - _VALIDATION
        if n_test < 1:
            raise ValueError(f"a random split needs more than {_TRAIN + _VALIDATION} characters, got {len(self.names)}")
        return torch.randperm(len(self.names), generator=generator).split([_TRAIN, _VALIDATION, n_test])

    def _lake(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        background, test = torch.arange(len(self.names)).tensor_split([self.n_background])
        alphabet = self._numbers()[background]
        n_alphabets = len(alphabet.unique())
        if n_alphabets <= _VALIDATION_ALPHABETS:
            raise ValueError(f"a lake split needs more than {_VALIDATION_ALPHABETS} background alphabets")
        held_out = torch.randperm(n_alphabets, generator=generator)[:_VALIDATION_ALPHABETS]
        validation = torch.isin(alphabet, held_out)
        return background[~validation], background[validation], test

    def _vinyals(self) -> tuple[Tensor, ...]:
        first, test = torch.arange(len(self.names)).tensor_split([_TRAIN + _VALIDATION])
        held_out = [name.partition("/")[0] in _VINYALS_VALIDATION for name in self.names[: len(first)]]
        validation = torch.tensor(held_out, dtype=torch.bool)
        if not (len(test) and validation.any()):
            raise ValueError(f"a vinyals split needs all characters of Omniglot, got {len(self.names)}")
        return first[~validation], first[validation], test


def one_shot_runs(root: Path | str | None = None, *, download: bool = True, image_size: int = 28) -> Episode:
    """Lake's 20 one-shot runs: in each, one drawing of 20 characters of one alphabet, and 20 more to recognise.

    The data are looked for as `Omniglot.load` does, as `all_runs.zip` or the folder that it unpacks to. Support image
    `i` is of class `i`. Lake, Salakhutdinov and Tenenbaum (2015), figure 6A.
    """
    check_image_size(image_size)
    source = _locate(root, _RUNS, download)
    query, support = _decode(source, _RUNS, image_size)[1].float().div_(255).unflatten(0, (20, 2)).unbind(1)
    with _reading(source):
        return Episode(support, torch.arange(20).repeat(20, 1), query, _labels(source), n_way=20)


# --- for the command line ---


@dataclass(frozen=True)
class Verification:
    """Zips or folders in which every drawing is, pixel by pixel, as published."""

    sources: tuple[Path, ...]
    characters: int

    def __str__(self) -> str:
        counts = f"{self.characters:,} characters, {self.characters * _DRAWINGS:,} drawings, every pixel as published"
        return "\n  ".join((counts, *map(str, self.sources)))


@dataclass(frozen=True)
class Info:
    """What a copy of Omniglot holds, and the file in which its decoded pixels are kept."""

    alphabets: int
    characters: int
    drawings: int
    sources: tuple[Path, ...]
    cache: Path
    cache_bytes: int

    def __str__(self) -> str:
        counts = f"{self.alphabets:,} alphabets, {self.characters:,} characters, {self.drawings:,} drawings"
        kept = f"kept in {self.cache} ({self.cache_bytes / 1e6:.1f} MB)"
        return "\n  ".join((counts, *(f"from {source}" for source in self.sources), kept))


def download(root: Path | str | None = None, *, runs: bool = False, parts: Sequence[_Part] = _PARTS) -> Verification:
    """Fetch what is missing of Omniglot into `root`, else METATUTOR_DATA, else the user's cache folder; verify all.

    The official source comes first, then the addresses in METATUTOR_OMNIGLOT_URL (separated by spaces, each a folder
    with the zips). An archive gets its name only when all of it is there and intact. With `runs`, Lake's one-shot runs
    are fetched too.
    """
    folder, _ = _folder(root)
    found = ((part, _find(folder, part)) for part in (*parts, *[_RUNS] * runs))
    sources = [_intact(source, part) if source else _fetch(folder, part) for part, source in found]
    return Verification(tuple(sources), sum(part.folders for part in parts))


def _intact(source: Path, part: _Part) -> Path:
    with _reading(source):
        _check(source, part)
    return source


def verify(root: Path | str | None = None, *, parts: Sequence[_Part] = _PARTS) -> Verification:
    """Compare every drawing of a copy with the published ones, including Lake's one-shot runs if they are there."""
    sources = [_intact(_locate(root, part, download=False), part) for part in parts]
    if runs := _find(_folder(root)[0], _RUNS):
        sources.append(_intact(runs, _RUNS))
    return Verification(tuple(sources), sum(part.folders for part in parts))


def info(root: Path | str | None = None, *, image_size: int = 28, parts: Sequence[_Part] = _PARTS) -> Info:
    """Count what is in `root`, else METATUTOR_DATA, else the cache folder, and report where the pixels are."""
    omniglot = Omniglot.load(root, download=False, image_size=image_size, parts=parts)
    sources = {part: _locate(root, part, download=False) for part in parts}
    cache = _cache_file(sources, image_size)
    counts = len(omniglot.alphabets), len(omniglot.names), len(omniglot.names) * _DRAWINGS
    if runs := _find(_folder(root)[0], _RUNS):
        _intact(runs, _RUNS)  # damaged ones are not ignored
    with _reading(cache):
        return Info(*counts, tuple(sources.values()), cache, cache.stat().st_size)
