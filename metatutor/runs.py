"""Recorded runs: a training from which anyone can train again, and what evaluations of it came to.

A run is a folder of `results/` with `config.json`, `history.csv`, `model.safetensors` and `evaluations.json`. This
module reads them, and makes them. Weights of more than 2 MB are recorded in half precision; what is evaluated is
always what was recorded.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor

from metatutor.config import RunConfig, TestConfig, config_text, load_config, parse_test, read_text, shown
from metatutor.data import Splits
from metatutor.episodes import ClassImages
from metatutor.evaluation import Evaluation, evaluate, scores
from metatutor.learner import Learner
from metatutor.training import (
    Row,
    check_device,
    load_parameters,
    read_history,
    replacing,
    train,
    write_history,
)

FILES = ("config.json", "history.csv", "model.safetensors", "evaluations.json")
WEIGHTS_LIMIT = 2_000_000  # bytes of a model.safetensors
VALIDATION_SEED = 1_000_003  # far from the seeds of training and test


# --- reading ---


@dataclass(frozen=True)
class Run:
    """A recorded run and one of its evaluations, read.

    Args:
        name: of the evaluation.
        folder: where the run lies.
        config: what it was trained with.
        test: what the evaluation is of.
        evaluation: what was recorded of it, and of the training: accuracy, interval, time, device, …
        history: the rows of `history.csv`; none for a method without training.

    Example:
        >>> all(load_run(name).evaluation["n_episodes"] >= 600 for name in run_names())
        True
    """

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
    """Where the recorded runs lie: `results/` of a checkout, or the copy that came with the installation."""
    package = Path(__file__).parent
    checkout = package.parent / "results"
    return checkout if (package.parent / "pyproject.toml").exists() else package / "results"


def run_folders(results: Path | None = None) -> list[Path]:
    """The folders of all recorded runs, by name."""
    return sorted(path.parent for path in (results or results_folder()).glob("*/config.json"))


def run_names(results: Path | None = None) -> list[str]:
    """The names of all recorded evaluations, sorted; those of a run whose record is damaged are left out.

    Args:
        results: the folder to look in; default: `results_folder()`.

    Returns:
        Names such as `omniglot-maml-5w1s`.
    """
    return sorted(record["name"] for _, record in _records(results))


def load_run(name: str, results: Path | None = None) -> Run:
    """Read a recorded run by the name of an evaluation.

    Args:
        name: such as `omniglot-maml-5w5s`; or that of a run's folder, for its first evaluation.
        results: the folder to look in; default: `results_folder()`.

    Returns:
        Its configuration, evaluation and history; `.learner()` gives the trained learner.

    Raises:
        ValueError: if there is no such run, or its files are damaged.
    """
    folder, record = _find(name, results)
    path = folder / "evaluations.json"
    about = {key: value for key, value in read_evaluations(folder).items() if key != "evaluations"}
    history = read_history(folder / "history.csv") if (folder / "history.csv").exists() else []
    config = load_config(folder / "config.json")
    return Run(record["name"], folder, config, parse_test(record, str(path)), about | record, history)


def recorded_accuracy(name: str, results: Path | None = None) -> Evaluation:
    """What a recorded evaluation came to."""
    return Evaluation.from_record(_find(name, results)[1])


def read_evaluations(folder: Path) -> dict[str, Any]:
    """The contents of a run's `evaluations.json`: about its training, and a list `evaluations`, empty if there is none.

    Raises:
        ValueError: if the file is damaged.
    """
    path = folder / "evaluations.json"
    if not path.exists():
        return {"evaluations": []}
    try:
        about = json.loads(read_text(path))
        for record in about["evaluations"]:
            Evaluation.from_record(record), check_name(record["name"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({shown(error)}); evaluate the run anew without it") from None
    return about


def check_name(name: str) -> None:
    """Raise a `ValueError` if a run or an evaluation cannot be called so: it is to name a single folder."""
    if not re.fullmatch(r"\w[\w.+-]{0,99}", name):
        raise ValueError(f"a run is named by 1 to 100 letters, digits and _ . + -, not {shown(name)}")


def published() -> list[dict[str, Any]]:
    """The papers' numbers: one dict a row, with method, n_way, k_shot, accuracy, ci95, source and protocol."""
    return json.loads((results_folder() / "published.json").read_text(encoding="utf-8"))


def published_streams() -> list[dict[str, Any]]:
    """The papers' accuracies by instance, counted from 1: method, n_way, instance, accuracy, source and protocol."""
    return json.loads((results_folder() / "published_streams.json").read_text(encoding="utf-8"))


