"""The command `metatutor`: get the data, train, evaluate, reproduce."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from metatutor import recording
from metatutor.data import omniglot
from metatutor.recording import RunConfig
from metatutor.training import TrainingDivergedError, check_device

Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
RunName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Split = Literal["test", "validation"]

data_app = tyro.extras.SubcommandApp()
app = tyro.extras.SubcommandApp()


@data_app.command(name="download")
def download(data: Folder = None, runs: bool = False) -> None:
    """Download Omniglot and compare every pixel with the published ones.

    Args:
        data: where to put it; default: METATUTOR_DATA, else your cache folder.
        runs: get Lake's 20 one-shot runs too.
    """
    print(omniglot.download(data, runs=runs))


@data_app.command(name="verify")
def verify(data: Folder = None) -> None:
    """Compare every pixel of your copy of Omniglot with the published ones.

    Args:
        data: where it lies; default: METATUTOR_DATA, else your cache folder.
    """
    print(omniglot.verify(data))


@data_app.command(name="info")
def info(data: Folder = None) -> None:
    """Count what your copy of Omniglot holds, and tell where its pixels are kept.

    Args:
        data: where it lies; default: METATUTOR_DATA, else your cache folder.
    """
    print(omniglot.info(data))


@app.command(name="train")
def train(
    name: RunName,
    config: Annotated[RunConfig, tyro.conf.arg(name="")] = RunConfig(),  # noqa: B008 - frozen
    runs: Path = Path("runs"),
    data: Folder = None,
    device: str | None = None,
) -> None:
    """Train and evaluate a learner; started again after a kill, it goes on where it was.

    Args:
        name: of the run; its files go to the folder RUNS/NAME.
        config: what to train.
        runs: the folder of your runs.
        data: where Omniglot lies; default: METATUTOR_DATA, else your cache folder.
        device: cpu or cuda; default: a GPU if there is one.
    """
    print(recording.run_training(config, runs / name, data=data, device=device))


@app.command(name="reproduce")
def reproduce(
    run: RunName,
    runs: Path = Path("runs"),
    data: Folder = None,
    device: str | None = None,
    record: bool = False,
) -> None:
    """Retrain a recorded run from its config.json alone, and compare.

    Args:
        run: a folder name under results/, or the path of a config.json.
        runs: the folder of your runs; this one's files go to a folder of its name there.
        data: where Omniglot lies; default: METATUTOR_DATA, else your cache folder.
        device: cpu or cuda; default: a GPU if there is one.
        record: copy the outcome to results/, in place of what is recorded there.
    """
    path = Path(run)
    source = path.parent if path.name == "config.json" else recording.run_folder(run)
    config = recording.load_config(source / "config.json")
    folder = runs / source.resolve().name
    evaluation = recording.run_training(config, folder, data=data, device=device)
    before = recording.recorded_accuracy(source)
    print(f"{folder.name}: {evaluation}" + (f" (recorded: {before})" if before else ""))
    if record:
        target = recording.results_folder() / folder.name
        target.mkdir(exist_ok=True)
        for name in recording.FILES:
            if (folder / name).exists():
                shutil.copy2(folder / name, target / name)


@app.command(name="evaluate")
def evaluate(
    run: RunName,
    split: Split = "test",
    n_episodes: int | None = None,
    data: Folder = None,
    device: str | None = None,
) -> None:
    """Evaluate the recorded weights of a run anew.

    Args:
        run: a folder name under results/, or the path of a run's folder.
        split: classes to draw the tasks from.
        n_episodes: how many tasks; default: as recorded.
        data: where Omniglot lies; default: METATUTOR_DATA, else your cache folder.
        device: cpu or cuda; default: cpu.
    """
    folder = Path(run) if (Path(run) / "config.json").exists() else recording.run_folder(run)
    config = recording.load_config(folder / "config.json")
    learner = recording.load_learner(folder, config)
    check_device(device)
    learner.to(device)
    splits = config.data.load(data)
    evaluation = recording.evaluate_learner(learner, splits, config, split=split, n_episodes=n_episodes)
    before = recording.recorded_accuracy(folder)
    print(f"{folder.name}: {evaluation}" + (f" (recorded: {before})" if before else ""))


@app.command(name="runs")
def runs() -> None:
    """List the recorded runs with their accuracies."""
    for name in recording.run_names():
        print(f"{name:42} {recording.recorded_accuracy(recording.run_folder(name)) or 'not evaluated'}")


app.command(data_app, name="data")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a mistake ends it with one line and exit status 2."""
    try:
        app.cli(prog="metatutor", description=__doc__, args=arguments)
    except (ValueError, TrainingDivergedError, torch.cuda.OutOfMemoryError) as error:
        sys.exit(_fail(str(error), 2))
    except KeyboardInterrupt as interrupt:
        sys.exit(_fail(str(interrupt) or "interrupted", 130))


def _fail(message: str, status: int) -> int:
    print(f"metatutor: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
