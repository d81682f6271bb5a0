"""The outer loop: the only place where a learner's meta-parameters change."""

from __future__ import annotations

import csv
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from metatutor.allocator import keep_freed_memory_once, limited_threads, threads_for
from metatutor.episodes import Episode, EpisodeSpec
from metatutor.files import replacing
from metatutor.learner import Learner, load_parameters

HISTORY_FIELDS: tuple[str, ...] = ("iteration", "seconds", "meta_loss", "train_accuracy", "validation_accuracy")
CHECKPOINT = "checkpoint.pt"
_OPTIMIZERS: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
MAY_CHANGE = ("iterations", "log_every", "checkpoint_every", "tasks_at_once", "patience")  # when a run goes on
Row = dict[str, int | float]  # one row of history, with the keys HISTORY_FIELDS


class TrainingDivergedError(RuntimeError):
    """The loss was not finite; the last good checkpoint is kept."""


@dataclass(frozen=True)
class TrainConfig:
    """How the outer loop runs.

    Args:
        iterations: steps of the outer optimizer.
        tasks_per_step: tasks whose mean loss makes one step (meta-batch size), over all processes together.
        outer_lr: peak learning rate of the outer optimizer.
        warmup: iterations of linear rise to `outer_lr`.
        schedule: what follows the warm-up: `"cosine"` decay to zero, or `"constant"`.
        clip_norm: the gradient is scaled down to this norm where it is longer; None: never.
        log_every: iterations between two rows of history, each with an accuracy in training and validation.
        checkpoint_every: iterations between two checkpoints.
        seed: of the stream of training tasks, and of dropout. `metatutor train` draws the initial parameters from it
            too; in Python they are drawn before `train` sees the learner, from `torch.manual_seed`.
        optimizer: the outer one: `"adam"`, `"adamw"` or plain gradient descent, `"sgd"`.
        weight_decay: of the outer optimizer.
        tasks_at_once: tasks computed side by side, a matter of memory and speed; default: as the learner likes.
        keep: whether the learner ends with its `"last"` parameters, or with those of the row of history whose
            validation accuracy was `"best"`.
        patience: rows of history without a better validation accuracy after which training ends early; None: never.

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
    clip_norm: float | None = 10.0
    log_every: int = 250
    checkpoint_every: int = 250
    seed: int = 0
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    weight_decay: float = 0.0
    tasks_at_once: int | None = None
    keep: Literal["last", "best"] = "last"
    patience: int | None = None

    def __post_init__(self) -> None:
        positive = ("iterations", "tasks_per_step", "outer_lr", "log_every", "checkpoint_every")
        for name in (*positive, "clip_norm", "tasks_at_once", "patience"):
            value = getattr(self, name)
            if (name in positive and value is None) or (value is not None and not 0 < value < math.inf):
                raise ValueError(f"{name} must be positive, got {value}")
        if self.outer_lr > 1e6 or not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"outer_lr = {self.outer_lr} or weight_decay = {self.weight_decay} is out of range")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        if self.warmup < 0 or self.schedule not in ("cosine", "constant"):
            raise ValueError("warmup must not be negative and schedule must be 'cosine' or 'constant'")
        if self.optimizer not in _OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(_OPTIMIZERS)}, got {self.optimizer!r}")
        if self.keep not in ("last", "best"):
            raise ValueError(f"keep must be 'last' or 'best', got {self.keep!r}")


@dataclass
class _Progress:
    """What the loop remembers besides parameters and optimizer."""

    iteration: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    history: list[Row] = field(default_factory=list)

    def rows_since_best(self) -> int:
        """Rows of history after the one with the best validation accuracy; 0: it is the last."""
        accuracies = [row["validation_accuracy"] for row in self.history]
        return len(accuracies) - 1 - accuracies.index(max(accuracies)) if accuracies else 0


def train(
    learner: Learner,
    classes: Any,
    spec: EpisodeSpec,
    config: TrainConfig = TrainConfig(),
    *,
    folder: Path | str | None = None,
    validate: Callable[[Learner], float] | None = None,
    transform: Callable[[Episode], Episode] | None = None,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    schedule: Callable[[int], float] | None = None,
    callbacks: Sequence[Callable[[Learner, Row], object]] = (),
    log_with: Any = None,
    device: str | None = None,
    progress_bar: bool = True,
) -> list[Row]:
    """Minimise `learner.meta_loss` over tasks drawn from classes.

    Several processes (`accelerate launch`, `torchrun`) split the tasks of each step among them and average their
    gradients. With a `folder`, history and checkpoints go there, and a run that was killed goes on where its last
    checkpoint stood: on CPU it ends bit for bit as if it had never stopped. More iterations than at first may then be
    asked for. The learner is left in evaluation mode.

    Args:
        learner: what to train, in place.
        classes: where the training tasks are drawn from: `ClassImages`, or anything that has a `sampler(spec, seed=…)`.
        spec: the shape of the training tasks.
        config: how long and how fast.
        folder: for `history.csv` and `checkpoint.pt`; None writes nothing.
        validate: maps the learner, in evaluation mode, to an accuracy from 0 to 1.
        transform: changes each batch of training tasks, to augment images for example.
        optimizer: makes another outer optimizer of the meta-parameters than `config` names.
        schedule: maps an iteration, from 0, to a factor of the learning rate, in place of `config.schedule`.
        callbacks: called with the learner and each new row of history.
        log_with: a tracker of accelerate, such as `"tensorboard"`, which writes to `folder`.
        device: any that PyTorch knows, such as `"cpu"`, `"cuda:1"` or `"mps"`; default: what accelerate finds.
        progress_bar: whether to show one.

    Returns:
        The history: one dict a row, with the keys `HISTORY_FIELDS`.

    Raises:
        TrainingDivergedError: at the first loss that is not finite.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after a checkpoint was written.
        ValueError: if the learner learns nothing, the classes are too few, the device is absent, or the checkpoint in
            `folder` is of another learner or configuration.

    Example:
        >>> from metatutor import MAML, ConvNet, EpisodeSpec, Strokes
        >>> classes = Strokes.load(n_alphabets=3, characters_per_alphabet=8).split().train
        >>> learner = MAML(ConvNet(5, filters=4))
        >>> len(train(learner, classes, EpisodeSpec(5, 1, 1), TrainConfig(iterations=2), progress_bar=False))
        1

    Reference:
        Finn, Abbeel & Levine (2017), algorithm 1, line 8.
    """
    if not learner.learns:
        raise ValueError(f"{type(learner).__name__} learns nothing before it sees a task; evaluate it as it is")
    if validate is None and (config.keep == "best" or config.patience is not None):
        raise ValueError("without `validate` no parameters are the best: give it, or leave keep and patience out")
    keep_freed_memory_once()
    accelerator, place = _accelerator(device, log_with, folder)
    share = _share(config.tasks_per_step, accelerator)
    draw = classes.sampler if learner.trains_on == "episodes" else classes.mini_batches
    sampler = draw(spec, seed=config.seed)
    learner.to(place)
    parameters: list[Tensor] = list(learner.meta_parameters().values())
    descent = optimizer(parameters) if optimizer else _optimizer(parameters, config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(descent, schedule or partial(_rate, config=config))
    state = _State(learner, descent, scheduler, sampler, config, _Progress())
    main, folder = accelerator.is_main_process, None if folder is None else Path(folder)
    threads = threads_for(sum(p.numel() for p in learner.parameters()))
    with torch.random.fork_rng(), _stop_flag() as stop, limited_threads(threads):
        torch.manual_seed(config.seed)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            state.load(folder / CHECKPOINT)
        if accelerator.num_processes > 1:
            from accelerate.utils import broadcast

            broadcast(list(learner.state_dict().values()))  # all begin where the main process begins
        progress = state.progress
        begun = time.perf_counter() - progress.seconds
        bar = tqdm(
            total=config.iterations, initial=progress.iteration, disable=not (progress_bar and main), unit="step"
        )
        with bar:
            while not state.finished():
                learner.train()
                episode = sampler.sample(config.tasks_per_step).tasks(share).to(place)
                episode = transform(episode) if transform else episode
                loss = _step(learner, episode, descent, scheduler, accelerator, config)
                if not math.isfinite(loss):
                    raise TrainingDivergedError(_diverged(progress.iteration + 1, loss, folder))
                progress.iteration += 1
                progress.loss_sum += loss
                progress.loss_count += 1
                bar.update()
                if progress.iteration == config.iterations or progress.iteration % config.log_every == 0:
                    progress.seconds = time.perf_counter() - begun
                    _log(progress, learner, episode, validate)
                    row = progress.history[-1]
                    state.keep_best()
                    _show(bar, row)
                    accelerator.log(row, step=progress.iteration)
                    for callback in callbacks:
                        callback(learner, row)
                progress.seconds = time.perf_counter() - begun
                save = state.finished() or stop.is_set() or progress.iteration % config.checkpoint_every == 0
                if folder is not None and main and save:
                    write_history(progress.history, folder / "history.csv")
                    state.save(folder / CHECKPOINT)
                if stop.is_set() and not state.finished():
                    where = f"; run the same command again to go on from {folder / CHECKPOINT}" if folder else ""
                    raise KeyboardInterrupt(f"stopped after iteration {progress.iteration}{where}")
    if state.best is not None:
        learner.load_state_dict(state.best)
    for tracker in accelerator.trackers:
        tracker.finish()
    learner.eval()
    return progress.history


def accumulate(
    learner: Learner,
    episode: Episode,
    at_once: int | None = None,
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
) -> Float[Tensor, ""]:
    """The mean meta-loss of all tasks of an episode, and its gradients, added to those that parameters have.

    Args:
        learner: in training mode.
        episode: a batch of tasks.
        at_once: tasks computed side by side; default: as the learner likes.
        backward: what is called with the loss of each part.
    """
    total = torch.zeros((), device=episode.query_images.device)
    for part in learner.chunks(episode, at_once):
        loss = learner.meta_loss(part) * (len(part) / len(episode))
        backward(loss)
        total = total + loss.detach()
    return total


def _step(
    learner: Learner, episode: Episode, optimizer: Any, scheduler: Any, accelerator: Any, config: TrainConfig
) -> float:
    """One step of the outer optimizer; no step if the loss is not finite."""
    optimizer.zero_grad()
    with accelerator.autocast():
        loss = accumulate(learner, episode, config.tasks_at_once, accelerator.backward)
    parameters = [p for p in learner.parameters() if p.grad is not None]
    if accelerator.num_processes > 1:
        for parameter in parameters:
            parameter.grad = _mean(accelerator, parameter.grad)  # pyright: ignore[reportArgumentType]
        loss = _mean(accelerator, loss)
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)
    value = loss.item() if torch.isfinite(norm) else math.nan
    if math.isfinite(value):
        optimizer.step()
        scheduler.step()
        learner.after_step()
        if accelerator.num_processes > 1:
            for buffer in filter(torch.is_floating_point, learner.buffers()):
                buffer.copy_(_mean(accelerator, buffer))
    return value


def _mean(accelerator: Any, tensor: Tensor) -> Tensor:
    return accelerator.reduce(tensor, reduction="mean")  # pyright: ignore[reportReturnType]


def _rate(iteration: int, config: TrainConfig) -> float:
    """The learning rate of an iteration as a fraction of `outer_lr`."""
    warm = min(1.0, (iteration + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return warm
    left = max(1, config.iterations - config.warmup)
    done = min(1.0, max(0, iteration - config.warmup) / left)
    return warm * 0.5 * (1 + math.cos(math.pi * done))


def _optimizer(parameters: list[Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    return _OPTIMIZERS[config.optimizer](parameters, lr=config.outer_lr, weight_decay=config.weight_decay)


def _log(progress: _Progress, learner: Learner, episode: Episode, validate: Callable[[Learner], float] | None) -> None:
    classes = not episode.query_labels.is_floating_point()
    buffers = [(buffer, buffer.clone()) for buffer in learner.buffers()]  # running statistics are no business of a log
    with torch.no_grad():
        accuracy = learner.measure(episode).float().mean().item() if classes else math.nan
        for buffer, before in buffers:
            buffer.copy_(before)
    learner.eval()
    row = {
        "iteration": progress.iteration,
        "seconds": round(progress.seconds, 2),
        "meta_loss": progress.loss_sum / progress.loss_count,
        "train_accuracy": accuracy,
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
    sampler: Any
    config: TrainConfig
    progress: _Progress
    best: dict[str, Tensor] | None = None

    def finished(self) -> bool:
        """Whether all iterations are done, or patience is at its end."""
        patience, done = self.config.patience, self.progress.iteration
        waited = patience is not None and self.progress.rows_since_best() >= patience
        return done >= self.config.iterations or waited

    def keep_best(self) -> None:
        """Remember the parameters if the last row of history is the best so far."""
        if self.config.keep == "best" and self.progress.rows_since_best() == 0:
            self.best = {name: tensor.clone() for name, tensor in self.learner.state_dict().items()}

    def save(self, path: Path) -> None:
        state = {
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "sampler": self.sampler.state_dict(),
            "best": self.best,
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
            config, progress, best = dict(state["config"]), _Progress(**state["progress"]), state["best"]
            parts = [state[name] for name in ("optimizer", "scheduler", "sampler")]
            weights, random = dict(state["learner"]), state["torch"]
        except Exception as error:
            raise ValueError(f"{path} is not a readable checkpoint; delete it to start anew ({error})") from error
        changed = [k for k, v in asdict(self.config).items() if k not in MAY_CHANGE and config.get(k) != v]
        if changed:
            raise ValueError(
                f"{path} was trained with another {', '.join(changed)}; delete it or choose another folder"
            )
        load_parameters(self.learner, weights, path)
        try:
            for part, of in zip(parts, (self.optimizer, self.scheduler, self.sampler), strict=True):
                of.load_state_dict(part)
            torch.set_rng_state(random)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no whole checkpoint; delete it to start anew ({error})") from error
        self.progress, self.best = progress, best


@contextmanager
def _stop_flag() -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM sets the flag, so that the step at hand is finished; the second ends it at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(*_: Any) -> None:
        flag.set()
        restore()

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield flag
    finally:
        restore()


def check_device(device: str | None) -> torch.device | None:
    """The device of a name.

    Raises:
        ValueError: if there is no such device.
    """
    if device is None:
        return None
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0][:120]
        raise ValueError(f"there is no device {device!r} here ({reason}); leave it out, or say cpu") from None
    return place


def _accelerator(device: str | None, log_with: Any, folder: Path | str | None) -> tuple[Any, torch.device]:
    """The accelerator, and where to compute."""
    from accelerate import Accelerator  # a second to import

    place = check_device(device)
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    on_cpu = (place is not None and place.type == "cpu") or (many and not torch.cuda.is_available())
    accelerator = Accelerator(cpu=on_cpu, log_with=log_with, project_dir=folder)
    if log_with is not None:
        accelerator.init_trackers("metatutor")
    return accelerator, place if place is not None and accelerator.num_processes == 1 else accelerator.device


def _share(tasks_per_step: int, accelerator: Any) -> slice:
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
