"""Get the data, train, evaluate, reproduce; `metatutor --version` prints the version."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tabulate import tabulate
from tyro.conf import arg

from metatutor import runs as recorded
from metatutor.classify import FewShotClassifier
from metatutor.comparison import compared
from metatutor.config import RunConfig, TestConfig, load_config, parse_test
from metatutor.data import omniglot
from metatutor.evaluation import Evaluation
from metatutor.files import one_line
from metatutor.folders import answer, check_apart, learned
from metatutor.report import Report, table

Data = Annotated[Path | None, arg(metavar="DIR", help="folder of Omniglot; default: METATUTOR_DATA, else your cache")]
Device = Annotated[str | None, arg(help="such as cpu or cuda:1; default: a GPU if there is one, but cpu to evaluate")]
Runs = Annotated[Path, arg(help="the folder for your runs; this run's files go to a folder of its name there")]
RunName = Annotated[str, tyro.conf.Positional, arg(metavar="RUN")]
_WIDEST = 15  # classes of a confusion matrix on a terminal
app = tyro.extras.SubcommandApp()


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a function as a command that parsing leaves to be done."""

    @wraps(function)
    def parsed(**arguments: Any) -> Callable[[], None]:
        return partial(function, **arguments)

    app.command(name=function.__name__)(parsed)
    return function


@command
def data(
    action: Annotated[Literal["download", "verify", "info"], tyro.conf.Positional],
    data: Data = None,
    runs: bool = False,
) -> None:
    """Omniglot: download it, compare every pixel of your copy with the published ones, or count what it holds.

    Args:
        action: what to do.
        runs: download Lake's 20 one-shot runs too.
    """
    if runs and action != "download":
        raise ValueError(f"--runs is for download; leave it out of {action}")
    print(omniglot.download(data, runs=runs) if action == "download" else getattr(omniglot, action)(data))


@command
def train(
    name: RunName,
    config: Annotated[RunConfig, arg(name="")] = RunConfig(),  # noqa: B008 - frozen
    test: TestConfig = TestConfig(),  # noqa: B008 - frozen
    runs: Runs = Path("runs"),
    data: Data = None,
    device: Device = None,
) -> None:
    """Train and evaluate a learner; if it is killed, the same command continues where it was.

    Args:
        name: name of the run; its files go to the folder RUNS/NAME.
        config: what to train.
        test: how to evaluate it.
    """
    recorded.check_name(name)
    test = replace(test, name=test.name or name)
    [evaluation] = recorded.run_training(config, runs / name, [test], data=data, device=device)
    print(evaluation)


@command
def evaluate(
    run: RunName,
    split: Literal["test", "validation"] | None = None,
    n_episodes: int | None = None,
    test: TestConfig = TestConfig(),  # noqa: B008 - frozen
    data: Data = None,
    device: Device = None,
) -> None:
    """Evaluate the recorded weights of a run, as before or, given `--test.name`, in another way.

    Args:
        run: the name of a recorded evaluation; or the folder of a run, for all of its evaluations.
        split: classes to draw the tasks from; default: as recorded.
        n_episodes: how many tasks; default: as recorded.
        test: another evaluation, which is recorded too, in the folder of the run.
    """
    folder, records = _evaluations(run)
    if test != TestConfig():
        if not test.name:
            raise ValueError("another evaluation needs a name: give --test.name too")
        _tell(test.name, recorded.evaluate_run(folder, test, data=data, device=device, record=True))
        return
    if not records:
        raise ValueError(f"{run} was not evaluated yet; name an evaluation with --test.name")
    asked = {"split": split, "n_episodes": n_episodes}
    changes: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    for record in records:
        again = replace(parse_test(record), **changes)
        found = recorded.evaluate_run(folder, again, data=data, device=device)
        _tell(again.name, found, Evaluation.from_record(record))


@command
def reproduce(
    run: RunName, runs: Runs = Path("runs"), data: Data = None, device: Device = None, record: bool = False
) -> None:
    """Train a recorded run again from its config.json alone, evaluate it as before, and compare.

    Args:
        run: the name of a recorded evaluation; or the path of a run's folder, or of its config.json.
        record: copy the result to results/, replacing what is recorded there.
    """
    path = Path(run)
    source = path.parent if path.name == "config.json" else _evaluations(run)[0]
    folder = runs / source.resolve().name
    recorded.check_name(folder.name)
    for name, found, before in recorded.reproduce(source, folder, data=data, device=device):
        _tell(name, found, before)
    if record:
        target = recorded.results_folder() / folder.name
        target.mkdir(exist_ok=True)
        for file in filter(Path.exists, (folder / name for name in recorded.FILES)):
            shutil.copy2(file, target / file.name)


