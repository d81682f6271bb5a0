"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each.

In reading order: find the archives, download them, compare every pixel with the published ones, resize and cache
once, split. Archives are trusted for what they hold, not for where they came from.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar
from uuid import uuid4

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from metatutor.episodes import ClassImages, Episode


@dataclass(frozen=True)
class _Part:
    """One published archive: its name, how many characters it holds, and the digest of their pixels."""

    name: str
    characters: int
    digest: str


_PARTS = (
    _Part("images_background", 964, "72b29e700cff186ed4eec511699ee2b6466aab8e2fa6daf852264b72ab606d32"),
    _Part("images_evaluation", 659, "3bccfcf54110b862e4f04c62a4d7d432b0f2bf145889b45d9b824cbd9191ccd5"),
)
_RUNS = "all_runs"
_DRAWINGS = 20  # of each character, each by another person
_TRAIN, _VALIDATION, _VALIDATION_ALPHABETS = 1100, 100, 5
_CACHE_FORMAT = "v1"  # changes when decoding does
_UNREADABLE = (OSError, LookupError, SyntaxError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)


class DownloadError(ValueError):
    """No source gave an intact archive; the message names every address tried and what to do without a network.

    Example:
        >>> issubclass(DownloadError, ValueError)
        True
    """


class _Damage(ValueError):
    """What is wrong with an archive; whoever knows where it came from adds that."""


# --- where the archives are ---


def _cache_folder() -> Path:
    return Path(os.environ.get("METATUTOR_CACHE") or user_cache_path("metatutor")).expanduser()


def _folder(root: Path | str | None) -> tuple[Path, str]:
    """Where to look, and who said so ("" if nobody did, and it is the cache)."""
    if root is not None:
        return Path(root).expanduser(), "the given root"
    if named := os.environ.get("METATUTOR_DATA"):
        return Path(named).expanduser(), "METATUTOR_DATA"
    return _cache_folder(), ""


def _find(folder: Path, name: str) -> Path | None:
    for base in (folder, folder / "omniglot-py"):
        if (archive := base / f"{name}.zip").is_file():
            return archive
        if (unpacked := base / name).is_dir():
            return unpacked
    return None


def _locate(root: Path | str | None, name: str, check: Callable[[Path], object], download: bool) -> Path:
    """The zip or folder called `name`; it is downloaded only when nobody named a place where it should be."""
    folder, origin = _folder(root)
    if found := _find(folder, name):
        return found
    if download and not origin:
        return _fetch(folder, name, check)
    held = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    command = "" if name == _RUNS else f" (`metatutor data download --data {folder}` does)"
    raise ValueError(
        f"{folder} ({origin or 'the cache'}) does not hold {name}: expected {name}.zip or a folder {name}, there or "
        f"in omniglot-py; found {held or 'an empty folder'}; put {_urls(name)[0]} there{command}, "
        "or name another folder in METATUTOR_DATA"
    )


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name on success and vanishes on failure."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise ValueError(
            f"cannot write {path.name} in {path.parent} ({error.strerror or error}); make that folder writable, with "
            "space to spare, or choose another one (METATUTOR_CACHE names the cache); nothing was changed"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _urls(name: str) -> list[str]:
    from torchvision.datasets import Omniglot as Torchvision  # a second to import, and rarely needed

    inside = "one-shot-classification/" if name == _RUNS else ""
    mirrors = os.environ.get("METATUTOR_OMNIGLOT_URL", "").split()
    folders = [f"{Torchvision.download_url_prefix}/{inside}", *mirrors]
    return [f"{folder.rstrip('/')}/{name}.zip" for folder in folders]


