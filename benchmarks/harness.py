"""What the benchmarks of one step share: the same gradient first, then processes that take turns, and one table.

Not a benchmark itself: `maml_step.py` and `mann_stream.py` say what is compared.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from psutil import Process
from torch import Tensor, nn

from metatutor.allocator import keep_freed_memory, peak_memory_mib

TOLERANCE = 1e-8  # of the float64 gradients, relative to the greatest entry of each parameter's gradient

Prepared = tuple[nn.Module, Callable[[], None]]  # and what adds one gradient to the parameters'


Check = Callable[[Any, Sequence[str]], dict[str, float]]
Prepare = Callable[[Any, str], Prepared]


@dataclass(frozen=True)
class Config:
    """What to measure, and how.

    Args:
        settings: which settings.
        peers: which peers to compare with, if installed.
        variants: what else to time.
        rounds: timed steps of every implementation.
        threads: threads of every process; default: PyTorch's choice.
        device: cpu or cuda.
        quick: 4 tasks and 2 rounds, for a check.
        check_only: compare the gradients and stop.
        json: a file to write the rows to.
    """

    settings: tuple[str, ...] = ()
    peers: tuple[str, ...] = ("plain loop",)
    variants: tuple[str, ...] = ()
    rounds: int = 10
    threads: int | None = None
    device: str = "cpu"
    quick: bool = False
    check_only: bool = False
    json: Path | None = None


class Setting(Protocol):
    """The shape of the work, and where it is done."""

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> str: ...


# --- the same gradient ---------------------------------------------------------------------------------------------


def gradients(module: nn.Module) -> list[Tensor]:
    """The gradient of every parameter, in order."""
    found = [p.grad for p in module.parameters()]
    assert all(g is not None for g in found), "a parameter without gradient"
    return [g for g in found if g is not None]


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The greatest difference, relative to the greatest entry of each parameter's gradient."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def refuse_differences(setting: str, differences: Mapping[str, float], tolerance: float = TOLERANCE) -> None:
    """Stop if a gradient is not the expected one.

    Raises:
        SystemExit: naming the first that differs.
    """
    for name, found in differences.items():
        if not found < tolerance:
            raise SystemExit(f"{setting}: the gradient of {name} is off by {found:.1e}, more than {tolerance:.0e}")


# --- time and memory -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    setting: str
    implementation: str
    milliseconds: float
    ratio: float
    peak_mib: float


@dataclass(frozen=True)
class Measurement:
    """What one implementation needed: its timed steps, and the memory they added."""

    milliseconds: list[float]
    peak_mib: float


def serve(pipe: Connection, prepare: Prepare, setting: Setting, name: str, threads: int | None) -> None:
    """In a process of its own: take a step whenever asked, and say how long it took and the peak memory so far."""
    if threads is not None:
        torch.set_num_threads(threads)
    if name == "metatutor-plain-malloc":
        os.environ["METATUTOR_KEEP_MEMORY"] = "0"
    if name == "plain loop-keep-memory":
        keep_freed_memory()
    module, backward = prepare(setting, name)
    before = memory_mib(setting.device)
    while pipe.recv():
        module.zero_grad()
        synchronize(setting.device)
        start = time.perf_counter()
        backward()
        synchronize(setting.device)
        pipe.send((1000 * (time.perf_counter() - start), memory_mib(setting.device, peak=True) - before))


def measure(
    prepare: Prepare, setting: Setting, names: Sequence[str], rounds: int, threads: int | None
) -> dict[str, Measurement]:
    """Let the implementations take turns; the first two rounds warm up."""
    context = get_context("spawn")
    with ExitStack() as stack:
        pipes: dict[str, Connection] = {}
        for name in names:
            pipes[name], theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, prepare, setting, name, threads), daemon=True)
            process.start()
            theirs.close()  # so that a process that dies is noticed
            stack.callback(process.join)
            stack.callback(pipes[name].send, False)
        taken = {name: [step(pipe) for pipe in [pipes[name]]] for name in names}  # alone with its imports and compiling
        for _ in range(1 + rounds):
            for name, pipe in pipes.items():
                taken[name].append(step(pipe))
    return {name: Measurement([ms for ms, _ in of[2:]], of[-1][1]) for name, of in taken.items()}


def step(pipe: Connection) -> tuple[float, float]:
    pipe.send(True)
    return pipe.recv()


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def memory_mib(device: str, peak: bool = False) -> float:
    """Memory of this process, now or at its peak; on a GPU, that of its tensors."""
    if device != "cpu":
        return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device) / 2**20
    return peak_memory_mib() if peak else Process().memory_info().rss / 2**20


# --- the table -----------------------------------------------------------------------------------------------------


def chosen(
    config: Config, implementations: Mapping[str, object], packages: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """The implementations to run, and the peers that are not installed.

    Args:
        config: what was asked for.
        implementations: all there are, by name.
        packages: as in `compare`.

    Raises:
        SystemExit: if a peer or a variant is unknown.
    """
    peers = "plain loop", *packages
    unknown = set(config.peers) - set(peers)
    if unknown:
        raise SystemExit(f"no such peer: {', '.join(sorted(unknown))}; choose among {', '.join(peers)}")
    unknown = set(config.variants) - implementations.keys()
    if unknown:
        raise SystemExit(f"no such variant: {', '.join(sorted(unknown))}; choose among {', '.join(implementations)}")
    missing = [peer for peer in config.peers if peer in packages and find_spec(packages[peer]) is None]
    return ["metatutor", *(peer for peer in config.peers if peer not in missing)], missing


def machine(config: Config) -> str:
    """What this is measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    threads = config.threads or torch.get_num_threads()
    gpu = "" if config.device == "cpu" else f"; {torch.cuda.get_device_name(config.device)}"
    return f"{model}, {os.cpu_count()} cores, {threads} threads{gpu}; PyTorch {torch.__version__}"


