"""Recorded runs: a configuration from which anyone can retrain, and what came of it.

A run is a folder of `results/` with `config.json`, `history.csv`, `model.safetensors` and `evaluation.json`.
This module reads them, and makes them. Weights of more than 2 MB are recorded in half precision; what is evaluated
is always what was recorded.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save

from metatutor.backbones import MLP, ConvNet, Normalization, Pixels, Pooling
from metatutor.baselines import NearestPixelsConfig, PretrainedCosineConfig, PretrainedFinetunedConfig, ScratchConfig
from metatutor.data import Omniglot, Sinusoids, Splits, Strokes
from metatutor.episodes import ClassImages, EpisodeSpec
from metatutor.evaluation import (
    ByInstance,
    Evaluation,
    Regression,
    accuracies,
    evaluate,
    evaluate_regression,
    evaluate_stream,
    instance_accuracies,
)
from metatutor.learner import Learner
from metatutor.memory import FeedForwardConfig, MANNConfig, MetaNetConfig, PlainLSTMConfig, SNAILConfig
from metatutor.memory.stream import StreamLearner
from metatutor.metric import MatchingConfig, PrototypicalConfig, RelationConfig, SiameseConfig
from metatutor.optimization import ImplicitMAMLConfig, MAMLConfig, MetaLSTMConfig, ReptileConfig
from metatutor.optimization.base import AdaptingLearner
from metatutor.training import (
    Row,
    TrainConfig,
    check_device,
    load_parameters,
    read_history,
    replacing,
    train,
    write_history,
)

LearnerConfig = Annotated[
    MAMLConfig
    | ReptileConfig
    | ImplicitMAMLConfig
    | MetaLSTMConfig
    | PrototypicalConfig
    | MatchingConfig
    | RelationConfig
    | SiameseConfig
    | MANNConfig
    | PlainLSTMConfig
    | FeedForwardConfig
    | MetaNetConfig
    | SNAILConfig
    | ScratchConfig
    | PretrainedFinetunedConfig
    | PretrainedCosineConfig
    | NearestPixelsConfig,
    Field(discriminator="method"),
]
_ONE_HEAD = MAMLConfig | ReptileConfig | ImplicitMAMLConfig | MetaLSTMConfig | ScratchConfig  # for so many ways only
_STREAM = MANNConfig | PlainLSTMConfig | FeedForwardConfig
_READS_LABELS = _STREAM | MetaNetConfig | SNAILConfig  # of so many classes only
FILES = ("config.json", "history.csv", "model.safetensors", "evaluation.json")
WEIGHTS_LIMIT = 2_000_000  # bytes of a model.safetensors
_VALIDATION_SEED = 1_000_003  # far from the seeds of training and test


@dataclass(frozen=True)
class DataConfig:
    """Which classes a run learns from and is tested on.

    Args:
        source: `"omniglot"` or `"strokes"`.
        split: `"random"` or `"lake"` for Omniglot; Strokes are always split by whole alphabets.
        seed: of the split.
        rotations: whether turned characters are classes of their own.

    Example:
        >>> DataConfig().source
        'omniglot'

    Reference:
        Finn, Abbeel & Levine (2017), section 5.2.
    """

    source: Literal["omniglot", "strokes"] = "omniglot"
    split: Literal["random", "lake"] = "random"
    seed: int = 0
    rotations: bool = True

    def load(self, root: Path | str | None = None) -> Splits:
        """The three splits; `root` is where Omniglot lies (see `Omniglot.load`)."""
        if self.source == "strokes":
            return _strokes().split(seed=self.seed, rotations=self.rotations)
        return Omniglot.load(root).split(self.split, seed=self.seed, rotations=self.rotations)


@dataclass(frozen=True)
class SinusoidsConfig:
    """Sine waves instead of characters: train, validation and test draw from the same ones, at other seeds.

    Args:
        source: the tag of these data in `config.json`.

    Example:
        >>> SinusoidsConfig().load().test.amplitude
        (0.1, 5.0)

    Reference:
        Finn, Abbeel & Levine (2017), section 5.1.
    """

    source: Literal["sinusoids"] = "sinusoids"

    def load(self, root: Path | str | None = None) -> Splits[Sinusoids]:
        """The waves of the paper."""
        return Splits(Sinusoids(), Sinusoids(), Sinusoids(), "sinusoids")


@cache
def _strokes() -> Strokes:
    return Strokes.load()


@dataclass(frozen=True)
class NetworkConfig:
    """The arguments of `ConvNet` that a run chooses.

    Args:
        filters: see `ConvNet`, as are the others.

    Example:
        >>> NetworkConfig(hidden=(64,)).build(n_outputs=5).embedding_size
        64

    Reference:
        See `ConvNet`.
    """

    filters: int = 64
    n_blocks: int = 4
    n_halving: int | None = None
    pooling: Pooling = "stride"
    hidden: tuple[int, ...] = ()
    normalization: Normalization = "batch"
    zero_head: bool = False
    fixed_head: bool = False

    def build(self, n_outputs: int | None) -> ConvNet:
        """The network with this many logits, or without a last layer."""
        return ConvNet(n_outputs, **vars(self))


@dataclass(frozen=True)
class MLPConfig:
    """The arguments of `MLP` that a run chooses.

    Args:
        kind: the tag of this network in `config.json`.
        hidden: see `MLP`.

    Example:
        >>> MLPConfig().build(1).n_outputs
        1

    Reference:
        See `MLP`.
    """

    kind: Literal["mlp"] = "mlp"
    hidden: tuple[int, ...] = (40, 40)

    def build(self, n_outputs: int | None) -> MLP:
        """The network, of one input."""
        return MLP(1, n_outputs or 1, hidden=self.hidden)


@dataclass(frozen=True)
class PixelsConfig:
    """The arguments of `Pixels` that a run chooses.

    Args:
        kind: the tag of this embedding in `config.json`.
        size: see `Pixels`.

    Example:
        >>> PixelsConfig().build(None).embedding_size
        400

    Reference:
        See `Pixels`.
    """

    kind: Literal["pixels"] = "pixels"
    size: int = 20

    def build(self, n_outputs: int | None) -> Pixels:
        """The embedding, which has no last layer."""
        return Pixels(self.size)


@dataclass(frozen=True)
class EvaluationConfig:
    """How a run is tested.

    Args:
        n_query: query images of each class.
        n_episodes: tasks.
        seed: of the stream of tasks.
        n_way, k_shot: the shape of the tasks; default: that of training.
        stream: whether the support set is a stream, every image of which is asked before its label is told.

    Raises:
        ValueError: if a size is too small.

    Example:
        >>> EvaluationConfig().n_episodes
        1000

    Reference:
        Snell et al. (2017), section 3.1: 1,000 test episodes.
    """

    n_query: int = 15
    n_episodes: int = 1000
    seed: int = 0
    n_way: int | None = None
    k_shot: int | None = None
    stream: bool = False

    def __post_init__(self) -> None:
        if self.n_query < 1 or self.n_episodes < 2:
            raise ValueError(f"need n_query >= 1 and n_episodes >= 2, got {self.n_query} and {self.n_episodes}")


@dataclass(frozen=True)
class RunConfig:
    """Everything needed to retrain a run, and nothing else.

    Args:
        learner: the method and its arguments.
        network: the backbone.
        data: the classes.
        n_way, k_shot: the shape of the tasks, in training and, unless `evaluation` has others, in test.
        n_query: query images of each class in training.
        train: the outer loop; None for a method that learns nothing before it sees a task.
        evaluation: the test.

    Raises:
        ValueError: if the learner cannot be tested with the ways of `evaluation`.

    Example:
        >>> config = RunConfig(learner=MAMLConfig(inner_lr=0.1))
        >>> parse_config(config_text(config)) == config
        True

    Reference:
        Every run's `config.json` under `results/`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    learner: LearnerConfig = field(default_factory=MAMLConfig)
    network: tyro.conf.AvoidSubcommands[NetworkConfig | MLPConfig | PixelsConfig] = field(default_factory=NetworkConfig)
    data: tyro.conf.AvoidSubcommands[DataConfig | SinusoidsConfig] = field(default_factory=DataConfig)
    n_way: int = 5
    k_shot: int = 1
    n_query: int = 5
    train: TrainConfig | None = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        n_way = self.evaluation.n_way
        if self.regression != isinstance(self.network, MLPConfig):
            raise ValueError("sinusoids need a network of kind 'mlp', and images need a ConvNet")
        if self.evaluation.stream and not isinstance(self.learner, _STREAM):
            raise ValueError(f"{self.learner.method} answers no stream; leave evaluation.stream out")
        if isinstance(self.network, PixelsConfig) and not isinstance(self.learner, _READS_LABELS):
            raise ValueError(f"{self.learner.method} needs a network that learns; leave out kind 'pixels'")
        if isinstance(self.learner, _READS_LABELS) and {self.learner.n_way, n_way or self.n_way} != {self.n_way}:
            raise ValueError(
                f"learner.n_way = {self.learner.n_way}, n_way = {self.n_way}, evaluation.n_way = {n_way}: "
                f"{self.learner.method} reads labels of so many classes only; let them agree"
            )
        if isinstance(self.learner, _ONE_HEAD) and n_way not in (None, self.n_way):
            raise ValueError(
                f"evaluation.n_way = {n_way} but a last layer for n_way = {self.n_way} classes; "
                f"{self.learner.method} is tested with the ways of its training"
            )

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
        """The shape of a validation task: the ways of training, the shots and query images of the test."""
        return replace(self.test_spec, n_way=self.n_way)

    @property
    def test_spec(self) -> EpisodeSpec:
        """The shape of a test task."""
        test = self.evaluation
        n_way = self.n_way if test.n_way is None else test.n_way
        return EpisodeSpec(n_way, self.k_shot if test.k_shot is None else test.k_shot, test.n_query)

    def build(self, n_train_classes: int) -> Learner:
        """The learner with its initial parameters, drawn from the seed of `train`."""
        with torch.random.fork_rng():
            torch.manual_seed(self.train.seed if self.train else 0)
            network: Any = self.network.build(self._n_outputs(n_train_classes))
            return self.learner.build(network)

    def _n_outputs(self, n_train_classes: int) -> int | None:
        if isinstance(self.learner, _ONE_HEAD):
            return self.n_way
        pretrained = isinstance(self.learner, PretrainedFinetunedConfig | PretrainedCosineConfig)
        return n_train_classes if pretrained else None


