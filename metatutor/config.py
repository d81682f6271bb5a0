"""What a run was made from: a learner, a network, classes and a training, as `config.json` and the command line say it.

The arguments of a learner or network stand once, in its constructor. `config_of` reads them there.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import torch
import tyro
from pydantic import ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter, ValidationError
from torch import nn

from metatutor.data import Omniglot, Sinusoids, Splits, Strokes
from metatutor.episodes import EpisodeSpec
from metatutor.learner import Learner
from metatutor.training import TrainConfig

Key = Literal["method", "kind"]  # under which a learner, and a network, says its tag
Value = bool | int | float | None | str
LARGEST_FILE = 2**20  # bytes of a configuration
MOST_PARAMETERS = 2**30
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_ARGUMENT = re.compile(r"^ {4}(\w+(?:, \w+)*): (.+(?:\n {5,}.+)*)", re.MULTILINE)


# --- arguments, read from a constructor ---


@dataclass(frozen=True)
class Arguments:
    """The arguments of a constructor; `config_of` makes a class from it for every learner and network."""

    of: ClassVar[type[nn.Module]]

    def build(self, *positional: Any, **others: Any) -> Any:
        """The learner or network: a learner of a network, a network with so many outputs (None: as is its default)."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in get_args(Key)}
        return self.of(*positional, **others, **chosen)


@cache
def config_of(cls: type[nn.Module]) -> type[Arguments]:
    """The arguments of a learner or network as a frozen dataclass, with its tag and its own words on each of them.

    Args:
        cls: a learner, all of whose arguments but `network` have defaults; or a network. Arguments that no JSON can
            hold, such as a loss, are left out.

    Example:
        >>> from metatutor import MAML
        >>> config_of(MAML)(inner_lr=0.1).method
        'maml'
    """
    key: Key = "method" if issubclass(cls, Learner) else "kind"
    hints, words = get_type_hints(cls.__init__), _words(cls)
    made: list[tuple[str, Any, Any]] = [
        (key, Annotated[Literal[tag_of(cls)], tyro.conf.Suppress], field(default=tag_of(cls)))
    ]
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        kept = _data_type(hints.get(name))
        if kept is not None and name != "n_outputs":
            default = tuple(parameter.default) if get_origin(kept) is tuple else parameter.default
            made.append((name, kept, field(default=default)))
    about = "\n".join(f"    {name}: {words[name]}" for name, *_ in made if name in words)
    summary = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")[0]
    namespace = {"of": cls, "__doc__": f"{summary}\n\nArgs:\n{about}\n", "__pydantic_config__": _STRICT}
    return make_dataclass(
        f"{cls.__name__}Config", made, bases=(Arguments,), frozen=True, kw_only=True, namespace=namespace
    )


def tag_of(cls: type) -> str:
    """How files, the command line and errors call a learner or network: `ImplicitMAML` is `implicit-maml`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls.__name__).lower()


@cache
def known(key: Key) -> dict[str, type[Arguments]]:
    """The learners (`"method"`) or the networks (`"kind"`) that `metatutor` exports, by their tags."""
    import metatutor  # which imports this module

    exported = [getattr(metatutor, name) for name in metatutor.__all__]
    built = [c for c in exported if isinstance(c, type) and issubclass(c, nn.Module) and not inspect.isabstract(c)]
    return {tag_of(c): config_of(c) for c in built if issubclass(c, Learner) == (key == "method")}


def _words(cls: type) -> dict[str, str]:
    """What docstrings say of the arguments, the nearest class last; "see `Base`" leaves the base's words."""
    said: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for names, text in _ARGUMENT.findall(inspect.cleandoc(vars(base).get("__doc__") or "")):
            if not text.startswith("see `"):
                said |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return said


