"""What a run was made from: a learner, a network, classes and a training, as in `config.json` and on the command line.

The arguments of a learner or network are written once, in its constructor. `config_of` reads them there.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import torch
import tyro
from pydantic import ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter, ValidationError
from torch import nn

from metatutor.data import Omniglot, Sinusoids, Splits, Strokes
from metatutor.data.omniglot import check_image_size
from metatutor.episodes import EpisodeSpec
from metatutor.learner import Learner
from metatutor.training import TrainConfig, check_seed

Key = Literal["method", "kind"]  # under which a learner, and a network, gives its tag
Value = bool | int | float | None | str
MOST_PARAMETERS = 2**30
_LARGEST_FILE = 2**20  # bytes of JSON
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


# --- arguments, read from a constructor ---


@dataclass(frozen=True)
class Arguments:
    """The arguments of a constructor, `of`; `config_of` makes a class from it for every learner and network."""

    of: ClassVar[Any]
    tag: ClassVar[str]

    def build(self, *positional: Any, **others: Any) -> Any:
        """The learner, given a network; or the network."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in get_args(Key)}
        return self.of(*positional, **others, **chosen)


@cache
def config_of(cls: type[nn.Module]) -> Any:
    """The arguments of a learner or network as a frozen dataclass, with its tag and its own words about each.

    All but `network` have defaults. Those that JSON cannot hold, such as a loss, are left out, and so is `n_outputs`,
    which the learner decides.

    Example:
        >>> from metatutor import MAML
        >>> config_of(MAML)(inner_lr=0.1)
        MAMLConfig(method='maml', inner_lr=0.1, inner_steps=1, ...)
    """
    tag = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls.__name__).lower()
    key: Key = "method" if issubclass(cls, Learner) else "kind"
    made: list[Any] = [(key, Annotated[Literal[tag], tyro.conf.Suppress], field(default=tag))]
    hints = get_type_hints(cls.__init__)
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        kept = _data_type(hints.get(name))
        if kept is not None and name != "n_outputs":
            default = tuple(parameter.default) if get_origin(kept) is tuple else parameter.default
            made.append((name, kept, field(default=default)))
    about = {"of": cls, "tag": tag, "__doc__": cls.__doc__, "__pydantic_config__": _STRICT}
    return make_dataclass(f"{cls.__name__}Config", made, bases=(Arguments,), frozen=True, kw_only=True, namespace=about)


def _data_type(hint: Any) -> Any:
    """A type of what JSON can hold, made hashable; None for any other."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (bool, int, float, str, type(None)) or origin is Literal:
        return hint
    if origin in (Sequence, list, tuple):
        return (item := _data_type(arguments[0])) and tuple[item, ...]
    parts = [_data_type(argument) for argument in arguments]
    return Union[tuple(parts)] if origin in (Union, types.UnionType) and None not in parts else None  # noqa: UP007


@cache
def known(key: Key) -> dict[str, Any]:
    """The learners (`"method"`) or the networks (`"kind"`) that `metatutor` exports, by their tags."""
    import metatutor  # which imports this module

    exported = [getattr(metatutor, name) for name in metatutor.__all__]
    modules = [c for c in exported if isinstance(c, type) and issubclass(c, nn.Module) and not inspect.isabstract(c)]
    return {(c := config_of(m)).tag: c for m in modules if issubclass(m, Learner) == (key == "method")}


@dataclass(frozen=True)
class _Known:
    """Stands in an annotation for one of the exported learners or networks, whatever they are by then."""

    key: Key

    def union(self) -> Any:
        return Union[tuple(Annotated[c, tyro.conf.subcommand(tag)] for tag, c in known(self.key).items())]  # noqa: UP007

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        union: Any = Annotated[self.union(), Field(discriminator=self.key)]
        return handler.generate_schema(union if self.key == "method" else union | None)


_LEARNER, _NETWORK = _Known("method"), _Known("kind")


# --- the parts of a run ---


@dataclass(frozen=True)
class DataConfig:
    """Which classes a run learns from and is tested on.

    Args:
        source: `"omniglot"` or `"strokes"`.
        split: `"random"`, `"lake"` or `"vinyals"` for Omniglot; Strokes are always split by whole alphabets.
        seed: seed of the split.
        rotations: whether rotated characters are classes of their own.
        together: the share of training tasks whose characters all come from one alphabet.
        warp: whether training images are rotated, stretched, sheared and shifted a little, at random.
        image_size: height and width in pixels; Omniglot's are shrunk from 105, Strokes are drawn with 28.
    """

    source: Literal["omniglot", "strokes"] = "omniglot"
    split: Literal["random", "lake", "vinyals"] = "random"
    seed: int = 0
    rotations: bool = True
    together: float = 0.0
    warp: bool = False
    image_size: int = 28

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_image_size(self.image_size)
        if self.source == "strokes" and self.image_size != 28:
            raise ValueError(f"Strokes are drawn with 28×28 pixels, got image_size={self.image_size}; use 28")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image: channels, height and width."""
        return (1, self.image_size, self.image_size)

    def load(self, root: Path | str | None = None) -> Splits:
        """The three splits; `root` is the folder with Omniglot (see `Omniglot.load`)."""
        if self.source == "strokes":
            splits = _strokes().split(seed=self.seed, rotations=self.rotations)
        else:
            splits = Omniglot.load(root, image_size=self.image_size).split(
                self.split, seed=self.seed, rotations=self.rotations
            )
        return replace(splits, train=replace(splits.train, together=self.together))