def rows_of(setting: str, measurements: dict[str, Measurement]) -> list[Row]:
    medians = {name: statistics.median(of.milliseconds) for name, of in measurements.items()}
    ours = medians["metatutor"]
    return [Row(setting, n, ms, ms / ours, measurements[n].peak_mib) for n, ms in medians.items()]


def table(setting: str, measurements: dict[str, Measurement], names: Sequence[str], check: dict[str, float]) -> str:
    lines = []
    for row in rows_of(setting, measurements):
        least = min(measurements[row.implementation].milliseconds)
        numbers = f"{row.milliseconds:>9.1f} {least:>9.1f} {row.ratio:>7.2f} {row.peak_mib:>9.0f}"
        checked = f"{check[row.implementation]:>11.0e}" if row.implementation in check else ""
        lines.append(f"{row.setting:<15} {row.implementation:<23} {numbers} {checked}")
    peers = [row for row in rows_of(setting, measurements) if row.implementation in names[1:]]
    if peers:
        fastest = min(peers, key=lambda row: row.ratio)
        lines.append(f"{'':<15} fastest peer, {fastest.implementation}: {fastest.ratio:.2f} × metatutor's time")
    return "\n".join(lines)


COLUMNS = f"{'median ms':>9} {'min ms':>9} {'ratio':>7} {'peak MiB':>9} {'difference':>11}"
HEADER = f"{'setting':<15} {'implementation':<23} {COLUMNS}"


def compare(
    config: Config,
    about: str,
    settings: Sequence[Setting],
    *,
    rounds: int,
    implementations: Mapping[str, object],
    packages: Mapping[str, str],
    check: Check,
    prepare: Prepare,
) -> None:
    """Compare the gradients, then time them, print one table, and write it as JSON if asked to.

    Args:
        config: what was asked for.
        about: the work in a few words, to be printed.
        settings: the sizes of the work.
        rounds: timed steps.
        implementations: all there are, by name.
        packages: the module to import of every peer that may be missing, by its name on the package index.
        check: how far the gradients of some implementations are from the expected one; stops if too far.
        prepare: an implementation in a setting; by a name that a new process can import.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    names, missing = chosen(config, implementations, packages)
    print(machine(config))
    if packages:
        print(", ".join(f"{name} {version(name)}" for name in names if name in packages), flush=True)
    for name in missing:
        print(f"{name}: not installed")
    print(f"\n{about}; {rounds} rounds")
    print(f"\n{HEADER}", flush=True)
    rows = []
    for setting in settings:
        differences = check(setting, [*names, *config.variants])
        if config.check_only:
            lines = (f"{setting.name:<15} {n:<23} {'':>37} {d:>11.0e}" for n, d in differences.items())
            print("\n".join(lines), flush=True)
            continue
        measurements = measure(prepare, setting, [*names, *config.variants], rounds, config.threads)
        print(table(setting.name, measurements, names, differences), flush=True)
        rows += rows_of(setting.name, measurements)
    if config.json and rows:
        config.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
