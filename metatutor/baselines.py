"""The conventional CNN, honestly: what classification without meta-learning reaches on the same tasks.

In reading order: a network trained from scratch on each support set; one pretrained as an ordinary classifier, then
fine-tuned on each support set, or left as it is and compared by cosine; and no network at all, the nearest pixels.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from metatutor.backbones import ConvNet
from metatutor.episodes import ClassImages, Episode, EpisodeSampler, EpisodeSpec
from metatutor.learner import Learner, NetworkLearner, Parameters

Descent = Callable[[list[Tensor]], Optimizer]


# --- the arguments, for recorded runs ---


@dataclass(frozen=True)
class ScratchConfig:
    """The arguments of `Scratch`, for a recorded run.

    Args:
        method: the tag of this learner in `config.json`.
        steps: see `Scratch`, as are the others.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> ScratchConfig(steps=10).build(ConvNet(n_outputs=5, filters=8)).config.steps
        10

    Reference:
        Vinyals et al. (2016), section 4.1.
    """

    method: Literal["scratch"] = "scratch"
    steps: int = 20
    lr: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        _check_descent(self.steps, self.lr)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2**32 - 1, got {self.seed}")

    def build(self, network: ConvNet) -> Scratch:
        """The learner with these arguments."""
        return Scratch(network, steps=self.steps, lr=self.lr, seed=self.seed)


@dataclass(frozen=True)
class PretrainedFinetunedConfig:
    """The arguments of `PretrainedFinetuned`, for a recorded run.

    Args:
        method: the tag of this learner in `config.json`.
        steps: see `PretrainedFinetuned`, as are the others.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> PretrainedFinetunedConfig(adapt="head").build(ConvNet(n_outputs=100, filters=8)).config.adapt
        'head'

    Reference:
        Chen et al. (2019), A Closer Look at Few-shot Classification.
    """

    method: Literal["pretrained-finetuned"] = "pretrained-finetuned"
    steps: int = 5
    lr: float = 0.01
    adapt: Literal["all", "head"] = "all"

    def __post_init__(self) -> None:
        _check_descent(self.steps, self.lr)
        if self.adapt not in ("all", "head"):
            raise ValueError(f"adapt must be 'all' or 'head', got {self.adapt!r}")

    def build(self, network: ConvNet) -> PretrainedFinetuned:
        """The learner with these arguments."""
        return PretrainedFinetuned(network, steps=self.steps, lr=self.lr, adapt=self.adapt)


@dataclass(frozen=True)
class PretrainedCosineConfig:
    """The arguments of `PretrainedCosine`, for a recorded run.

    Args:
        method: the tag of this learner in `config.json`.
        scale: see `PretrainedCosine`.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> PretrainedCosineConfig().build(ConvNet(n_outputs=100, filters=8)).config.method
        'pretrained-cosine'

    Reference:
        Vinyals et al. (2016), table 1, "Baseline Classifier, Cosine".
    """

    method: Literal["pretrained-cosine"] = "pretrained-cosine"
    scale: float = 10.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")

    def build(self, network: ConvNet) -> PretrainedCosine:
        """The learner with these arguments."""
        return PretrainedCosine(network, scale=self.scale)


@dataclass(frozen=True)
class NearestPixelsConfig:
    """The arguments of `NearestPixels`, of which there are none, for a recorded run.

    Args:
        method: the tag of this learner in `config.json`.

    Example:
        >>> NearestPixelsConfig().build().normalization
        'none'

    Reference:
        Vinyals et al. (2016), table 1, "Pixels, Cosine".
    """

    method: Literal["nearest-pixels"] = "nearest-pixels"

    def build(self, network: ConvNet | None = None) -> NearestPixels:
        """The learner; it has no use for a network."""
        return NearestPixels()


# --- what the networks share ---


class _Untrained:
    """The part of a learner that knows nothing before it sees a task."""

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """There is none: a ValueError says so."""
        raise ValueError(self._nothing_to_train())

    def sampler(self, classes: ClassImages, spec: EpisodeSpec, *, seed: int = 0) -> EpisodeSampler:
        """There is none: a ValueError says so."""
        raise ValueError(self._nothing_to_train())

    def _nothing_to_train(self) -> str:
        return f"{type(self).__name__} learns nothing before it sees a task; evaluate it as it is, without training"


def _descend(
    learner: NetworkLearner, initial: Parameters, episode: Episode, steps: int, optimizer: Descent, prefix: str = ""
) -> Parameters:
    """Every task's parameters after `steps` of gradient descent on its support set; those with another `prefix` stay.

    One optimizer serves all tasks: it treats each number by itself, and no task's loss depends on another's parameters.
    """
    parameters = {name: p.detach().clone().requires_grad_(name.startswith(prefix)) for name, p in initial.items()}
    descent = optimizer([p for p in parameters.values() if p.requires_grad])
    with torch.enable_grad():
        for _ in range(steps):
            descent.zero_grad()
            learner.support_losses(episode, parameters).sum().backward()
            descent.step()
    return {name: p.detach() for name, p in parameters.items()}


# --- from scratch ---


class Scratch(_Untrained, NetworkLearner):
    """Trains a new, randomly initialised network on each support set, then answers with it.

    The initial parameters are drawn anew for each task, by the network's own law, from `seed` and the support images:
    the answer to a task is the same in whatever batch the task comes. Nothing is learnt from one task for another, so
    there is nothing to meta-train and nothing to save: the learner has no parameters of its own.

    Args:
        network: the architecture; its present parameters are not used.
        steps: of Adam, each on the whole support set.
        lr: learning rate of Adam.
        seed: of the initial parameters, from 0.

    Raises:
        ValueError: if an argument is out of range, an episode has other ways than the network has outputs, or
            it is asked for its `meta_loss` or its training sampler: there is nothing to learn.

    Example:
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> learner = Scratch(ConvNet(n_outputs=5, filters=8), steps=2)
        >>> learner(Episode(images, labels, images, labels, n_way=5)).shape
        torch.Size([2, 5, 5])

    Reference:
        The network is that of Finn et al. (2017), section 5.2, without its meta-training.
    """

    network: ConvNet  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        network: ConvNet,
        *,
        steps: int = ScratchConfig.steps,
        lr: float = ScratchConfig.lr,
        seed: int = ScratchConfig.seed,
    ) -> None:
        super(NetworkLearner, self).__init__()
        object.__setattr__(self, "network", network)  # not as a submodule: its parameters are never used
        self.config = ScratchConfig("scratch", steps, lr, seed)

    def forward(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """Train on each support set, then answer the query images."""
        return self.query_logits(episode, self.adapt(episode))

    def adapt(self, episode: Episode) -> Parameters:
        """The trained parameters of every task, `[task, ...]` by name; only the support set is read."""
        if episode.n_way != self.network.n_outputs:
            raise ValueError(
                f"the network has {self.network.n_outputs} outputs but the episode is {episode.n_way}-way; "
                f"build ConvNet(n_outputs={episode.n_way})"
            )
        optimizer = partial(torch.optim.Adam, lr=self.config.lr)
        return _descend(self, self.initial_parameters(episode), episode, self.config.steps, optimizer)

    def initial_parameters(self, episode: Episode) -> Parameters:
        """The random parameters that every task starts from, `[task, ...]` by name."""
        device = episode.support_images.device
        drawn = []
        for images in episode.support_images:
            pixels = images.mul(255).round().int().cpu().numpy().tobytes()
            generator = torch.Generator().manual_seed(zlib.crc32(pixels, self.config.seed))
            drawn.append(_draw(self.network, generator))
        return {name: torch.stack([of_task[name] for of_task in drawn]).to(device) for name in drawn[0]}


def _draw(network: ConvNet, generator: torch.Generator) -> Parameters:
    """New initial parameters by the law of `ConvNet`: weights and biases uniform within 1 / sqrt(inputs)."""
    drawn = {}
    for path, layer in network.named_modules():
        own = dict(layer.named_parameters(recurse=False))
        for name, p in own.items():
            if name in ("scale", "shift"):
                fresh = torch.full(p.shape, float(name == "scale"), dtype=p.dtype)
            else:
                bound = own["weight"][0].numel() ** -0.5
                fresh = (torch.rand(p.shape, dtype=p.dtype, generator=generator) * 2 - 1) * bound
            drawn[f"{path}.{name}"] = fresh
    return drawn


# --- pretrained as an ordinary classifier ---


class ClassificationSampler:
    """Draws ordinary mini-batches of labelled images, in the clothes of an episode.

    A mini-batch is an episode without support: one task whose ways are all the classes at once. Each image is of
    a class drawn at random, with replacement, so the generator is all that a resumed run must restore. The rows of
    an episode are a mini-batch in parts, which processes can share: `n_tasks * images_per_task` images in all.

    Args:
        classes: where the images come from; label `c` is class `c`.
        images_per_task: images in a row.
        seed: where the stream of images begins.

    Raises:
        ValueError: if `images_per_task` or `n_tasks` is not positive.

    Example:
        >>> classes = ClassImages(torch.zeros(8, 20, 1, 28, 28, dtype=torch.uint8), list("abcdefgh"))
        >>> batch = ClassificationSampler(classes, images_per_task=10).sample(4)
        >>> batch.query_images.shape, batch.support_images.shape[1], batch.n_way
        (torch.Size([4, 10, 1, 28, 28]), 0, 8)

    Reference:
        Chen et al. (2019), section 3.2: the training stage of the baseline.
    """

    def __init__(self, classes: ClassImages, images_per_task: int, *, seed: int = 0) -> None:
        if images_per_task < 1:
            raise ValueError(f"images_per_task must be positive, got {images_per_task}")
        self.classes, self.images_per_task = classes, images_per_task
        self.generator = torch.Generator().manual_seed(seed)

    def sample(self, n_tasks: int) -> Episode:
        """Draw the next `n_tasks` rows of images."""
        if n_tasks < 1:
            raise ValueError(f"n_tasks must be positive, got {n_tasks}")
        shape, n_way = (n_tasks, self.images_per_task), len(self.classes)
        labels = torch.randint(n_way, shape, generator=self.generator)
        drawings = torch.randint(self.classes.images.shape[1], shape, generator=self.generator)
        images = self.classes.take(labels, drawings.unsqueeze(-1)).squeeze(2).float().div_(255)
        labels = labels.to(images.device)
        return Episode(images[:, :0], labels[:, :0], images, labels, n_way)


class _Pretrained(NetworkLearner):
    """Answers an episode without support with the classifier itself: which is how it is pretrained."""

    network: ConvNet  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, network: ConvNet) -> None:
        super().__init__(network)
        if network.n_outputs is None:
            raise ValueError("pretraining needs a last layer; build ConvNet(n_outputs=the meta-training classes)")

    def forward(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """Learn from the support set, then answer the query images; without support, tell the pretraining classes."""
        if _is_episode(episode):
            return self.answer(episode)
        self._check(episode.n_way)
        return self.network(episode.query_images.flatten(0, 1)).unflatten(0, episode.query_labels.shape)

    @abstractmethod
    def answer(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """Logits of the query images, learnt from the support set."""

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The mean cross-entropy of an ordinary classifier over a mini-batch of `ClassificationSampler`."""
        if _is_episode(episode):
            raise ValueError(
                f"{type(self).__name__} is pretrained on all classes at once, not on episodes; "
                "draw its training batches from learner.sampler(classes, spec)"
            )
        return super().meta_loss(episode)

    def sampler(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, classes: ClassImages, spec: EpisodeSpec, *, seed: int = 0
    ) -> ClassificationSampler:
        """Mini-batches of all classes; a step sees as many images as with episodes of this spec."""
        self._check(len(classes))
        return ClassificationSampler(classes, spec.n_way * (spec.k_shot + spec.n_query), seed=seed)

    def finish(self) -> None:
        """Forget the pretraining classes, whose last layer no task uses: the weights to record shrink to a few."""
        head = self.network.head
        for name, parameter in dict(head.named_parameters()).items():
            head.register_parameter(name, nn.Parameter(parameter[:1].detach().clone()))
        self.network.n_outputs = 1

    def _check(self, n_classes: int) -> None:
        if n_classes != self.network.n_outputs:
            raise ValueError(
                f"the network has {self.network.n_outputs} outputs but there are {n_classes} classes to pretrain on; "
                f"build ConvNet(n_outputs={n_classes})"
            )


