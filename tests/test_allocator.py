"""Freed memory stays at hand when asked, and goes back when asked; told by page faults, not by the clock."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest

from metatutor import allocator
from metatutor.allocator import keep_freed_memory, keep_freed_memory_once
from metatutor.backbones import ConvNet
from metatutor.baselines import PretrainedCosine
from metatutor.learner import NetworkLearner
from metatutor.metric import Prototypical
from metatutor.optimization import MAML

GLIBC = platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Each test begins undecided; what the other tests run with is put back."""
    keep_freed_memory_once.cache_clear()
    yield
    keep_freed_memory_once.cache_clear()
    keep_freed_memory_once()


def in_a_fresh_process(program: str) -> list[int]:
    """What a program prints, run with the module alone: no other memory is in its way."""
    prelude = f"import resource, runpy; keep = runpy.run_path({allocator.__file__!r})['keep_freed_memory']\n"
    done = subprocess.run([sys.executable, "-c", prelude + program], capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


def test_tells_whether_anything_was_set():
    assert keep_freed_memory() is GLIBC
    assert keep_freed_memory(False) is GLIBC


def test_kept_memory_is_not_faulted_in_again_and_it_can_be_undone():
    program = """
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
    first, kept, undone = in_a_fresh_process(program)
    if GLIBC:
        assert first > 4 * kept
        assert undone > 4 * kept


def test_undoing_gives_idle_memory_back():
    program = """
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
        assert in_a_fresh_process(program)[0] > 200 * 2**20


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


@pytest.mark.parametrize("method", [MAML, Prototypical, PretrainedCosine])
def test_learners_ask_for_it(monkeypatch: pytest.MonkeyPatch, method: type[NetworkLearner]):
    calls = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: calls.append(True) or True)
    for _ in range(2):
        method(ConvNet(5, filters=4))
    assert calls == [True]


def test_not_on_other_systems(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert not keep_freed_memory()
    assert not keep_freed_memory(False)
