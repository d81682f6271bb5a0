"""The outer loop: reproducible, interruptible at any moment, and wrong runs stop with a sentence."""

from __future__ import annotations

import csv
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import accelerate
import pytest
import torch
from torch import Tensor, nn

import metatutor
from metatutor.backbones import ConvNet, Pixels
from metatutor.baselines import NearestPixels, PretrainedCosine
from metatutor.episodes import ClassImages, Episode, EpisodeSampler, EpisodeSpec
from metatutor.learner import Learner
from metatutor.memory import MANN
from metatutor.metric import Prototypical
from metatutor.optimization import MAML, Reptile
from metatutor.training import (
    CHECKPOINT,
    HISTORY_FIELDS,
    TrainConfig,
    TrainingDivergedError,
    accumulate,
    check_device,
    read_history,
    train,
    write_history,
)

ROOT = Path(metatutor.__file__).parents[1]
History = list[dict[str, float]]


class Line(Learner):
    """Logits linear in the pixels of the query: the cheapest learner there is. It notes what it goes through."""

    def __init__(self, *, n_pixels: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(n_pixels, 3)
        self.dropout = nn.Dropout(dropout)
        for parameter in self.parameters():
            parameter.data = torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape)
        self.modes: list[bool] = []  # `training` at each step
        self.positions: list[float] = []  # the first weight at each step

    def forward(self, episode: Episode) -> Tensor:
        return self.linear(self.dropout(episode.query_images.flatten(2)))

    def meta_loss(self, episode: Episode) -> Tensor:
        self.modes.append(self.training)
        self.positions.append(self.linear.weight[0, 0].item())
        return super().meta_loss(episode)


class Tampered:
    """A sampler that first does something else, told the number of the draw, from 1."""

    def __init__(self, sampler: Any, tamper: Callable[[int], object]) -> None:
        self.sampler, self.tamper, self.draws = sampler, tamper, 0
        self.state_dict, self.load_state_dict = sampler.state_dict, sampler.load_state_dict

    def sample(self, n_tasks: int) -> Episode:
        self.draws += 1
        self.tamper(self.draws)
        return self.sampler.sample(n_tasks)


class InDoublePrecision(Tampered):
    """The tasks of a sampler in float64."""

    def __init__(self, sampler: Any) -> None:
        super().__init__(sampler, lambda draw: None)

    def sample(self, n_tasks: int) -> Episode:
        return super().sample(n_tasks).to(torch.float64)


class PowerCut(Exception):
    """The end of a run, as it might come from outside."""


SPEC = EpisodeSpec(3, 1, 2)


