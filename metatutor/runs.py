"""Recorded runs: trainings that anyone can repeat, and the results of their evaluations.

A run is a folder of `results/` with `config.json`, `history.csv`, `model.safetensors` and `evaluations.json`. Weights
of more than 2 MB are recorded in half precision; what is evaluated is always what was recorded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save

from metatutor.allocator import peak_memory_mib
from metatutor.config import DataConfig, RunConfig, TestConfig, config_text, load_config, parse_test, read_text, shown
from metatutor.data import Splits
from metatutor.data.warp import warp
from metatutor.episodes import ClassImages, EpisodeSpec
from metatutor.evaluation import Evaluation, evaluate, scores
from metatutor.files import decoding, replacing
from metatutor.learner import Learner, computing, load_parameters
from metatutor.training import HISTORY_FIELDS, MAY_CHANGE, Row, check_device, read_history, train, write_history

FILES = ("config.json", "history.csv", "model.safetensors", "evaluations.json")
WEIGHTS_LIMIT = 2_000_000  # bytes of a model.safetensors
VALIDATION_SEED = 1_000_003  # far from the seeds of training and test


# --- reading ---


@dataclass(frozen=True)
class Run:
    """A recorded run and one of its evaluations: what it was trained with, what was recorded of both, its history."""

    name: str
    folder: Path
    config: RunConfig
    test: TestConfig
    evaluation: dict[str, Any]
    history: list[Row]

    def learner(self) -> Learner:
        """The trained learner as it was evaluated, in evaluation mode, on the CPU."""
        return load_learner(self.folder, self.config.tested(self.test))


def results_folder() -> Path:
    """Where the recorded runs are: `results/` of a checkout, or the copy that came with the installation."""
    package = Path(__file__).parent
    checkout = package.parent / "results"
    return checkout if (package.parent / "pyproject.toml").exists() else package / "results"


def run_folders(results: Path | None = None) -> list[Path]:
    """The folders of all recorded runs, by name."""
    return sorted(path.parent for path in (results or results_folder()).glob("*/config.json"))


def run_names(results: Path | None = None) -> list[str]:
    """The names of all recorded evaluations, such as `omniglot-maml-5w1s`, sorted."""
    return sorted(record["name"] for _, record in _records(results))


def load_run(name: str, results: Path | None = None) -> Run:
    """Read a recorded run; a ValueError says so if there is none, or it is damaged.

    The name is that of an evaluation, such as `omniglot-maml-5w5s`; or of a run's folder, for its first evaluation.
    """
    folder, record = _find(name, results)
    about = {key: value for key, value in read_evaluations(folder).items() if key != "evaluations"}
    config, test = load_config(folder), parse_test(record)
    return Run(record["name"], folder, config, test, about | record, _history(folder))


def recorded_accuracy(name: str, results: Path | None = None) -> Evaluation:
    """The result of a recorded evaluation."""
    return Evaluation.from_record(_find(name, results)[1])


def read_evaluations(folder: Path) -> dict[str, Any]:
    """What `evaluations.json` says about a training, and a list of its `evaluations`; a ValueError if it is damaged."""
    path = folder / "evaluations.json"
    if not path.exists():
        return {"evaluations": []}
    try:
        about = json.loads(read_text(path))
        for record in about["evaluations"]:
            str(Evaluation.from_record(record))
            check_name(parse_test(record).name)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({shown(error)}); delete it and evaluate the run again") from None
    return about


def check_name(name: str) -> None:
    """Raise a `ValueError` if this cannot be the name of a run or an evaluation: it must name a single folder."""
    if not re.fullmatch(r"\w[\w.+-]{0,99}", name):
        raise ValueError(
            f"a name has 1 to 100 letters, digits and _ . + -, and begins with a letter; not {shown(name)}"
        )


def task_of(evaluation: Evaluation) -> str:
    """The kind of tasks of an evaluation, such as `5-way 1-shot`."""
    n_way, k_shot = evaluation.n_way, evaluation.k_shot
    return {
        "accuracy": f"{n_way}-way {k_shot}-shot",
        "accuracy_by_instance": f"{n_way}-way stream, {k_shot} images a class",
        "mse_by_step": f"sine waves, {k_shot} points",
    }[evaluation.metric]


def published() -> list[dict[str, Any]]:
    """The papers' numbers: one dict per row, with method, n_way, k_shot, accuracy, ci95, source and protocol."""
    return _read_json("published.json")