def _fetch(folder: Path, name: str, check: Callable[[Path], object]) -> Path:
    """Download an archive from the first address where it is intact."""
    from pooch import HTTPDownloader
    from requests import RequestException

    target, failures = folder / "omniglot-py" / f"{name}.zip", []
    with _new_file(target) as temporary:
        for url in _urls(name):
            try:
                HTTPDownloader(progressbar=True)(url, temporary, None)
                check(temporary)
                return target
            except RequestException as error:
                status = error.response is not None and f"HTTP {error.response.status_code}"
                failures.append(f"{url} ({status or type(error).__name__})")
            except _Damage as damage:
                failures.append(f"{url} ({damage})")
        raise DownloadError(
            f"cannot download {name}: tried {', '.join(failures)}; set METATUTOR_DATA to a folder that holds "
            f"{name}.zip, METATUTOR_OMNIGLOT_URL to a mirror, or use Strokes, which needs no data"
        )


# --- what the archives hold ---


@contextmanager
def _members(source: Path, base: Path) -> Iterator[tuple[list[str], Callable[[str], bytes]]]:
    """The files of a zip, or of a folder counted from `base`: their names, sorted, and how to read one."""
    if source.is_dir():
        files = (path.relative_to(base).as_posix() for path in source.rglob("*.*"))
        yield sorted(files), lambda name: (base / name).read_bytes()
        return
    try:
        archive = zipfile.ZipFile(source)
    except _UNREADABLE as error:
        raise _Damage(f"not a complete zip archive: {error}") from error
    with archive:
        yield sorted(archive.namelist()), archive.read


def _bitmap(read: Callable[[str], bytes], name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(read(name))).convert("1")
    except _UNREADABLE as error:
        raise _Damage(f"cannot read {name}: {error}") from error


def _bitmaps(source: Path, part: _Part) -> Iterator[tuple[str, Image.Image]]:
    """Every drawing with its path, in order; raises at the latest after the last one if they are not the published."""
    digest = hashlib.sha256()
    with _members(source, source.parent) as (members, read):
        names = [n for n in members if n.startswith(f"{part.name}/") and n.endswith(".png") and "/." not in n]
        _check_counts(names, part)
        for name in names:
            bitmap = _bitmap(read, name)
            digest.update(name.encode() + b"\0" + np.packbits(np.asarray(bitmap)).tobytes())
            yield name, bitmap
    if digest.hexdigest() != part.digest:
        raise _Damage(
            f"the pixels or names of its {len(names)} drawings differ from those published "
            f"(digest {digest.hexdigest()[:12]}…, expected {part.digest[:12]}…)"
        )


def _check_counts(names: list[str], part: _Part) -> None:
    characters = Counter(name.rpartition("/")[0] for name in names)
    for character, count in characters.items():
        if count != _DRAWINGS:
            raise _Damage(f"{count} drawings of {character}, expected {_DRAWINGS}")
    if len(characters) != part.characters:
        alphabets = len({character.rpartition("/")[0] for character in characters})
        raise _Damage(f"{len(characters)} characters in {alphabets} alphabets, expected {part.characters} characters")


def _check(source: Path, part: _Part) -> None:
    for _ in _bitmaps(source, part):
        pass


def _sources(root: Path | str | None, parts: Sequence[_Part], download: bool) -> list[Path]:
    return [_locate(root, part.name, partial(_check, part=part), download) for part in parts]


@contextmanager
def _blaming(source: Path) -> Iterator[None]:
    try:
        yield
    except _Damage as damage:
        raise ValueError(
            f"{source} is damaged or incomplete: {damage}; delete it and put an intact copy in its place "
            "(`metatutor data download` fetches one)"
        ) from damage


# --- pixels, once ---


def _check_size(image_size: int) -> None:
    if not 1 <= image_size <= 105:
        raise ValueError(f"image_size must be from 1 to 105 pixels, got {image_size}")


def _ink(bitmap: Image.Image, image_size: int) -> UInt8[np.ndarray, "size size"]:
    """Ink 255, paper 0; in greys, because a 1-bit image would be resized by its nearest pixels."""
    grey = bitmap.convert("L").resize((image_size, image_size), Image.Resampling.LANCZOS)
    return 255 - np.asarray(grey)


def _decode(source: Path, part: _Part, image_size: int) -> tuple[list[str], UInt8[Tensor, "character 20 1 size size"]]:
    with _blaming(source):
        drawings = [(name, _ink(bitmap, image_size)) for name, bitmap in _bitmaps(source, part)]
    names = [name.split("/", 1)[1].rpartition("/")[0] for name, _ in drawings[::_DRAWINGS]]
    images = torch.from_numpy(np.stack([ink for _, ink in drawings]))
    return names, images.view(-1, _DRAWINGS, 1, image_size, image_size)