def classes() -> ClassImages:
    pixels = torch.randint(0, 256, (9, 5, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    return ClassImages(pixels.to(torch.uint8), list("abcdefghi"))


def sampler(seed: int = 0) -> EpisodeSampler:
    return classes().sampler(SPEC, seed=seed)


class Drawing:
    """Classes that are drawn from by a given sampler, whatever is asked for."""

    def __init__(self, draws: Any) -> None:
        self.draws = draws

    def sampler(self, spec: EpisodeSpec, *, seed: int) -> Any:
        return self.draws


def maml(seed: int = 0) -> MAML:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MAML(ConvNet(3, filters=4, n_blocks=2, image_size=8))


def reptile(seed: int = 0) -> Reptile:
    """A learner that learns something besides its parameters."""
    return Reptile(maml(seed).network, inner_lr=0.01)


CONFIG = TrainConfig(iterations=10, tasks_per_step=2, warmup=3, log_every=4, checkpoint_every=3)


def fit(
    learner: Learner, draws: Any = None, config: TrainConfig = CONFIG, folder: Path | None = None, **options: Any
) -> History:
    source: Any = classes() if draws is None else Drawing(draws)
    return train(learner, source, SPEC, config, folder=folder, device="cpu", progress_bar=False, **options)


def same_weights(one: Learner, other: Learner) -> bool:
    others = other.state_dict()
    return all(torch.equal(tensor, others[name]) for name, tensor in one.state_dict().items())


def without_seconds(history: History) -> list[list[str]]:
    """Rows that can be compared: NaN equals NaN."""
    return [[f"{name} {value!r}" for name, value in row.items() if name != "seconds"] for row in history]


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


# --- reproducible ----------------------------------------------------------------------------------------------


def test_same_seed_same_weights_bit_for_bit():
    runs = []
    for seed in (0, 0, 1):
        torch.rand(3)  # the global generator is elsewhere each time
        learner = maml()
        runs.append((learner, fit(learner, sampler(seed))))
    assert same_weights(runs[0][0], runs[1][0])
    assert without_seconds(runs[0][1]) == without_seconds(runs[1][1])
    assert not same_weights(runs[0][0], runs[2][0])


def test_history_tells_what_happened(tmp_path: Path):
    learner, losses = Line(), [0.5, 1.5, 4.0, 2.0, 8.0, 1.0, 1.0]
    remaining = iter(losses)
    learner.meta_loss = lambda episode: 0 * learner.linear.weight.sum() + next(remaining)
    accuracies = iter([0.25, 0.5, 0.75])
    config = replace(CONFIG, iterations=7, log_every=3)
    history = fit(learner, config=config, folder=tmp_path, validate=lambda _: next(accuracies))
    assert [list(row) for row in history] == [list(HISTORY_FIELDS)] * 3
    assert [row["iteration"] for row in history] == [3, 6, 7]
    assert [row["meta_loss"] for row in history] == [2.0, 11 / 3, 1.0]  # means since the row before
    assert [row["validation_accuracy"] for row in history] == [0.25, 0.5, 0.75]
    assert all(0 <= row["train_accuracy"] <= 1 for row in history)
    assert [row["seconds"] for row in history] == sorted(row["seconds"] for row in history)
    assert read_history(tmp_path / "history.csv") == history


def test_train_accuracy_is_that_of_the_query_images():
    learner = Line()
    episodes: list[Episode] = []
    draws = Tampered(sampler(), lambda draw: None)
    draws.sample = lambda n_tasks: episodes.append(draws.sampler.sample(n_tasks)) or episodes[-1]
    history = fit(learner, draws, replace(CONFIG, iterations=1))
    with torch.no_grad():
        right = learner(episodes[0]).argmax(-1) == episodes[0].query_labels
    assert history[0]["train_accuracy"] == pytest.approx(right.double().mean().item())


def test_nothing_is_written_without_a_folder_or_shown_without_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    history = fit(Line())
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert [row["iteration"] for row in history] == [4, 8, 10]
    assert all(row["validation_accuracy"] != row["validation_accuracy"] for row in history)  # NaN


def test_validation_sees_evaluation_mode_and_training_training_mode():
    learner, seen = Line().eval(), []
    fit(learner, validate=lambda validated: float(seen.append(validated.training) or 0.5))
    assert seen == [False] * 3
    assert learner.modes == [True] * 10
    assert not learner.training


def test_a_history_survives_its_file(tmp_path: Path):
    rows = [{"iteration": 1, "seconds": 0.1, "meta_loss": 1 / 3, "train_accuracy": 1e-300, "validation_accuracy": 1.0}]
    write_history(rows, tmp_path / "history.csv")
    assert read_history(tmp_path / "history.csv") == rows


# --- the step --------------------------------------------------------------------------------------------------


def rates(config: TrainConfig) -> list[float]:
    """The learning rate of each step, as measured: under a constant gradient, Adam moves by just that."""
    learner = Line()

    def constant_slope(episode: Episode) -> Tensor:
        learner.positions.append(learner.linear.weight[0, 0].item())
        return learner.linear.weight.sum()

    learner.double()
    learner.meta_loss = constant_slope
    fit(learner, InDoublePrecision(sampler()), config)
    positions = [*learner.positions, learner.linear.weight[0, 0].item()]
    return [before - after for before, after in pairwise(positions)]


def test_the_learning_rate_warms_up_then_follows_a_cosine():
    config = TrainConfig(iterations=12, tasks_per_step=1, outer_lr=0.1, warmup=4, log_every=100)
    half_cosine = [0.1 * 0.5 * (1 + torch.tensor(torch.pi * i / 8).cos().item()) for i in range(8)]
    assert rates(config) == pytest.approx([0.025, 0.05, 0.075, 0.1, *half_cosine], rel=1e-5)
    constant = replace(config, schedule="constant")
    assert rates(constant) == pytest.approx([0.025, 0.05, 0.075] + 9 * [0.1], rel=1e-5)
    assert rates(replace(constant, warmup=0)) == pytest.approx(12 * [0.1], rel=1e-5)
    assert rates(replace(config, warmup=0))[0] == pytest.approx(0.1, rel=1e-5)
    assert rates(replace(config, warmup=100)) == pytest.approx([0.001 * (i + 1) for i in range(12)], rel=1e-5)


@pytest.mark.parametrize(("slope", "clipped"), [(100.0, 0.5), (0.01, 0.01 * 195**0.5)])
def test_the_gradient_is_clipped_before_the_optimizer_sees_it(tmp_path: Path, slope: float, clipped: float):
    """All 195 parameters have the gradient `slope`; Adam's first mean is a tenth of what reached it."""
    learner = Line()
    learner.meta_loss = lambda episode: slope * torch.stack([p.sum() for p in learner.parameters()]).sum()
    fit(learner, config=replace(CONFIG, iterations=1, clip_norm=0.5), folder=tmp_path)
    adam = torch.load(tmp_path / CHECKPOINT)["optimizer"]["state"]
    norm = torch.cat([adam[i]["exp_avg"].flatten() for i in range(2)]).norm().item()
    assert norm == pytest.approx(0.1 * clipped, rel=1e-4)


def test_gradients_do_not_add_up_over_steps(tmp_path: Path):
    learner = Line()
    learner.meta_loss = lambda episode: learner.linear.weight.sum()
    fit(learner, config=replace(CONFIG, iterations=3, clip_norm=1e9), folder=tmp_path)
    assert learner.linear.weight.grad is not None
    assert (learner.linear.weight.grad == 1).all()


def test_plain_descent_moves_by_rate_times_gradient():
    """By no more and no less, though the gradients before were others: no momentum, no scale. Adam does not."""
    slopes = [4.0, 4.0, -1.0, 8.0]
    config = replace(CONFIG, iterations=4, outer_lr=0.25, warmup=2, schedule="constant", clip_norm=1e9)

    def moves(config: TrainConfig) -> list[float]:
        learner, remaining = Line().double(), iter(slopes)

        def sloping(episode: Episode) -> Tensor:
            learner.positions.append(learner.linear.weight[0, 0].item())
            return next(remaining) * learner.linear.weight.sum()

        learner.meta_loss = sloping
        fit(learner, InDoublePrecision(sampler()), config)
        positions = [*learner.positions, learner.linear.weight[0, 0].item()]
        return [after - before for before, after in pairwise(positions)]

    rates = [0.125, 0.25, 0.25, 0.25]
    expected = [-rate * slope for rate, slope in zip(rates, slopes, strict=True)]
    assert moves(replace(config, optimizer="sgd")) == pytest.approx(expected, rel=1e-12)
    assert moves(replace(config, optimizer="adam"))[0] == pytest.approx(-0.125, rel=1e-6)
    assert config.optimizer == "adam"


def test_plain_descent_clips_too():
    """All 195 parameters have the gradient 1; what reaches the optimizer is of length 1/2."""
    learner = Line().double()
    start = learner.linear.weight[0, 0].item()
    learner.meta_loss = lambda episode: torch.stack([p.sum() for p in learner.parameters()]).sum()
    config = replace(CONFIG, iterations=1, warmup=0, outer_lr=2.0, clip_norm=0.5, optimizer="sgd")
    fit(learner, InDoublePrecision(sampler()), config)
    assert start - learner.linear.weight[0, 0].item() == pytest.approx(2 * 0.5 / 195**0.5, rel=1e-5)


def test_the_seed_of_the_configuration_draws_the_tasks_and_the_dropout():
    weights = []
    for seed in (7, 7, 8):
        torch.rand(3)
        learner = Line(dropout=0.5)
        fit(learner, config=replace(CONFIG, seed=seed))
        weights.append(learner.linear.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_global_generator_is_left_alone():
    learner = Line(dropout=0.5)
    before = torch.get_rng_state()
    fit(learner)
    assert torch.equal(torch.get_rng_state(), before)


def test_tasks_in_parts_give_the_gradient_of_all():
    learner = maml().double().train()
    episode = sampler().sample(5).to(torch.float64)
    gradients = []
    for at_once in (None, 5, 2, 1):
        learner.zero_grad()
        loss = accumulate(learner, episode, at_once)
        gradients.append(torch.cat([p.grad.flatten() for p in learner.parameters() if p.grad is not None]))
        assert torch.allclose(loss, learner.meta_loss(episode))
        assert torch.allclose(gradients[-1], gradients[0], rtol=0, atol=1e-14)
    parts = [len(part) for part in learner.chunks(episode, 2)]
    assert parts == [2, 2, 1]
    history = fit(maml(), config=replace(CONFIG, tasks_at_once=1))
    assert history[-1]["meta_loss"] == pytest.approx(fit(maml())[-1]["meta_loss"], rel=1e-4)


def test_weight_decay_and_adamw_differ_as_they_should():
    """Without a gradient, AdamW shrinks a weight by rate times decay; Adam turns the decay into a full step."""
    config = replace(CONFIG, iterations=1, warmup=0, outer_lr=0.1, weight_decay=0.5, schedule="constant")
    moved = {}
    for optimizer in ("adam", "adamw", "sgd"):
        learner = Line()
        start = learner.linear.weight[0, 0].item()
        learner.meta_loss = lambda episode, learner=learner: 0 * learner.linear.weight.sum()
        fit(learner, config=replace(config, optimizer=optimizer))
        moved[optimizer] = learner.linear.weight[0, 0].item() / start
    assert moved["adamw"] == moved["sgd"] == pytest.approx(0.95, rel=1e-5)
    assert moved["adam"] == pytest.approx(0.0, abs=1e-4)  # from -0.1 by 0.1


def test_an_optimizer_and_a_schedule_of_ones_own():
    learner = Line().double()
    start = learner.linear.weight[0, 0].item()

    def slope(episode: Episode) -> Tensor:
        return learner.linear.weight.sum()

    learner.meta_loss = slope
    fit(
        learner,
        InDoublePrecision(sampler()),
        replace(CONFIG, iterations=3, clip_norm=None),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        schedule=lambda iteration: (0.5, 0.25, 0.125)[min(iteration, 2)],
    )
    assert start - learner.linear.weight[0, 0].item() == pytest.approx(0.875, rel=1e-12)


def test_clip_norm_none_clips_nothing():
    learner = Line().double()
    start = learner.linear.weight[0, 0].item()
    learner.meta_loss = lambda episode: 1e3 * learner.linear.weight.sum()
    config = replace(CONFIG, iterations=1, warmup=0, outer_lr=1.0, clip_norm=None, optimizer="sgd")
    fit(learner, InDoublePrecision(sampler()), config)
    assert start - learner.linear.weight[0, 0].item() == pytest.approx(1e3, rel=1e-12)


def test_there_is_something_to_train():
    learner = Line()
    learner.requires_grad_(False)
    with pytest.raises(ValueError, match="^Line has no parameter to train; unfreeze some, or evaluate it as it is$"):
        fit(learner)


def test_validation_is_a_number():
    with pytest.raises(ValueError, match=r"^validate must return a number, such as evaluate\(…\).accuracy, got list$"):
        fit(Line(), validate=lambda _: [0.5])
    with pytest.raises(ValueError, match="^validate must return a number.*, got Tensor$"):
        fit(Line(), validate=lambda _: cast(Any, torch.ones(2)))
    assert fit(Line(), validate=lambda _: cast(Any, torch.tensor(0.5)))[0]["validation_accuracy"] == 0.5


def test_a_memory_can_be_trained_in_bfloat16():
    config = replace(CONFIG, iterations=1, precision="bfloat16")
    [row] = fit(MANN(Pixels(5), n_way=3, slots=8, width=6, hidden_size=16), config=config)
    assert row["meta_loss"] == pytest.approx(math.log(3), abs=0.3)


def test_the_loss_can_be_computed_in_bfloat16():
    seen = []

    class Watched(Line):
        def meta_loss(self, episode: Episode) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
            return super().meta_loss(episode)

    for precision in (None, "bfloat16"):
        fit(Watched(), config=replace(CONFIG, iterations=1, precision=precision))
    assert seen == [False, torch.bfloat16]


def test_an_unknown_precision(unchecked_types: None):
    with pytest.raises(ValueError, match="precision must be 'bfloat16' or None, got 'half'"):
        replace(CONFIG, precision="half")


def test_a_transform_changes_the_training_tasks_only():
    seen: list[float] = []
    learner = Line()
    learner.meta_loss = lambda episode: (
        seen.append(episode.query_images.max().item()) or 0 * learner.linear.weight.sum()
    )
    fit(learner, transform=lambda episode: replace(episode, query_images=0 * episode.query_images))
    assert set(seen) == {0.0}


def test_callbacks_and_trackers_get_every_row(tmp_path: Path):
    rows: list[Any] = []
    learner = Line()
    history = fit(
        learner, folder=tmp_path, callbacks=[lambda got, row: rows.append((got, row))], log_with="tensorboard"
    )
    assert rows == [(learner, row) for row in history]
    assert list(tmp_path.glob("metatutor/**/events*"))


def test_the_best_parameters_by_validation_are_kept(tmp_path: Path):
    accuracies, seen = [0.2, 0.9, 0.4], []

    def validate(learner: Learner) -> float:
        seen.append({name: tensor.clone() for name, tensor in learner.state_dict().items()})
        return accuracies[len(seen) - 1]

    learner = Line()
    fit(learner, config=replace(CONFIG, keep="best"), folder=tmp_path, validate=validate)
    assert len(seen) == 3
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in learner.state_dict().items())
    again = Line()
    fit(again, config=replace(CONFIG, keep="best"), folder=tmp_path, validate=validate)
    assert same_weights(again, learner)
    last = Line()
    fit(last, validate=lambda _: 0.5)
    assert not same_weights(last, learner)


def test_patience_ends_a_training_that_no_longer_gets_better(tmp_path: Path):
    config = replace(CONFIG, iterations=100, log_every=2, patience=2)
    accuracies = iter([0.5, 0.7, 0.6, 0.7, 0.9])
    history = fit(Line(), config=config, folder=tmp_path, validate=lambda _: next(accuracies))
    assert [row["iteration"] for row in history] == [2, 4, 6, 8]
    assert fit(Line(), config=config, folder=tmp_path, validate=lambda _: 0.9) == history  # and it has ended
    with pytest.raises(ValueError, match="^without `validate` there are no best parameters"):
        fit(Line(), config=config)


def test_a_learner_that_learns_nothing_is_not_trained():
    message = "NearestPixels learns nothing before it sees a task; evaluate it as it is"
    with pytest.raises(ValueError, match=exactly(message)):
        fit(NearestPixels())


def test_a_classifier_is_pretrained_on_all_classes_at_once():
    learner = PretrainedCosine(ConvNet(9, filters=4, n_blocks=2, image_size=8))
    seen: list[tuple[int, ...]] = []
    fit(learner, transform=lambda episode: seen.append((episode.n_way, *episode.query_labels.shape)) or episode)
    assert set(seen) == {(9, 2, 9)}  # two rows of as many images as a task has


# --- when it goes wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss is infinite", "loss is not a number", "gradient is not a number"])
def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(tmp_path: Path, what: str):
    learner, good = Line(), Line()

    def meta_loss(episode: Episode) -> Tensor:
        loss = Line.meta_loss(learner, episode)
        if len(learner.positions) < 8:
            return loss
        zero = learner.linear.weight.sum() * 0
        return loss + {"loss is infinite": zero + torch.inf, "loss is not a number": zero + torch.nan}.get(
            what, zero.sqrt()
        )

    learner.meta_loss = meta_loss
    message = (
        f"the loss of iteration 8 is {'inf' if what == 'loss is infinite' else 'nan'}: "
        f"lower outer_lr or inner_lr, or clip_norm; the last good checkpoint is {tmp_path / CHECKPOINT}"
    )
    with pytest.raises(TrainingDivergedError, match=exactly(message)):
        fit(learner, folder=tmp_path)
    assert all(parameter.isfinite().all() for parameter in learner.parameters())
    state = torch.load(tmp_path / CHECKPOINT)
    assert state["progress"]["iteration"] == 6
    assert all(tensor.isfinite().all() for tensor in state["learner"].values())

    with pytest.raises(PowerCut):
        fit(good, Tampered(sampler(), cut_at(8)))
    assert same_weights(learner, good)  # the eighth step was not taken


def test_a_diverging_run_without_a_folder_promises_no_checkpoint():
    learner = Line()
    learner.meta_loss = lambda episode: learner.linear.weight.sum() * torch.nan
    message = "the loss of iteration 1 is nan: lower outer_lr or inner_lr, or clip_norm"
    with pytest.raises(TrainingDivergedError, match=exactly(message)):
        fit(learner)


def test_absent_and_unknown_devices():
    for device in ("tpu:x", "cuda:99", "xla", ""):
        learner = Line()
        with pytest.raises(ValueError, match=rf"^there is no device {device!r} here \(.+\); leave it out, or say cpu$"):
            train(learner, classes(), SPEC, CONFIG, device=device, progress_bar=False)
        assert same_weights(learner, Line())
    assert check_device("cpu") == torch.device("cpu")
    assert check_device(None) is None


@pytest.mark.parametrize("device", ["cpu", None])
def test_a_training_on_the_cpu_may_follow_one_on_a_gpu(device: str | None, monkeypatch: pytest.MonkeyPatch):
    """accelerate keeps one device for the whole process, and refuses to be told another."""
    told = []

    class Watched(accelerate.Accelerator):
        def __init__(self, **options: Any) -> None:
            told.append(options["cpu"])
            super().__init__(**options)

    monkeypatch.setattr(accelerate, "Accelerator", Watched)
    learner = Line()
    train(learner, classes(), SPEC, CONFIG, device=device, progress_bar=False)
    assert told == [False]
    assert device is None or learner.device.type == device


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "name", ["iterations", "tasks_per_step", "outer_lr", "clip_norm", "log_every", "checkpoint_every"]
)
def test_numbers_out_of_range(name: str):
    for value in (0, -1, float("nan")):
        options: dict[str, Any] = {name: value}
        with pytest.raises(ValueError, match=f"^{name} must be positive, got {value}$"):
            TrainConfig(**options)


@pytest.mark.usefixtures("unchecked_types")
def test_warmup_and_schedule_out_of_range():
    wrong: list[dict[str, Any]] = [{"warmup": -1}, {"schedule": "linear"}]
    for options in wrong:
        with pytest.raises(ValueError, match=r"^warmup must not be negative and schedule must be 'cosine' or 'constan"):
            TrainConfig(**options)


@pytest.mark.usefixtures("unchecked_types")
def test_an_unknown_optimizer():
    options: dict[str, Any] = {"optimizer": "rmsprop"}
    with pytest.raises(ValueError, match=exactly("optimizer must be one of adam, adamw, sgd, got 'rmsprop'")):
        TrainConfig(**options)


# --- checkpoints -----------------------------------------------------------------------------------------------


def cut_at(draw: int) -> Callable[[int], None]:
    def cut(now: int) -> None:
        if now == draw:
            raise PowerCut

    return cut


@pytest.mark.parametrize("draw", [1, 3, 4, 6, 8, 10])
def test_a_resumed_run_ends_as_if_it_had_never_stopped(tmp_path: Path, draw: int):
    """Bit for bit, also with randomness from the global generator, which a resumed run must find again."""

    def run(folder: Path, tamper: Callable[[int], object]) -> tuple[Line, History, EpisodeSampler]:
        learner, tasks = Line(dropout=0.5), sampler()
        history = fit(learner, Tampered(tasks, tamper), folder=folder, validate=lambda v: v(tasks_seen).mean().item())
        return learner, history, tasks

    tasks_seen = sampler(seed=5).sample(1)
    torch.manual_seed(0)
    whole, expected, whole_tasks = run(tmp_path / "whole", lambda draw: None)
    torch.manual_seed(0)
    with pytest.raises(PowerCut):
        run(tmp_path / "cut", cut_at(draw))
    if draw > 3:
        torch.manual_seed(1)  # the checkpoint knows better
    else:
        torch.manual_seed(0)  # there is no checkpoint yet
    learner, history, tasks = run(tmp_path / "cut", lambda draw: None)
    assert same_weights(learner, whole)
    assert without_seconds(history) == without_seconds(expected)
    assert torch.equal(tasks.generator.get_state(), whole_tasks.generator.get_state())
    assert without_seconds(read_history(tmp_path / "cut" / "history.csv")) == without_seconds(
        [dict.fromkeys(HISTORY_FIELDS, 0.0) | {name: float(value) for name, value in row.items()} for row in expected]
    )


def test_a_resumed_run_of_plain_descent_too(tmp_path: Path):
    config, whole, learner = replace(CONFIG, optimizer="sgd"), Line(), Line()
    fit(whole, config=config)
    with pytest.raises(PowerCut):
        fit(Line(), Tampered(sampler(), cut_at(8)), config, tmp_path)
    fit(learner, config=config, folder=tmp_path)
    assert same_weights(learner, whole)
    assert len(learner.modes) == 4  # from the checkpoint of the sixth step
    adam = Line()
    fit(adam)
    assert not same_weights(adam, whole)


@pytest.mark.filterwarnings("ignore:tasks are computed one by one")
def test_a_resumed_run_computes_tasks_as_before_where_vmap_fails(tmp_path: Path):
    """Running statistics change with the size of the chunks, which is another after the first failure."""

    def learner() -> MAML:
        torch.manual_seed(0)
        return MAML(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))

    whole, cut, resumed = learner(), learner(), learner()
    fit(whole)
    with pytest.raises(PowerCut):
        fit(cut, Tampered(sampler(), cut_at(8)), folder=tmp_path)
    fit(resumed, folder=tmp_path)
    assert same_weights(resumed, whole)


