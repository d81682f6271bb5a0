"""How many threads, and how they wait: one meta-gradient of MAML on quiet cores, and beside other programs.

    python benchmarks/threads.py --json threads.json

A setting `16-busy` is Conv-4 with 16 filters while, on every CPU that the process may use, another program keeps
counting; in `16-quiet` there is none of ours. `metatutor` is what `train` does: one thread where the network is small,
waiting threads asleep. Its variants take one thread; all of them, asleep; all of them, spinning, as OpenMP has it by
itself. Each lives in a process of its own, one after the other, since OpenMP reads once how to wait.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated
from unittest.mock import patch

import harness
import torch
import tyro
from harness import HEADER, Measurement, Prepared, chosen, machine, measure, rows_of, table

from metatutor.allocator import ASLEEP, threads_for, usable_cpus
from metatutor.backbones import ConvNet
from metatutor.episodes import Episode
from metatutor.optimization.maml import MAML
from metatutor.training import accumulate

NAMES = ("metatutor", "metatutor-one-thread", "metatutor-asleep", "metatutor-spinning")


@dataclass(frozen=True)
class Config(harness.Config):
    """What to measure, and how.

    Args:
        settings: which settings; any number of filters will do.
        variants: what to compare with.
        tasks: tasks in an episode.
    """

    settings: tuple[str, ...] = ("16-quiet", "16-busy", "64-quiet", "64-busy")
    peers: tuple[str, ...] = ()
    variants: tuple[str, ...] = ("metatutor-one-thread", "metatutor-asleep", "metatutor-spinning")
    rounds: int = 20
    tasks: int = 16


@dataclass(frozen=True)
class Setting:
    """The size of the work, and what else there is to do."""

    name: str
    tasks: int
    device: str = "cpu"

    def parts(self) -> tuple[int, bool]:
        """How many filters, and whether other programs run."""
        found = re.fullmatch(r"([1-9]\d*)-(quiet|busy)", self.name)
        if not found:
            raise SystemExit(f"no such setting: {self.name}; write it like 16-busy")
        return int(found.group(1)), found.group(2) == "busy"


def prepare(setting: Setting, name: str) -> Prepared:
    """A meta-gradient of 5-way 1-shot tasks, on as many threads as the implementation takes."""
    filters, _ = setting.parts()
    learner = MAML(ConvNet(5, filters=filters))
    n_parameters = sum(p.numel() for p in learner.parameters())
    threads = {"metatutor": threads_for(n_parameters), "metatutor-one-thread": 1}
    torch.set_num_threads(threads.get(name, usable_cpus()))
    labels = torch.arange(5).repeat(setting.tasks, 5)
    images = torch.rand(*labels.shape, 1, 28, 28)
    episode = Episode(images[:, :5], labels[:, :5], images, labels, n_way=5)

    def backward() -> None:
        accumulate(learner, episode)

    return learner, backward


@contextmanager
def waiting(name: str) -> Iterator[None]:
    """Processes started within are told how their threads wait, and nothing else that the user may have set."""
    with patch.dict(os.environ):
        for variable in (*ASLEEP, "OMP_NUM_THREADS"):
            os.environ.pop(variable, None)
        if name != "metatutor-spinning":
            os.environ.update(ASLEEP)
        yield


@contextmanager
def others(n: int) -> Iterator[None]:
    """Programs that keep a CPU busy each."""
    with ExitStack() as stack:
        for _ in range(n):
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(other.wait)
            stack.callback(other.kill)
        yield


def measured(setting: Setting, names: Sequence[str], rounds: int) -> dict[str, Measurement]:
    found = {}
    _, busy = setting.parts()
    with others(usable_cpus() if busy else 0):
        for name in names:
            with waiting(name):
                found |= measure(prepare, setting, [name], rounds, None)
    return found


def main(config: Annotated[Config, tyro.conf.arg(name="")]) -> None:
    """Measure, print one table, and write it as JSON if asked to."""
    names, _ = chosen(config, dict.fromkeys(NAMES, prepare), {})
    settings = [Setting(name, config.tasks) for name in config.settings]
    for setting in settings:
        setting.parts()
    print(f"{machine(config)}; {usable_cpus()} CPUs may be used")
    print(f"\n{config.tasks} tasks, 5-way 1-shot, 5 queries a class; {config.rounds} rounds\n\n{HEADER}", flush=True)
    rows = []
    for setting in settings:
        measurements = measured(setting, [*names, *config.variants], config.rounds)
        print(table(setting.name, measurements, names, {}), flush=True)
        rows += rows_of(setting.name, measurements)
    if config.json:
        config.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