class PretrainedFinetuned(_Pretrained):
    """Fine-tunes an ordinary classifier on each support set, with a new last layer for the classes of the task.

    Pretraining: cross-entropy over all meta-training classes at once (`ClassificationSampler`). At test time every
    task starts from the same pretrained network with a last layer of zeros, and takes `steps` of gradient descent
    with momentum 0.9.

    Args:
        network: the classifier; `n_outputs` is the number of meta-training classes.
        steps: of gradient descent, each on the whole support set.
        lr: its learning rate.
        adapt: which parameters are fine-tuned: `"all"` or only the last layer, `"head"`.

    Raises:
        ValueError: if an argument is out of range, the network has not one output for each meta-training class, or
            the learner is trained on episodes.

    Example:
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> learner = PretrainedFinetuned(ConvNet(n_outputs=100, filters=8), steps=2)
        >>> learner(Episode(images, labels, images, labels, n_way=5)).shape
        torch.Size([2, 5, 5])

    Reference:
        Chen et al. (2019), section 3.2, "Baseline"; Vinyals et al. (2016), table 1, "Baseline Classifier", fine-tuned.
    """

    def __init__(
        self,
        network: ConvNet,
        *,
        steps: int = PretrainedFinetunedConfig.steps,
        lr: float = PretrainedFinetunedConfig.lr,
        adapt: Literal["all", "head"] = PretrainedFinetunedConfig.adapt,
    ) -> None:
        super().__init__(network)
        self.config = PretrainedFinetunedConfig("pretrained-finetuned", steps, lr, adapt)

    def answer(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """Fine-tune on each support set, then answer the query images."""
        return self.query_logits(episode, self.adapt(episode))

    def adapt(self, episode: Episode) -> Parameters:
        """The fine-tuned parameters of every task, `[task, ...]` by name; only the support set is read."""
        old = self.network.get_parameter("head.weight")
        head = {"head.weight": old.new_zeros(episode.n_way, old.shape[1]), "head.bias": old.new_zeros(episode.n_way)}
        initial = dict(self.network.named_parameters()) | head
        of_tasks = {name: p.expand(len(episode), *p.shape) for name, p in initial.items()}
        prefix = "head." if self.config.adapt == "head" else ""
        optimizer = partial(torch.optim.SGD, lr=self.config.lr, momentum=0.9)
        return _descend(self, of_tasks, episode, self.config.steps, optimizer, prefix)


class PretrainedCosine(_Pretrained):
    """Compares a pretrained classifier's embeddings: the class whose mean direction is nearest by angle.

    `logits = scale * cosine(embed(query), mean of embed(support) / |embed(support)| over the class)`. Nothing is
    learnt at test time. Support and query images are embedded in one call.

    Args:
        network: the classifier; `n_outputs` is the number of meta-training classes.
        scale: of the logits; it does not change which is largest.

    Raises:
        ValueError: if the scale is not positive, the network has not one output for each meta-training class, or
            the learner is trained on episodes.

    Example:
        >>> images, labels = torch.rand(1, 5, 1, 28, 28), torch.arange(5).repeat(1, 1)
        >>> learner = PretrainedCosine(ConvNet(n_outputs=100, filters=8))
        >>> learner(Episode(images, labels, images, labels, n_way=5)).argmax(-1)
        tensor([[0, 1, 2, 3, 4]])

    Reference:
        Vinyals et al. (2016), table 1, "Baseline Classifier", cosine, not fine-tuned.
    """

    def __init__(self, network: ConvNet, *, scale: float = PretrainedCosineConfig.scale) -> None:
        super().__init__(network)
        self.config = PretrainedCosineConfig("pretrained-cosine", scale)

    def answer(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """Cosines between query images and the class centroids of the support set."""
        n_support = episode.support_images.shape[1]
        images = torch.cat([episode.support_images, episode.query_images], dim=1)
        embeddings = torch.stack([self.network.embed(of_task, n_support) for of_task in images])
        support, query = F.normalize(embeddings, dim=-1).split([n_support, images.shape[1] - n_support], dim=1)
        members = F.one_hot(episode.support_labels, episode.n_way).mT.to(support)  # [task, way, support]
        centroids = F.normalize(members @ support, dim=-1)  # [task, way, embedding]
        return self.config.scale * query @ centroids.mT


# --- no network at all ---


class NearestPixels(_Untrained, Learner):
    """Answers with the class of the support image whose pixels are nearest, by angle.

    `logits[c] = max over the support images of class c of cosine(query, support)`, an image being a long vector.

    Raises:
        ValueError: if it is asked for its `meta_loss` or its training sampler: there is nothing to learn.

    Example:
        >>> images, labels = torch.rand(1, 5, 1, 28, 28), torch.arange(5).repeat(1, 1)
        >>> NearestPixels()(Episode(images, labels, images, labels, n_way=5)).argmax(-1)
        tensor([[0, 1, 2, 3, 4]])

    Reference:
        Vinyals et al. (2016), table 1, "Pixels", cosine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.config = NearestPixelsConfig()

    def forward(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """The cosine of each query image with the nearest support image of each class."""
        support, query = (F.normalize(x.flatten(2), dim=-1) for x in (episode.support_images, episode.query_images))
        cosines = query @ support.mT  # [task, query, support]
        of_classes = cosines.new_full((*cosines.shape[:2], episode.n_way), -torch.inf)
        return of_classes.scatter_reduce(2, episode.support_labels.unsqueeze(1).expand_as(cosines), cosines, "amax")


def _is_episode(episode: Episode) -> bool:
    """Whether there is a support set to learn from; a mini-batch of `ClassificationSampler` has none."""
    return episode.support_images.shape[1] > 0


def _check_descent(steps: int, lr: float) -> None:
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
