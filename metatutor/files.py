"""Files written whole and read within bounds: what is on a disk, or comes from a network, may be anything.

Whatever goes wrong raises a ValueError with a one-line message, or an OSError where stated.
"""

from __future__ import annotations

import io
import os
import platform
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from uuid import uuid4

_WRITING: set[str] = set()  # names of the temporary files that this process is writing
_HOUR = 3600  # seconds
_MOST_FILES, _MOST_BYTES = 100_000, 65_536  # in an archive; of a file in it


def one_line(text: str) -> str:
    """A message as one printable line of at most 2,000 characters, whatever the names in it contain."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= 2000 else f"{text[:1000]} … {text[-997:]}"


def expanded(path: Path | str, origin: str) -> Path:
    """A path with its `~` replaced by the home folder; if there is no such user, a ValueError names its `origin`."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(one_line(f"{origin} is {path}: there is no such user; write the path in full")) from error


# --- writing ---


@contextmanager
def replacing(path: Path, hint: str = "") -> Iterator[Path]:
    """A new, empty file beside `path` to write to: it takes that name at the end, and vanishes if anything fails.

    Readers find the old file or the new one, never half of one. Several threads or processes may write at once: the
    last to finish wins. What killed writers of the same `path` left behind is removed first. The folder is created if
    needed. Where the folder or the disk does not allow it, the message of the ValueError ends with the `hint`.
    """
    temporary = path.with_name(f"{path.name}.{_processes()}-{os.getpid()}-{uuid4().hex[:8]}.tmp")
    _WRITING.add(temporary.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary.touch()
        yield temporary
        temporary.replace(path)
    except OSError as error:
        reason = f"cannot write {path.name} in {path.parent} ({error.strerror or error})"
        advice = f"make that folder writable, with space to spare, or choose another one{hint}"
        raise ValueError(one_line(f"{reason}; {advice}; nothing was changed")) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        _WRITING.discard(temporary.name)


def _processes() -> str:
    """Where a process number is valid: a machine, or a container, among those that share the folder."""
    container = ""
    with suppress(OSError):
        container = os.readlink("/proc/self/ns/pid")  # where there is such a thing
    return f"{zlib.crc32((platform.node() + container).encode()):08x}"


def _remove_leftovers(path: Path) -> None:
    pattern = re.compile(re.escape(path.name) + r"\.([0-9a-f]{8})-([0-9]{1,9})-[0-9a-f]{8}\.tmp")
    for file in list(path.parent.iterdir()):
        with suppress(OSError):  # another writer may be tidying up too
            if (named := pattern.fullmatch(file.name)) and _is_leftover(file, named[1], int(named[2])):
                file.unlink()


def _is_leftover(file: Path, processes: str, process: int) -> bool:
    from psutil import pid_exists

    if processes != _processes():
        return time.time() - file.stat().st_mtime > _HOUR
    if process == os.getpid():  # of an earlier process: numbers are reused
        return file.name not in _WRITING
    return not pid_exists(process)


def download(url: str, path: Path, at_most: int) -> None:
    """Download a file, with a progress bar, replacing what is at `path`; never more than `at_most` bytes.

    A `requests.RequestException` says that the address does not answer, a ValueError that it is not an address, or
    sends more.
    """
    from pooch import HTTPDownloader

    class Bounded(io.FileIO):
        def write(self, data: bytes, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
            if self.tell() + len(data) > at_most:
                raise ValueError(f"more than {at_most:,} bytes")
            return super().write(data)

    with Bounded(path, "w") as file:
        HTTPDownloader(progressbar=True)(url, file, None)


# --- reading ---


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Turns what damaged bytes raise, a dozen types in zipfile and Pillow, into a ValueError beginning with `what`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise ValueError(f"{what}: {str(error) or type(error).__name__}") from error


def entries(folder: Path) -> list[str]:
    """The paths of everything in a folder, at most 100,000; links are not followed, as they could lead in a circle."""

    def fail(error: OSError) -> None:
        raise error

    walk = os.walk(folder, onerror=fail)
    paths = (os.path.join(where, name) for where, folders, files in walk for name in (*folders, *files))
    found = list(islice(paths, _MOST_FILES + 1))
    if len(found) > _MOST_FILES:
        raise ValueError(f"more than {_MOST_FILES:,} files")
    return found


@contextmanager
def members(source: Path, base: Path) -> Iterator[tuple[list[str], Callable[[str], bytes]]]:
    """What is in a zip or a folder: the sorted names, relative to `base` in a folder; and a way to read a small file.

    Reading a damaged file raises many types (see `decoding`); a ValueError if it would take more time or memory than an
    archive of small files.
    """
    if source.is_dir():
        yield sorted(Path(path).relative_to(base).as_posix() for path in entries(source)), partial(_read_file, base)
        return
    with source.open("rb") as file:
        with decoding("not a complete zip archive"):
            archive = zipfile.ZipFile(file)
        names = sorted(archive.namelist())
        if outside := [name for name in names if ".." in name.split("/")]:
            raise ValueError(f"the name {outside[0]} leads out of it")
        yield names, partial(_read_member, archive)


def _check_bytes(size: int) -> None:
    if size > _MOST_BYTES:
        raise ValueError(f"{size:,} bytes, expected at most {_MOST_BYTES:,}")


def _read_file(base: Path, name: str) -> bytes:
    path = base / name
    if not path.is_file():  # a pipe would be waited for, a device read for ever
        raise ValueError("no such file, or not a regular one")
    _check_bytes(path.stat().st_size)
    with path.open("rb") as file:
        return file.read(_MOST_BYTES)


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    member = archive.getinfo(name)
    _check_bytes(member.file_size)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("expected it stored or deflated: other methods unpack without a bound")
    with archive.open(member) as file:
        return file.read(member.file_size)  # with a size, so that no more than that is unpacked