def _fingerprint(source: Path) -> str:
    """Changes when the source does: the bytes of a zip; the path, size and times of every file of a folder."""
    if source.is_file():
        return hashlib.sha256(source.read_bytes()).hexdigest()
    digest = hashlib.sha256(str(source.resolve()).encode())
    for folder, folders, files in os.walk(source):
        folders.sort()
        for name in sorted(files):
            status = os.stat(path := os.path.join(folder, name))
            digest.update(f"{path}\0{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\0".encode())
    return digest.hexdigest()


def _cache_file(sources: Sequence[Path], parts: Sequence[_Part], image_size: int) -> Path:
    """Named after what was decoded, so that no source is ever answered with the pixels of another."""
    key = "".join(_fingerprint(source) + part.digest for source, part in zip(sources, parts, strict=True))
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return _cache_folder() / f"omniglot-{_CACHE_FORMAT}-{image_size}px-{digest}.safetensors"


def _read_cache(path: Path) -> Omniglot | None:
    """The cached images; None if there are none, or if they are not what was written (they are then decoded again)."""
    try:
        with safe_open(path, framework="pt") as file:
            images, about = file.get_tensor("images"), file.metadata()
    except (OSError, SafetensorError):
        return None
    if zlib.crc32(images.numpy().data) != int(about["crc32"]):
        return None
    return Omniglot(images, tuple(about["names"].split("\n")), int(about["n_background"]))


def _write_cache(path: Path, omniglot: Omniglot) -> None:
    about = {
        "names": "\n".join(omniglot.names),
        "n_background": str(omniglot.n_background),
        "crc32": str(zlib.crc32(omniglot.images.numpy().data)),
    }
    path.write_bytes(save({"images": omniglot.images}, about))


# --- the dataset ---


Source = TypeVar("Source")  # what tasks are drawn from


@dataclass(frozen=True, eq=False)
class Splits(Generic[Source]):
    """The classes for meta-training, meta-validation and meta-test; no character, turned or not, is in two of them.

    Args:
        train: classes to meta-train on.
        validation: classes to choose settings by.
        test: classes to report accuracy on.
        id: names the split in records, such as `random-0`: the same id means the same classes.

    Returns:
        Iterating gives the three in that order.

    Example:
        >>> classes = ClassImages(torch.zeros(2, 20, 1, 28, 28, dtype=torch.uint8), ("a", "b"))
        >>> train, validation, test = Splits(classes, classes, classes, "toy")
        >>> len(train)
        2

    Reference:
        Ravi and Larochelle (2017), Optimization as a Model for Few-Shot Learning, section 2.
    """

    train: Source
    validation: Source
    test: Source
    id: str

    def __iter__(self) -> Iterator[Source]:
        return iter((self.train, self.validation, self.test))


