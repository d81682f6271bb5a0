"""Recorded runs: trained from a configuration alone, evaluated more than once, and read again."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from metatutor import config as config_module
from metatutor import runs
from metatutor.config import DataConfig, RunConfig, SinusoidsConfig, TestConfig, ValidationConfig, known, load_config
from metatutor.data import Strokes
from metatutor.evaluation import Evaluation, evaluate, scores
from metatutor.learner import Learner
from metatutor.runs import (
    FILES,
    evaluate_run,
    load_learner,
    load_run,
    read_evaluations,
    recorded_accuracy,
    reproduce,
    run_names,
    run_training,
)
from metatutor.training import TrainConfig, read_history

METHODS, CONV, PIXELS, MLP = known("method"), *(known("kind")[tag] for tag in ("conv-net", "pixels", "mlp"))
TINY = RunConfig(
    learner=METHODS["maml"](test_inner_steps=2),
    network=CONV(filters=4, n_blocks=2, hidden=(8,)),
    data=DataConfig(source="strokes"),
    n_query=2,
    train=TrainConfig(iterations=6, tasks_per_step=2, warmup=2, log_every=3, checkpoint_every=2),
    validation=ValidationConfig(n_query=3, n_episodes=20),
)
TEST = TestConfig("tiny-5w1s", n_query=3, n_episodes=20)
TWO_SHOTS = replace(TEST, name="tiny-5w2s", k_shot=2, learner={"test_inner_steps": 5})
PRETRAINED = replace(TINY, learner=METHODS["pretrained-cosine"]())
UNTRAINED = replace(TINY, learner=METHODS["nearest-pixels"](), train=None)
METRIC = replace(
    TINY,
    learner=METHODS["prototypical"](),
    network=CONV(filters=4, n_blocks=2, pooling="max", normalization="group"),
    n_way=8,
)
WAVES = RunConfig(
    learner=METHODS["maml"](inner_lr=0.01, test_inner_steps=3),
    network=MLP(hidden=(8,)),
    data=SinusoidsConfig(),
    n_way=1,
    k_shot=5,
    train=TrainConfig(iterations=3, tasks_per_step=2),
)
STREAM = RunConfig(
    learner=METHODS["mann"](n_way=3, hidden_size=8, slots=6, width=4, heads=2),
    network=PIXELS(size=4),
    data=DataConfig(source="strokes"),
    n_way=3,
    k_shot=4,
    n_query=1,
    train=TrainConfig(iterations=2, tasks_per_step=2, warmup=1),
    validation=ValidationConfig(k_shot=3, n_query=1, n_episodes=20, stream=True),
)
STREAM_TEST = TestConfig("stream", k_shot=3, n_query=1, n_episodes=4, stream=True)


@pytest.fixture(scope="module", autouse=True)
def few_strokes() -> Iterator[None]:
    strokes = Strokes.load(n_alphabets=6, characters_per_alphabet=8, drawings=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_module, "_strokes", lambda: strokes)
        yield


def trained(config: RunConfig, folder: Path, *tests: TestConfig) -> list[Evaluation]:
    return run_training(config, folder, tests, device="cpu", progress_bar=False)


@pytest.fixture(scope="module")
def recorded(few_strokes: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Evaluation]]:
    folder = tmp_path_factory.mktemp("results") / "tiny"
    return folder, trained(TINY, folder, TEST, TWO_SHOTS)


@pytest.fixture
def copied(recorded: tuple[Path, list[Evaluation]], tmp_path: Path) -> Path:
    """A copy of the recorded run, to be damaged."""
    return Path(shutil.copytree(recorded[0], tmp_path / "results" / "tiny"))


# --- one training, several evaluations ---


def test_a_run_leaves_the_four_files(recorded: tuple[Path, list[Evaluation]]) -> None:
    folder, (one, two) = recorded
    assert {path.name for path in folder.iterdir()} == {*FILES, "checkpoint.pt"}
    about = json.loads((folder / "evaluations.json").read_text())
    assert about["train_iterations"] == 6 and about["train_seconds"] > 0 and about["peak_memory_mib"] > 0
    assert [record["name"] for record in about["evaluations"]] == ["tiny-5w1s", "tiny-5w2s"]
    assert [record["accuracy"] for record in about["evaluations"]] == [one.accuracy, two.accuracy]
    assert [record.get("learner") for record in about["evaluations"]] == [None, {"test_inner_steps": 5}]
    assert (one.k_shot, two.k_shot, one.n_episodes) == (1, 2, 20) and one.split.endswith("/test")


def test_every_evaluation_is_found_by_its_name(recorded: tuple[Path, list[Evaluation]]) -> None:
    folder, found = recorded
    assert run_names(folder.parent) == ["tiny-5w1s", "tiny-5w2s"]
    for name, expected, steps in zip(run_names(folder.parent), found, (2, 5), strict=True):
        run = load_run(name, folder.parent)
        assert (run.name, run.folder, run.config) == (name, folder, TINY)
        assert run.evaluation["accuracy"] == expected.accuracy and run.evaluation["train_iterations"] == 6
        assert recorded_accuracy(name, folder.parent) == expected
        assert run.learner().test_inner_steps == steps and not run.learner().training
        assert [row["iteration"] for row in run.history] == [3, 6]
    assert load_run("tiny", folder.parent).name == "tiny-5w1s"


def test_recorded_weights_give_the_recorded_accuracy(recorded: tuple[Path, list[Evaluation]]) -> None:
    folder, (one, two) = recorded
    before = (folder / "evaluations.json").read_bytes()
    assert [evaluate_run(folder, test) for test in (TEST, TWO_SHOTS)] == [one, two]
    assert (folder / "evaluations.json").read_bytes() == before
    by_hand = evaluate(
        load_learner(folder, TINY).eval(),
        TINY.data.load().validation,
        TINY.test_spec(TEST),
        n_episodes=5,
        seed=3,
        split=f"{TINY.data.load().id}/validation",
    )
    assert evaluate_run(folder, replace(TEST, split="validation", n_episodes=5, seed=3)) == by_hand


def test_another_evaluation_joins_those_before_and_a_name_stands_for_one(copied: Path) -> None:
    evaluate_run(copied, replace(TEST, name="again", seed=1), record=True)
    evaluate_run(copied, replace(TEST, seed=2), record=True)
    records = read_evaluations(copied)["evaluations"]
    assert [(r["name"], r["seed"]) for r in records] == [("tiny-5w1s", 2), ("tiny-5w2s", 0), ("again", 1)]
    trained(TINY, copied, TEST)  # has nothing left to train, so the other evaluations still stand
    assert [(r["name"], r["seed"]) for r in read_evaluations(copied)["evaluations"]] == [
        ("tiny-5w1s", 0),
        ("tiny-5w2s", 0),
        ("again", 1),
    ]


def test_more_training_goes_on_and_voids_what_was_evaluated_before(copied: Path) -> None:
    assert TINY.train is not None
    longer = replace(TINY, train=replace(TINY.train, iterations=8, log_every=4))
    trained(longer, copied, TEST)
    assert [row["iteration"] for row in read_history(copied / "history.csv")] == [3, 6, 8]
    assert load_config(copied) == longer
    assert [record["name"] for record in read_evaluations(copied)["evaluations"]] == ["tiny-5w1s"]


def test_reproducing_gives_the_same_bits_and_all_evaluations(
    recorded: tuple[Path, list[Evaluation]], tmp_path: Path
) -> None:
    folder, found = recorded
    again = reproduce(folder, tmp_path / "again", device="cpu", progress_bar=False)
    assert again == [("tiny-5w1s", found[0], found[0]), ("tiny-5w2s", found[1], found[1])]
    first, second = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_configuration_alone_is_reproduced_too(recorded: tuple[Path, list[Evaluation]], tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    shutil.copy(recorded[0] / "config.json", tmp_path / "given")
    source = tmp_path / "given"
    wrong = json.loads((source / "config.json").read_text()) | {"k_shot": 1}
    (source / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="k_shot \\+ n_query = 16 exceeds the 8 drawings"):  # of the default test
        reproduce(source, tmp_path / "new", device="cpu", progress_bar=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("config", [PRETRAINED, UNTRAINED, METRIC], ids=lambda config: config.learner.tag)
def test_other_methods_go_the_same_way(config: RunConfig, tmp_path: Path) -> None:
    [found] = trained(config, tmp_path / "run", replace(TEST, n_way=5))
    assert evaluate_run(tmp_path / "run", replace(TEST, n_way=5)) == found
    assert (tmp_path / "run" / "model.safetensors").exists() == (config.train is not None)
    assert load_run("tiny-5w1s", tmp_path).history == (
        [] if config.train is None else load_run("run", tmp_path).history
    )


def test_a_regression_is_recorded_step_by_step(tmp_path: Path) -> None:
    test = TestConfig("waves", n_query=10, n_episodes=4)
    longer = replace(test, name="longer", learner={"test_inner_steps": 6})
    found = trained(WAVES, tmp_path / "run", test, longer)
    assert [f.metric for f in found] == ["mse_by_step"] * 2
    assert [len(read_evaluations(tmp_path / "run")["evaluations"][i]["mse_by_step"]) for i in (0, 1)] == [4, 7]
    assert recorded_accuracy("longer", tmp_path) == found[1]
    assert math.isnan(read_history(tmp_path / "run" / "history.csv")[-1]["validation_accuracy"])
    other = evaluate_run(tmp_path / "run", replace(test, split="validation"))
    assert other.mean != found[0].mean  # at another seed, since the waves are the same


def test_a_stream_is_recorded_instance_by_instance_and_validated_as_one(tmp_path: Path) -> None:
    tasks = TestConfig("tasks", k_shot=2, n_query=3, n_episodes=4)
    found, of_tasks = trained(STREAM, tmp_path / "run", STREAM_TEST, tasks)
    assert (found.metric, of_tasks.metric) == ("accuracy_by_instance", "accuracy")
    record, other = read_evaluations(tmp_path / "run")["evaluations"]
    assert record["stream"] is True and "accuracy" not in record and "stream" not in other
    assert len(record["accuracy_by_instance"]) == len(record["ci95_by_instance"]) == 3
    assert recorded_accuracy("stream", tmp_path) == found == evaluate_run(tmp_path / "run", STREAM_TEST)
    learner, spec = load_learner(tmp_path / "run", STREAM), STREAM.validation_spec
    sampler = STREAM.data.load().validation.sampler(spec, seed=runs.VALIDATION_SEED)
    last = read_history(tmp_path / "run" / "history.csv")[-1]["validation_accuracy"]
    assert spec.k_shot == 3
    assert last == pytest.approx(scores(learner, sampler, 20, stream=True).mean().item(), abs=1e-6)


# --- weights ---


def test_many_weights_are_recorded_in_half_precision_and_evaluated_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(STREAM, tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert {t.dtype for t in whole.values()} == {torch.float32}
    monkeypatch.setattr(runs, "WEIGHTS_LIMIT", (tmp_path / "whole" / "model.safetensors").stat().st_size - 1)
    trained(STREAM, tmp_path / "half")
    half, read = (
        load_file(tmp_path / "half" / "model.safetensors"),
        load_learner(tmp_path / "half", STREAM).state_dict(),
    )
    for name, tensor in half.items():
        assert torch.equal(tensor, whole[name].half())  # the same training
        assert torch.equal(read[name], tensor.float())


class Tied(Learner):
    """Two names for one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.other = nn.Linear(3, 3)
        self.other.weight = self.one.weight

    def forward(self, episode: Any) -> Any:
        return episode


