"""metatutor: meta-learning for convolutional networks, each method tested against its paper."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from metatutor.allocator import let_threads_sleep

if TYPE_CHECKING:
    from metatutor.backbones import MLP, ConvNet, Pixels, ResNet, backbone
    from metatutor.baselines import NearestPixels, PretrainedCosine, PretrainedFinetuned, Scratch
    from metatutor.classify import FewShotClassifier
    from metatutor.data import Omniglot, Splits, Strokes
    from metatutor.episodes import ClassImages, Episode, EpisodeSampler, EpisodeSpec
    from metatutor.evaluation import Evaluation, evaluate
    from metatutor.learner import Learner, load
    from metatutor.memory import MANN, SNAIL, FeedForward, MetaNet, PlainLSTM
    from metatutor.metric import Matching, Prototypical, Relation, Siamese
    from metatutor.optimization import MAML, R2D2, ImplicitMAML, MetaLSTM, ProtoMAML, Reptile
    from metatutor.training import TrainConfig, train

__version__ = "0.1.0"

let_threads_sleep()  # where PyTorch comes later; else it is too late

__all__ = [
    "MAML",
    "MANN",
    "MLP",
    "R2D2",
    "SNAIL",
    "ClassImages",
    "ConvNet",
    "Episode",
    "EpisodeSampler",
    "EpisodeSpec",
    "Evaluation",
    "FeedForward",
    "FewShotClassifier",
    "ImplicitMAML",
    "Learner",
    "Matching",
    "MetaLSTM",
    "MetaNet",
    "NearestPixels",
    "Omniglot",
    "Pixels",
    "PlainLSTM",
    "PretrainedCosine",
    "PretrainedFinetuned",
    "ProtoMAML",
    "Prototypical",
    "Relation",
    "Reptile",
    "ResNet",
    "Scratch",
    "Siamese",
    "Splits",
    "Strokes",
    "TrainConfig",
    "backbone",
    "evaluate",
    "load",
    "train",
]
_HOMES = (
    "episodes",
    "backbones",
    "data",
    "learner",
    "metric",
    "optimization",
    "memory",
    "baselines",
    "evaluation",
    "training",
    "classify",
)


def __getattr__(name: str) -> Any:
    """Fetch an exported name when it is first asked for: importing PyTorch takes seconds."""
    if name in __all__:
        for home in _HOMES:
            found = getattr(import_module(f"metatutor.{home}"), name, None)
            if found is not None:
                globals()[name] = found
                return found
    raise AttributeError(f"module 'metatutor' has no attribute {name!r}")
