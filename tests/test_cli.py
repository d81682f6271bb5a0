"""The command line: what works, and how it ends when it is interrupted, or nobody can be told."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch

from metatutor import config, runs
from metatutor.cli import main
from metatutor.config import RunConfig, load_config
from metatutor.data import Strokes
from metatutor.runs import FILES, read_evaluations
from tests.test_runs import TINY

TRAIN = [
    *("train", "tiny", "--data.source", "strokes", "--n-query", "2", "--device", "cpu"),
    *("--network.filters", "4", "--network.n-blocks", "2", "--network.hidden", "8", "--learner.test-inner-steps", "2"),
    *("--train.iterations", "6", "--train.tasks-per-step", "2", "--train.warmup", "2"),
    *("--train.log-every", "3", "--train.checkpoint-every", "2"),
    *("--validation.n-query", "3", "--validation.n-episodes", "20", "--test.n-query", "3", "--test.n-episodes", "20"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    strokes = Strokes.load(n_alphabets=6, characters_per_alphabet=8, drawings=8)
    monkeypatch.setattr(config, "_strokes", lambda: strokes)
    monkeypatch.setattr(runs, "results_folder", lambda: tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def out(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    main(arguments)
    return capsys.readouterr().out.strip()


def test_train_then_evaluate_then_reproduce(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    accuracy = out(capsys, *TRAIN)
    assert re.fullmatch(r"\d+\.\d ± \d+\.\d%", accuracy)
    assert load_config(elsewhere / "runs/tiny") == TINY
    same = f"tiny: {accuracy} (recorded: {accuracy})"
    assert out(capsys, "evaluate", "runs/tiny", "--device", "cpu") == same
    assert out(capsys, "reproduce", "runs/tiny/config.json", "--runs", "again", "--device", "cpu") == same
    assert "±" in out(capsys, "evaluate", "runs/tiny", "--split", "validation", "--n-episodes", "4")
    assert out(capsys, *TRAIN) == accuracy  # nothing is left to train


def test_another_evaluation_is_recorded_and_reproduced_too(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    main(TRAIN)
    more = ["--test.name", "tiny-2s", "--test.k-shot", "2", "--test.n-query", "3", "--test.n-episodes", "20"]
    more += ["--test.learner", "test_inner_steps", "5", "inner_lr", "0.1"]
    second = out(capsys, "evaluate", "runs/tiny", *more).removeprefix("tiny-2s: ")
    record = read_evaluations(elsewhere / "runs/tiny")["evaluations"][1]
    assert (record["name"], record["k_shot"]) == ("tiny-2s", 2)
    assert record["learner"] == {"test_inner_steps": 5, "inner_lr": 0.1}
    (elsewhere / "results").mkdir()
    (elsewhere / "runs/tiny").rename(elsewhere / "results/tiny")
    assert out(capsys, "evaluate", "tiny-2s") == f"tiny-2s: {second} (recorded: {second})"
    both = out(capsys, "reproduce", "tiny-2s", "--device", "cpu")
    assert [line.split(":")[0] for line in both.splitlines()] == ["tiny", "tiny-2s"]
    assert f"tiny-2s: {second} (recorded: {second})" in both


def test_reproduce_with_record_replaces_the_recorded_files(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(TRAIN)
    (elsewhere / "results" / "tiny").mkdir(parents=True)
    for name in ("config.json", "evaluations.json"):
        (elsewhere / "runs" / "tiny" / name).rename(elsewhere / "results" / "tiny" / name)
    main(["reproduce", "tiny", "--runs", "new", "--device", "cpu", "--record"])
    assert {path.name for path in (elsewhere / "results" / "tiny").iterdir()} == set(FILES)


def test_runs_are_listed_the_damaged_too(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = out(capsys, *TRAIN, "--runs", "results")
    for folder in ("other", "untold"):
        (elsewhere / "results" / folder).mkdir()
        (elsewhere / "results" / folder / "config.json").write_text("{}")
    (elsewhere / "results" / "other" / "evaluations.json").write_text("{")
    other, tiny, untold = (re.split(r"\s{2,}", line) for line in out(capsys, "runs").splitlines())
    assert tiny == ["tiny", "5-way 1-shot", accuracy, "tiny"]
    assert other[:2] == ["other", "damaged"] and "other/evaluations.json is damaged" in other[2]
    assert untold[:2] == ["untold", "not evaluated"]


def test_the_defaults_of_train_are_those_of_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RunConfig] = []
    monkeypatch.setattr(runs, "run_training", lambda config, *_, **__: (seen.append(config), ["done"])[1])
    main(["train", "x"])
    main(["train", "x", "--train.iterations", "2"])  # no subcommand first
    main(["train", "x", "learner:prototypical", "--train.iterations", "2", "--learner.distance", "cosine"])
    main(["train", "x", "network:pixels", "learner:mann", "--network.size", "7"])
    main(["train", "x", "learner:nearest-pixels"])
    assert asdict(seen[0]) == asdict(RunConfig())
    assert [c.train and c.train.iterations for c in seen] == [2000, 2, 2, 2000, None]
    tags = [(c.learner.tag, c.network and c.network.tag) for c in seen[2:]]
    assert tags == [("prototypical", "conv-net"), ("mann", "pixels"), ("nearest-pixels", None)]


@pytest.mark.parametrize("method", config.known("method"))
def test_help_prints_every_argument_in_the_learners_own_words(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "x", f"learner:{method}", "--help"])
    assert end.value.code in (None, 0)
    shown = " ".join(re.sub(r"[│|]", " ", capsys.readouterr().out).split())
    made = config.known("method")[method]
    documented = made.of.__doc__.partition("Args:")[2]
    for argument in (f.name for f in fields(made) if f.name != "method"):
        assert f"--learner.{argument.replace('_', '-')}" in shown
        words = re.search(rf"^ +{argument}: (.*)$", documented, re.MULTILINE)
        assert words and not words.group(1).startswith("see `")
        assert words.group(1)[:30] in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "nonsense"], "no recorded run 'nonsense'; did you mean"),
        (["reproduce", "nowhere/config.json"], "cannot read nowhere/config.json"),
        (["evaluate", "nonsense"], "no recorded run 'nonsense'"),
        (["train", "x", "--data.source", "strokes", "--n-way", "5000"], "n_way = 5000 exceeds the"),
        (["train", "x", "--data.source", "strokes", "--k-shot", "8"], "k_shot + n_query = 23 exceeds the 8 drawings"),
        (["train", "x", "--train.outer-lr", "1e38"], "outer_lr = 1e+38"),
        (["train", "x", "--network.filters", "1000000000"], "maml cannot be built with this network"),
        (["train", "x", "--learner.inner-lr", "-1"], "inner_lr must be positive, got -1.0"),
        (["train", "../x"], "a name has 1 to 100 letters"),
        (["train", "x", "--n-way", "five"], "invalid literal for int() with base 10: 'five'; see metatutor --help"),
        (["train", "x", "--train.itrations", "2"], "--train.itrations, 2; did you mean --train.iterations?"),
        (["train", "x", "--data", "nowhere"], "nowhere"),
        (["data", "verify", "--data", "nowhere"], "nowhere"),
        (["no-such-command"], "no-such-command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_costs_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("metatutor: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("number", [13, 28, 122])
def test_an_operating_system_that_refuses_costs_one_line(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr(runs, "run_folders", refuse)
    with pytest.raises(SystemExit) as end:
        main(["runs"])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"metatutor: some/file: {os.strerror(number)}\n"


@pytest.mark.usefixtures("unchecked_types")
def test_a_damaged_checkpoint_costs_one_line(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(TRAIN)
    path = elsewhere / "runs/tiny/checkpoint.pt"
    whole = torch.load(path)
    damages = [{name: value for name, value in whole.items() if name != lost} for lost in whole]
    damages += [whole | {name: wrong} for name in ("config", "learner", "optimizer", "sampler") for wrong in ({}, 1)]
    damages += [{}, []]
    for damage in damages:
        torch.save(damage, path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(TRAIN)
        error = capsys.readouterr().err.splitlines()[-1]
        assert end.value.code == 2 and error.startswith("metatutor: ") and "checkpoint.pt" in error


# --- as a process of its own ---


def started(*arguments: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "metatutor", *arguments]
    root = Path(runs.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    streams: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, text=True, env=environment, **streams)


def test_the_version_is_told_without_delay() -> None:
    process = started("--version")
    told, error = process.communicate()
    assert (process.returncode, told, error) == (0, "metatutor 0.1.0\n", "")


def test_nobody_reading_is_no_mistake() -> None:
    read, write = os.pipe()
    os.close(read)
    process = started("runs", stdout=write)
    os.close(write)
    _, error = process.communicate()
    assert (process.returncode, error) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only some systems have it")
def test_a_full_disk_costs_one_line() -> None:
    with open("/dev/full", "w") as full:
        process = started("runs", stdout=full)
        _, error = process.communicate()
    assert (process.returncode, error) == (2, "metatutor: No space left on device\n")


def test_an_interrupt_while_pytorch_is_imported_costs_one_line(tmp_path: Path) -> None:
    """A module in PyTorch's place tells when it is being imported, and then takes its time."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("print('now', flush=True)\nimport time\ntime.sleep(60)\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from metatutor.cli import main; main(['runs'])"
    environment = os.environ | {"PYTHONPATH": str(Path(runs.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=50)
    assert (process.returncode, error) == (130, "metatutor: interrupted\n")


def test_an_interrupt_later_costs_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> list[Path]:
        raise KeyboardInterrupt("stopped after iteration 3")

    monkeypatch.setattr(runs, "run_folders", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["runs"])
    assert (end.value.code, capsys.readouterr().err) == (130, "metatutor: stopped after iteration 3\n")


def test_what_is_recorded_is_json(elsewhere: Path) -> None:
    main(TRAIN)
    for name in ("config.json", "evaluations.json"):
        assert json.loads((elsewhere / "runs/tiny" / name).read_text())
