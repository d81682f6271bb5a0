"""One meta-gradient of second-order MAML: 32 tasks, 5-way 1-shot, Conv-4 with 64 filters, ours and the peers'.

    python benchmarks/maml_step.py --json maml_step.json
    python benchmarks/maml_step.py --quick                      # few tasks, few rounds: are the gradients the same?

A setting `pooled-15q-5s` is a max-pooled network, 15 queries a class and 5 inner steps; `strided` halves its images by
strided convolutions. Ours is `MAML(...).meta_loss(episode).backward()` with `ConvNet`; every peer adapts task by task
the network its user would write, `torch.nn.Conv2d`, `BatchNorm2d`, `ReLU`, with the same weights. Nothing is timed
before all have given the same gradient in float64. Then each lives in a process of its own and they take turns, one
step at a time, so that whatever else the machine does meets all alike. Peak memory is what the steps add to the
process; the ratio is to metatutor's median in the same setting. Peers that are not installed are left out.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.func import functional_call

from metatutor.allocator import keep_freed_memory
from metatutor.backbones import ConvBlock, ConvNet
from metatutor.episodes import Episode
from metatutor.optimization.maml import MAML

INNER_LR = 0.4
TOLERANCE = 1e-8  # of the float64 gradients, relative to the greatest entry of each parameter's gradient

STEPS = (1, 2, 5, 10)
SETTINGS = (
    *(f"strided-{queries}q-{steps}s" for queries in (1, 15) for steps in STEPS),
    *(f"pooled-{queries}q-{steps}s" for queries in (1, 15) for steps in (1, 5)),
)


@dataclass(frozen=True)
class Config:
    """What to measure, and how.

    Args:
        settings: which settings, such as `pooled-15q-5s`; any numbers will do.
        peers: which peers to compare with, if installed.
        variants: what else to time: `metatutor-recompute`, `metatutor-compiled`, `metatutor-plain-malloc` (glibc's own
            memory limits), `plain loop-keep-memory` (the plain loop with ours).
        rounds: timed steps of every implementation.
        tasks: tasks in an episode.
        filters: channels of every convolution.
        threads: threads of every process; default: PyTorch's choice.
        device: cpu or cuda.
        quick: 4 tasks and 2 rounds, for a check.
        check_only: compare the gradients and stop.
        json: a file to write the rows to.
    """

    settings: tuple[str, ...] = SETTINGS
    peers: tuple[str, ...] = ("plain loop", "higher", "TorchOpt", "learn2learn")
    variants: tuple[str, ...] = ()
    rounds: int = 10
    tasks: int = 32
    filters: int = 64
    threads: int | None = None
    device: str = "cpu"
    quick: bool = False
    check_only: bool = False
    json: Path | None = None


@dataclass(frozen=True)
class Setting:
    """The shape of the work, and where it is done."""

    name: str
    tasks: int
    filters: int
    device: str

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[ConvNet, Episode, int]:
        """The network, the episode and the number of inner steps; the same in every process."""
        found = re.fullmatch(r"(strided|pooled)-(\d+)q-(\d+)s", self.name)
        if not found:
            raise SystemExit(f"no such setting: {self.name}; write it like pooled-15q-5s")
        pooling, queries, steps = found.groups()
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = ConvNet(5, filters=self.filters, pooling="max" if pooling == "pooled" else "stride")
        labels = [torch.arange(5).repeat_interleave(n).repeat(self.tasks, 1) for n in (1, int(queries))]
        images = [torch.rand(*of_images.shape, 1, 28, 28, generator=generator, dtype=dtype) for of_images in labels]
        episode = Episode(images[0], labels[0], images[1], labels[1], n_way=5)
        return network.to(self.device, dtype), episode.to(self.device), int(steps)


# --- implementations: each gives a module, and a function that adds one meta-gradient to its parameters' -----------

Implementation = Callable[[ConvNet, Episode, int], tuple[nn.Module, Callable[[], None]]]


def metatutor(
    network: ConvNet, episode: Episode, inner_steps: int, **options: Any
) -> tuple[nn.Module, Callable[[], None]]:
    learner = MAML(network, inner_lr=INNER_LR, inner_steps=inner_steps, **options)
    return network, lambda: learner.meta_loss(episode).backward()


def plain_loop(
    network: ConvNet, episode: Episode, inner_steps: int, second_order: bool = True
) -> tuple[nn.Module, Callable[[], None]]:
    net = ordinary(network)

    def loss(parameters: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, parameters, (images,)), labels)

    def backward() -> None:
        for support_images, support_labels, query_images, query_labels in tasks(episode):
            adapted: dict[str, Tensor] = dict(net.named_parameters())
            for _ in range(inner_steps):
                support_loss = loss(adapted, support_images, support_labels)
                gradients = torch.autograd.grad(support_loss, list(adapted.values()), create_graph=second_order)
                adapted = {n: p - INNER_LR * g for (n, p), g in zip(adapted.items(), gradients, strict=True)}
            (loss(adapted, query_images, query_labels) / len(episode)).backward()

    return net, backward


def higher_(network: ConvNet, episode: Episode, inner_steps: int) -> tuple[nn.Module, Callable[[], None]]:
    import higher

    net = ordinary(network)
    optimizer = torch.optim.SGD(net.parameters(), lr=INNER_LR)

    def backward() -> None:
        for support_images, support_labels, query_images, query_labels in tasks(episode):
            with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (adapted, inner):
                for _ in range(inner_steps):
                    inner.step(F.cross_entropy(adapted(support_images), support_labels))
                (F.cross_entropy(adapted(query_images), query_labels) / len(episode)).backward()

    return net, backward


def torchopt_(network: ConvNet, episode: Episode, inner_steps: int) -> tuple[nn.Module, Callable[[], None]]:
    import torchopt

    net = ordinary(network)
    inner = torchopt.MetaSGD(net, lr=INNER_LR)

    def backward() -> None:
        states = torchopt.extract_state_dict(net), torchopt.extract_state_dict(inner)
        for support_images, support_labels, query_images, query_labels in tasks(episode):
            for _ in range(inner_steps):
                inner.step(F.cross_entropy(net(support_images), support_labels))
            (F.cross_entropy(net(query_images), query_labels) / len(episode)).backward()
            for target, state in zip((net, inner), states, strict=True):
                torchopt.recover_state_dict(target, state)

    return net, backward


def learn2learn_(network: ConvNet, episode: Episode, inner_steps: int) -> tuple[nn.Module, Callable[[], None]]:
    from learn2learn.algorithms import MAML as TheirMAML

    maml = TheirMAML(ordinary(network), lr=INNER_LR)

    def backward() -> None:
        for support_images, support_labels, query_images, query_labels in tasks(episode):
            learner = maml.clone()
            for _ in range(inner_steps):
                learner.adapt(F.cross_entropy(learner(support_images), support_labels))
            (F.cross_entropy(learner(query_images), query_labels) / len(episode)).backward()

    return maml, backward


IMPLEMENTATIONS: dict[str, Implementation] = {
    "metatutor": metatutor,
    "metatutor-recompute": partial(metatutor, recompute=True),
    "metatutor-compiled": partial(metatutor, compile=True),
    "metatutor-plain-malloc": metatutor,
    "plain loop": plain_loop,
    "plain loop-keep-memory": plain_loop,
    "higher": higher_,
    "TorchOpt": torchopt_,
    "learn2learn": learn2learn_,
}
PACKAGES = {"higher": "higher", "TorchOpt": "torchopt", "learn2learn": "learn2learn"}


def ordinary(network: ConvNet) -> nn.Sequential:
    """The network a user of the peers would write, with the same weights; its parameters come in the same order."""
    layers: list[nn.Module] = []
    for block in network.blocks:
        assert isinstance(block, ConvBlock)
        c_out, c_in = block.weight.shape[:2]
        layers += [nn.Conv2d(c_in, c_out, 3, stride=block.stride, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(c_out, track_running_stats=False), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if block.stride == 1 else []
    weight = network.get_parameter("head.weight")
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(network.embedding_size, len(weight))).to(weight)
    with torch.no_grad():
        for theirs, given in zip(net.parameters(), network.parameters(), strict=True):
            theirs.copy_(given)
    return net


def tasks(episode: Episode) -> Iterator[tuple[Tensor, ...]]:
    images = episode.support_images, episode.support_labels, episode.query_images, episode.query_labels
    return zip(*images, strict=True)


# --- the same gradient ---------------------------------------------------------------------------------------------


def meta_gradient(implementation: Implementation, setting: Setting) -> list[Tensor]:
    """The meta-gradient in float64, one tensor a parameter."""
    module, backward = implementation(*setting.build(torch.float64))
    backward()
    gradients = [p.grad for p in module.parameters()]
    assert all(g is not None for g in gradients), "a parameter without gradient"
    return [g for g in gradients if g is not None]


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The greatest difference, relative to the greatest entry of each parameter's gradient."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def check(setting: Setting, names: Sequence[str]) -> dict[str, float]:
    """How far each gradient is from the plain loop's.

    Raises:
        SystemExit: if one differs, or if leaving the second derivatives out would have made no difference.
    """
    expected = meta_gradient(plain_loop, setting)
    first_order = difference(meta_gradient(lambda *given: plain_loop(*given, second_order=False), setting), expected)
    if first_order < 1e-3:
        raise SystemExit(f"{setting.name}: first order differs by {first_order:.0e} only; this checks nothing")
    differences = {n: difference(meta_gradient(IMPLEMENTATIONS[n], setting), expected) for n in names}
    for name, found in differences.items():
        if not found < TOLERANCE:
            raise SystemExit(f"{setting.name}: the gradient of {name} is off by {found:.1e}, more than {TOLERANCE:.0e}")
    return differences


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


def serve(pipe: Connection, setting: Setting, name: str, threads: int | None) -> None:
    """In a process of its own: take a step whenever asked, and say how long it took and the peak memory so far."""
    if threads is not None:
        torch.set_num_threads(threads)
    if name == "metatutor-plain-malloc":
        os.environ["METATUTOR_KEEP_MEMORY"] = "0"
    if name == "plain loop-keep-memory":
        keep_freed_memory()
    module, backward = IMPLEMENTATIONS[name](*setting.build())
    before = memory_mib(setting.device)
    while pipe.recv():
        module.zero_grad()
        synchronize(setting.device)
        start = time.perf_counter()
        backward()
        synchronize(setting.device)
        pipe.send((1000 * (time.perf_counter() - start), memory_mib(setting.device, peak=True) - before))


def measure(setting: Setting, names: Sequence[str], rounds: int, threads: int | None) -> dict[str, Measurement]:
    """Let the implementations take turns; the first two rounds warm up."""
    context = get_context("spawn")
    with ExitStack() as stack:
        pipes: dict[str, Connection] = {}
        for name in names:
            pipes[name], theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, setting, name, threads), daemon=True)
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
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss, which a process inherits from its parent
        return int(status.read_text().split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


# --- the table -----------------------------------------------------------------------------------------------------


def chosen(config: Config) -> tuple[list[str], list[str]]:
    """The implementations to run, and the peers that are not installed."""
    unknown = set(config.peers) - {"plain loop", *PACKAGES}
    if unknown:
        raise SystemExit(f"no such peer: {', '.join(sorted(unknown))}; choose among plain loop, {', '.join(PACKAGES)}")
    unknown = set(config.variants) - IMPLEMENTATIONS.keys()
    if unknown:
        raise SystemExit(f"no such variant: {', '.join(sorted(unknown))}; choose among {', '.join(IMPLEMENTATIONS)}")
    missing = [peer for peer in config.peers if peer in PACKAGES and find_spec(PACKAGES[peer]) is None]
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


def main(config: Annotated[Config, tyro.conf.arg(name="")]) -> None:
    """Compare the gradients, then time them, print one table, and write it as JSON if asked to."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    n_tasks, rounds = (4, 2) if config.quick else (config.tasks, config.rounds)
    names, missing = chosen(config)
    print(machine(config))
    print(", ".join(f"{name} {version(PACKAGES[name])}" for name in names if name in PACKAGES), flush=True)
    for name in missing:
        print(f"{name}: not installed")
    print(f"\n{n_tasks} tasks, 5-way 1-shot, {config.filters} filters, second order; {rounds} rounds")
    print(f"\n{HEADER}", flush=True)
    rows = []
    for name in config.settings:
        setting = Setting(name, n_tasks, config.filters, config.device)
        differences = check(setting, [*names, *config.variants])
        if config.check_only:
            print("\n".join(f"{name:<15} {n:<23} {'':>37} {d:>11.0e}" for n, d in differences.items()), flush=True)
            continue
        measurements = measure(setting, [*names, *config.variants], rounds, config.threads)
        print(table(name, measurements, names, differences), flush=True)
        rows += rows_of(name, measurements)
    if config.json and rows:
        config.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