@dataclass(frozen=True)
class SinusoidsConfig:
    """Sine waves instead of characters, those of Finn, Abbeel & Levine (2017); all splits draw from the same ones."""

    source: Literal["sinusoids"] = "sinusoids"
    shape: ClassVar[tuple[int, ...]] = (1,)

    def load(self, root: Path | str | None = None) -> Splits[Sinusoids]:
        """The waves of the paper."""
        return Splits(Sinusoids(), Sinusoids(), Sinusoids(), "sinusoids")


@cache
def _strokes() -> Strokes:
    return Strokes.load()


_Images = Annotated[DataConfig, tyro.conf.subcommand("images")]
_Waves = Annotated[SinusoidsConfig, tyro.conf.subcommand("sinusoids")]


@dataclass(frozen=True)
class ValidationConfig:
    """How a training is monitored, on tasks of the meta-validation classes with as many ways as its own.

    Args:
        k_shot: support images of each class; default: as in training.
        n_query: query images of each class.
        n_episodes: tasks.
        stream: whether every image of the support set is classified before its label is revealed.
    """

    n_way: ClassVar[None] = None

    k_shot: int | None = None
    n_query: int = 15
    n_episodes: int = 200
    stream: bool = False


@dataclass(frozen=True)
class TestConfig:
    """One evaluation of a trained learner.

    Args:
        name: its name among all evaluations of all runs.
        n_way: classes of a task; default: as in training.
        k_shot: support images of each class; default: as in training.
        n_query: query images of each class.
        n_episodes: tasks.
        seed: seed of the stream of tasks.
        split: the classes that tasks are drawn from.
        stream: whether every image of the support set is classified before its label is revealed.
        learner: arguments of the learner that differ from training, such as test_inner_steps 10.
        network: arguments of the network that differ from training.
    """

    __test__: ClassVar[bool] = False  # for pytest

    name: str = ""
    n_way: int | None = None
    k_shot: int | None = None
    n_query: int = 15
    n_episodes: int = 1000
    seed: int = 0
    split: Literal["test", "validation"] = "test"
    stream: bool = False
    learner: dict[str, Value] = field(default_factory=dict)
    network: dict[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.n_episodes < 2:
            raise ValueError(f"n_episodes must be at least 2 for an interval, got {self.n_episodes}")
        check_seed(self.seed)


# --- the whole ---


@dataclass(frozen=True)
class RunConfig:
    """Everything needed to train a run, and nothing else.

    Args:
        learner: the method and its arguments.
        network: the network and its arguments; None for a method without one.
        data: the classes.
        n_way: classes of a training task.
        k_shot: support images of each class in training.
        n_query: query images of each class in training.
        train: the outer loop; None for a method that learns nothing before it sees a task.
        validation: how the training is monitored.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    learner: Annotated[Arguments, _LEARNER, tyro.conf.arg(constructor_factory=_LEARNER.union)] = field(
        default_factory=lambda: known("method")["maml"]()
    )
    network: Annotated[Arguments | None, _NETWORK, tyro.conf.arg(constructor_factory=_NETWORK.union)] = field(
        default_factory=lambda: known("kind")["conv-net"]()
    )
    data: Annotated[_Images | _Waves, Field(discriminator="source")] = field(default_factory=DataConfig)
    n_way: int = 5
    k_shot: int = 1
    n_query: int = 5
    train: tyro.conf.AvoidSubcommands[TrainConfig | None] = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        method = self.learner.of
        if "network" not in inspect.signature(method.__init__).parameters:
            object.__setattr__(self, "network", None)
        if not method.learns and self.train == TrainConfig():
            object.__setattr__(self, "train", None)
        specs, learner = (self.train_spec, self.validation_spec), self._outline()
        for spec in specs:
            self._check(learner, spec, self.validation.stream)
        if self.train is not None and not method.learns:
            raise ValueError(f"{self.learner.tag} learns nothing before it sees a task; leave out `train`")
        if self.train is not None and not any(p.requires_grad for p in learner.parameters()):
            raise ValueError(f"{self.learner.tag} has nothing to learn with this network; choose another kind")

    @property
    def regression(self) -> bool:
        """Whether numbers are predicted instead of classes."""
        return isinstance(self.data, SinusoidsConfig)

    @property
    def train_spec(self) -> EpisodeSpec:
        """The shape of a training task."""
        return EpisodeSpec(self.n_way, self.k_shot, self.n_query)

    @property
    def validation_spec(self) -> EpisodeSpec:
        """The shape of a validation task."""
        return self.test_spec(self.validation)

    def test_spec(self, test: TestConfig | ValidationConfig) -> EpisodeSpec:
        """The shape of a test task."""
        n_way = self.n_way if test.n_way is None else test.n_way
        return EpisodeSpec(n_way, self.k_shot if test.k_shot is None else test.k_shot, test.n_query)

    def tested(self, test: TestConfig) -> RunConfig:
        """The configuration with the arguments that a test changes; a ValueError if the learner cannot be tested so."""
        changed: dict[str, Any] = {}
        for name, part, changes in (("learner", self.learner, test.learner), ("network", self.network, test.network)):
            if part and changes:
                changed[name] = _read(type(part), json.dumps(asdict(part) | changes), f"arguments of the {name}")
        config = replace(self, **changed)
        self._check(config._outline(), self.test_spec(test), test.stream)
        return config

    def build(self, n_train_classes: int) -> Learner:
        """The learner with its initial parameters, drawn from the seed of `train`."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.train.seed if self.train else 0)
            if self.network is None:
                return self.learner.build()
            outputs = self.learner.of.outputs(self.n_way, n_train_classes)
            if outputs is None:
                return self.learner.build(self.network.build())
            if "n_outputs" not in inspect.signature(self.network.of.__init__).parameters:
                raise ValueError(f"{self.learner.tag} needs a network with a last layer; {self.network.tag} has none")
            return self.learner.build(self.network.build(n_outputs=outputs))

    def _outline(self) -> Learner:
        """The learner without memory for its numbers: mistakes in its arguments show up, at no cost."""
        try:
            with torch.device("meta"):
                learner = self.build(n_train_classes=2)
        except (RuntimeError, TypeError, OverflowError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{self.learner.tag} cannot be built with this network: {reason}") from None
        size, shape = sum(tensor.numel() for tensor in learner.state_dict().values()), self.data.shape
        if size > MOST_PARAMETERS:
            raise ValueError(f"{size:,} parameters are more than the {MOST_PARAMETERS:,} that a run may have")
        taken = getattr(getattr(learner, "network", None), "image_shape", shape)
        if taken != shape or getattr(self.network, "n_inputs", math.prod(shape)) != math.prod(shape):
            raise ValueError(f"{self.data.source} are inputs of {shape}, which this network does not take")
        return learner

    def _check(self, learner: Learner, spec: EpisodeSpec, stream: bool) -> None:
        """Raise a `ValueError` if the learner cannot answer such tasks."""
        if learner.ways not in (None, spec.n_way):
            raise ValueError(
                f"{self.learner.tag} is made for n_way = {learner.ways}, not {spec.n_way}; make them agree"
            )
        if stream and not learner.reads_streams:
            raise ValueError(f"{self.learner.tag} answers no stream; leave out `stream`")


# --- as JSON ---


def config_text(config: RunConfig) -> str:
    """A configuration as JSON."""
    return json.dumps(asdict(config), indent=2, allow_nan=False) + "\n"


def parse_config(text: str, source: str = "config.json") -> RunConfig:
    """A configuration from JSON; a ValueError names the first key that is unknown, ill-typed or duplicated."""
    return _read(RunConfig, text, source)


def load_config(folder: Path) -> RunConfig:
    """The configuration of a run's folder."""
    return parse_config(read_text(folder / "config.json"), str(folder / "config.json"))


def parse_test(record: dict[str, Any]) -> TestConfig:
    """The test that a recorded evaluation came from."""
    said = {f.name: record[f.name] for f in fields(TestConfig) if f.name in record}
    return _read(TestConfig, json.dumps(said | {"split": record["split"].rpartition("/")[2]}), str(record["name"]))


def read_text(path: Path) -> str:
    """The text of a small file of ours; a ValueError if there is none."""
    try:
        if path.is_file() and path.stat().st_size <= _LARGEST_FILE:
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    raise ValueError(f"cannot read {path}: it is {'too large' if path.is_file() else 'not a file'}")


def shown(value: object) -> str:
    """A value as an error repeats it: at most 200 characters of it."""
    text = repr(value)
    return text if len(text) <= 200 else text[:199] + "…"


def _read(cls: Any, text: str, source: str) -> Any:
    try:
        json.loads(text, object_pairs_hook=_distinct)  # pydantic takes the last of two equal keys
        return _adapter(cls).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        path, ours = ".".join(str(part) for part in first["loc"]), first["msg"].startswith("Value error, ")
        message = first["msg"].removeprefix("Value error, ") + ("" if ours else f" (got {shown(first['input'])})")
        raise ValueError(": ".join(part for part in (source, path, message) if part)) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: {error}") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} appears twice")
        found[key] = value
    return found


@cache
def _adapter(cls: Any) -> TypeAdapter:
    return TypeAdapter(cls)