def test_a_finished_run_is_not_run_again(tmp_path: Path):
    learner, again = Line(), Line()
    history = fit(learner, folder=tmp_path, validate=lambda _: 0.5)
    assert fit(again, folder=tmp_path) == history
    assert same_weights(again, learner)
    assert again.modes == []
    assert not again.training


def test_a_crash_while_saving_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save, saves, before = torch.save, [], []

    def crash(state: object, path: Path) -> None:
        saves.append(path)
        if len(saves) == 2:
            before.append((tmp_path / CHECKPOINT).read_bytes())
            path.write_bytes(before[0][:1000])
            raise OSError("No space left on device")
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", crash)
        with pytest.raises(ValueError, match="^cannot write checkpoint.pt in .*No space left"):
            fit(Line(), folder=tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, "history.csv"]
    learner, whole = Line(), Line()
    fit(learner, folder=tmp_path)
    fit(whole)
    assert same_weights(learner, whole)


def test_a_crash_while_writing_history_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "history.csv"
    rows = fit(Line())
    write_history(rows, path)
    before = path.read_text()

    def crash(writer: object, rows: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(csv.DictWriter, "writerows", crash)
    with pytest.raises(ValueError, match="^cannot write history.csv in .*No space left"):
        write_history(rows * 2, path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path):
    fit(Line(), folder=tmp_path)
    path = tmp_path / CHECKPOINT
    other = Line()
    other.linear = nn.Linear(65, 3)
    before = other.linear.weight.clone()
    message = (
        f"{path} holds another architecture: 'linear.weight' is (3, 64) there and (3, 65) here; "
        "build the learner from the run's own config.json"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        fit(other, folder=tmp_path)
    assert torch.equal(other.linear.weight, before)
    message = f"{path} was trained with another learner; delete it or choose another folder"
    with pytest.raises(ValueError, match=exactly(message)):
        fit(Line(dropout=0.5), folder=tmp_path)
    message = f"{path} was trained with another shape of tasks; delete it or choose another folder"
    with pytest.raises(ValueError, match=exactly(message)):
        train(Line(), classes(), EpisodeSpec(3, 2, 1), CONFIG, folder=tmp_path, device="cpu")
    message = f"{path} was trained with another outer_lr, seed; delete it or choose another folder"
    learner = Line()
    with pytest.raises(ValueError, match=exactly(message)):
        fit(learner, config=replace(CONFIG, outer_lr=0.5, seed=1), folder=tmp_path)
    assert same_weights(learner, Line())
    message = f"{path} was trained with another optimizer; delete it or choose another folder"
    with pytest.raises(ValueError, match=exactly(message)):
        fit(learner, config=replace(CONFIG, optimizer="sgd"), folder=tmp_path)
    with pytest.raises(ValueError, match=exactly(message)):
        fit(learner, folder=tmp_path, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    contents = path.read_bytes()
    torch.save(learner.state_dict(), path)
    weights = path.read_bytes()
    for damaged in (contents[:1000], b"", weights):
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=f"^{re.escape(str(path))} is not a readable checkpoint; delete it to start"
        ):
            fit(Line(), folder=tmp_path)


def test_running_statistics_do_not_depend_on_how_often_is_logged():
    weights = []
    for log_every in (1, 10):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4))
        learner = Prototypical(network)
        fit(learner, config=replace(CONFIG, log_every=log_every))
        weights.append(learner)
    assert same_weights(*weights)


