"""The conventional CNN, honestly: what classification without meta-learning achieves on the same tasks.

In reading order: a network trained from scratch on each support set; one pretrained as an ordinary classifier, then
fine-tuned on each support set, or left as it is and compared by cosine; and no network at all, the nearest pixels.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from metatutor.backbones import ConvBlock, Embedding, Network, backbone
from metatutor.checks import check_choice, check_not_negative, check_positive
from metatutor.episodes import Episode
from metatutor.functional import Parameters, TaskMap, class_maxima, class_means
from metatutor.learner import Learner, Loss, NetworkLearner, task_loss

Descent = Callable[[list[Tensor]], Optimizer]


# --- what the networks share ---


class _Untrained(Learner):
    """A learner that knows nothing before it sees a task."""

    learns = False

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """There is none: a ValueError says so."""
        raise ValueError(
            f"{type(self).__name__} learns nothing before it sees a task; evaluate it as it is, without training"
        )


def _descend(
    learner: NetworkLearner, initial: Parameters, episode: Episode, steps: int, optimizer: Descent, moving: set[str]
) -> Parameters:
    """Every task's parameters after `steps` steps on its support set; all but the `moving` ones stay the same.

    One optimizer serves all tasks: it treats each number separately, and no task's loss depends on another's
    parameters.
    """
    parameters = {name: p.detach().clone().requires_grad_(name in moving) for name, p in initial.items()}
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

    The initial parameters are drawn afresh for each task, from the network's own distribution, by `seed` and the
    support images: the answer to a task is the same whatever batch the task is in. For the same reason dropout is left
    out. Running statistics are those of a task's own support set. Nothing is learned from one task for another, so
    there is nothing to meta-train and nothing to save: the learner has no parameters of its own.

    Args:
        network: the architecture; its current parameters are not used, unless they are frozen.
        steps: steps of Adam, each on the whole support set.
        lr: learning rate of Adam.
        seed: seed of the initial parameters, from 0.
        loss: function of outputs and labels; default: cross-entropy.

    Raises:
        ValueError: if an episode does not have as many ways as the network has outputs, or if `meta_loss` is called.

    Example:
        >>> from metatutor import ConvNet
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> Scratch(ConvNet(n_outputs=5, filters=8), steps=2)(Episode(images, labels, images)).shape
        torch.Size([2, 5, 5])

    Reference:
        The network is that of Finn et al. (2017), section 5.2, without its meta-training.
    """

    def __init__(
        self, network: nn.Module, *, steps: int = 20, lr: float = 0.01, seed: int = 0, loss: Loss | None = None
    ) -> None:
        super(NetworkLearner, self).__init__()
        check_not_negative(steps=steps)
        check_positive(lr=lr)
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2**32 - 1, got {seed}")
        own = deepcopy(backbone(network)).eval()  # not as a submodule: its parameters are never used
        object.__setattr__(self, "network", own)
        self.loss, self.map_tasks = task_loss if loss is None else loss, TaskMap()
        self.steps, self.lr, self.seed, self.ways = steps, lr, seed, own.n_outputs

    @classmethod
    def outputs(cls, n_way: int, n_train_classes: int) -> int:
        """One output per class of a task."""
        return n_way

    def forward(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """Train on each support set, then answer the query images."""
        return self.query_logits(episode, self.adapt(episode))

    def adapt(self, episode: Episode) -> Parameters:
        """The trained parameters and the buffers of every task, `[task, ...]` by name; only the support set is read."""
        initial = self.initial_parameters(episode)
        first = {name: p[0] for name, p in initial.items()}
        ways = self.ways or functional_call(self.network, first, (episode.support_images[0, :1],)).shape[-1]
        self.check_outputs(ways, episode)
        optimizer = partial(torch.optim.Adam, lr=self.lr)
        moving = {name for name, p in self.network.named_parameters() if p.requires_grad}
        norms = [layer for layer in self.network.modules() if isinstance(layer, nn.modules.batchnorm._NormBase)]
        for norm in norms:
            norm.train()  # and no other layer: there is no dropout
        adapted = _descend(self, initial, episode, self.steps, optimizer, moving)
        for norm in norms:
            norm.eval()
        return adapted

    def initial_parameters(self, episode: Episode) -> Parameters:
        """The random parameters that every task starts from, and its buffers, `[task, ...]` by name."""
        like = episode.support_images
        drawn = []
        for images in like:
            pixels = images.mul(255).round().int().cpu().numpy().tobytes()
            generator = torch.Generator().manual_seed(zlib.crc32(pixels, self.seed))
            drawn.append(_draw(self.network, generator) | dict(self.network.named_buffers()))
        of_tasks = {name: torch.stack([of_task[name] for of_task in drawn]) for name in drawn[0]}
        return {n: t.to(like) if t.is_floating_point() else t.to(like.device) for n, t in of_tasks.items()}


def _draw(network: Network, generator: torch.Generator) -> Parameters:
    """New parameters: uniform within 1 / sqrt(inputs) where a layer starts at random. Frozen ones stay as they are."""
    drawn = {}
    for path, layer in network.named_modules():
        own = dict(layer.named_parameters(recurse=False))
        fixed = _not_random(layer) | {name: p.detach() for name, p in own.items() if not p.requires_grad}
        for name, p in own.items():
            if name not in fixed:
                inputs = next(q for q in (p, *own.values()) if q.dim() > 1)[0].numel()
                fixed[name] = (torch.rand(p.shape, dtype=p.dtype, generator=generator) * 2 - 1) * inputs**-0.5
            drawn[f"{path}.{name}" if path else name] = fixed[name]
    return {name: drawn[name] for name, _ in network.named_parameters()}  # tied ones once


def _not_random(layer: nn.Module) -> Parameters:
    """A layer's own parameters that always start with the same values, such as those of normalisation."""
    own = dict(layer.named_parameters(recurse=False))
    if isinstance(layer, ConvBlock):
        return {"scale": torch.ones_like(own["scale"]), "shift": torch.zeros_like(own["shift"])}
    if not own or ("Norm" not in type(layer).__name__ and any(p.dim() > 1 for p in own.values())):
        return {}
    new: Any = deepcopy(layer)
    if hasattr(new, "reset_parameters"):
        new.reset_parameters()
    return {name: p.detach() for name, p in new.named_parameters(recurse=False)}


# --- pretrained as an ordinary classifier ---


class _Pretrained(NetworkLearner):
    """Answers an episode without support with the classifier itself, which is how it is pretrained."""

    trains_on = "classes"

    def __init__(self, network: nn.Module, loss: Loss | None = None) -> None:
        super().__init__(network, loss)
        if self.network.head_prefix is None:
            raise ValueError(
                "pretraining needs a last layer; build ConvNet(n_outputs=the meta-training classes), or say which it "
                "is with backbone(network, head=the name of a layer)"
            )
        names, head = dict(self.network.named_parameters()), self.network.get_submodule(self.network.head_prefix[:-1])
        if any(self.network.head_prefix + name not in names for name, _ in head.named_parameters()):
            raise ValueError("the last layer shares its weights with another, but every task needs a new last layer")

    @classmethod
    def outputs(cls, n_way: int, n_train_classes: int) -> int:
        """One output per class of all that it is pretrained on."""
        return n_train_classes

    def forward(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """Learn from the support set, then answer the query images; without support, name the pretraining classes."""
        if episode.support_images.shape[1]:
            return self.answer(episode)
        if self.network.n_outputs not in (None, episode.n_way):
            raise ValueError(
                f"the network has {self.network.n_outputs} outputs but there are {episode.n_way} classes to pretrain "
                f"on; build ConvNet(n_outputs={episode.n_way})"
            )
        return self.network(episode.query_images.flatten(0, 1)).unflatten(0, episode.query_images.shape[:2])

    @abstractmethod
    def answer(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """Logits of the query images, learned from the support set."""

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The mean cross-entropy of an ordinary classifier over a mini-batch of `ClassificationSampler`."""
        if episode.support_images.shape[1]:
            raise ValueError(
                f"{type(self).__name__} is pretrained on all classes at once, not on episodes; "
                "train(learner, classes, spec, config) takes care of that"
            )
        return super().meta_loss(episode)

    def finish(self) -> None:
        """Forget the pretraining classes, whose last layer no task uses, so that fewer weights are recorded."""
        head = self.network.get_submodule((self.network.head_prefix or "").rstrip("."))
        for name, parameter in dict(head.named_parameters()).items():
            head.register_parameter(name, nn.Parameter(parameter[:1].detach().clone()))
        self.network.n_outputs = 1
        if "n_outputs" in self.network.arguments:
            self.network.arguments["n_outputs"] = 1  # so that what is saved can be built again


class PretrainedFinetuned(_Pretrained):
    """Fine-tunes an ordinary classifier on each support set, with a new last layer for the classes of the task.

    Pretraining: cross-entropy over all meta-training classes at once (`ClassificationSampler`). At test time every
    task starts from the same pretrained network with a last layer of zeros, and takes `steps` steps of gradient descent
    with momentum 0.9.

    Args:
        network: the classifier; `n_outputs` is the number of meta-training classes.
        steps: steps of gradient descent, each on the whole support set.
        lr: its learning rate.
        adapt: which parameters are fine-tuned: `"all"`, or `"head"`, only the last layer.
        loss: function of outputs and labels; default: cross-entropy.

    Raises:
        ValueError: if the network does not have one output per meta-training class, or is trained on episodes.

    Example:
        >>> from metatutor import ConvNet
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> PretrainedFinetuned(ConvNet(n_outputs=100, filters=8), steps=2)(Episode(images, labels, images)).shape
        torch.Size([2, 5, 5])

    Reference:
        Chen et al. (2019), section 3.2, "Baseline"; Vinyals et al. (2016), table 1, "Baseline Classifier", fine-tuned.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        steps: int = 5,
        lr: float = 0.01,
        adapt: Literal["all", "head"] = "all",
        loss: Loss | None = None,
    ) -> None:
        super().__init__(network, loss)
        check_not_negative(steps=steps)
        check_positive(lr=lr)
        check_choice("adapt", adapt, ["all", "head"])
        self.steps, self.lr = steps, lr
        self.prefix = (self.network.head_prefix or "") if adapt == "head" else ""

    def answer(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """Fine-tune on each support set, then answer the query images."""
        return self.query_logits(episode, self.adapt(episode))

    def adapt(self, episode: Episode) -> Parameters:
        """The fine-tuned parameters of every task, `[task, ...]` by name; only the support set is read."""
        heads = {n: p for n, p in self.network.named_parameters() if n.startswith(self.network.head_prefix or "")}
        initial = {n: p for n, p in self.network.named_parameters() if p.requires_grad}
        initial |= {n: p.new_zeros(episode.n_way, *p.shape[1:]) for n, p in heads.items()}
        of_tasks = {name: p.expand(len(episode), *p.shape) for name, p in initial.items()}
        optimizer = partial(torch.optim.SGD, lr=self.lr, momentum=0.9)
        moving = {name for name in initial if name.startswith(self.prefix)}
        return _descend(self, of_tasks, episode, self.steps, optimizer, moving)


class PretrainedCosine(_Pretrained):
    """Compares a pretrained classifier's embeddings: the class whose mean direction is nearest by angle.

    `logits = scale * cosine(embed(query), mean of embed(support) / |embed(support)| over the class)`. Nothing is
    learned at test time. Support and query images are embedded in one call.

    Args:
        network: the classifier; `n_outputs` is the number of meta-training classes.
        scale: factor of the logits; it does not change which is largest.
        loss: function of outputs and labels in pretraining; default: cross-entropy.

    Raises:
        ValueError: if the network does not have one output per meta-training class, or is trained on episodes.

    Example:
        >>> from metatutor import ConvNet
        >>> images, labels = torch.rand(1, 5, 1, 28, 28), torch.arange(5)[None]
        >>> PretrainedCosine(ConvNet(n_outputs=100, filters=8))(Episode(images, labels, images)).argmax(-1)
        tensor([[0, 1, 2, 3, 4]])

    Reference:
        Vinyals et al. (2016), table 1, "Baseline Classifier", cosine, not fine-tuned.
    """

    network: Embedding  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, network: nn.Module, *, scale: float = 10.0, loss: Loss | None = None) -> None:
        super().__init__(network, loss)
        check_positive(scale=scale)
        self.scale = scale

    def answer(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """Cosines between query images and the class centroids of the support set."""
        n_support = episode.support_images.shape[1]
        images = torch.cat([episode.support_images, episode.query_images], dim=1)
        embeddings = torch.stack([self.network.embed(of_task, n_support) for of_task in images])
        support, query = F.normalize(embeddings, dim=-1).split([n_support, images.shape[1] - n_support], dim=1)
        centroids = F.normalize(class_means(support, episode.support_labels, episode.n_way), dim=-1)
        return self.scale * query @ centroids.mT


# --- no network at all ---


class NearestPixels(_Untrained):
    """Answers with the class of the support image whose pixels are nearest, by angle.

    `logits[c] = max over the support images of class c of cosine(query, support)`, with each image as one long vector.

    Raises:
        ValueError: if `meta_loss` is called: there is nothing to learn.

    Example:
        >>> images, labels = torch.rand(1, 5, 1, 28, 28), torch.arange(5)[None]
        >>> NearestPixels()(Episode(images, labels, images)).argmax(-1)
        tensor([[0, 1, 2, 3, 4]])

    Reference:
        Vinyals et al. (2016), table 1, "Pixels", cosine.
    """

    def forward(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """The cosine of each query image with the nearest support image of each class."""
        support, query = (F.normalize(x.flatten(2), dim=-1) for x in (episode.support_images, episode.query_images))
        return class_maxima(query @ support.mT, episode.support_labels, episode.n_way)
