"""Configurations: read from constructors, strict as JSON, and refused before anything is loaded or computed."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from metatutor import MAML, ConvNet, Episode, Learner
from metatutor.config import (
    DataConfig,
    RunConfig,
    SinusoidsConfig,
    TestConfig,
    ValidationConfig,
    config_of,
    config_text,
    known,
    load_config,
    parse_config,
    parse_test,
)
from metatutor.training import TrainConfig

METHODS, KINDS = known("method"), known("kind")
CONV = KINDS["conv-net"]
GROUP = CONV(normalization="group", pooling="max", n_halving=2)


class Stranger(Learner):
    """Somebody's method.

    Args:
        network: any.
        widths: of its layers.
        rate: how fast,
            and how slow.
        kind_of: one of two.
        loss: a function.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        widths: Sequence[int] = [3, 4],
        rate: float | None = None,
        kind_of: Literal["a", "b"] = "a",
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.network = network

    def forward(self, episode: Episode) -> Tensor:
        return torch.zeros(*episode.query_images.shape[:2], episode.n_way)


def config(method: str = "maml", **changes: Any) -> RunConfig:
    learner = METHODS[method](**changes.pop("learner", {}))
    return RunConfig(**{"learner": learner, "network": GROUP, "data": DataConfig(source="strokes")} | changes)


# --- read from constructors ---


def test_every_method_and_network_has_one_tag() -> None:
    assert sorted(METHODS) == sorted(
        [
            "maml",
            "implicit-maml",
            "reptile",
            "meta-lstm",
            "plain-lstm",
            "feed-forward",
            "meta-net",
            "snail",
            "mann",
            "nearest-pixels",
            "scratch",
            "pretrained-finetuned",
            "pretrained-cosine",
            "siamese",
            "matching",
            "prototypical",
            "proto-maml",
            "r2d2",
            "relation",
        ]
    )
    assert sorted(KINDS) == ["conv-net", "mlp", "pixels", "res-net"]


@pytest.mark.parametrize("made", [*METHODS.values(), *KINDS.values()], ids=lambda made: made.tag)
def test_a_configuration_has_the_arguments_and_defaults_of_its_constructor(made: Any) -> None:
    arguments = inspect.signature(made.of.__init__).parameters
    assert {f.name for f in fields(made)} - {"method", "kind"} <= set(arguments)
    left_out = set(arguments) - {f.name for f in fields(made)}
    assert left_out <= {"self", "args", "kwargs", "network", "n_outputs", "loss", "inner_loss"}
    assert all(getattr(made(), f.name) == arguments[f.name].default for f in fields(made) if f.name in arguments)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_built_has_the_arguments_of_its_configuration(method: str) -> None:
    learner = config(method).build(n_train_classes=7)
    assert type(learner) is METHODS[method].of
    written = {name: value for name, value in asdict(config(method).learner).items() if name != "method"}
    assert {name: learner.arguments[name] for name in written} == written


def test_a_strangers_method_needs_no_configuration_class() -> None:
    made = config_of(Stranger)
    assert asdict(made()) == {"method": "stranger", "widths": (3, 4), "rate": None, "kind_of": "a"}
    assert {f.name: f.type for f in fields(made)}["widths"] == tuple[int, ...]
    run = RunConfig(learner=made(rate=0.5), network=GROUP, data=DataConfig(source="strokes"))
    built = run.build(n_train_classes=7)
    assert isinstance(built, Stranger) and built.arguments["rate"] == 0.5
    assert config_of(Stranger) is made and made() == made() and hash(made()) == hash(made())


def test_a_seed_draws_the_initial_parameters_and_leaves_other_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    seven, again, eight = (config(train=TrainConfig(seed=s)).build(1).state_dict() for s in (7, 7, 8))
    assert torch.equal(torch.rand(3), expected)
    name = "network.blocks.0.weight"
    assert torch.equal(seven[name], again[name]) and not torch.equal(seven[name], eight[name])


# --- as JSON ---

CONFIGS = [
    *(config(method) for method in METHODS),
    config("siamese", n_way=20, learner={"finetune_steps": 3}),
    config("mann", network=KINDS["pixels"](size=4), validation=ValidationConfig(k_shot=3, stream=True)),
    config(network=KINDS["mlp"](hidden=(8,)), data=SinusoidsConfig(), n_way=1, k_shot=10),
    config(network=CONV(hidden=(64, 32)), data=DataConfig(split="lake", rotations=False)),
]