@dataclass(frozen=True)
class Run:
    """A recorded run, read.

    Args:
        name: of its folder.
        folder: where it lies.
        config: what it was trained with.
        evaluation: the fields of `evaluation.json`.
        history: the rows of `history.csv`; none for a method without training.

    Example:
        >>> all(load_run(name).evaluation["n_episodes"] >= 600 for name in run_names())
        True

    Reference:
        The folders of `results/`.
    """

    name: str
    folder: Path
    config: RunConfig
    evaluation: dict[str, Any]
    history: list[Row]

    def learner(self) -> Learner:
        """The trained learner, in evaluation mode, on the CPU."""
        return load_learner(self.folder, self.config)


def results_folder() -> Path:
    """Where the recorded runs lie: `results/` of a checkout, or the copy that came with the installation."""
    package = Path(__file__).parent
    checkout = package.parent / "results"
    return checkout if (package.parent / "pyproject.toml").exists() else package / "results"


def run_names(results: Path | None = None) -> list[str]:
    """The names of all recorded runs, sorted.

    Args:
        results: the folder to look in; default: `results_folder()`.

    Returns:
        Names such as `omniglot-maml-5w1s`.

    Example:
        >>> run_names() == sorted(run_names())
        True

    Reference:
        The folders of `results/`.
    """
    return sorted(path.parent.name for path in (results or results_folder()).glob("*/config.json"))


