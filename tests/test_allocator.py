"""Freed memory stays at hand when asked, and goes back when asked; told by page faults, not by the clock."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterator

import pytest
import torch

from metatutor import allocator
from metatutor.allocator import keep_freed_memory, keep_freed_memory_once
from metatutor.backbones import ConvNet
from metatutor.optimization import MAML

GLIBC = platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Each test begins undecided; what the other tests run with is put back."""
    keep_freed_memory_once.cache_clear()
    yield
    keep_freed_memory_once.cache_clear()
    keep_freed_memory_once()


def page_faults(mebibytes: int) -> int:
    """Of four activations of this size, made and dropped one after the other, once the heap has settled."""

    def activate(times: int) -> int:
        for _ in range(times):
            torch.ones(mebibytes * 2**18)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    settled = activate(8)
    return activate(4) - settled


def test_tells_whether_anything_was_set():
    assert keep_freed_memory() is GLIBC
    assert keep_freed_memory(False) is GLIBC


def test_kept_memory_is_not_faulted_in_again_and_it_can_be_undone():
    """Each time larger than before, lest a block be at hand that was kept earlier."""
    keep_freed_memory()
    kept = page_faults(32)
    keep_freed_memory(False)
    returned = page_faults(64)
    keep_freed_memory()
    kept_again = page_faults(96)
    if GLIBC:
        assert returned > 4 * max(kept, kept_again)


def test_undoing_gives_idle_memory_back():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    if GLIBC:
        keep_freed_memory()
        torch.ones(2**26)  # 256 MiB
        held = resident()
        keep_freed_memory(False)
        assert held - resident() > 200 * 2**20


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


def test_maml_asks_for_it(monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: calls.append(True) or True)
    for _ in range(2):
        MAML(ConvNet(5, filters=4))
    assert calls == [True]


def test_not_on_other_systems(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not keep_freed_memory()
    assert not keep_freed_memory(False)
