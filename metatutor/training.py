"""The outer loop: the only place where a learner's meta-parameters change."""

from __future__ import annotations

import csv
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from tqdm.auto import tqdm

from metatutor.episodes import Episode
from metatutor.learner import Learner

HISTORY_FIELDS: tuple[str, ...] = ("iteration", "seconds", "meta_loss", "train_accuracy", "validation_accuracy")
CHECKPOINT = "checkpoint.pt"
Row = dict[str, int | float]  # one row of history, with the keys HISTORY_FIELDS


class TrainingDivergedError(RuntimeError):
    """The loss was not finite; the last good checkpoint is kept."""


@runtime_checkable
class Sampler(Protocol):
    """Anything that draws episodes from a generator it owns, such as `EpisodeSampler`."""

    generator: torch.Generator

    def sample(self, n_tasks: int) -> Episode:
        """Draw the next `n_tasks` tasks."""
        ...


@dataclass(frozen=True)
class TrainConfig:
    """How the outer loop runs.

    Args:
        iterations: steps of the outer optimizer.
        tasks_per_step: tasks whose mean loss makes one step (meta-batch size), over all processes together.
        outer_lr: peak learning rate of the outer optimizer.
        warmup: iterations of linear rise to `outer_lr`.
        schedule: what follows the warm-up: `"cosine"` decay to zero, or `"constant"`.
        clip_norm: the gradient is scaled down to this norm where it is longer.
        log_every: iterations between two rows of history, each with an accuracy in training and validation.
        checkpoint_every: iterations between two checkpoints.
        seed: of the network's initial parameters and of the stream of training tasks.
        optimizer: the outer one, `"adam"` or plain gradient descent, `"sgd"`.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> TrainConfig(iterations=1000).outer_lr
        0.003

    Reference:
        Kingma & Ba (2015), Adam; cosine decay: Loshchilov & Hutter (2017).
    """

    iterations: int = 2000
    tasks_per_step: int = 16
    outer_lr: float = 3e-3
    warmup: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    clip_norm: float = 10.0
    log_every: int = 250
    checkpoint_every: int = 250
    seed: int = 0
    optimizer: Literal["adam", "sgd"] = "adam"

    def __post_init__(self) -> None:
        for name in ("iterations", "tasks_per_step", "outer_lr", "clip_norm", "log_every", "checkpoint_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.warmup < 0 or self.schedule not in ("cosine", "constant"):
            raise ValueError("warmup must not be negative and schedule must be 'cosine' or 'constant'")
        if self.optimizer not in ("adam", "sgd"):
            raise ValueError(f"optimizer must be 'adam' or 'sgd', got {self.optimizer!r}")


@dataclass
class _Progress:
    """What the loop remembers besides parameters and optimizer."""

    iteration: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    history: list[Row] = field(default_factory=list)


def train(
    learner: Learner,
    sampler: Sampler,
    config: TrainConfig,
    *,
    folder: Path | str | None = None,
    validate: Callable[[Learner], float] | None = None,
    device: str | None = None,
    progress_bar: bool = True,
) -> list[Row]:
    """Minimise `learner.meta_loss` over the tasks of `sampler`.

    Several processes (`accelerate launch`) split the tasks of each step among them and average their gradients.
    With a `folder`, history and checkpoints go there, and a run that was killed goes on where its last checkpoint
    stood: on CPU it ends bit for bit as if it had never stopped. The learner is left in evaluation mode.

    Args:
        learner: what to train, in place.
        sampler: where the training tasks come from.
        config: how long and how fast.
        folder: for `history.csv` and `checkpoint.pt`; None writes nothing.
        validate: maps the learner, in evaluation mode, to an accuracy from 0 to 1.
        device: `"cpu"`, `"cuda"`, …; default: what accelerate finds.
        progress_bar: whether to show one.

    Returns:
        The history: one dict a row, with the keys `HISTORY_FIELDS`.

    Raises:
        TrainingDivergedError: at the first loss that is not finite.
        KeyboardInterrupt: on Ctrl-C, after a checkpoint was written.
        ValueError: if the device is absent, or the checkpoint in `folder` is of another learner or configuration.

    Example:
        >>> from metatutor import MAML, ConvNet, EpisodeSampler, EpisodeSpec, Strokes
        >>> classes = Strokes.load(n_alphabets=3, characters_per_alphabet=8).split().train
        >>> sampler = EpisodeSampler(classes, EpisodeSpec(5, 1, 1))
        >>> learner = MAML(ConvNet(5, filters=4))
        >>> len(train(learner, sampler, TrainConfig(iterations=2), progress_bar=False))
        1

    Reference:
        Finn, Abbeel & Levine (2017), algorithm 1, line 8.
    """
    accelerator = _accelerator(device)
    share = _share(config.tasks_per_step, accelerator)
    learner.to(accelerator.device)
    descent = torch.optim.Adam if config.optimizer == "adam" else torch.optim.SGD
    optimizer = descent(learner.parameters(), lr=config.outer_lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate(i, config))
    folder = None if folder is None else Path(folder)
    state = _State(learner, optimizer, scheduler, sampler, config, _Progress())
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        state.load(folder / CHECKPOINT)
    if accelerator.num_processes > 1:
        broadcast(list(learner.state_dict().values()))  # all begin where the main process begins
    progress, main = state.progress, accelerator.is_main_process
    begun = time.perf_counter() - progress.seconds
    bar = tqdm(total=config.iterations, initial=progress.iteration, disable=not (progress_bar and main), unit="step")
    with bar, _interrupt_flag() as interrupted:
        while progress.iteration < config.iterations:
            learner.train()
            episode = sampler.sample(config.tasks_per_step).tasks(share).to(accelerator.device)
            loss = _step(learner, episode, optimizer, scheduler, accelerator, config.clip_norm)
            if not math.isfinite(loss):
                raise TrainingDivergedError(_diverged(progress.iteration + 1, loss, folder))
            progress.iteration += 1
            progress.loss_sum += loss
            progress.loss_count += 1
            progress.seconds = time.perf_counter() - begun
            bar.update()
            done = progress.iteration == config.iterations
            if done or progress.iteration % config.log_every == 0:
                _log(progress, learner, episode, validate)
                progress.seconds = time.perf_counter() - begun
                _show(bar, progress.history[-1])
            stop = interrupted.is_set() and not done
            save = done or stop or progress.iteration % config.checkpoint_every == 0
            if folder is not None and main and save:
                write_history(progress.history, folder / "history.csv")
                state.save(folder / CHECKPOINT)
            if stop:
                where = f"; run the same command again to go on from {folder / CHECKPOINT}" if folder else ""
                raise KeyboardInterrupt(f"stopped after iteration {progress.iteration}{where}")
    learner.eval()
    return progress.history


def _step(
    learner: Learner, episode: Episode, optimizer: Any, scheduler: Any, accelerator: Accelerator, clip_norm: float
) -> float:
    """One step of the outer optimizer; no step if the loss is not finite."""
    optimizer.zero_grad()
    with accelerator.autocast():
        loss = learner.meta_loss(episode)
    accelerator.backward(loss)
    if accelerator.num_processes > 1:
        for parameter in learner.parameters():
            if parameter.grad is not None:
                parameter.grad = _mean(accelerator, parameter.grad)
        for buffer in learner.buffers():
            buffer.copy_(_mean(accelerator, buffer))
        loss = _mean(accelerator, loss.detach())
    norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), clip_norm)
    value = loss.item() if torch.isfinite(norm) else math.nan
    if math.isfinite(value):
        optimizer.step()
        scheduler.step()
    return value