@pytest.mark.parametrize("run", CONFIGS, ids=lambda run: run.learner.tag)
def test_a_configuration_survives_json(run: RunConfig) -> None:
    assert parse_config(config_text(run)) == run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(n_wya=5), r"n_wya: Unexpected .*\(got 5\)"),
        (lambda c: c["train"].update(lr=1), r"train\.lr: Unexpected"),
        (lambda c: c["learner"].update(alpha=1), r"learner\.maml\.alpha: Unexpected"),
        (lambda c: c["learner"].update(inner_lr="big"), r"learner\.maml\.inner_lr: .*number \(got 'big'\)"),
        (lambda c: c["learner"].update(inner_lr=float("nan")), r"learner\.maml\.inner_lr: .*finite"),
        (lambda c: c["learner"].update(method="mamal"), r"learner: .*'mamal' .*'maml'"),
        (lambda c: c["learner"].update(inner_lr=-0.1), r"inner_lr must be positive, got -0.1"),
        (lambda c: c["learner"].pop("method"), r"learner: .*method"),
        (lambda c: c["network"].update(kind="mpl"), r"network: .*'mpl' .*'mlp'"),
        (lambda c: c["network"].update(normalization="layer"), r"network\.conv-net\.normalization: .*'group'"),
        (lambda c: c["network"].update(hidden=[1, "2"]), r"network\.conv-net\.hidden\.1: .*integer \(got '2'\)"),
        (lambda c: c["data"].update(source="mnist"), r"data: .*'mnist' .*'omniglot'"),
        (lambda c: c.update(n_way="5"), r"n_way: .*integer \(got '5'\)"),
        (lambda c: c.update(k_shot=True), r"k_shot: .*integer"),
        (lambda c: c.update(learner=3), r"learner: .*object \(got 3\)"),
        (lambda c: c.update(n_way="x" * 10_000), r"n_way: .{,260}…\)$"),
    ],
)
def test_a_wrong_configuration_is_named_in_one_line(change: Callable[[dict], Any], message: str) -> None:
    wrong = json.loads(config_text(config()))
    change(wrong)
    with pytest.raises(ValueError, match=rf"^a\.json: {message}") as error:
        parse_config(json.dumps(wrong), "a.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"n_way": 5, "k_shot": 1, "n_way": 6}', "the key 'n_way' appears twice"),
        ('{"train": {"seed": 1, "seed": 2}}', "the key 'seed' appears twice"),
        ("[" * 100_000, "recursion"),
        ('{"n_way": 5', "delimiter"),
        ("", "Expecting value"),
        ("[]", "object"),
        ('{"n_way": ' + "9" * 5000 + "}", "digits"),
    ],
)
def test_what_is_no_configuration_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse_config(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_what_is_no_file_of_ours_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match="cannot read .*not a file"):
        load_config(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot read .*utf-8"):
        load_config(tmp_path)
    path.write_bytes(b" " * 2_000_000)
    with pytest.raises(ValueError, match="cannot read .*too large"):
        load_config(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="cannot read .*not a file"):
        load_config(tmp_path)


# --- refused at once ---


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("maml", {"n_way": 0}, "n_way must be a positive integer, got 0"),
        ("maml", {"learner": {"inner_lr": -1.0}}, "inner_lr must be positive"),
        ("maml", {"learner": {"test_inner_lr": 0.0}}, "test_inner_lr must be positive"),
        ("maml", {"network": CONV(filters=10**9)}, "cannot be built with this network: .*overflow"),
        ("maml", {"network": CONV(filters=20_000)}, r"[\d,]+ parameters are more than the 1,073,741,824"),
        ("prototypical", {"network": CONV(filters=10**30)}, "cannot be built with this network"),
        ("maml", {"n_way": 10**9}, r"[\d,]+ parameters are more than"),
        ("maml", {"network": None}, "cannot be built with this network: .*network"),
        ("maml", {"network": KINDS["pixels"]()}, "needs a network with a last layer; pixels has none"),
        ("prototypical", {"network": KINDS["pixels"]()}, "has nothing to learn with this network"),
        ("maml", {"network": CONV(in_channels=3)}, r"strokes are inputs of \(1, 28, 28\), which this network does not"),
        ("maml", {"network": KINDS["mlp"]()}, "which this network does not take"),
        ("maml", {"data": DataConfig(image_size=14)}, r"omniglot are inputs of \(1, 14, 14\), which this network"),
        ("maml", {"data": SinusoidsConfig()}, r"sinusoids are inputs of \(1,\), which this network does not take"),
        ("mann", {"network": CONV()}, "a stream is answered image by image"),
        ("mann", {"n_way": 3}, "mann is made for n_way = 5, not 3; make them agree"),
        ("plain-lstm", {"learner": {"n_way": 3}}, "plain-lstm is made for n_way = 3, not 5"),
        ("maml", {"validation": ValidationConfig(stream=True)}, "maml answers no stream"),
        ("snail", {"validation": ValidationConfig(stream=True)}, "snail answers no stream"),
        ("maml", {"validation": ValidationConfig(k_shot=0)}, "k_shot must be a positive integer"),
        ("nearest-pixels", {"train": TrainConfig(iterations=3)}, "nearest-pixels learns nothing before it sees a task"),
        ("scratch", {"train": TrainConfig(iterations=3)}, "scratch learns nothing"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused_at_once(method: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        config(method, **changes)
    assert "\n" not in str(error.value)


def test_images_are_loaded_in_the_size_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def load(root: object, *, image_size: int) -> object:
        sizes.append(image_size)
        raise InterruptedError

    monkeypatch.setattr("metatutor.config.Omniglot.load", load)
    run = config("maml", data=DataConfig(image_size=14), network=CONV(image_size=14))
    with pytest.raises(InterruptedError):
        run.data.load()
    assert sizes == [14] and parse_config(config_text(run)) == run


def test_a_size_that_images_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size must be from 1 to 105 pixels, got 106"):
        DataConfig(image_size=106)
    with pytest.raises(ValueError, match=r"Strokes are drawn with 28×28 pixels, got image_size=14; use 28"):
        DataConfig(source="strokes", image_size=14)


def test_what_a_method_does_not_use_is_not_written_down() -> None:
    assert config("nearest-pixels").network is None and config("nearest-pixels").train is None
    assert config("scratch").network == GROUP and config("scratch").train is None


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30])
def test_a_seed_beyond_64_bits_is_refused(seed: int) -> None:
    for make in (TrainConfig, TestConfig):
        with pytest.raises(ValueError, match="seed must be from 0 to"):
            make(seed=seed)


@pytest.mark.parametrize("n_episodes", [1, 0, -3])
def test_too_few_tasks_for_an_interval_are_refused(n_episodes: int) -> None:
    with pytest.raises(ValueError, match=f"n_episodes must be at least 2 for an interval, got {n_episodes}"):
        TestConfig(n_episodes=n_episodes)


# --- a test of it ---


def test_a_test_changes_arguments_of_learner_and_network() -> None:
    run = config(network=CONV())
    tested = run.tested(TestConfig(learner={"test_inner_steps": 10}, network={"normalization": "support"}))
    assert tested.learner == METHODS["maml"](test_inner_steps=10) and tested.network == CONV(normalization="support")
    assert replace(tested, learner=run.learner, network=run.network) == run
    learner = tested.build(1)
    assert isinstance(learner, MAML) and isinstance(learner.network, ConvNet)
    assert (learner.test_inner_steps, learner.network.normalization) == (10, "support")


@pytest.mark.parametrize(
    ("method", "test", "message"),
    [
        ("maml", TestConfig(n_way=20), "maml is made for n_way = 5, not 20"),
        ("scratch", TestConfig(n_way=20), "scratch is made for n_way = 5, not 20"),
        ("maml", TestConfig(stream=True), "maml answers no stream"),
        ("maml", TestConfig(k_shot=0), "k_shot must be a positive integer"),
        ("maml", TestConfig(learner={"steps": 3}), "arguments of the learner: steps: Unexpected"),
        (
            "maml",
            TestConfig(learner={"test_inner_steps": "3"}),
            "arguments of the learner: test_inner_steps: .*integer",
        ),
        ("maml", TestConfig(learner={"inner_lr": -3.0}), "inner_lr must be positive"),
        ("maml", TestConfig(network={"filtres": 3}), "arguments of the network: filtres: Unexpected"),
    ],
)
def test_a_test_that_the_learner_cannot_take_is_refused(method: str, test: TestConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(method).tested(test)


def test_a_metric_method_is_tested_with_any_ways_and_a_stream_reader_on_streams() -> None:
    assert config("prototypical", n_way=20).test_spec(TestConfig(n_way=5, k_shot=2)).n_way == 5
    assert config("prototypical", n_way=20).tested(TestConfig(n_way=5)) == config("prototypical", n_way=20)
    assert config("mann").tested(TestConfig(n_way=5, stream=True)) == config("mann")


def test_a_test_is_read_from_its_record() -> None:
    record = {"name": "a", "accuracy": 1.0, "n_way": 5, "k_shot": 1, "n_query": 15, "n_episodes": 9, "seed": 0}
    record |= {"split": "random-0/validation", "learner": {"finetune_steps": 3}}
    expected = TestConfig("a", 5, 1, 15, 9, 0, "validation", learner={"finetune_steps": 3})
    assert parse_test(record) == expected
    with pytest.raises(ValueError, match="a: k_shot: .*integer"):
        parse_test(record | {"k_shot": "one"})