def test_tied_parameters_are_recorded_under_both_names(tmp_path: Path) -> None:
    learner = Tied()
    runs._write_parameters(learner, tmp_path / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    assert torch.equal(written["one.weight"], written["other.weight"]) and learner.one.weight is learner.other.weight


COMPLEX = (lambda w: w.to(torch.complex64), r"is of torch\.complex64, not of torch\.float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *([COMPLEX] if "C64" in safetensors.torch._TYPES else []),  # the oldest safetensors cannot write them
        (lambda w: w.mul(math.nan), "numbers that are not finite"),
        (lambda w: w.div(0), "numbers that are not finite"),
        (lambda w: w.to(torch.int64), r"'network\.head\.weight' is of torch\.int64, not of torch\.float32"),
        (lambda w: w.double(), r"is of torch\.float64, not of torch\.float32"),
        (lambda w: w.bfloat16(), r"is of torch\.bfloat16, not of torch\.float32"),
        (lambda w: w[:3], r"another architecture: 'network\.head\.weight' is \(3, 8\) there and \(5, 8\) here"),
    ],
)
def test_weights_that_are_none_are_refused(copied: Path, change: Any, message: str) -> None:
    parameters = load_file(copied / "model.safetensors")
    save_file(parameters | {"network.head.weight": change(parameters["network.head.weight"])}, copied / "new")
    (copied / "new").rename(copied / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        load_run("tiny-5w1s", copied.parent).learner()
    assert "\n" not in str(error.value)


def test_damaged_or_missing_weights_are_refused(copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_learner(copied, TINY)
    path.unlink()
    with pytest.raises(ValueError, match="absent there"):
        load_learner(copied, TINY)
    path.mkdir()
    with pytest.raises(ValueError, match="damaged"):
        load_learner(copied, TINY)


# --- what goes wrong ---


def test_a_folder_belongs_to_one_configuration(copied: Path) -> None:
    before = {path: path.read_bytes() for path in copied.iterdir()}
    with pytest.raises(ValueError, match="another configuration"):
        trained(PRETRAINED, copied)
    assert {path: path.read_bytes() for path in copied.iterdir()} == before


@pytest.mark.parametrize(
    ("config", "test", "message"),
    [
        (replace(TINY, n_way=20_000), TEST, "exceeds the .* classes"),
        (replace(TINY, k_shot=7), TEST, r"k_shot \+ n_query = 10 exceeds the 8 drawings"),
        (TINY, replace(TEST, k_shot=7), r"k_shot \+ n_query = 10 exceeds the 8 drawings"),
        (replace(TINY, validation=ValidationConfig(n_query=8)), TEST, r"k_shot \+ n_query = 9 exceeds"),
        (TINY, replace(TEST, n_way=4), "maml is made for n_way = 5, not 4"),
        (TINY, replace(TEST, learner={"steps": 4}), "steps: Unexpected"),
    ],
)
def test_what_does_not_fit_fails_before_the_training(
    config: RunConfig, test: TestConfig, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trained(config, tmp_path / "run", test)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "3",
        '{"evaluations": 3}',
        '{"evaluations": [3]}',
        '{"evaluations": [{"name": "a"}]}',
        '{"evaluations": [{"accuracy": 1}]}',
        "[" * 100_000,
    ],
)
def test_a_damaged_record_is_named_and_hides_no_other(copied: Path, damage: str) -> None:
    shutil.copytree(copied, copied.parent / "whole")
    (copied.parent / "whole" / "evaluations.json").write_text(
        (copied / "evaluations.json").read_text().replace("tiny-", "whole-")
    )
    (copied / "evaluations.json").write_text(damage)
    with pytest.raises(ValueError, match=r"tiny/evaluations\.json is damaged") as error:
        read_evaluations(copied)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    with pytest.raises(ValueError, match="is damaged"):
        load_run("tiny", copied.parent)
    assert run_names(copied.parent) == ["whole-5w1s", "whole-5w2s"]
    assert load_run("whole-5w1s", copied.parent).config == TINY


@pytest.mark.parametrize("damage", [b"", b"\xff\xff", b"iteration\n3\n", b"iteration,seconds\n3\n", b"a,b\n1,x\n"])
def test_a_damaged_history_is_named(copied: Path, damage: bytes) -> None:
    (copied / "history.csv").write_bytes(damage)
    if not damage:
        assert load_run("tiny-5w1s", copied.parent).history == []
        return
    with pytest.raises(ValueError, match=r"history\.csv is damaged"):
        load_run("tiny-5w1s", copied.parent)


@pytest.mark.parametrize("lost", ["name", "n_way", "ci95", "accuracy", "split"])
def test_an_evaluation_without_a_field_is_damaged(copied: Path, lost: str) -> None:
    about = json.loads((copied / "evaluations.json").read_text())
    del about["evaluations"][1][lost]
    (copied / "evaluations.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=f"is damaged .*{lost}"):
        read_evaluations(copied)


@pytest.mark.parametrize("name", ["", ".", "..", "../tiny", "a/b", "a\\b", "/etc", "a\nb", "a\0b", "-a", "x" * 101])
def test_a_name_is_that_of_a_single_folder(name: str, copied: Path) -> None:
    with pytest.raises(ValueError, match="a name has 1 to 100 letters"):
        load_run(name, copied.parent)
    with pytest.raises(ValueError, match="a name has 1 to 100 letters"):
        evaluate_run(copied, replace(TEST, name=name), record=True)


def test_an_unknown_run_is_an_error_that_knows_the_near_ones(recorded: tuple[Path, list[Evaluation]]) -> None:
    with pytest.raises(ValueError, match="no recorded run 'tiny-5w3s'; did you mean tiny-5w2s or tiny-5w1s"):
        load_run("tiny-5w3s", recorded[0].parent)
    with pytest.raises(ValueError, match="no recorded run 'nonsense'; did you mean one that `metatutor runs` lists"):
        load_run("nonsense", recorded[0].parent)
