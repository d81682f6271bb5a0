"""From Omniglot's archives to episodes: decoding once, loading what was kept, drawing tasks.

    python benchmarks/data.py --data FOLDER --json data.json

Tasks are drawn from the tensor by `EpisodeSampler`, and the usual way: a `Dataset` that opens each PNG with PIL, behind
a `DataLoader`, with as many workers as are best. Every measurement has a process of its own; its peak memory is that of
this process, without the loader's workers. The ratio is to metatutor's time in the same setting.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from metatutor.allocator import peak_memory_mib
from metatutor.data import Omniglot
from metatutor.data.omniglot import info
from metatutor.episodes import EpisodeSampler, EpisodeSpec

SPEC = EpisodeSpec(n_way=5, k_shot=1, n_query=15)
TASKS = 32
WINDOWS = 5


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    setting: str
    implementation: str
    milliseconds: float
    ratio: float
    peak_mib: float


class Episodes(Dataset):
    """One task an item, read from PNG files."""

    def __init__(self, characters: list[list[Path]], tasks: int) -> None:
        self.characters, self.tasks = characters, tasks

    def __len__(self) -> int:
        return self.tasks

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng(index)
        classes = rng.choice(4 * len(self.characters), SPEC.n_way, replace=False)
        images = torch.stack([self.drawings(rng, *divmod(int(c), 4)) for c in classes])  # [way, shot, 1, 28, 28]
        support, query = images.split([SPEC.k_shot, SPEC.n_query], dim=1)
        return support.flatten(0, 1), query.flatten(0, 1)

    def drawings(self, rng: np.random.Generator, character: int, turns: int) -> Tensor:
        chosen = rng.choice(len(self.characters[character]), SPEC.k_shot + SPEC.n_query, replace=False)
        return torch.stack([self.open(self.characters[character][i]) for i in chosen]).rot90(turns, (-2, -1))

    def open(self, path: Path) -> Tensor:
        with Image.open(path) as image:
            grey = image.convert("L").resize((28, 28), Image.Resampling.LANCZOS)
        return 1 - torch.from_numpy(np.asarray(grey, dtype=np.float32)).unsqueeze(0) / 255


def milliseconds(run: Callable[[], object], times: int, windows: int = 1) -> float:
    """The time of one run in the best of a few windows of several runs: other programs only ever slow it down."""

    def window() -> float:
        start = time.perf_counter()
        for _ in range(times):
            run()
        return 1000 * (time.perf_counter() - start) / times

    return min(window() for _ in range(windows))


def load(root: Path | None) -> tuple[float, float]:
    return milliseconds(lambda: Omniglot.load(root), times=1), peak_memory_mib()


def sample(root: Path | None, batches: int) -> tuple[float, float]:
    sampler = EpisodeSampler(Omniglot.load(root).split().train, SPEC)
    milliseconds(lambda: sampler.sample(TASKS), times=3)
    return milliseconds(lambda: sampler.sample(TASKS), batches, windows=WINDOWS), peak_memory_mib()


def open_pngs(folders: list[Path], batches: int, workers: int) -> tuple[float, float]:
    characters = [sorted(c.glob("*.png")) for folder in folders for c in sorted(folder.glob("*/*"))][:1100]
    tasks = TASKS * (WINDOWS * batches + 2)
    loader = DataLoader(Episodes(characters, tasks), batch_size=TASKS, num_workers=workers)
    stream = iter(loader)
    milliseconds(lambda: next(stream), times=2)
    return milliseconds(lambda: next(stream), batches, windows=WINDOWS), peak_memory_mib()


def alone(measure: Callable[..., tuple[float, float]], *args: object) -> tuple[float, float]:
    """Measure in a fresh process, after its imports."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, *args).result()


def unpacked(sources: tuple[Path, ...], folder: Path) -> list[Path]:
    """The folders of PNGs, unpacked if they come as zips."""
    for source in sources:
        if source.is_file():
            with zipfile.ZipFile(source) as archive:
                archive.extractall(folder)
    return [folder / source.stem if source.is_file() else source for source in sources]


def measure(root: Path | None, scratch: Path, batches: int) -> list[Row]:
    os.environ["METATUTOR_CACHE"] = str(scratch / "cache")
    cold = alone(load, root)
    cached = [alone(load, root) for _ in range(3)]
    warm = statistics.median(ms for ms, _ in cached), max(mib for _, mib in cached)
    ours = alone(sample, root, batches)
    folders = unpacked(info(root).sources, scratch)
    loaders = {workers: alone(open_pngs, folders, max(batches // 8, 4), workers) for workers in (0, 2)}
    workers, theirs = min(loaders.items(), key=lambda item: item[1])
    drawing = f"draw {TASKS} tasks, {SPEC.n_way}-way {SPEC.k_shot}-shot, {SPEC.n_query} queries a class"
    return [
        Row("decode and verify, once", "metatutor", cold[0], 1.0, cold[1]),
        Row("load what was kept", "metatutor", warm[0], 1.0, warm[1]),
        Row(drawing, "metatutor", ours[0], 1.0, ours[1]),
        Row(drawing, f"DataLoader of PNGs, {workers} workers", theirs[0], theirs[0] / ours[0], theirs[1]),
    ]


def table(rows: list[Row]) -> str:
    lines = [f"{'setting':<55} {'implementation':<30} {'ms':>9} {'ratio':>7} {'peak MiB':>9}"]
    for row in rows:
        numbers = f"{row.milliseconds:>9.1f} {row.ratio:>7.1f} {row.peak_mib:>9.0f}"
        lines.append(f"{row.setting:<55} {row.implementation:<30} {numbers}")
    return "\n".join(lines)


def main(
    data: Path | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    batches: int = 40,
) -> None:
    """Measure, print one table, and write it as JSON if asked to.

    Args:
        data: a folder with Omniglot; otherwise METATUTOR_DATA or the user's cache folder.
        json_file: where to write the rows.
        batches: how many batches of tasks to draw in each of the five windows, of which the best counts.
    """
    if data is None and "METATUTOR_DATA" not in os.environ:
        data = info().sources[0].parent
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(data, Path(scratch), batches)
    print(table(rows))
    if json_file:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
