"""Memory is told by page faults, threads by what the kernel allows: nothing here looks at the clock."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from metatutor import allocator
from metatutor.allocator import (
    keep_freed_memory,
    keep_freed_memory_once,
    limited_threads,
    peak_memory_mib,
    threads_for,
    usable_cpus,
)

GLIBC = platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Each test begins undecided; what the other tests run with is put back."""
    keep_freed_memory_once.cache_clear()
    yield
    keep_freed_memory_once.cache_clear()
    keep_freed_memory_once()


def in_a_fresh_process(program: str, **environment: str) -> list[str]:
    """What a program prints, run with the module alone: no other memory is in its way, no torch is imported."""
    prelude = f"import os, runpy, sys\nmodule = runpy.run_path({allocator.__file__!r})\n"
    inherited = {name: value for name, value in os.environ.items() if "OMP_" not in name} | environment
    command = [sys.executable, "-c", prelude + program]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=inherited).stdout.split()


# --- memory ----------------------------------------------------------------------------------------------------


def test_tells_whether_anything_was_set():
    assert keep_freed_memory() is GLIBC
    assert keep_freed_memory(False) is GLIBC


def test_kept_memory_is_not_faulted_in_again_and_it_can_be_undone():
    program = """
import resource
keep = module["keep_freed_memory"]

def page_faults(mebibytes):
    def activate(times):
        for _ in range(times):
            b"1" * (mebibytes * 2**20 + times)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    settled = activate(3)
    return activate(4) - settled

first = page_faults(32)
keep()
kept = page_faults(32)
keep(False)
undone = page_faults(64)
print(first, kept, undone)
"""
    first, kept, undone = map(int, in_a_fresh_process(program))
    if GLIBC:
        assert first > 4 * kept
        assert undone > 4 * kept


def test_undoing_gives_idle_memory_back():
    program = """
import resource
keep = module["keep_freed_memory"]

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

keep()
b"1" * (256 * 2**20)
held = resident()
keep(False)
print(held - resident())
"""
    if GLIBC:
        assert int(in_a_fresh_process(program)[0]) > 200 * 2**20


@pytest.mark.parametrize(("setting", "asked"), [("0", False), ("1", True), (None, True)])
def test_the_environment_may_forbid_it(monkeypatch: pytest.MonkeyPatch, setting: str | None, asked: bool):
    if setting is None:
        monkeypatch.delenv("METATUTOR_KEEP_MEMORY", raising=False)
    else:
        monkeypatch.setenv("METATUTOR_KEEP_MEMORY", setting)
    calls = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: calls.append(True) or True)
    assert [keep_freed_memory_once() for _ in range(3)] == [asked] * 3
    assert len(calls) == asked  # once


def test_not_on_other_systems(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not keep_freed_memory()
    assert not keep_freed_memory(False)


BLOCKED = "for name in ('resource', 'fcntl', 'pwd'): sys.modules[name] = None\n"


def test_the_peak_counts_what_was_given_back():
    program = """
before = module["peak_memory_mib"]()
b"1" * (256 * 2**20)
print(module["peak_memory_mib"]() - before)
"""
    assert 250 < int(in_a_fresh_process(BLOCKED * (platform.system() == "Linux") + program)[0]) < 262


def test_the_peak_on_windows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(allocator, "_text", lambda path: "")
    monkeypatch.setattr(allocator.sys, "platform", "win32")
    info = SimpleNamespace(peak_wset=300 * 2**20)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: info))
    assert peak_memory_mib() == 300


@pytest.mark.parametrize(("system", "unit"), [("darwin", 1), ("freebsd14", 1024)])
def test_the_peak_on_other_systems(monkeypatch: pytest.MonkeyPatch, system: str, unit: int):
    resource = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=300 * 2**20 // unit))
    monkeypatch.setattr(allocator, "_text", lambda path: "")
    monkeypatch.setattr(allocator.sys, "platform", system)
    monkeypatch.setitem(sys.modules, "resource", resource)
    assert peak_memory_mib() == 300