def load_run(name: str, results: Path | None = None) -> Run:
    """Read a recorded run by its name.

    Args:
        name: of its folder, such as `omniglot-maml-5w1s`.
        results: the folder to look in; default: `results_folder()`.

    Returns:
        Its configuration, evaluation and history; `.learner()` gives the trained learner.

    Raises:
        ValueError: if there is no such run, or its files are damaged.

    Example:
        >>> [load_run(name).config.n_way for name in run_names() if name == "omniglot-nearest-pixels-5w1s"]
        [5]

    Reference:
        The folders of `results/`.
    """
    folder = run_folder(name, results)
    path = folder / "evaluation.json"
    if not path.exists():
        raise ValueError(f"run '{name}' has a config.json but was not evaluated; run `metatutor reproduce {name}`")
    history = folder / "history.csv"
    return Run(
        name,
        folder,
        load_config(folder / "config.json"),
        json.loads(path.read_text()),
        read_history(history) if history.exists() else [],
    )


def run_folder(name: str, results: Path | None = None) -> Path:
    """The folder of a recorded run.

    Raises:
        ValueError: if there is no such run.
    """
    folder = (results or results_folder()) / name
    if not (folder / "config.json").exists():
        known = ", ".join(run_names(results)) or "none"
        raise ValueError(f"no recorded run '{name}'; there are: {known}")
    return folder