@dataclass(frozen=True, eq=False)
class Omniglot:
    """All characters of Omniglot as one tensor, pixels 0 (paper) to 255 (ink): the 964 background, then the 659 others.

    Args:
        images: `[character, drawing, channel, height, width]`, uint8.
        names: one a character, such as `Greek/character03`; sorted within background and evaluation.
        n_background: how many characters, the first ones, are of the background alphabets.

    Example:
        >>> omniglot = Omniglot.load()  # doctest: +SKIP
        >>> omniglot.images.shape  # doctest: +SKIP
        torch.Size([1623, 20, 1, 28, 28])

    Reference:
        Lake, Salakhutdinov and Tenenbaum (2015), Human-level concept learning through probabilistic program
        induction, Science 350.
    """

    images: UInt8[Tensor, "character 20 1 height width"]
    names: tuple[str, ...]
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
        """Read Omniglot from `root`, else METATUTOR_DATA, else the user's cache folder, where it is downloaded to.

        The first time, every drawing is compared with the published ones and resized with antialiasing; the result is
        kept in the cache folder (METATUTOR_CACHE names another one) for as long as the source stays as it is.

        Args:
            root: a folder with the two official zips or the folders they unpack to, directly or in `omniglot-py`.
            download: whether to fetch what is missing, if neither `root` nor METATUTOR_DATA says where it should be.
            image_size: height and width in pixels, at most the 105 of the originals.
            parts: the archives expected.

        Returns:
            All characters, on the CPU.

        Raises:
            ValueError: if the data are not there, not whole or not Omniglot, or the cache cannot be written.
            DownloadError: if no source gives an intact copy.

        Example:
            >>> Omniglot.load(image_size=0)
            Traceback (most recent call last):
            ValueError: image_size must be from 1 to 105 pixels, got 0

        Reference:
            Lake, Salakhutdinov and Tenenbaum (2015), supplementary material, section 1.
        """
        _check_size(image_size)
        sources = _sources(root, parts, download)
        path = _cache_file(sources, parts, image_size)
        if (cached := _read_cache(path)) is not None:
            return cached
        with _new_file(path) as temporary:
            decoded = [_decode(source, part, image_size) for source, part in zip(sources, parts, strict=True)]
            names = tuple(name for names, _ in decoded for name in names)
            omniglot = cls(torch.cat([images for _, images in decoded]), names, parts[0].characters)
            _write_cache(temporary, omniglot)
        return omniglot

    @property
    def alphabets(self) -> tuple[str, ...]:
        """The names of the alphabets, in the order of their characters."""
        return tuple(dict.fromkeys(name.partition("/")[0] for name in self.names))

    def split(self, protocol: str = "random", *, seed: int = 0, rotations: bool = True) -> Splits:
        """Part the characters into meta-training, meta-validation and meta-test classes.

        `random` shuffles all characters: 1,100 / 100 / 423, as in the MAML paper. `lake` keeps alphabets whole: the
        659 evaluation characters are for meta-test, five background alphabets chosen by `seed` for meta-validation.

        Args:
            protocol: `random` or `lake`.
            seed: another seed, another split.
            rotations: whether each character turned by 90, 180 and 270 degrees is three more classes of its split,
                in all three splits, as in the MAML code.

        Returns:
            The three splits and their id, `random-0` for example; `random-0-upright` without rotations.

        Raises:
            ValueError: if the protocol is unknown, or there are too few characters for it.

        Example:
            >>> names = tuple(f"alphabet{i // 35}/character{i % 35}" for i in range(1623))
            >>> omniglot = Omniglot(torch.zeros(1623, 20, 1, 1, 1, dtype=torch.uint8), names, n_background=964)
            >>> [len(classes) for classes in omniglot.split("random", seed=0)]
            [4400, 400, 1692]

        Reference:
            Vinyals et al. (2016), section 4.1.1; Finn et al. (2017), section 5.2; Lake et al. (2015).
        """
        generator = torch.Generator().manual_seed(seed)
        if protocol == "random":
            train, validation, test = self._random(generator)
        elif protocol == "lake":
            train, validation, test = self._lake(generator)
        else:
            raise ValueError(f"no split {protocol!r}; choose 'random' or 'lake'")
        name = f"{protocol}-{seed}" + ("" if rotations else "-upright")
        return Splits(*(self._classes(chosen, rotations) for chosen in (train, validation, test)), id=name)

    def _random(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        n_test = len(self.names) - _TRAIN - _VALIDATION
        if n_test < 1:
            raise ValueError(f"a random split needs more than {_TRAIN + _VALIDATION} characters, got {len(self.names)}")
        return torch.randperm(len(self.names), generator=generator).split([_TRAIN, _VALIDATION, n_test])

    def _lake(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        alphabet = {name: i for i, name in enumerate(self.alphabets)}
        of = torch.tensor([alphabet[name.partition("/")[0]] for name in self.names])  # [character]
        background = torch.arange(len(self.names)) < self.n_background
        n_alphabets = len(of[background].unique())
        if n_alphabets <= _VALIDATION_ALPHABETS:
            raise ValueError(f"a lake split needs more than {_VALIDATION_ALPHABETS} background alphabets")
        held_out = torch.randperm(n_alphabets, generator=generator)[:_VALIDATION_ALPHABETS]
        validation = background & torch.isin(of, held_out)
        return tuple(where.nonzero().squeeze(1) for where in (background & ~validation, validation, ~background))

    def _classes(self, chosen: Int64[Tensor, " n"], rotations: bool) -> ClassImages:
        chosen = chosen.sort().values
        return ClassImages(self.images[chosen], tuple(self.names[i] for i in chosen.tolist()), rotations)


# --- Lake's one-shot runs ---


def one_shot_runs(root: Path | str | None = None, *, download: bool = True, image_size: int = 28) -> Episode:
    """Lake's 20 one-shot runs: in each, one drawing of 20 characters of one alphabet, and 20 more to recognise.

    Args:
        root: a folder with `all_runs.zip` or what it unpacks to; otherwise METATUTOR_DATA or the user's cache folder.
        download: whether to fetch the runs if neither `root` nor METATUTOR_DATA says where they should be.
        image_size: height and width in pixels.

    Returns:
        20 tasks of 20 classes with one support and one query image each; support image `i` is of class `i`.

    Raises:
        ValueError: if the runs are not there or not whole.
        DownloadError: if no source gives an intact copy.

    Example:
        >>> one_shot_runs().query_images.shape  # doctest: +SKIP
        torch.Size([20, 20, 1, 28, 28])

    Reference:
        Lake, Salakhutdinov and Tenenbaum (2015), figure 6A.
    """
    _check_size(image_size)
    source = _locate(root, _RUNS, lambda path: _runs(path, image_size), download)
    with _blaming(source):
        return _runs(source, image_size)


def _runs(source: Path, image_size: int) -> Episode:
    with _members(source, source) as (_, read):
        runs = [_run(read, f"run{i:02}", image_size) for i in range(1, 21)]
    support, query, labels = (torch.stack(tensors) for tensors in zip(*runs, strict=True))
    return Episode(support, torch.arange(20).repeat(20, 1), query, labels, n_way=20)


def _run(read: Callable[[str], bytes], run: str, image_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Support and query images `[20, 1, size, size]`, and which support image each query image matches."""
    try:
        text = read(f"{run}/class_labels.txt").decode()
    except _UNREADABLE as error:
        raise _Damage(f"cannot read {run}/class_labels.txt: {error}") from error
    matches = dict(re.findall(rf"{run}/test/item(\d\d)\.png\s+{run}/training/class(\d\d)\.png", text))
    labels = [int(drawn) - 1 for _, drawn in sorted(matches.items())]  # [query]
    if sorted(labels) != list(range(20)):
        raise _Damage(f"{run}/class_labels.txt pairs {len(matches)} items, expected each of 20 items with one class")

    def images(kind: str) -> Float[Tensor, "20 1 size size"]:
        bitmaps = (_bitmap(read, f"{run}/{kind}{i:02}.png") for i in range(1, 21))
        pixels = np.stack([_ink(bitmap, image_size) for bitmap in bitmaps])
        return torch.from_numpy(pixels).unsqueeze(1).float().div_(255)

    return images("training/class"), images("test/item"), torch.tensor(labels)


# --- for the command line ---


@dataclass(frozen=True)
class Verification:
    """Archives in which every drawing is, pixel by pixel, as published.

    Args:
        sources: the zips or folders compared.
        characters: how many characters they hold together.

    Example:
        >>> print(Verification((Path("images_background.zip"),), 964))
        964 characters, 19,280 drawings, every pixel as published
          images_background.zip

    Reference:
        Lake, Salakhutdinov and Tenenbaum (2015).
    """

    sources: tuple[Path, ...]
    characters: int

    def __str__(self) -> str:
        counts = f"{self.characters:,} characters, {self.characters * _DRAWINGS:,} drawings, every pixel as published"
        return "\n  ".join((counts, *map(str, self.sources)))


@dataclass(frozen=True)
class Info:
    """What a copy of Omniglot holds, and where its decoded pixels are kept.

    Args:
        alphabets: how many.
        characters: how many.
        drawings: how many, of all characters together.
        sources: the zips or folders it was read from.
        cache: the file with the decoded pixels.
        cache_bytes: its size.

    Example:
        >>> print(Info(50, 1623, 32460, (Path("omniglot-py"),), Path("omniglot.safetensors"), 25_000_000))
        50 alphabets, 1,623 characters, 32,460 drawings
          from omniglot-py
          kept in omniglot.safetensors (25.0 MB)

    Reference:
        Lake, Salakhutdinov and Tenenbaum (2015).
    """

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
    with the zips). An archive gets its name only when all of it is there and intact.

    Args:
        root: the folder to fill; it is made if need be.
        runs: whether to fetch Lake's one-shot runs too.
        parts: the archives to fetch.

    Returns:
        What is now there.

    Raises:
        ValueError: if what was there before is damaged, or the folder cannot be written.
        DownloadError: if no address gives an intact copy.

    Example:
        >>> print(download("data"))  # doctest: +SKIP
        1,623 characters, 32,460 drawings, every pixel as published
          data/omniglot-py/images_background.zip
          data/omniglot-py/images_evaluation.zip

    Reference:
        https://github.com/brendenlake/omniglot
    """
    folder, _ = _folder(root)
    sources = tuple(_have(folder, part.name, partial(_check, part=part)) for part in parts)
    if runs:
        _have(folder, _RUNS, lambda path: _runs(path, image_size=28))
    return Verification(sources, sum(part.characters for part in parts))


def _have(folder: Path, name: str, check: Callable[[Path], object]) -> Path:
    """The intact archive called `name`, downloaded if it is not there."""
    if (found := _find(folder, name)) is None:
        return _fetch(folder, name, check)
    with _blaming(found):
        check(found)
    return found


def verify(root: Path | str | None = None, *, parts: Sequence[_Part] = _PARTS) -> Verification:
    """Compare every drawing in `root`, else METATUTOR_DATA, else the user's cache folder, with the published ones.

    Args:
        root: the folder with the archives.
        parts: the archives expected.

    Returns:
        What was compared, if all of it is as published.

    Raises:
        ValueError: if an archive is missing, damaged or not Omniglot; the message tells which and what to do.

    Example:
        >>> print(verify("data"))  # doctest: +SKIP
        1,623 characters, 32,460 drawings, every pixel as published
          data/omniglot-py/images_background.zip
          data/omniglot-py/images_evaluation.zip

    Reference:
        https://github.com/brendenlake/omniglot
    """
    sources = _sources(root, parts, download=False)
    for source, part in zip(sources, parts, strict=True):
        with _blaming(source):
            _check(source, part)
    return Verification(tuple(sources), sum(part.characters for part in parts))


def info(root: Path | str | None = None, *, image_size: int = 28, parts: Sequence[_Part] = _PARTS) -> Info:
    """Count what is in `root`, else METATUTOR_DATA, else the user's cache folder, and tell where the pixels are kept.

    Args:
        root: the folder with the archives.
        image_size: height and width in pixels of the images that are kept.
        parts: the archives expected.

    Returns:
        Counts, places and the size of the cache.

    Raises:
        ValueError: as `Omniglot.load` does; nothing is downloaded.

    Example:
        >>> print(info("data"))  # doctest: +SKIP
        50 alphabets, 1,623 characters, 32,460 drawings
          from data/omniglot-py/images_background.zip
          from data/omniglot-py/images_evaluation.zip
          kept in ~/.cache/metatutor/omniglot-v1-28px-0123456789abcdef.safetensors (25.5 MB)

    Reference:
        https://github.com/brendenlake/omniglot
    """
    omniglot = Omniglot.load(root, download=False, image_size=image_size, parts=parts)
    sources = _sources(root, parts, download=False)
    cache = _cache_file(sources, parts, image_size)
    n_characters, n_drawings = omniglot.images.shape[:2]
    counts = len(omniglot.alphabets), n_characters, n_characters * n_drawings
    return Info(*counts, tuple(sources), cache, cache.stat().st_size)