def test_the_peak_of_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7 * 2**20)
    assert peak_memory_mib() == 7


# --- threads ---------------------------------------------------------------------------------------------------


def test_importing_changes_nothing():
    program = """
before = dict(os.environ)
runpy.run_path(module["__file__"])
print(dict(os.environ) == before, "torch" in sys.modules, "psutil" in sys.modules)
"""
    assert in_a_fresh_process(program) == ["True", "False", "False"]


WAITING = "print(module['let_threads_sleep'](), os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"


def test_threads_sleep_where_torch_comes_later():
    assert in_a_fresh_process(WAITING) == ["True", "PASSIVE", "1000"]


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_threads_wait_as_the_user_says(name: str):
    found = in_a_fresh_process(WAITING, **{name: "17"})
    assert found[0] == "False" and sorted(found[1:]) == ["17", "None"]


def test_it_is_too_late_when_torch_is_there():
    assert in_a_fresh_process("sys.modules['torch'] = None\n" + WAITING) == ["False", "None", "None"]


def test_no_more_cpus_than_the_process_is_bound_to():
    if hasattr(os, "sched_setaffinity"):
        one = min(os.sched_getaffinity(0))
        assert in_a_fresh_process(f"os.sched_setaffinity(0, {{{one}}})\nprint(module['usable_cpus']())") == ["1"]


def test_cpus_without_unix(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "process_cpu_count", lambda: 8, raising=False)
    monkeypatch.setattr(allocator, "_text", lambda path: "")
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: [0, 1, 5], raising=False)
    assert usable_cpus() == 3
    monkeypatch.delattr(psutil.Process, "cpu_affinity")  # as on macOS
    assert usable_cpus() == 8


QUOTAS: dict[str, tuple[str, dict[str, str], float]] = {
    "none": ("", {}, math.inf),
    "version 2, a container": ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
    "version 2, unlimited": ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
    "version 2, a service": (
        "0::/a.slice/b\n",
        {"a.slice/cpu.max": "200000 100000", "a.slice/b/cpu.max": "max 100000"},
        2,
    ),
    "version 1": (
        "9:memory:/x\n3:cpuset:/x\n4:cpu,cpuacct:/x/y\n0::/\n",
        {"cpu/x/cpu.cfs_quota_us": "50000\n", "cpu/x/cpu.cfs_period_us": "100000\n", "cpu/cpu.cfs_quota_us": "-1\n"},
        0.5,
    ),
    "version 1, seen from inside": (
        "4:cpuacct,cpu:/docker/f00\n",
        {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        3,
    ),
    "another group's": ("0::/mine\n", {"yours/cpu.max": "100000 100000"}, math.inf),
    "nonsense": ("0::\nx\n\n1:cpu\n0::/\n", {"cpu.max": "1e3 0\nmore"}, math.inf),
    "a period of nothing": ("0::/\n", {"cpu.max": "100000 0"}, math.inf),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_quotas(case: str, tmp_path: Path):
    groups, limits, expected = QUOTAS[case]
    files = {"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{name}": text for name, text in limits.items()}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert allocator._quota(tmp_path) == expected


@pytest.mark.parametrize(("quota", "cpus"), [(0.5, 1), (1.9, 1), (2.5, 2), (3.0, 3), (64.0, 4), (math.inf, 4)])
def test_no_more_cpus_than_the_quota_and_at_least_one(monkeypatch: pytest.MonkeyPatch, quota: float, cpus: int):
    monkeypatch.setattr(allocator, "_bound_cpus", lambda: 4)
    monkeypatch.setattr(allocator, "_quota", lambda root: quota)
    assert usable_cpus() == cpus


def test_small_networks_take_one_thread_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(allocator, "usable_cpus", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads_for(n) for n in (0, 28_965, 112_965)] == [1, 1, 6]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads_for(0) == 6


def test_threads_are_limited_and_given_back():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with limited_threads(2):
            assert torch.get_num_threads() == 2
            with limited_threads(8):  # no more than it was told before
                assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 3
        with pytest.raises(KeyError), limited_threads(1):
            raise KeyError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