@command
def classify(
    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional, arg(metavar="[SUPPORT] [QUERY]")],
    head: Annotated[str, arg(metavar="auto|ridge|gaussians|prototypes|RUN")] = "auto",
    backbone: Annotated[str, arg(metavar="auto|omniglot|photos|torchvision:NAME")] = "auto",
    weights: Path | None = None,
    support: Path | None = None,
    save: Path | None = None,
    csv: Path | None = None,
    json: Path | None = None,
    report: Path | None = None,
) -> None:
    """Learn the classes of a folder from a few pictures of each, check them, and name other pictures.

    Args:
        pictures: SUPPORT, a folder that has a folder of pictures for each class, unless --support is given; and QUERY,
            a folder of pictures, one picture or, to measure accuracy, a folder of class folders. Without QUERY the
            support set is only checked.
        head: what is fitted to the embeddings; or a recorded run whose learner takes any number of ways.
        backbone: the network that embeds; auto looks at the pictures.
        weights: a file of weights for the backbone: safetensors, or a state dict of PyTorch.
        support: a file that --save wrote, in place of SUPPORT.
        save: a file for what was fitted.
        csv: a file for the answers, one line per picture.
        json: a file for everything that was found out.
        report: a file for a page with the pictures, the most doubtful first, each beside the nearest support pictures.
    """
    if not 1 <= len(pictures) <= (2 if support is None else 1):
        raise ValueError("expected SUPPORT and QUERY, or --support FILE and QUERY")
    if support is not None:
        classifier = FewShotClassifier.load(support, weights=weights)
        found = Report(classifier, warnings=list(classifier.warnings_))
    else:
        if pictures[1:]:
            check_apart(*pictures)
        found = learned(pictures[0], head, backbone, weights)
    print(*found.support_lines(), *_remarks(found), sep="\n")
    if save is not None:
        found.classifier.save(save)
    if support is None and not pictures[1:]:
        return
    told = len(found.skipped), len(found.warnings)
    answer(found, pictures[-1], keep=report is not None)
    print(*_remarks(found, *told), tabulate(table(found.rows), tablefmt="plain"), *found.query_lines(), sep="\n")
    if found.judged and len(found.names) <= _WIDEST:
        print(tabulate(found.confusion_rows(), headers="firstrow", tablefmt="plain"))
    for path, write in ((csv, found.write_csv), (json, found.write_json), (report, found.write_html)):
        if path is not None:
            write(path)


def _remarks(found: Report, skipped: int = 0, warnings: int = 0) -> list[str]:
    """Lines on what was left out and what to beware of, except the first ones."""
    lines = [f"left out: {path}: {reason}" for path, reason in list(found.skipped.items())[skipped:]]
    return [one_line(line) for line in (*lines, *(f"warning: {text}" for text in found.warnings[warnings:]))]


@command
def runs() -> None:
    """List the recorded runs: every evaluation, its result, and the folder of its run."""
    rows = []
    for folder in recorded.run_folders():
        try:
            records = recorded.read_evaluations(folder)["evaluations"]
        except ValueError as error:
            rows.append((folder.name, "damaged", error, folder.name))
            continue
        for record in records:
            found = Evaluation.from_record(record)
            rows.append((record["name"], recorded.task_of(found), found, folder.name))
        if not records:
            rows.append((folder.name, "not evaluated", "", folder.name))
    print(tabulate(rows, tablefmt="plain", disable_numparse=True))


@command
def results(n_way: int | None = None, k_shot: int | None = None) -> None:
    """Every method beside its paper, and what it costs; published protocols differ, so this is not a ranking.

    Times are those of one CPU thread, where they were measured: `ms` is the time to adapt to one task and answer it,
    tasks a second the rate when 32 go together.

    Args:
        n_way: only tasks with this many classes.
        k_shot: only tasks with this many support images per class.
    """
    head = (
        "method",
        "task",
        "ours",
        "under the paper's rules",
        "paper",
        "trained",
        "parameters",
        "peak MiB",
        "ms",
        "tasks/s",
    )
    rows = []
    for row in compared():
        if n_way in (None, row.ours.n_way) and k_shot in (None, row.ours.k_shot):
            task = f"{row.ours.n_way}-way {row.ours.k_shot}-shot"
            speed = [f"{number:.0f}" if number else "–" for number in (row.ms_a_task, row.tasks_a_second)]
            size = (f"{row.train_seconds / 60:.0f} min", f"{row.parameters:,}", f"{row.peak_memory_mib:,}")
            rows.append((row.method, task, row.ours, row.as_published_cell, row.papers_cell, *size, *speed))
    if not rows:
        raise ValueError("no recorded results for such tasks; leave n-way and k-shot out to see what there is")
    print(tabulate(rows, head, tablefmt="plain", disable_numparse=True))


def _evaluations(run: str) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a run, and the evaluations asked for: all, or the one of that name."""
    folder = Path(run)
    if not (folder.parts[1:] or (folder / "config.json").exists()):
        found = recorded.load_run(run)
        return found.folder, [found.evaluation]
    load_config(folder)  # an error if it is not a run
    return folder, recorded.read_evaluations(folder)["evaluations"]


def _tell(name: str, found: Evaluation, before: Evaluation | None = None) -> None:
    print(f"{name}: {found}" + (f" (recorded: {before})" if before else ""))