def recorded_accuracy(folder: Path) -> Evaluation | ByInstance | Regression | None:
    """The evaluation recorded in a run's folder, if there is one."""
    path = folder / "evaluation.json"
    if not path.exists():
        return None
    recorded = json.loads(path.read_text())
    if "mse_by_step" in recorded:
        return Regression(**{f.name: recorded[f.name] for f in fields(Regression)})
    if "accuracy_by_instance" in recorded:
        return ByInstance(**{f.name: recorded[f.name] for f in fields(ByInstance)})
    return Evaluation(**{f.name: recorded[f.name] for f in fields(Evaluation)})


def published() -> list[dict[str, Any]]:
    """The papers' numbers: one dict a row, with method, n_way, k_shot, accuracy, ci95, source and protocol."""
    return json.loads((results_folder() / "published.json").read_text())


def published_streams() -> list[dict[str, Any]]:
    """The papers' accuracies by instance, counted from 1: method, n_way, instance, accuracy, source and protocol."""
    return json.loads((results_folder() / "published_streams.json").read_text())


def parse_config(text: str, source: str = "config.json") -> RunConfig:
    """A configuration from JSON.

    Raises:
        ValueError: naming the first key that is unknown or ill-typed.
    """
    try:
        return _adapter().validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{source}: {where}: {message} (got {first['input']!r})") from None


@cache
def _adapter() -> TypeAdapter:
    return TypeAdapter(RunConfig)


def load_config(path: Path) -> RunConfig:
    """A configuration from a file."""
    try:
        return parse_config(path.read_text(), str(path))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; give the path of a config.json") from None


def config_text(config: RunConfig) -> str:
    """A configuration as JSON."""
    return json.dumps(asdict(config), indent=2) + "\n"


def load_learner(folder: Path, config: RunConfig) -> Learner:
    """The learner of a configuration with the parameters recorded in a folder, in evaluation mode.

    Raises:
        ValueError: if the parameters are missing, damaged, or of another architecture.
    """
    path = folder / "model.safetensors"
    parameters = _read_parameters(path)
    heads = [t.shape[0] for name, t in parameters.items() if name.endswith("network.head.weight")]
    learner = config.build(heads[0] if heads else config.n_way)
    load_parameters(learner, parameters, path)
    return learner.eval()


def _read_parameters(path: Path) -> dict[str, torch.Tensor]:
    if not path.exists():
        return {}
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); reproduce the run to make it anew") from None