def _mean(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    return accelerator.reduce(tensor, reduction="mean")  # pyright: ignore[reportReturnType]


def _rate(iteration: int, config: TrainConfig) -> float:
    """The learning rate of an iteration as a fraction of `outer_lr`."""
    warm = min(1.0, (iteration + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return warm
    left = max(1, config.iterations - config.warmup)
    done = min(1.0, max(0, iteration - config.warmup) / left)
    return warm * 0.5 * (1 + math.cos(math.pi * done))


def _log(progress: _Progress, learner: Learner, episode: Episode, validate: Callable[[Learner], float] | None) -> None:
    with torch.no_grad():
        answers = learner(episode).argmax(-1)
    classes = not episode.query_labels.is_floating_point()
    learner.eval()
    row = {
        "iteration": progress.iteration,
        "seconds": round(progress.seconds, 2),
        "meta_loss": progress.loss_sum / progress.loss_count,
        "train_accuracy": (answers == episode.query_labels).float().mean().item() if classes else math.nan,
        "validation_accuracy": math.nan if validate is None else validate(learner),
    }
    progress.history.append(row)
    progress.loss_sum, progress.loss_count = 0.0, 0


def _show(bar: tqdm, row: Row) -> None:
    bar.set_postfix(
        loss=f"{row['meta_loss']:.3f}",
        accuracy=f"{row['train_accuracy']:.1%}",
        validation=f"{row['validation_accuracy']:.1%}",
    )


def write_history(history: list[Row], path: Path) -> None:
    """Write rows of history as CSV, whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, HISTORY_FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)


def read_history(path: Path) -> list[Row]:
    """The rows that `write_history` wrote."""
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@dataclass
class _State:
    """Everything that a resumed run must find again."""

    learner: Learner
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    sampler: Sampler
    config: TrainConfig
    progress: _Progress

    def save(self, path: Path) -> None:
        state = {
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "sampler": self.sampler.generator.get_state(),
            "torch": torch.get_rng_state(),
            "config": asdict(self.config),
            "progress": asdict(self.progress),
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            config = dict(state["config"])
        except Exception as error:
            raise ValueError(f"{path} is not a readable checkpoint; delete it to start anew ({error})") from error
        if config != asdict(self.config):
            changed = [k for k, v in asdict(self.config).items() if config.get(k) != v]
            raise ValueError(
                f"{path} was trained with another {', '.join(changed)}; delete it or choose another folder"
            )
        load_parameters(self.learner, state["learner"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.sampler.generator.set_state(state["sampler"])
        torch.set_rng_state(state["torch"])
        self.progress = _Progress(**state["progress"])


def load_parameters(learner: Learner, parameters: dict[str, Tensor], source: Path | str) -> None:
    """Put recorded parameters into a learner of the same architecture.

    Raises:
        ValueError: if a name or a shape differs; the learner is then unchanged.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in learner.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    if expected != found:
        name = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))[0]
        raise ValueError(
            f"{source} holds another architecture: '{name}' is {found.get(name, 'absent')} there and "
            f"{expected.get(name, 'absent')} here; build the learner from the run's own config.json"
        )
    learner.load_state_dict(parameters)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary name beside `path`, then rename: the file is there whole, or as it was."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the flag, so that the step at hand is finished; the second one interrupts at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(*_: Any) -> None:
        flag.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


def check_device(device: str | None) -> None:
    """Raise a `ValueError` if the device is unknown, or a CUDA device that is not there."""
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("cuda was asked for but PyTorch finds no CUDA device; leave the device out or say cpu")


def _accelerator(device: str | None) -> Accelerator:
    check_device(device)
    return Accelerator(cpu=device == "cpu")


def _share(tasks_per_step: int, accelerator: Accelerator) -> slice:
    """The tasks of each step that this process takes."""
    each, rest = divmod(tasks_per_step, accelerator.num_processes)
    if rest:
        raise ValueError(
            f"tasks_per_step = {tasks_per_step} does not split among {accelerator.num_processes} processes; "
            f"choose a multiple of {accelerator.num_processes}"
        )
    return slice(each * accelerator.process_index, each * (accelerator.process_index + 1))


def _diverged(iteration: int, loss: float, folder: Path | None) -> str:
    kept = f"; the last good checkpoint is {folder / CHECKPOINT}" if folder and (folder / CHECKPOINT).exists() else ""
    return f"the loss of iteration {iteration} is {loss}: lower outer_lr or inner_lr, or clip_norm{kept}"
