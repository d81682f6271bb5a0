"""Files that are there whole, or as they were."""

from __future__ import annotations

import os
import platform
import re
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from uuid import uuid4

_WRITING: set[str] = set()  # names of the temporary files that this process is writing
_HOUR = 3600  # seconds


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path` to write to: it takes that name at the end, and vanishes if anything fails.

    Readers find the old file or the new one, never half of one. Several may write at once, threads or processes: the
    last to end wins. What killed writers of the same `path` left behind is removed first.

    Raises:
        OSError: if the folder is missing or cannot be written to.
    """
    _remove_leftovers(path)
    temporary = path.with_name(f"{path.name}.{_processes()}-{os.getpid()}-{uuid4().hex[:8]}.tmp")
    _WRITING.add(temporary.name)
    try:
        temporary.touch()
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        _WRITING.discard(temporary.name)


def _processes() -> str:
    """Whom a process number is known to: a machine, or a container, of those that share the folder."""
    container = ""
    with suppress(OSError):
        container = os.readlink("/proc/self/ns/pid")  # where there is such a thing
    return f"{zlib.crc32((platform.node() + container).encode()):08x}"


def _remove_leftovers(path: Path) -> None:
    pattern = re.compile(re.escape(path.name) + r"\.([0-9a-f]{8})-([0-9]{1,9})-[0-9a-f]{8}\.tmp")
    for file in list(path.parent.glob(f"{escape(path.name)}.*.tmp")):
        if named := pattern.fullmatch(file.name):
            with suppress(OSError):  # another writer may be tidying up too
                if _is_leftover(file, named[1], int(named[2])):
                    file.unlink(missing_ok=True)


def _is_leftover(file: Path, processes: str, process: int) -> bool:
    if processes != _processes():
        return time.time() - file.stat().st_mtime > _HOUR
    if process == os.getpid():  # of an earlier process: numbers come again
        return file.name not in _WRITING
    from psutil import pid_exists

    return not pid_exists(process)
