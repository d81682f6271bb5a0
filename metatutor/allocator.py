"""Keep freed memory at hand: on Linux, big CPU activations cost more in page faults than in arithmetic.

glibc gives every freed block of more than 128 KiB back to the kernel and asks for it anew a moment later,
and the kernel zeroes each page again. Training allocates the same activations every step, so we ask glibc
to keep them. The setting is the process's, not ours alone; `METATUTOR_KEEP_MEMORY=0` leaves it untouched,
and `keep_freed_memory(False)` puts glibc's own limits back.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_GLIBC_DEFAULT, _KEEP = 128 * 1024, 2**30


def keep_freed_memory(keep: bool = True) -> bool:
    """Ask glibc to keep freed blocks of up to 1 GiB instead of returning them to the kernel.

    Args:
        keep: False restores glibc's initial limits of 128 KiB and gives idle memory back.

    Returns:
        Whether anything was set: only on Linux with glibc.

    Example:
        >>> keep_freed_memory() == keep_freed_memory(False)
        True

    Reference:
        mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    libc = _glibc()
    if libc is None:
        return False
    limit = _KEEP if keep else _GLIBC_DEFAULT
    done = bool(libc.mallopt(_M_MMAP_THRESHOLD, limit)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, limit))
    if not keep:
        libc.malloc_trim(0)
    return done


@cache
def keep_freed_memory_once() -> bool:
    """`keep_freed_memory()`, the first time it is called, unless `METATUTOR_KEEP_MEMORY=0`."""
    return os.environ.get("METATUTOR_KEEP_MEMORY", "1") != "0" and keep_freed_memory()


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