def _data_type(hint: Any) -> Any:
    """A type of what JSON can hold, hashable; None for any other."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (bool, int, float, str, type(None)) or origin is Literal:
        return hint
    if origin in (Sequence, list, tuple):
        return (item := _data_type(arguments[0])) and tuple[item, ...]
    parts = [_data_type(argument) for argument in arguments]
    return Union[tuple(parts)] if origin in (Union, types.UnionType) and None not in parts else None  # noqa: UP007


@dataclass(frozen=True)
class _Known:
    """Stands in an annotation for one of the exported learners or networks, whatever they are by then."""

    key: Key

    def union(self) -> Any:
        return Union[tuple(Annotated[c, tyro.conf.subcommand(tag)] for tag, c in known(self.key).items())]  # noqa: UP007

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        union = Annotated[self.union(), Field(discriminator=self.key)]
        return handler.generate_schema(union | None if self.key == "kind" else union)


_LEARNER, _NETWORK = _Known("method"), _Known("kind")


# --- the parts of a run ---


@dataclass(frozen=True)
class DataConfig:
    """Which classes a run learns from and is tested on.

    Args:
        source: `"omniglot"` or `"strokes"`.
        split: `"random"` or `"lake"` for Omniglot; Strokes are always split by whole alphabets.
        seed: of the split.
        rotations: whether turned characters are classes of their own.
    """

    source: Literal["omniglot", "strokes"] = "omniglot"
    split: Literal["random", "lake"] = "random"
    seed: int = 0
    rotations: bool = True
    shape: ClassVar[tuple[int, ...]] = (1, 28, 28)

    def load(self, root: Path | str | None = None) -> Splits:
        """The three splits; `root` is where Omniglot lies (see `Omniglot.load`)."""
        if self.source == "strokes":
            return _strokes().split(seed=self.seed, rotations=self.rotations)
        return Omniglot.load(root).split(self.split, seed=self.seed, rotations=self.rotations)


@dataclass(frozen=True)
class SinusoidsConfig:
    """Sine waves instead of characters: train, validation and test draw from the same ones, at other seeds.

    Args:
        source: the tag of these data.

    Reference:
        Finn, Abbeel & Levine (2017), section 5.1.
    """

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
    """How a training is watched, on tasks of the meta-validation classes with as many ways as its own.

    Args:
        k_shot: support images of each class; default: as in training.
        n_query: query images of each class.
        n_episodes: tasks.
        stream: whether every image of the support set is asked before its label is told.
    """

    k_shot: int | None = None
    n_query: int = 15
    n_episodes: int = 200
    stream: bool = False


@dataclass(frozen=True)
class TestConfig:
    """One evaluation of a trained learner.

    Args:
        name: what it is called among all evaluations of all runs.
        n_way: classes of a task; default: as in training.
        k_shot: support images of each class; default: as in training.
        n_query: query images of each class.
        n_episodes: tasks.
        seed: of the stream of tasks.
        split: the classes that tasks are drawn from.
        stream: whether every image of the support set is asked before its label is told.
        learner: arguments of the learner that are others here than in training.
        network: arguments of the network that are others here than in training.

    Raises:
        ValueError: if there are too few tasks for an interval.
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
        check_numbers(self)
        if self.n_episodes < 2:
            raise ValueError(f"n_episodes must be at least 2 for an interval, got {self.n_episodes}")


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
        validation: how the training is watched.

    Raises:
        ValueError: if an argument is out of range, or two of them do not go together.

    Example:
        >>> config = RunConfig(n_way=20)
        >>> parse_config(config_text(config)) == config
        True
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
        check_numbers(self)
        specs = {"training": self.train_spec, "validation": self.validation_spec}
        method = self.learner.of
        if "network" not in inspect.signature(method.__init__).parameters:
            object.__setattr__(self, "network", None)
        if not method.learns and self.train == TrainConfig():
            object.__setattr__(self, "train", None)
        if not method.learns and self.train is not None:
            raise ValueError(f"{self.learner.method} learns nothing before it sees a task; leave out `train`")
        learner = self._outline()
        if self.train and not any(p.requires_grad for p in learner.parameters()):
            raise ValueError(f"{self.learner.method} has nothing to learn with this network; choose another kind")
        for where, spec in specs.items():
            self._check_tasks(learner, where, spec, self.validation.stream)

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
        shots = self.k_shot if self.validation.k_shot is None else self.validation.k_shot
        return EpisodeSpec(self.n_way, shots, self.validation.n_query)

    def test_spec(self, test: TestConfig) -> EpisodeSpec:
        """The shape of a test task."""
        n_way = self.n_way if test.n_way is None else test.n_way
        return EpisodeSpec(n_way, self.k_shot if test.k_shot is None else test.k_shot, test.n_query)

    def tested(self, test: TestConfig) -> RunConfig:
        """The configuration with the arguments that a test changes.

        Raises:
            ValueError: if it has no such arguments, or the learner cannot be tested so.
        """
        changed = {"learner": _changed(self.learner, test.learner)}
        if self.network is not None:
            changed["network"] = _changed(self.network, test.network)
        config = replace(self, **changed)
        self._check_tasks(config._outline(), "test", self.test_spec(test), test.stream)
        return config

    def build(self, n_train_classes: int) -> Learner:
        """The learner with its initial parameters, drawn from the seed of `train`."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.train.seed if self.train else 0)
            if self.network is None:
                return self.learner.build()
            outputs = self.learner.of.outputs(self.n_way, n_train_classes)
            chosen = "n_outputs" in inspect.signature(self.network.of.__init__).parameters and outputs is not None
            return self.learner.build(self.network.build(**{"n_outputs": outputs} if chosen else {}))

    def _outline(self) -> Learner:
        """The learner without memory for its numbers: what is wrong with its arguments shows, and costs nothing."""
        try:
            with torch.device("meta"), torch.no_grad():
                learner = self.build(n_train_classes=2)
                if self.network is not None:
                    learner.network(torch.empty(2, *self.data.shape))
        except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{self.learner.method} cannot be built for this network and data: {reason}") from None
        numbers = sum(p.numel() for p in learner.state_dict().values())
        if numbers > MOST_PARAMETERS:
            raise ValueError(f"{numbers:,} parameters are more than the {MOST_PARAMETERS:,} that a run may have")
        return learner

    def _check_tasks(self, learner: Learner, where: str, spec: EpisodeSpec, stream: bool) -> None:
        """Raise a `ValueError` if the learner cannot answer such tasks."""
        if learner.ways not in (None, spec.n_way):
            raise ValueError(
                f"{self.learner.method} was made for {learner.ways} ways but the {where} has n_way = {spec.n_way}; "
                "let them agree"
            )
        if stream and not learner.reads_streams:
            raise ValueError(f"{self.learner.method} answers no stream; leave out `stream`")


def _changed(arguments: Arguments, changes: dict[str, Value]) -> Arguments:
    return _read(type(arguments), json.dumps(asdict(arguments) | changes), "changed arguments")


def check_numbers(config: Any) -> None:
    """Raise a `ValueError` if a number of a configuration is too large for 64 bits, or not finite."""
    for name, value in _numbers(config):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} must be from -2**63 to 2**63 - 1, got {shown(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def _numbers(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for part in fields(config):
        value, name = getattr(config, part.name), path + part.name
        if is_dataclass(value):
            yield from _numbers(value, f"{name}.")
        else:
            yield from ((name, v) for v in (value if isinstance(value, tuple) else (value,)))


# --- as JSON ---


def config_text(config: RunConfig) -> str:
    """A configuration as JSON."""
    return json.dumps(asdict(config), indent=2) + "\n"


def parse_config(text: str, source: str = "config.json") -> RunConfig:
    """A configuration from JSON.

    Raises:
        ValueError: naming the first key that is unknown, ill-typed or there twice.
    """
    return _read(RunConfig, text, source)


def parse_test(record: dict[str, Any], source: str) -> TestConfig:
    """The test that a recorded evaluation is of.

    Raises:
        ValueError: naming the first key that is missing or ill-typed.
    """
    known_keys = {f.name for f in fields(TestConfig)} & record.keys()
    about = {key: record[key] for key in known_keys} | {"split": str(record.get("split")).rpartition("/")[2]}
    return _read(TestConfig, json.dumps(about), source)


def load_config(path: Path) -> RunConfig:
    """A configuration from a file."""
    return parse_config(read_text(path), str(path))


def read_text(path: Path) -> str:
    """What stands in a small file of text.

    Raises:
        ValueError: if there is no such file, or it is not one of ours.
    """
    try:
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"{path} is larger than any file of its kind")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text") from None


def shown(value: object) -> str:
    """A value as an error repeats it: not more than 200 characters of it."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**200 else "a number of many digits"
    return text if len(text) <= 200 else text[:199] + "…"


def _read(cls: Any, text: str, source: str) -> Any:
    try:
        json.loads(text, object_pairs_hook=_distinct)  # pydantic takes the last of two alike keys
        return _adapter(cls).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        path, ours = ".".join(str(part) for part in first["loc"]), first["msg"].startswith("Value error, ")
        message = first["msg"].removeprefix("Value error, ") + ("" if ours else f" (got {shown(first['input'])})")
        raise ValueError(": ".join(part for part in (source, path, message) if part)) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: {error}") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


@cache
def _adapter(cls: Any) -> TypeAdapter:
    return TypeAdapter(cls)
