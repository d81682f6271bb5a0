"""The outer loop: the only place where a learner's meta-parameters change."""

from __future__ import annotations

import csv
import json
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

from metatutor.episodes import Episode, EpisodeSpec
from metatutor.files import decoding, replacing
from metatutor.functional import TaskMap
from metatutor.learner import Learner, computing, load_parameters

HISTORY_FIELDS: tuple[str, ...] = ("iteration", "seconds", "meta_loss", "train_accuracy", "validation_accuracy")
CHECKPOINT = "checkpoint.pt"
_OPTIMIZERS: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
_SHOWN = "loss={meta_loss:.3f}, accuracy={train_accuracy:.1%}, validation={validation_accuracy:.1%}"
_PARTS = ("learner", "optimizer", "scheduler", "sampler")  # the parts of a run with a `state_dict`
_PROGRESS = ("iteration", "seconds", "loss_sum", "history", "best")  # and what else it must remember
MAY_CHANGE = ("iterations", "log_every", "checkpoint_every", "tasks_at_once", "patience")  # when a run is resumed
Row = dict[str, int | float]  # one row of history, with the keys HISTORY_FIELDS


class TrainingDivergedError(RuntimeError):
    """The loss was not finite; the last good checkpoint is kept."""


def check_seed(seed: int) -> None:
    """Raise a `ValueError` if PyTorch does not accept the seed."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, got {seed}")


@dataclass(frozen=True)
class TrainConfig:
    """How the outer loop runs.

    Args:
        iterations: steps of the outer optimizer.
        tasks_per_step: tasks whose mean loss makes one step (meta-batch size), over all processes together.
        outer_lr: peak learning rate of the outer optimizer.
        warmup: iterations of linear rise to `outer_lr`.
        schedule: what follows the warm-up: `"cosine"` decay to zero (Loshchilov & Hutter, 2017), or `"constant"`.
        clip_norm: the gradient is scaled down to this norm if it is longer; None: never.
        log_every: iterations between two rows of history, each with an accuracy in training and validation.
        checkpoint_every: iterations between two checkpoints.
        seed: seed of the stream of training tasks, and of dropout. `metatutor train` also draws the initial parameters
            from it; in Python they are drawn before `train` sees the learner, from `torch.manual_seed`.
        optimizer: the outer one: `"adam"` (Kingma & Ba, 2015), `"adamw"` or plain gradient descent, `"sgd"`.
        weight_decay: weight decay of the outer optimizer.
        tasks_at_once: tasks computed side by side, a matter of memory and speed; default: the learner decides.
        keep: whether the learner ends with its `"last"` parameters, or with those of the row of history whose
            validation accuracy was `"best"`.
        patience: training ends early after this many rows of history without a better validation accuracy; None: never.
        precision: `"bfloat16"` computes the loss under autocast; None: as accelerate is configured for its
            own device, normally in full.

    Raises:
        ValueError: if a number is out of range.
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
    precision: Literal["bfloat16"] | None = None

    def __post_init__(self) -> None:
        optional = ("clip_norm", "tasks_at_once", "patience")
        for name in ("iterations", "tasks_per_step", "outer_lr", "log_every", "checkpoint_every", *optional):
            value = getattr(self, name)
            if not (name in optional if value is None else 0 < value < math.inf):
                raise ValueError(f"{name} must be positive, got {value}")
        if self.outer_lr > 1e6 or not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"outer_lr = {self.outer_lr} or weight_decay = {self.weight_decay} is out of range")
        check_seed(self.seed)
        if self.warmup < 0 or self.schedule not in ("cosine", "constant"):
            raise ValueError("warmup must not be negative and schedule must be 'cosine' or 'constant'")
        if self.optimizer not in _OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(_OPTIMIZERS)}, got {self.optimizer!r}")
        if self.keep not in ("last", "best"):
            raise ValueError(f"keep must be 'last' or 'best', got {self.keep!r}")
        if self.precision not in (None, "bfloat16"):
            raise ValueError(f"precision must be 'bfloat16' or None, got {self.precision!r}")


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
    """Minimise `learner.meta_loss` over tasks drawn from classes; returns the history, rows of `HISTORY_FIELDS`.

    Several processes (`accelerate launch`, `torchrun`) split the tasks of each step among them and average their
    gradients. With a `folder`, history and checkpoints go there, and a run that was killed continues from its last
    checkpoint: on a CPU it ends bit for bit as if it had never stopped. It may then be given more iterations than at
    first. The learner is left in evaluation mode.

    Args:
        learner: what to train, in place.
        classes: where the training tasks are drawn from: `ClassImages`, or anything that has a `sampler(spec, seed=…)`.
        spec: the shape of the training tasks.
        config: how long and how fast.
        folder: for `history.csv` and `checkpoint.pt`; None writes nothing.
        validate: maps the learner, in evaluation mode, to an accuracy from 0 to 1.
        transform: changes each batch of training tasks, for example to augment images.
        optimizer: makes the outer optimizer from the meta-parameters, in place of the one that `config` names.
        schedule: maps an iteration, from 0, to a factor of the learning rate, in place of `config.schedule`.
        callbacks: called with the learner and each new row of history.
        log_with: a tracker of accelerate, such as `"tensorboard"`, which writes to `folder`.
        device: any that PyTorch knows, such as `"cpu"`, `"cuda:1"` or `"mps"`; default: what accelerate finds.
        progress_bar: whether to show one.

    Raises:
        TrainingDivergedError: at the first loss that is not finite.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after a checkpoint was written.
        ValueError: if the learner learns nothing, there are too few classes, the device is absent, the checkpoint in
            `folder` belongs to another learner or configuration, or the sampler has no state to keep there.

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
        raise ValueError("without `validate` there are no best parameters: give it, or leave out keep and patience")
    accelerator, place = _accelerator(device, log_with, folder)
    share = _share(config.tasks_per_step, accelerator)
    draw = classes.sampler if learner.trains_on == "episodes" else classes.mini_batches
    sampler = draw(spec, seed=config.seed)
    if folder is not None and not hasattr(sampler, "state_dict"):
        raise ValueError(
            f"a run with a folder can continue, which needs the sampler's state, and {type(sampler).__name__} has no "
            "state_dict; derive it from metatutor.episodes.SeededSampler, or leave out folder"
        )
    learner.to(place)
    parameters: list[Tensor] = list(learner.meta_parameters().values())
    if not parameters:
        raise ValueError(f"{type(learner).__name__} has no parameter to train; unfreeze some, or evaluate it as it is")
    make = partial(_OPTIMIZERS[config.optimizer], lr=config.outer_lr, weight_decay=config.weight_decay)
    descent = (optimizer or make)(parameters)
    scheduler = torch.optim.lr_scheduler.LambdaLR(descent, schedule or partial(_rate, config=config))
    state = _State(learner, spec, descent, scheduler, sampler, config)
    checkpoint = None if folder is None else Path(folder) / CHECKPOINT
    with torch.random.fork_rng(), _stop_flag() as stop, computing(learner):
        torch.manual_seed(config.seed)
        if checkpoint:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            state.load(checkpoint)
        from accelerate.utils import broadcast

        broadcast(list(learner.state_dict().values()))  # all start where the main process starts
        main, begun = accelerator.is_main_process, time.perf_counter() - state.seconds
        hidden = not (progress_bar and main)
        with tqdm(total=config.iterations, initial=state.iteration, disable=hidden, unit="step") as bar:
            while not state.finished():
                learner.train()
                episode = learner.taken(sampler.sample(config.tasks_per_step).tasks(share))
                episode = transform(episode) if transform else episode
                loss = state.step(episode, accelerator)
                if not math.isfinite(loss):
                    kept = checkpoint and checkpoint.exists()
                    where = f"; the last good checkpoint is {checkpoint}" if kept else ""
                    message = f"the loss of iteration {state.iteration + 1} is {loss}: lower outer_lr or inner_lr"
                    raise TrainingDivergedError(f"{message}, or clip_norm{where}")
                bar.update()
                state.seconds = time.perf_counter() - begun
                if state.iteration == config.iterations or state.iteration % config.log_every == 0:
                    row = state.log(episode, validate)
                    bar.set_postfix_str(_SHOWN.format(**row))
                    accelerator.log(row, step=state.iteration)
                    for callback in callbacks:
                        callback(learner, row)
                    state.seconds = time.perf_counter() - begun
                due = state.finished() or stop.is_set() or state.iteration % config.checkpoint_every == 0
                if checkpoint and main and due:
                    write_history(state.history, checkpoint.with_name("history.csv"))
                    state.save(checkpoint)
                if stop.is_set() and not state.finished():
                    where = f"; run the same command again to continue from {checkpoint}" if checkpoint else ""
                    raise KeyboardInterrupt(f"stopped after iteration {state.iteration}{where}")
    if state.best is not None:
        learner.load_state_dict(state.best)
    for tracker in accelerator.trackers:
        tracker.finish()
    learner.eval()
    return state.history


def accumulate(
    learner: Learner,
    episode: Episode,
    at_once: int | None = None,
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
) -> Float[Tensor, ""]:
    """The mean meta-loss of all tasks of an episode; its gradients are added to those the parameters have."""
    total = torch.zeros((), device=episode.query_images.device)
    for part in learner.chunks(episode, at_once):
        loss = learner.meta_loss(part) * (len(part) / len(episode))
        backward(loss)
        total = total + loss.detach()
    return total


def _number(accuracy: Any) -> float:
    try:
        return float(accuracy)
    except (TypeError, ValueError, RuntimeError):
        kind = type(accuracy).__name__
        raise ValueError(f"validate must return a number, such as evaluate(…).accuracy, got {kind}") from None


def _rate(iteration: int, config: TrainConfig) -> float:
    """The learning rate of an iteration as a fraction of `outer_lr`."""
    warm = min(1.0, (iteration + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return warm
    left = max(1, config.iterations - config.warmup)
    done = min(1.0, max(0, iteration - config.warmup) / left)
    return warm * 0.5 * (1 + math.cos(math.pi * done))


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
    """Everything that a resumed run must restore, and how it changes."""

    learner: Learner
    spec: EpisodeSpec
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    sampler: Any
    config: TrainConfig
    iteration: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0  # since the last row of history
    history: list[Row] = field(default_factory=list)
    best: dict[str, Tensor] | None = None

    def rows_since_best(self) -> int:
        """Rows of history after the one with the best validation accuracy; 0 if it is the last."""
        accuracies = [row["validation_accuracy"] for row in self.history]
        return len(accuracies) - 1 - accuracies.index(max(accuracies)) if accuracies else 0

    def finished(self) -> bool:
        """Whether all iterations are done, or patience has run out."""
        patience = self.config.patience
        waited = patience is not None and self.rows_since_best() >= patience
        return self.iteration >= self.config.iterations or waited

    def step(self, episode: Episode, accelerator: Any) -> float:
        """Take a step of the outer optimizer, unless the loss is not finite; return the loss."""
        self.optimizer.zero_grad()
        lower = self.config.precision == "bfloat16"  # accelerate has one precision for the whole process
        with torch.autocast(self.learner.device.type, torch.bfloat16) if lower else accelerator.autocast():
            loss = accumulate(self.learner, episode, self.config.tasks_at_once, accelerator.backward)
        mean, together = partial(accelerator.reduce, reduction="mean"), accelerator.num_processes > 1
        parameters = [p for p in self.learner.parameters() if p.grad is not None]
        if together:
            for parameter in parameters:
                parameter.grad = mean(parameter.grad)
            loss = mean(loss)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_norm or math.inf)
        value = loss.item() if torch.isfinite(norm) else math.nan
        if math.isfinite(value):
            self.optimizer.step()
            self.scheduler.step()
            self.learner.after_step()
            for buffer in filter(torch.is_floating_point, self.learner.buffers() if together else ()):
                buffer.copy_(mean(buffer))
            self.iteration += 1
            self.loss_sum += value
        return value

    def log(self, episode: Episode, validate: Callable[[Learner], float] | None) -> Row:
        """Add a row of history, and remember the parameters if they are to be kept; ends in evaluation mode."""
        learner, accuracy = self.learner, math.nan
        if not episode.query_labels.is_floating_point():
            buffers = [(buffer, buffer.clone()) for buffer in learner.buffers()]
            with torch.no_grad():
                accuracy = learner.measure(episode).float().mean().item()
                for buffer, kept in buffers:  # logging must not change running statistics
                    buffer.copy_(kept)
        learner.eval()
        before = self.history[-1]["iteration"] if self.history else 0
        row = {
            "iteration": self.iteration,
            "seconds": round(self.seconds, 2),
            "meta_loss": self.loss_sum / (self.iteration - before),
            "train_accuracy": accuracy,
            "validation_accuracy": math.nan if validate is None else _number(validate(learner)),
        }
        self.history.append(row)
        self.loss_sum = 0.0
        if self.config.keep == "best" and self.rows_since_best() == 0:
            self.best = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
        return row

    def map_tasks(self) -> TaskMap:
        """How the learner applies its network to tasks; whether `vmap` has failed changes the size of its chunks."""
        return getattr(self.learner, "map_tasks", TaskMap())

    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one before."""
        about = self.learner.description()
        texts = {part: json.dumps(of, default=lambda value: type(value).__name__) for part, of in about.items()}
        others = {"shape of tasks": asdict(self.spec), "optimizer": type(self.optimizer).__name__}
        return asdict(self.config) | texts | others

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        state = {name: getattr(self, name).state_dict() for name in _PARTS}
        state |= {"config": self.settings(), "torch": torch.get_rng_state()}
        state["progress"] = {name: getattr(self, name) for name in _PROGRESS}
        state["side_by_side"] = self.map_tasks().side_by_side
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint, if there is one."""
        if not path.exists():
            return
        unreadable = f"{path} is not a readable checkpoint; delete it to start over"
        with decoding(unreadable):
            state = torch.load(path, map_location="cpu", weights_only=True)
            config, weights, progress = (dict(state[name]) for name in ("config", "learner", "progress"))
            random, parts = state["torch"], {name: state[name] for name in _PARTS[1:]}
            side_by_side = state["side_by_side"]
        changed = [k for k, v in self.settings().items() if k not in MAY_CHANGE and config.get(k) != v]
        if changed:
            raise ValueError(
                f"{path} was trained with another {', '.join(changed)}; delete it or choose another folder"
            )
        load_parameters(self.learner, weights, path)
        with decoding(unreadable):
            for name, part in parts.items():
                getattr(self, name).load_state_dict(part)
            torch.set_rng_state(random)
            self.map_tasks().side_by_side = side_by_side
            vars(self).update({name: progress[name] for name in _PROGRESS})


@contextmanager
def _stop_flag() -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM sets the flag, so that the current step is finished; the second stops at once."""
    flag = threading.Event()

    in_main = threading.current_thread() is threading.main_thread()  # no other thread may handle signals
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if in_main}

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
    """The device with this name; a ValueError if there is no such device."""
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
    # accelerate keeps its device for the whole process; a single process may train on the GPU now and on the CPU later
    on_cpu = many and (not torch.cuda.is_available() or (place is not None and place.type == "cpu"))
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