def _records(results: Path | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    for folder in run_folders(results):
        try:
            yield from ((folder, record) for record in read_evaluations(folder)["evaluations"])
        except ValueError:
            continue  # one damaged record is not to hide the others


def _find(name: str, results: Path | None) -> tuple[Path, dict[str, Any]]:
    check_name(name)
    found = [(folder, record) for folder, record in _records(results) if name == record["name"]]
    if found:
        return found[0]
    folder = (results or results_folder()) / name
    if not (folder / "config.json").exists():
        near = " or ".join(get_close_matches(name, run_names(results), n=3)) or "one of those that `metatutor runs` lists"
        raise ValueError(f"no recorded run {shown(name)}; did you mean {near}?")
    if not (records := read_evaluations(folder)["evaluations"]):
        raise ValueError(f"run {name!r} was not evaluated; run `metatutor reproduce {name}`")
    return folder, records[0]


# --- weights ---


def load_learner(folder: Path, config: RunConfig) -> Learner:
    """The learner of a configuration with the parameters recorded in a folder, in evaluation mode.

    Raises:
        ValueError: if the parameters are missing, damaged, or of another architecture.
    """
    learner = config.build(n_train_classes=1)  # which is all that `finish` leaves of a classifier's
    if config.train is not None:
        path = folder / "model.safetensors"
        parameters = _read_parameters(path)
        load_parameters(learner, parameters, path)
    return learner.eval()


def _read_parameters(path: Path) -> dict[str, Tensor]:
    try:
        parameters = load_file(path) if path.exists() else {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); reproduce the run to make it anew") from None
    for name, tensor in parameters.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: '{name}' holds numbers that are not finite; reproduce the run to make it anew")
    return parameters


def _check_types(learner: Learner, parameters: dict[str, Tensor], path: Path) -> None:
    for name, tensor in learner.state_dict().items():
        found = parameters[name].dtype
        if found != tensor.dtype and (found, tensor.dtype) != (torch.float16, torch.float32):
            raise ValueError(f"{path}: '{name}' is of {found}, not of {tensor.dtype}; reproduce the run to make it anew")


def _write_parameters(learner: Learner, path: Path) -> None:
    """Record the parameters, in half precision if they are many, and let the learner have what was recorded."""
    parameters = {name: tensor.detach().cpu().clone() for name, tensor in learner.state_dict().items()}  # none tied
    written = save(parameters)
    if len(written) > WEIGHTS_LIMIT:
        halves = {name: t.half() if t.is_floating_point() else t for name, t in parameters.items()}
        if all(t.isfinite().all() for t in halves.values()):
            written = save(halves)
    with replacing(path) as temporary:
        temporary.write_bytes(written)
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
    """Train a configuration, then evaluate it; a run killed before goes on where its last checkpoint stood.

    Args:
        config: what to train.
        folder: gets the four files of a recorded run, and the checkpoints.
        tests: the evaluations.
        data: where Omniglot lies (see `Omniglot.load`).
        device: see `train`.
        progress_bar: whether to show one.

    Returns:
        What each evaluation came to.

    Raises:
        ValueError: if the folder holds another configuration, or data or tests do not fit it.
    """
    check_device(device)
    for test in tests:
        config.tested(test)
    splits = config.data.load(data)
    for split, spec in _specs(config, tests):
        getattr(splits, split).sampler(spec)  # fails before the training, not after it
    _claim(folder, config)
    learner = config.build(len(splits.train) if isinstance(splits.train, ClassImages) else 1)
    if config.train is not None:
        history = train(
            learner,
            splits.train,
            config.train_spec,
            config.train,
            folder=folder,
            validate=_validation(splits, config),
            device=device,
            progress_bar=progress_bar,
        )
        learner.finish()
        _write_parameters(learner, folder / "model.safetensors")
        write_history(history, folder / "history.csv")
    _write_evaluations(folder, _about(learner, folder) | {"evaluations": read_evaluations(folder)["evaluations"]})
    where = next((p.device for p in learner.parameters()), device)
    return [evaluate_run(folder, test, splits=splits, device=where) for test in tests]


def evaluate_run(
    folder: Path,
    test: TestConfig,
    *,
    splits: Splits[Any] | None = None,
    data: Path | str | None = None,
    device: torch.device | str | None = None,
    record: bool = True,
) -> Evaluation:
    """Evaluate the recorded weights of a run.

    Args:
        folder: of the run.
        test: the evaluation.
        splits: the classes, where they are loaded already.
        data: where Omniglot lies (see `Omniglot.load`).
        device: where to compute; default: the CPU.
        record: whether what comes of it goes to `evaluations.json`, under the name of the test.
    """
    config = load_config(folder / "config.json")
    learner = load_learner(folder, config.tested(test)).to(device or "cpu")
    splits = splits or config.data.load(data)
    waves = config.regression and test.split == "validation"  # the same ones as for the test, at another seed
    found = evaluate(
        learner,
        getattr(splits, test.split),
        config.test_spec(test),
        n_episodes=test.n_episodes,
        seed=test.seed + VALIDATION_SEED * waves,
        split=f"{splits.id}/{test.split}",
        stream=test.stream,
    )
    if record:
        _record(folder, test, found)
    return found


def reproduce(
    source: Path,
    folder: Path,
    *,
    data: Path | str | None = None,
    device: str | None = None,
    progress_bar: bool = True,
) -> list[tuple[str, Evaluation, Evaluation | None]]:
    """Train a recorded run again from its `config.json` alone, and evaluate it as it was evaluated.

    Args:
        source: the folder of the recorded run.
        folder: gets the files of the new one.
        data: where Omniglot lies (see `Omniglot.load`).
        device: see `train`.
        progress_bar: whether to show one.

    Returns:
        The name of every evaluation, what it came to now, and what was recorded.
    """
    config, before = load_config(source / "config.json"), read_evaluations(source)["evaluations"]
    tests = [parse_test(record, str(source)) for record in before] or [TestConfig(folder.name)]
    found = run_training(config, folder, tests, data=data, device=device, progress_bar=progress_bar)
    recorded = [Evaluation.from_record(record) for record in before] or [None]
    return [(test.name, *pair) for test, *pair in zip(tests, found, recorded, strict=True)]


def _specs(config: RunConfig, tests: Sequence[TestConfig]) -> Iterator[tuple[str, Any]]:
    if config.train is not None:
        yield from (("train", config.train_spec), ("validation", config.validation_spec))
    yield from ((test.split, config.test_spec(test)) for test in tests)


def _claim(folder: Path, config: RunConfig) -> None:
    """Write `config.json`, unless the folder already belongs to another configuration."""
    path = folder / "config.json"
    if path.exists() and config_text(load_config(path)) != config_text(config):
        raise ValueError(f"{folder} holds a run with another configuration; choose another folder or delete it")
    read_evaluations(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(config_text(config), encoding="utf-8")


def _validation(splits: Splits[Any], config: RunConfig) -> Callable[[Learner], float] | None:
    if config.regression:
        return None
    watched = config.validation

    def validate(learner: Learner) -> float:
        sampler = splits.validation.sampler(config.validation_spec, seed=VALIDATION_SEED)
        return scores(learner, sampler, watched.n_episodes, stream=watched.stream).mean().item()

    return validate


def _record(folder: Path, test: TestConfig, found: Evaluation) -> None:
    """Write an evaluation down, in place of what its name stood for before."""
    check_name(test.name)
    changes = {key: value for key in ("learner", "network") if (value := getattr(test, key))}
    record = {"name": test.name, "stream": test.stream} | changes | found.record()
    about = read_evaluations(folder)
    names = [other["name"] for other in about["evaluations"]]
    at = names.index(test.name) if test.name in names else len(names)
    about["evaluations"][at : at + 1] = [record]
    _write_evaluations(folder, about)


def _write_evaluations(folder: Path, about: dict[str, Any]) -> None:
    with replacing(folder / "evaluations.json") as temporary:
        temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _about(learner: Learner, folder: Path) -> dict[str, Any]:
    history = read_history(folder / "history.csv") if (folder / "history.csv").exists() else []
    return {
        "train_seconds": round(history[-1]["seconds"], 1) if history else 0.0,
        "train_iterations": int(history[-1]["iteration"]) if history else 0,
        "device": device_name(learner),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in learner.parameters()),
        "peak_memory_mib": peak_memory_mib(),
    }


def device_name(learner: Learner) -> str:
    """Where a learner computes, such as `cpu, 2 threads`."""
    device = next((p.device for p in learner.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' * (threads != 1)}"


def peak_memory_mib() -> int:
    """The most memory the process has held so far: on the GPU if one was used, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return round(getattr(memory, "peak_wset", memory.rss) / 2**20)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)