def study(name: str) -> list[dict[str, Any]]:
    """The rows that a script of `studies/` recorded; none if it was not run."""
    recorded = f"studies/{name}.json"
    return _read_json(recorded)["rows"] if (results_folder() / recorded).exists() else []


def published_streams() -> list[dict[str, Any]]:
    """The papers' accuracies by instance, counted from 1: method, n_way, instance, accuracy, source and protocol."""
    return _read_json("published_streams.json")


def published_lake() -> list[dict[str, Any]]:
    """The published errors in Lake's 20 one-shot runs: method, error (0–1) and source."""
    return _read_json("published_lake.json")


def _read_json(name: str) -> Any:
    return json.loads((results_folder() / name).read_text(encoding="utf-8"))


def _records(results: Path | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    for folder in run_folders(results):
        with suppress(ValueError):  # one damaged record must not hide the others
            yield from ((folder, record) for record in read_evaluations(folder)["evaluations"])


def _find(name: str, results: Path | None) -> tuple[Path, dict[str, Any]]:
    check_name(name)
    for folder, record in _records(results):
        if record["name"] == name:
            return folder, record
    folder = (results or results_folder()) / name
    if not (folder / "config.json").exists():
        near = " or ".join(get_close_matches(name, run_names(results))) or "one that `metatutor runs` lists"
        raise ValueError(f"no recorded run {shown(name)}; did you mean {near}?")
    if not (records := read_evaluations(folder)["evaluations"]):
        raise ValueError(f"run {name!r} was not evaluated; run `metatutor reproduce {name}`")
    return folder, records[0]


def _history(folder: Path) -> list[Row]:
    path = folder / "history.csv"
    with decoding(f"{path} is damaged (reproduce the run to restore it)"):
        history = read_history(path) if path.exists() else []
        return [{name: row[name] for name in HISTORY_FIELDS} for row in history]


# --- weights ---


def load_learner(folder: Path, config: RunConfig) -> Learner:
    """The learner of a configuration with the parameters recorded in a folder, in evaluation mode."""
    learner = config.build(n_train_classes=1)  # as many as `finish` leaves of a classifier's
    if config.train is None:
        return learner.eval()
    path, like = folder / "model.safetensors", learner.state_dict()
    with decoding(f"{path} is damaged (reproduce the run to restore it)"):
        parameters = load_file(path) if path.exists() else {}
    for name, found in parameters.items():
        expected = like.get(name, found).dtype
        if found.dtype != expected and (found.dtype, expected) != (torch.float16, torch.float32):
            raise ValueError(f"{path}: '{name}' is of {found.dtype}, not of {expected}; reproduce the run")
        if found.is_floating_point() and not found.isfinite().all():
            raise ValueError(f"{path}: '{name}' holds numbers that are not finite; reproduce the run")
    load_parameters(learner, parameters, path)
    return learner.eval()


def _write_parameters(learner: Learner, path: Path) -> None:
    """Record the parameters, in half precision if there are many, and give the learner what was recorded."""
    parameters = {name: tensor.detach().cpu().clone() for name, tensor in learner.state_dict().items()}  # none tied
    written = save(parameters)
    if len(written) > WEIGHTS_LIMIT:
        written = save({name: t.half() if t.is_floating_point() else t for name, t in parameters.items()})
    _write(path, written)
    load_parameters(learner, load(written), path)


# --- making ---


def run_training(
    config: RunConfig,
    folder: Path,
    tests: Sequence[TestConfig] = (),
    *,
    data: Path | str | None = None,
    device: str | None = None,
    progress_bar: bool = True,
) -> list[Evaluation]:
    """Train a configuration, then evaluate it; a run that was killed continues from its last checkpoint.

    The folder gets the four files of a recorded run, and the checkpoints; `data` is the folder with Omniglot. A
    ValueError says so if data or tests do not fit the configuration, before anything is computed.
    """
    check_device(device)
    splits = _claimed(config, folder, tests, data)
    learner = config.build(len(splits.train) if isinstance(splits.train, ClassImages) else 1)
    if config.train is not None:
        history = train(
            learner,
            splits.train,
            config.train_spec,
            config.train,
            folder=folder,
            validate=None if config.regression else partial(_validated, splits=splits, config=config),
            device=device,
            progress_bar=progress_bar,
            transform=warp if isinstance(config.data, DataConfig) and config.data.warp else None,
        )
        learner.finish()
        _write_parameters(learner, folder / "model.safetensors")
        write_history(history, folder / "history.csv")
    about, before = _about(learner, _history(folder)), read_evaluations(folder)
    same = before.get("train_iterations") == about["train_iterations"]  # otherwise the weights have changed
    _write_evaluations(folder, about | {"evaluations": before["evaluations"] if same else []})
    return [evaluate_run(folder, test, splits=splits, device=learner.device, record=True) for test in tests]


def evaluate_run(
    folder: Path,
    test: TestConfig,
    *,
    splits: Splits[Any] | None = None,
    data: Path | str | None = None,
    device: torch.device | str | None = None,
    record: bool = False,
) -> Evaluation:
    """Evaluate the recorded weights of a run, on the CPU unless a device is given.

    The classes are `splits` if they are already loaded, else those of Omniglot in `data`. With `record`, the result
    goes to `evaluations.json`, under the name of the test.
    """
    if record:
        check_name(test.name)
    config = load_config(folder)
    learner = load_learner(folder, config.tested(test)).to(check_device(str(device or "cpu")))
    splits = splits or config.data.load(data)
    again = config.regression and test.split == "validation"  # the same waves as for the test
    found = evaluate(
        learner,
        getattr(splits, test.split),
        config.test_spec(test),
        n_episodes=test.n_episodes,
        seed=test.seed + VALIDATION_SEED * again,
        split=f"{splits.id}/{test.split}",
        stream=test.stream,
    )
    if record:
        changes = {key: value for key in ("stream", "learner", "network") if (value := getattr(test, key))}
        about = read_evaluations(folder)
        records = {other["name"]: other for other in about["evaluations"]}
        records[test.name] = {"name": test.name} | changes | found.record()
        _write_evaluations(folder, about | {"evaluations": list(records.values())})
    return found


def reproduce(
    source: Path, folder: Path, *, data: Path | str | None = None, device: str | None = None, progress_bar: bool = True
) -> list[tuple[str, Evaluation, Evaluation | None]]:
    """Train a run again, from its `config.json` alone; each evaluation's name, new result, and recorded result."""
    config, records = load_config(source), read_evaluations(source)["evaluations"]
    tests = [parse_test(record) for record in records] or [TestConfig(folder.name)]
    found = run_training(config, folder, tests, data=data, device=device, progress_bar=progress_bar)
    before = [Evaluation.from_record(record) for record in records] or [None]
    return [(test.name, now, then) for test, now, then in zip(tests, found, before, strict=True)]


def _claimed(config: RunConfig, folder: Path, tests: Sequence[TestConfig], data: Path | str | None) -> Splits[Any]:
    """The classes, after all checks that need no training; from then on the folder is the configuration's."""
    path, text = folder / "config.json", config_text(config)
    if path.exists():
        before = load_config(folder)
        if before.train and config.train:
            may = {name: getattr(config.train, name) for name in MAY_CHANGE}
            before = replace(before, train=replace(before.train, **may))
        if config_text(before) != text:
            raise ValueError(f"{folder} holds a run with another configuration; choose another folder or delete it")
    read_evaluations(folder)
    for test in tests:
        check_name(test.name)
    asked: list[tuple[str, EpisodeSpec]] = [(test.split, config.tested(test).test_spec(test)) for test in tests]
    if config.train is not None:
        asked += [("train", config.train_spec), ("validation", config.validation_spec)]
    splits = config.data.load(data)
    for split, spec in asked:
        getattr(splits, split).sampler(spec)
    _write(path, text)
    return splits


def _validated(learner: Learner, splits: Splits[Any], config: RunConfig) -> float:
    sampler = splits.validation.sampler(config.validation_spec, seed=VALIDATION_SEED)
    return scores(learner, sampler, config.validation.n_episodes, stream=config.validation.stream).mean().item()


def _write_evaluations(folder: Path, about: dict[str, Any]) -> None:
    _write(folder / "evaluations.json", json.dumps(about, indent=2) + "\n")


def _write(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def _about(learner: Learner, history: list[Row]) -> dict[str, Any]:
    with computing(learner):
        threads = torch.get_num_threads()
    gpu = torch.cuda.get_device_name(learner.device) if learner.device.type == "cuda" else None
    return {
        "train_seconds": round(history[-1]["seconds"], 1) if history else 0.0,
        "train_iterations": int(history[-1]["iteration"]) if history else 0,
        "device": f"{learner.device.type}, " + (gpu or f"{threads} thread{'s' * (threads != 1)}"),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in learner.parameters()),
        "peak_memory_mib": peak_memory_mib(),
    }
