"""Recorded runs: configuration in and out, training from it alone, and the weights that were recorded."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from metatutor import recording
from metatutor.baselines import NearestPixelsConfig, PretrainedCosineConfig, PretrainedFinetunedConfig, ScratchConfig
from metatutor.data import Strokes
from metatutor.episodes import ClassImages, StreamSampler
from metatutor.evaluation import ByInstance, Evaluation, Regression, evaluate_stream, instance_accuracies
from metatutor.learner import Learner
from metatutor.memory import MANN, FeedForwardConfig, MANNConfig, MetaNetConfig, PlainLSTMConfig, SNAILConfig
from metatutor.metric import MatchingConfig, PrototypicalConfig, RelationConfig, SiameseConfig
from metatutor.optimization import MAMLConfig
from metatutor.recording import (
    FILES,
    DataConfig,
    EvaluationConfig,
    MLPConfig,
    NetworkConfig,
    PixelsConfig,
    RunConfig,
    SinusoidsConfig,
    config_text,
    evaluate_learner,
    load_config,
    load_learner,
    load_run,
    parse_config,
    recorded_accuracy,
    results_folder,
    run_names,
    run_training,
)
from metatutor.training import TrainConfig, read_history

TINY = RunConfig(
    learner=MAMLConfig(test_inner_steps=2),
    network=NetworkConfig(filters=4, n_blocks=2, hidden=(8,)),
    data=DataConfig(source="strokes"),
    n_query=2,
    train=TrainConfig(iterations=6, tasks_per_step=2, warmup=2, log_every=3, checkpoint_every=2),
    evaluation=EvaluationConfig(n_query=3, n_episodes=20),
)
PRETRAINED = replace(TINY, learner=PretrainedCosineConfig())
UNTRAINED = replace(TINY, learner=NearestPixelsConfig(), train=None)
METRIC = replace(
    TINY,
    learner=PrototypicalConfig(),
    network=NetworkConfig(filters=4, n_blocks=2, pooling="max", normalization="group"),
    n_way=8,
    evaluation=replace(TINY.evaluation, n_way=5),
)
WAVES = RunConfig(
    learner=MAMLConfig(inner_lr=0.01),
    network=MLPConfig(hidden=(8,)),
    data=SinusoidsConfig(),
    n_way=1,
    k_shot=5,
    train=TrainConfig(iterations=3, tasks_per_step=2),
    evaluation=EvaluationConfig(n_query=10, n_episodes=4),
)
STREAM = RunConfig(
    learner=MANNConfig(n_way=3, hidden_size=8, slots=6, width=4, heads=2),
    network=PixelsConfig(size=4),
    data=DataConfig(source="strokes"),
    n_way=3,
    k_shot=4,
    n_query=1,
    train=TrainConfig(iterations=2, tasks_per_step=2, warmup=1),
    evaluation=EvaluationConfig(n_query=1, n_episodes=4, k_shot=3, stream=True),
)
CONFIGS = [
    WAVES,
    STREAM,
    replace(STREAM, learner=MANNConfig(n_way=3, sharpen=False, labels="letters", usage_decay=0.5)),
    replace(STREAM, learner=PlainLSTMConfig(n_way=3, labels="letters"), network=NetworkConfig(normalization="group")),
    replace(STREAM, learner=FeedForwardConfig(n_way=3)),
    TINY,
    PRETRAINED,
    UNTRAINED,
    replace(TINY, learner=PretrainedFinetunedConfig(steps=2)),
    replace(TINY, learner=ScratchConfig(steps=2), train=None),
    METRIC,
    replace(METRIC, learner=MatchingConfig(full_context=True)),
    replace(METRIC, learner=SiameseConfig(finetune_steps=1)),
    replace(METRIC, learner=RelationConfig(), network=replace(METRIC.network, n_halving=1)),
    replace(TINY, data=DataConfig(split="lake", rotations=False), network=NetworkConfig(normalization="group")),
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluation]:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    evaluation = run_training(TINY, folder, device="cpu", progress_bar=False)
    assert isinstance(evaluation, Evaluation)
    return folder, evaluation


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.learner.method)
def test_a_configuration_survives_json(config: RunConfig) -> None:
    assert parse_config(config_text(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(n_wya=5), r"config.json: n_wya: .*[Uu]nexpected"),
        (lambda c: c["train"].update(lr=1), r"train\.lr"),
        (lambda c: c["learner"].update(alpha=1), r"alpha"),
        (lambda c: c["learner"].update(inner_lr="big"), r"inner_lr.*number.*'big'"),
        (lambda c: c.update(n_way="5"), r"n_way.*integer.*'5'"),
        (lambda c: c.update(k_shot=True), r"k_shot.*integer"),
        (lambda c: c["learner"].update(inner_lr=-0.1), r"inner_lr must be positive"),
        (lambda c: c["learner"].update(method="mamal"), r"learner.*mamal"),
        (lambda c: c["network"].update(normalization="layer"), r"normalization"),
    ],
)
def test_a_wrong_configuration_is_named_in_one_line(change, message: str) -> None:
    config = json.loads(config_text(TINY))
    change(config)
    with pytest.raises(ValueError, match=message) as error:
        parse_config(json.dumps(config))
    assert "\n" not in str(error.value)


def test_a_run_leaves_the_four_files(recorded: tuple[Path, Evaluation]) -> None:
    folder, evaluation = recorded
    assert {path.name for path in folder.iterdir()} == {*FILES, "checkpoint.pt"}
    about = json.loads((folder / "evaluation.json").read_text())
    assert about["accuracy"] == evaluation.accuracy and about["n_episodes"] == 20
    assert about["train_iterations"] == 6 and about["train_seconds"] > 0 and about["peak_memory_mib"] > 0
    assert about["split"].endswith("/test") and about["transductive"] is True
    assert recorded_accuracy(folder) == evaluation
    run = load_run(folder.name, folder.parent)
    assert run.config == TINY and [row["iteration"] for row in run.history] == [3, 6]


def test_retraining_from_config_json_alone_gives_the_same_bits(
    recorded: tuple[Path, Evaluation], tmp_path: Path
) -> None:
    folder, evaluation = recorded
    again = run_training(load_config(folder / "config.json"), tmp_path / "again", device="cpu", progress_bar=False)
    assert again == evaluation
    first, second = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_recorded_weights_give_the_recorded_accuracy(recorded: tuple[Path, Evaluation]) -> None:
    folder, evaluation = recorded
    learner = load_learner(folder, TINY)
    assert not learner.training
    assert evaluate_learner(learner, TINY.data.load(), TINY) == evaluation


def test_seeds_of_training_matter(recorded: tuple[Path, Evaluation], tmp_path: Path) -> None:
    assert TINY.train is not None
    other = replace(TINY, train=replace(TINY.train, seed=1))
    run_training(other, tmp_path / "other", device="cpu", progress_bar=False)
    first, second = (load_file(f / "model.safetensors") for f in (recorded[0], tmp_path / "other"))
    assert not torch.equal(first["network.head.weight"], second["network.head.weight"])


@pytest.mark.parametrize("config", [PRETRAINED, UNTRAINED, METRIC], ids=["pretrained", "untrained", "metric"])
def test_other_methods_go_the_same_way(config: RunConfig, tmp_path: Path) -> None:
    evaluation = run_training(config, tmp_path / "run", device="cpu", progress_bar=False)
    learner = load_learner(tmp_path / "run", config)
    assert evaluate_learner(learner, config.data.load(), config) == evaluation
    assert (tmp_path / "run" / "model.safetensors").exists() == (config.train is not None)


def test_a_folder_belongs_to_one_configuration(recorded: tuple[Path, Evaluation]) -> None:
    before = (recorded[0] / "config.json").read_bytes()
    with pytest.raises(ValueError, match="another configuration"):
        run_training(PRETRAINED, recorded[0], device="cpu", progress_bar=False)
    assert (recorded[0] / "config.json").read_bytes() == before


def test_weights_of_another_architecture_are_refused(recorded: tuple[Path, Evaluation]) -> None:
    other = replace(TINY, network=NetworkConfig(filters=8, n_blocks=2, hidden=(8,)))
    with pytest.raises(ValueError, match=r"another architecture: 'network\.\S+' is \(.*\) there and \(.*\) here"):
        load_learner(recorded[0], other)


def test_damaged_or_missing_weights_are_refused(recorded: tuple[Path, Evaluation], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((recorded[0] / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_learner(tmp_path, TINY)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="absent there"):
        load_learner(tmp_path, TINY)
    save_file({"network.head.weight": torch.zeros(5, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="absent there"):
        load_learner(tmp_path, TINY)


def test_too_many_ways_fail_before_the_training(tmp_path: Path) -> None:
    for case, (wrong, message) in enumerate(
        (
            (replace(TINY, n_way=20_000), "exceeds the .* classes"),
            (replace(TINY, k_shot=19, n_query=1), r"k_shot \+ n_query = 22 exceeds the 20 drawings"),
            (replace(TINY, n_way=0), "n_way must be a positive integer"),
        )
    ):
        folder = tmp_path / str(case)
        with pytest.raises(ValueError, match=message):
            run_training(wrong, folder, device="cpu", progress_bar=False)
        assert not (folder / "checkpoint.pt").exists()


def test_a_run_may_be_tested_with_another_number_of_shots(tmp_path: Path) -> None:
    two = replace(TINY, evaluation=replace(TINY.evaluation, k_shot=2))
    evaluations = [run_training(c, tmp_path / str(c.test_spec.k_shot), progress_bar=False) for c in (TINY, two)]
    assert [(vars(e)["n_way"], e.k_shot) for e in evaluations] == [(5, 1), (5, 2)]
    weights = [(tmp_path / k_shot / "model.safetensors").read_bytes() for k_shot in "12"]
    validation = [read_history(tmp_path / k_shot / "history.csv")[-1]["validation_accuracy"] for k_shot in "12"]
    assert weights[0] == weights[1]
    assert validation[0] != validation[1]  # on tasks of as many shots as the test's


def test_a_metric_run_may_be_tested_with_another_number_of_ways(tmp_path: Path) -> None:
    evaluation = run_training(METRIC, tmp_path / "run", progress_bar=False)
    assert (METRIC.train_spec.n_way, METRIC.validation_spec.n_way, vars(evaluation)["n_way"]) == (8, 8, 5)
    assert "network.head.weight" not in load_file(tmp_path / "run" / "model.safetensors")


def test_a_regression_is_recorded_step_by_step(tmp_path: Path) -> None:
    assert WAVES.regression and not TINY.regression
    found = run_training(WAVES, tmp_path / "run", progress_bar=False)
    assert isinstance(found, Regression) and len(found.mse_by_step) == len(found.ci95_by_step) == 11
    assert recorded_accuracy(tmp_path / "run") == found
    assert "train_seconds" in json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert math.isnan(read_history(tmp_path / "run" / "history.csv")[-1]["train_accuracy"])
    again = evaluate_learner(load_learner(tmp_path / "run", WAVES), WAVES.data.load(), WAVES)
    assert again == found
    with pytest.raises(ValueError, match="sinusoids need a network of kind 'mlp'"):
        replace(WAVES, network=NetworkConfig())


@pytest.fixture
def few_strokes(monkeypatch: pytest.MonkeyPatch) -> None:
    strokes = Strokes.load(n_alphabets=6, characters_per_alphabet=4, drawings=8)
    monkeypatch.setattr(recording, "_strokes", lambda: strokes)


def test_a_stream_is_recorded_instance_by_instance(tmp_path: Path, few_strokes: None) -> None:
    """And validated as a stream, on as many images of a class as in the test."""
    found = run_training(STREAM, tmp_path / "run", device="cpu", progress_bar=False)
    assert isinstance(found, ByInstance)
    assert len(found.accuracy_by_instance) == len(found.ci95_by_instance) == 3
    assert (found.n_episodes, found.n_way, found.k_shot) == (4, 3, 3) and found.split.endswith("/test")
    about = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert about["accuracy_by_instance"] == found.accuracy_by_instance and about["train_iterations"] == 2
    assert "accuracy" not in about
    assert recorded_accuracy(tmp_path / "run") == found
    learner, splits = load_learner(tmp_path / "run", STREAM), STREAM.data.load()
    assert isinstance(learner, MANN)
    assert evaluate_learner(learner, splits, STREAM) == found
    assert isinstance(splits.validation, ClassImages)
    sampler = StreamSampler(splits.validation, STREAM.validation_spec, seed=recording._VALIDATION_SEED)
    last = read_history(tmp_path / "run" / "history.csv")[-1]["validation_accuracy"]
    assert last == pytest.approx(instance_accuracies(learner, sampler, 200).mean().item(), abs=1e-6)


def test_a_stream_is_evaluated_as_its_configuration_says(few_strokes: None) -> None:
    """On the split, the episodes and the seed that are asked for; and on query images, unless it says `stream`."""
    learner, splits = STREAM.build(5).eval(), STREAM.data.load()
    assert isinstance(learner, MANN) and isinstance(splits.validation, ClassImages)
    seeded = replace(STREAM, evaluation=replace(STREAM.evaluation, seed=7))
    found = evaluate_learner(learner, splits, seeded, split="validation", n_episodes=9)
    by_hand = evaluate_stream(
        learner, splits.validation, STREAM.test_spec, n_episodes=9, seed=7, split=f"{splits.id}/validation"
    )
    assert found == by_hand
    queries = replace(STREAM, evaluation=replace(STREAM.evaluation, stream=False))
    assert isinstance(evaluate_learner(learner, splits, queries), Evaluation)


def test_a_stream_is_trained_alike_again(tmp_path: Path, few_strokes: None) -> None:
    evaluations = [run_training(STREAM, tmp_path / run, device="cpu", progress_bar=False) for run in "ab"]
    assert evaluations[0] == evaluations[1]
    first, second = (load_file(tmp_path / run / "model.safetensors") for run in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learner": MAMLConfig()}, "maml answers no stream; leave evaluation.stream out"),
        ({"learner": SNAILConfig(n_way=3)}, "snail answers no stream; leave evaluation.stream out"),
        ({"learner": MetaNetConfig(n_way=3)}, "metanet answers no stream; leave evaluation.stream out"),
        ({"learner": PrototypicalConfig(), "evaluation": EvaluationConfig()}, "prototypical needs a network that"),
        ({"learner": MAMLConfig(), "evaluation": EvaluationConfig()}, "learns; leave out kind 'pixels'"),
        ({"n_way": 5}, "learner.n_way = 3, n_way = 5, evaluation.n_way = None: mann reads labels of so many classes"),
        ({"learner": PlainLSTMConfig(n_way=4)}, "learner.n_way = 4, n_way = 3, evaluation.n_way = None: plain_lstm"),
        ({"evaluation": EvaluationConfig(n_way=5)}, "n_way = 3, evaluation.n_way = 5: mann .*; let them agree"),
        ({"network": MLPConfig()}, "sinusoids need a network of kind 'mlp', and images need a ConvNet"),
        ({"data": SinusoidsConfig()}, "sinusoids need a network of kind 'mlp'"),
    ],
)
def test_what_no_stream_can_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(STREAM, **change)
    wrong = json.loads(config_text(STREAM)) | {name: asdict(c) if name != "n_way" else c for name, c in change.items()}
    with pytest.raises(ValueError, match=message):  # also where it is read from a file
        parse_config(json.dumps(wrong))


def test_labels_may_be_of_as_many_classes_as_the_test_has_too() -> None:
    same = replace(STREAM, evaluation=EvaluationConfig(n_way=3, stream=True))
    assert same.test_spec.n_way == same.validation_spec.n_way == 3


def test_a_configuration_of_pixels(few_strokes: None) -> None:
    learner = parse_config(config_text(STREAM)).build(7)
    assert isinstance(learner, MANN)
    assert learner.network.embedding_size == 16
    with pytest.raises(ValueError, match=r"config.json: network\..*kind"):
        parse_config(config_text(STREAM).replace('"pixels"', '"pixel"'))


def test_many_weights_are_recorded_in_half_precision_and_evaluated_so(
    few_strokes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_training(STREAM, tmp_path / "whole", device="cpu", progress_bar=False)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert {t.dtype for t in whole.values()} == {torch.float32}

    monkeypatch.setattr(recording, "WEIGHTS_LIMIT", (tmp_path / "whole" / "model.safetensors").stat().st_size - 1)
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(learner: Learner, *_: object) -> object:
        seen.append({name: tensor.clone() for name, tensor in learner.state_dict().items()})
        return found

    monkeypatch.setattr(recording, "evaluate_learner", evaluate)
    run_training(STREAM, tmp_path / "half", device="cpu", progress_bar=False)
    half = load_file(tmp_path / "half" / "model.safetensors")
    for name, tensor in half.items():
        assert tensor.dtype == torch.float16
        torch.testing.assert_close(tensor, whole[name].half(), rtol=0, atol=0)  # the same training
        torch.testing.assert_close(seen[0][name], tensor.float(), rtol=0, atol=0)


@pytest.mark.parametrize("learner", [MAMLConfig(), ScratchConfig()], ids=lambda learner: learner.method)
def test_a_last_layer_is_for_the_ways_of_its_training(learner: MAMLConfig | ScratchConfig) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.n_way = 20 but a last layer for n_way = 5"):
        replace(TINY, learner=learner, evaluation=EvaluationConfig(n_way=20))


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to"):
        run_training(TINY, tmp_path / "file" / "run", device="cpu", progress_bar=False)


def test_an_unknown_run_is_an_error_that_lists_the_known(recorded: tuple[Path, Evaluation]) -> None:
    with pytest.raises(ValueError, match="no recorded run 'nonsense'; there are: tiny"):
        load_run("nonsense", recorded[0].parent)


@pytest.mark.parametrize("name", run_names())
def test_every_recorded_run_is_whole(name: str) -> None:
    run = load_run(name)
    learner = run.learner()
    if run.config.evaluation.stream:
        measured = ("accuracy_by_instance", "ci95_by_instance")
        assert [len(run.evaluation[key]) for key in measured] == 2 * [run.evaluation["k_shot"]]
    else:
        measured = ("mse_by_step", "ci95_by_step") if run.config.regression else ("accuracy", "ci95")
    for key in (*measured, "train_seconds", "train_iterations", "device", "torch", "peak_memory_mib"):
        assert key in run.evaluation
    assert run.evaluation["n_episodes"] >= (600 if run.config.regression else 1000)  # as many as the papers have
    assert run.evaluation["parameters"] == sum(p.numel() for p in learner.parameters())
    assert (run.config.train is None) == (run.history == [])
    weights = results_folder() / name / "model.safetensors"
    assert not weights.exists() or weights.stat().st_size <= 2_000_000
