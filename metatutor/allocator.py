"""Memory and threads of the process: what training asks of the machine, but no more than the process may use.

Nothing here happens at import, because these belong to the whole process, not only to us:

- *Freed memory is kept.* glibc gives every freed block of more than 128 KiB back to the kernel and asks for it again a
  moment later, and the kernel zeroes each page again: on a CPU, big activations cost more in page faults than in
  arithmetic.
- *Waiting threads sleep.* OpenMP's threads spin while they wait for each other, for milliseconds, and on busy cores, or
  in a container with fewer CPUs than it shows, they starve those that work; `benchmarks/threads.py` measures it.
- *No more threads than CPUs*, and one where the network is small.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_GLIBC_DEFAULT, _KEEP = 128 * 1024, 2**30
ASLEEP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}  # every OpenMP; GNU's, which first looks 1,000 times
_SMALL = 50_000  # parameters: Conv-4 has 29,000 with 32 filters, 113,000 with 64


# --- memory ---


def keep_freed_memory(keep: bool = True) -> bool:
    """Ask glibc to keep freed blocks of up to 1 GiB (mallopt(3)), or to return them again; False if it cannot."""
    if not sys.platform.startswith("linux") or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
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


def peak_memory_mib() -> int:
    """The most memory, in MiB, the process has held so far: on the GPU if one was used, else resident."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return round(_peak_resident_bytes() / 2**20)


def _peak_resident_bytes() -> int:
    found = re.search(r"^VmHWM:\s*(\d+) kB$", _text(Path("/proc/self/status")), re.MULTILINE)
    if found:  # rather than ru_maxrss, which a Linux process inherits from its parent
        return 1024 * int(found[1])
    if sys.platform == "win32":
        from psutil import Process

        return Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- threads ---


def let_threads_sleep() -> bool:
    """Make OpenMP's waiting threads sleep, unless the environment says how they wait.

    False where it has no effect: OpenMP reads the environment once, when torch is imported.
    """
    if "torch" in sys.modules or ASLEEP.keys() & os.environ.keys():
        return False
    os.environ.update(ASLEEP)
    return True


def usable_cpus() -> int:
    """How many CPUs the process may use: those it is bound to, and no more than its container's quota."""
    return max(1, int(min(_bound_cpus(), _quota(Path("/")))))


def threads_for(n_parameters: int) -> int:
    """How many threads are worthwhile for a network on a CPU: one if it is small, else one per usable CPU.

    On two idle cores a second thread makes steps of Conv-4 with up to 32 filters slower more often than faster, and
    those with 64 up to 1.5 times as fast; on busy cores it costs time. Where OMP_NUM_THREADS is set, small networks use
    that many too.
    """
    return 1 if n_parameters < _SMALL and "OMP_NUM_THREADS" not in os.environ else usable_cpus()


@contextmanager
def limited_threads(most: int) -> Iterator[None]:
    """Within the block torch uses no more threads than `most`; fewer, if that was already its limit."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(before, most))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bound_cpus() -> int:
    """By affinity, and from Python 3.13 on by PYTHON_CPU_COUNT."""
    from psutil import Process

    count = getattr(os, "process_cpu_count", os.cpu_count)() or 1
    return min(count, len(Process().cpu_affinity())) if hasattr(Process, "cpu_affinity") else count  # not on macOS


def _quota(root: Path) -> float:
    """The lowest of the limits of the process's control groups, in CPUs; infinite if there is none."""
    quotas = [math.inf]
    # Version 2: "0::/group"; version 1: "4:cpu,cpuacct:/group".
    for controllers, group in re.findall(r"^\d+:(|(?:.*,)?cpu(?:,.*)?):/(.*)$", _text(root / "proc/self/cgroup"), re.M):
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        for folder in (PurePosixPath(group), *PurePosixPath(group).parents):
            at = mount / folder
            limit = _text(at / "cpu.max") or f"{_text(at / 'cpu.cfs_quota_us')} {_text(at / 'cpu.cfs_period_us')}"
            if found := re.fullmatch(r"(\d+)\s+([1-9]\d*)\s*", limit):  # neither "max" nor -1
                quotas.append(int(found[1]) / int(found[2]))
    return min(quotas)


def _text(path: Path) -> str:
    """The text of a kernel file; empty where there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