def _write_parameters(learner: Learner, path: Path) -> None:
    """Record the parameters, in half precision if they are many, and let the learner have what was recorded."""
    parameters = {name: tensor.contiguous().cpu() for name, tensor in learner.state_dict().items()}
    written = save(parameters)
    if len(written) > WEIGHTS_LIMIT:
        written = save({name: t.half() if t.is_floating_point() else t for name, t in parameters.items()})
    with replacing(path) as temporary:
        temporary.write_bytes(written)
    load_parameters(learner, load(written), path)


def run_training(
    config: RunConfig,
    folder: Path,
    *,
    data: Path | str | None = None,
    device: str | None = None,
    progress_bar: bool = True,
) -> Evaluation | ByInstance | Regression:
    """Train and evaluate a configuration; a run killed before goes on where its last checkpoint stood.

    Args:
        config: what to do.
        folder: gets the four files of a recorded run, and the checkpoints.
        data: where Omniglot lies (see `Omniglot.load`).
        device: see `train`.
        progress_bar: whether to show one.

    Returns:
        The evaluation on the meta-test classes.

    Raises:
        ValueError: if the folder holds another configuration, or the data do not fit it.
    """
    check_device(device)
    _claim(folder, config)
    splits = config.data.load(data)
    splits.test.sampler(config.test_spec)  # fails before the training, not after it
    learner = config.build(len(splits.train) if isinstance(splits.train, ClassImages) else 1)
    if config.train is not None:
        sampler = learner.sampler(splits.train, config.train_spec, seed=config.train.seed)
        history = train(
            learner,
            sampler,
            config.train,
            folder=folder,
            validate=_validation(splits.validation, config),
            device=device,
            progress_bar=progress_bar,
        )
        learner.finish()
        _write_parameters(learner, folder / "model.safetensors")
        write_history(history, folder / "history.csv")
    evaluation = evaluate_learner(learner, splits, config)
    with replacing(folder / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(_record(evaluation, learner, folder), indent=2) + "\n")
    return evaluation


def evaluate_learner(
    learner: Learner,
    splits: Splits[Any],
    config: RunConfig,
    *,
    split: Literal["test", "validation"] = "test",
    n_episodes: int | None = None,
) -> Evaluation | ByInstance | Regression:
    """Evaluate a learner as its configuration says, on the meta-test (or meta-validation) classes or waves."""
    source, test, spec = getattr(splits, split), config.evaluation, config.test_spec
    n_episodes = n_episodes or test.n_episodes
    if isinstance(learner, AdaptingLearner) and isinstance(source, Sinusoids):
        seed = test.seed if split == "test" else _VALIDATION_SEED
        return evaluate_regression(learner, source, spec, n_episodes=n_episodes, seed=seed)
    name = f"{splits.id}/{split}"
    if test.stream and isinstance(learner, StreamLearner):
        return evaluate_stream(learner, source, spec, n_episodes=n_episodes, seed=test.seed, split=name)
    return evaluate(learner, source, spec, n_episodes=n_episodes, seed=test.seed, split=name)


def _claim(folder: Path, config: RunConfig) -> None:
    """Write `config.json`, unless the folder already belongs to another configuration."""
    path = folder / "config.json"
    if path.exists() and load_config(path) != config:
        raise ValueError(f"{folder} holds a run with another configuration; choose another folder or delete it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(config_text(config))
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; choose a folder you may write to") from None


def _validation(source: ClassImages | Sinusoids, config: RunConfig) -> Callable[[Learner], float] | None:
    if isinstance(source, Sinusoids):
        return None

    def validate(learner: Learner) -> float:
        sampler = learner.test_sampler(source, config.validation_spec, seed=_VALIDATION_SEED)
        if config.evaluation.stream and isinstance(learner, StreamLearner):
            return instance_accuracies(learner, sampler, 200).mean().item()
        return accuracies(learner, sampler, 200).mean().item()

    return validate


def _record(evaluation: Evaluation | ByInstance | Regression, learner: Learner, folder: Path) -> dict[str, Any]:
    history = read_history(folder / "history.csv") if (folder / "history.csv").exists() else []
    return asdict(evaluation) | {
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
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)