def test_more_iterations_and_other_rows_are_not_another_run(tmp_path: Path):
    constant = replace(CONFIG, schedule="constant")
    fit(Line(), config=constant, folder=tmp_path)
    longer = replace(constant, iterations=14, log_every=7, checkpoint_every=5)
    learner, whole = Line(), Line()
    history = fit(learner, config=longer, folder=tmp_path)
    fit(whole, config=longer)
    assert same_weights(learner, whole)
    assert [row["iteration"] for row in history] == [4, 8, 10, 14]


def test_a_checkpoint_that_lacks_a_part_is_not_readable(tmp_path: Path):
    fit(Line(), folder=tmp_path)
    path = tmp_path / CHECKPOINT
    whole = torch.load(path)
    for part in whole:
        torch.save({name: value for name, value in whole.items() if name != part}, path)
        with pytest.raises(
            ValueError, match=f"^{re.escape(str(path))} is not a readable checkpoint; delete it to start"
        ):
            fit(Line(), folder=tmp_path)


# --- Ctrl-C ----------------------------------------------------------------------------------------------------


@pytest.fixture
def usual_interrupt() -> Iterator[None]:
    """Python's own reaction to Ctrl-C, whatever runs the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_interrupt")
@pytest.mark.parametrize("draw", [1, 4, 9])
def test_ctrl_c_finishes_the_step_and_saves(tmp_path: Path, draw: int):
    def press(now: int) -> None:
        if now == draw:
            signal.raise_signal(signal.SIGINT)

    message = f"stopped after iteration {draw}; run the same command again to continue from {tmp_path / CHECKPOINT}"
    with pytest.raises(KeyboardInterrupt, match=exactly(message)):
        fit(Line(), Tampered(sampler(), press), folder=tmp_path)
    assert torch.load(tmp_path / CHECKPOINT)["progress"]["iteration"] == draw
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    learner, whole = Line(), Line()
    history, expected = fit(learner, folder=tmp_path), fit(whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert same_weights(learner, whole)
    assert without_seconds(history) == without_seconds(expected)


@pytest.mark.usefixtures("usual_interrupt")
def test_sigterm_saves_too(tmp_path: Path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="^stopped after iteration 4; "):
        fit(
            Line(), Tampered(sampler(), lambda draw: draw == 4 and signal.raise_signal(signal.SIGTERM)), folder=tmp_path
        )
    assert torch.load(tmp_path / CHECKPOINT)["progress"]["iteration"] == 4
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("usual_interrupt")
def test_ctrl_c_without_a_folder_promises_no_checkpoint():
    with pytest.raises(KeyboardInterrupt, match=exactly("stopped after iteration 2")):
        fit(Line(), Tampered(sampler(), lambda draw: signal.raise_signal(signal.SIGINT) if draw == 2 else None))


@pytest.mark.usefixtures("usual_interrupt")
def test_ctrl_c_in_the_last_step_changes_nothing():
    learner, whole = Line(), Line()
    fit(learner, Tampered(sampler(), lambda draw: signal.raise_signal(signal.SIGINT) if draw == 10 else None))
    fit(whole)
    assert same_weights(learner, whole)


@pytest.mark.usefixtures("usual_interrupt")
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait_whichever_the_first_was(first: signal.Signals):
    def press_twice(draw: int) -> None:
        if draw == 2:
            signal.raise_signal(first)
            signal.raise_signal(signal.SIGINT)

    learner = Line()
    with pytest.raises(KeyboardInterrupt, match="^$"):
        fit(learner, Tampered(sampler(), press_twice))
    assert len(learner.modes) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- threads ---------------------------------------------------------------------------------------------------


def test_small_networks_train_on_one_thread_and_the_process_gets_its_own_back():
    program = (
        "import metatutor, sys; assert 'torch' not in sys.modules; import torch; torch.set_num_threads(2);"
        "from metatutor import *; c, s, n = Strokes.load(3, 6, 3).split().train, EpisodeSpec(5, 1, 1), [];"
        "note = [lambda *_: n.append(torch.get_num_threads())]; t = TrainConfig(iterations=1, tasks_per_step=1);"
        "[train(MAML(ConvNet(5, filters=f)), c, s, t, progress_bar=False, callbacks=note) for f in (4, 64)];"
        "from metatutor.allocator import usable_cpus; assert n == [1, min(2, usable_cpus())], n;"
        "assert torch.get_num_threads() == 2"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)


# --- other processes -------------------------------------------------------------------------------------------
# This file is also the program that they run: `test_training.py MODE FOLDER`.

LONG = replace(CONFIG, iterations=40, log_every=7, checkpoint_every=1)
SPLIT = replace(CONFIG, iterations=6, tasks_per_step=4, clip_norm=0.3, log_every=2)


def start(mode: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, mode, str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train_slowly(folder: Path) -> None:
    """Twenty steps a second at most; the 30th is never reached, so that whoever waits to kill it is not too late."""
    fit(maml(), Tampered(sampler(), lambda draw: time.sleep(0.05 if draw < 30 else 600)), LONG, folder)


def train_a_share(folder: Path) -> None:
    """One of two processes; the second starts elsewhere, and writes where nothing should be written."""
    rank, tasks = int(os.environ["RANK"]), set()
    learner, other = maml(seed=rank).double(), reptile(seed=rank).double()
    learner.meta_loss = lambda episode: tasks.add(len(episode)) or MAML.meta_loss(learner, episode)
    fit(learner, InDoublePrecision(sampler()), SPLIT, folder / f"of-{rank}")
    fit(other, InDoublePrecision(sampler()), SPLIT)
    torch.save([learner.state_dict(), other.state_dict()], folder / f"{rank}.pt")
    print("tasks a step:", *tasks)
    try:
        fit(learner, InDoublePrecision(sampler()), replace(SPLIT, tasks_per_step=3))
    except ValueError as error:
        print(error)


def wait_for(path: Path, child: subprocess.Popen[str], newer_than: float = 0.0) -> None:
    while not (path.exists() and path.stat().st_mtime > newer_than):
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.01)


def test_interrupted_then_killed_then_finished_is_as_if_never_stopped(tmp_path: Path):
    path, whole = tmp_path / CHECKPOINT, maml()
    expected = fit(whole, config=LONG)

    child = start("train_slowly", tmp_path)
    wait_for(path, child)
    child.send_signal(signal.SIGINT)
    output, _ = child.communicate()
    iteration = torch.load(path)["progress"]["iteration"]
    stopped = f"stopped after iteration {iteration}"
    message = f"KeyboardInterrupt: {stopped}; run the same command again to continue from {path}"
    assert output.splitlines()[-1] == message
    assert 0 < iteration < 30

    child, delay = start("train_slowly", tmp_path), random.uniform(0, 1)
    wait_for(path, child, newer_than=path.stat().st_mtime)
    time.sleep(delay)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert iteration < torch.load(path)["progress"]["iteration"] < 30, f"killed after {delay} s"

    learner = maml()
    history = fit(learner, config=LONG, folder=tmp_path)
    assert same_weights(learner, whole), f"killed after {delay} s"
    assert without_seconds(history) == without_seconds(expected)
    seconds = [row["seconds"] for row in history]
    assert seconds == sorted(seconds)


def test_two_processes_with_half_the_tasks_each_are_one(tmp_path: Path):
    alone = [maml().double(), reptile().double()]
    expected, _ = (fit(learner, InDoublePrecision(sampler()), SPLIT) for learner in alone)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # as torchrun says it
    children = [start("train_a_share", tmp_path, RANK=rank, LOCAL_RANK=rank, **here) for rank in ("0", "1")]
    outputs = [child.communicate()[0] for child in children]
    for rank, output in enumerate(outputs):
        message = "tasks_per_step = 3 does not split among 2 processes; choose a multiple of 2"
        assert output.splitlines()[-2:] == ["tasks a step: 2", message], output
        for learner, weights in zip(alone, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            for name, tensor in learner.state_dict().items():
                assert torch.allclose(weights[name], tensor, rtol=1e-11, atol=1e-12), name
    assert [path.name for path in (tmp_path / "of-1").iterdir()] == []
    history = read_history(tmp_path / "of-0" / "history.csv")
    assert [row["iteration"] for row in history] == [2, 4, 6]
    assert [row["meta_loss"] for row in history] == pytest.approx([row["meta_loss"] for row in expected], rel=1e-11)


def test_a_sampler_that_cannot_go_on_is_refused_before_the_first_step(tmp_path: Path):
    class Stateless:
        def sampler(self, spec: EpisodeSpec, *, seed: int = 0) -> Any:
            return self

        def sample(self, n_tasks: int) -> Episode:
            raise AssertionError("nothing is drawn")

    learner = MAML(ConvNet(5, filters=4))
    with pytest.raises(
        ValueError, match="Stateless has no state_dict; derive it from metatutor.episodes.SeededSampler"
    ):
        train(learner, Stateless(), EpisodeSpec(5, 1, 1), TrainConfig(1), folder=tmp_path, device="cpu")
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    torch.set_num_threads(1)
    programs = {"train_slowly": train_slowly, "train_a_share": train_a_share}
    cast(Callable[[Path], None], programs[sys.argv[1]])(Path(sys.argv[2]))
