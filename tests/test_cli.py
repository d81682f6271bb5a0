"""The command line: what works, and that a mistake costs one line, exit status 2 and nothing else."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from metatutor.recording import FILES, RunConfig, load_config

from metatutor.cli import main
from tests.test_recording import TINY

TRAIN = [
    *("train", "tiny", "--data.source", "strokes", "--n-query", "2"),
    *("--network.filters", "4", "--network.n-blocks", "2", "--network.hidden", "8"),
    *("--evaluation.n-query", "3", "--evaluation.n-episodes", "20", "--device", "cpu"),
    *("learner:maml-config", "--learner.test-inner-steps", "2", "train:train-config"),
    *("--train.iterations", "6", "--train.tasks-per-step", "2", "--train.warmup", "2"),
    *("--train.log-every", "3", "--train.checkpoint-every", "2"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("metatutor: ") and "\n" not in error and "Traceback" not in error
    return error


def test_train_then_reproduce_then_evaluate(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    main(TRAIN)
    accuracy = capsys.readouterr().out.strip()
    assert load_config(elsewhere / "runs/tiny/config.json") == TINY
    main(["evaluate", "runs/tiny", "--device", "cpu"])
    assert capsys.readouterr().out.strip() == f"tiny: {accuracy} (recorded: {accuracy})"
    main(["reproduce", "runs/tiny/config.json", "--runs", "again", "--device", "cpu"])
    assert capsys.readouterr().out.strip() == f"tiny: {accuracy} (recorded: {accuracy})"
    main(["evaluate", "runs/tiny", "--split", "validation", "--n-episodes", "4"])
    assert "±" in capsys.readouterr().out


def test_reproduce_with_record_replaces_the_recorded_files(
    monkeypatch: pytest.MonkeyPatch, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("metatutor.recording.results_folder", lambda: elsewhere / "results")
    main(TRAIN)
    (elsewhere / "results" / "tiny").mkdir(parents=True)
    (elsewhere / "results" / "tiny" / "config.json").write_text((elsewhere / "runs/tiny/config.json").read_text())
    main(["reproduce", "tiny", "--device", "cpu", "--record"])
    assert {path.name for path in (elsewhere / "results" / "tiny").iterdir()} == set(FILES)
    capsys.readouterr()
    main(["runs"])
    assert capsys.readouterr().out.startswith("tiny ")


def test_the_defaults_of_train_are_those_of_a_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[RunConfig] = []
    monkeypatch.setattr("metatutor.recording.run_training", lambda config, *_, **__: seen.append(config))
    main(["train", "x"])
    assert asdict(seen[0]) == asdict(RunConfig())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "nonsense"], "no recorded run 'nonsense'; there are: "),
        (["reproduce", "nowhere/config.json"], "cannot read nowhere/config.json"),
        (["evaluate", "nonsense"], "no recorded run 'nonsense'"),
        (["train", "x", "--data.source", "strokes", "--n-way", "5000"], "n_way = 5000 exceeds the"),
        (["train", "x", "--data.source", "strokes", "--k-shot", "19"], "k_shot + n_query = 34 exceeds the 20 drawings"),
        (["train", "x", "--data.source", "strokes", "--n-way", "0"], "n_way must be a positive integer, got 0"),
        (["train", "x", "--data.source", "strokes", "--device", "cuda"], "cuda was asked for but"),
        (["train", "x", "--data.source", "strokes", "--device", "tpu"], "device must be cpu or cuda"),
        (["train", "x", "--data", "nowhere"], "nowhere"),
        (["data", "verify", "--data", "nowhere"], "nowhere"),
        (["data", "info", "--data", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_costs_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert message in fails(arguments, capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "x", "learner:maml-config", "--learner.inner-lr", "-1"],
        ["train", "x", "--n-way", "five"],
        ["train"],
        ["no-such-command"],
    ],
)
def test_what_the_parser_refuses_has_status_2_and_no_traceback(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
