"""The contract every method keeps: an episode goes in, logits for its query images come out."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call

from metatutor.allocator import keep_freed_memory_once, limited_threads, threads_for
from metatutor.backbones import Backbone, Described, Network, backbone
from metatutor.data.images import task_of
from metatutor.episodes import Episode
from metatutor.files import decoding, replacing
from metatutor.functional import Parameters, TaskMap

Loss = Callable[[Tensor, Tensor], Tensor]  # of outputs [n, way] and labels [n], or of outputs and targets [n, output]


def task_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of class labels, or the mean squared error of real-valued targets."""
    return F.mse_loss(outputs, targets) if targets.is_floating_point() else F.cross_entropy(outputs, targets)


class Learner(Described, nn.Module, ABC):
    """Something that learns a task from its support set and answers its query images.

    `forward` and `meta_loss` are all that training and evaluation know about a method; it declares the rest itself, in
    the attributes below. A method that takes gradient steps at test time takes them inside `forward`, even under
    `torch.no_grad()`. No method reads `episode.query_labels` in `forward`, and `meta_loss` changes nothing: called
    twice, it returns the same value twice. `metatutor.testing.check_learner` tests all of this, for your own methods
    too.

    Attributes:
        learns: whether there is anything to meta-train.
        trains_on: whether it is trained on `"episodes"` or, like an ordinary classifier, on all `"classes"` at once.
        reads_streams: whether it can be evaluated on streams, where every image is classified before its label is
            revealed.
        ways: how many classes a task must have; None: any number.
        normalization: the policy of its network (see `ConvNet`), or `"none"`.
        transductive: whether the answer for one query image may depend on the other query images.
        exact_gradient: whether `meta_loss` back-propagates the exact gradient of its value; false for methods that
            leave a part of it out, or put another in its place, on purpose.

    Example:
        >>> class AlwaysTheFirst(Learner):
        ...     def forward(self, episode):
        ...         n_tasks, n_query = episode.query_images.shape[:2]
        ...         return torch.eye(episode.n_way)[torch.zeros(n_tasks, n_query, dtype=torch.long)]
        >>> images, labels = torch.zeros(1, 2, 1, 28, 28), torch.tensor([[0, 1]])
        >>> AlwaysTheFirst()(Episode(images, labels, images)).argmax(-1)
        tensor([[0, 0]])

    Reference:
        Vinyals et al. (2016), section 2.2: train the way you will be tested.
    """

    learns: bool = True
    trains_on: Literal["episodes", "classes"] = "episodes"
    reads_streams: bool = False
    ways: int | None = None
    normalization: str = "none"
    transductive: bool = False
    exact_gradient: bool = True

    @classmethod
    def outputs(cls, n_way: int, n_train_classes: int) -> int | None:
        """How many outputs its network needs for tasks of `n_way` classes; None: an embedding is enough."""
        return None

    @abstractmethod
    def forward(self, episode: Episode) -> Float[Tensor, "task query way"]:
        """Logits of every query image of every task."""

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """What the outer loop minimises: the mean cross-entropy of the query images."""
        return F.cross_entropy(self(episode).flatten(0, 1), episode.query_labels.flatten())

    def measure(self, episode: Episode, *, stream: bool = False) -> Float[Tensor, "task ..."]:
        """What an evaluation averages: each task's accuracy, or its squared error where numbers are predicted.

        `[task]`; or `[task, step]` for regressions by steps, `[task, instance]` for streams (see `reads_streams`).
        """
        answers = self(episode)
        if episode.query_labels.is_floating_point():
            return (answers - episode.query_labels).cpu().double().pow(2).mean((1, 2))[:, None]
        return (answers.argmax(-1) == episode.query_labels).cpu().double().mean(1)

    def chunks(self, episode: Episode, at_once: int | None = None) -> Iterator[Episode]:
        """The tasks of an episode in chunks of `at_once`, or of as many as run fastest; their gradients add up."""
        size = at_once or self.tasks_at_once(episode)
        return (episode.tasks(slice(i, i + size)) for i in range(0, len(episode), size))

    def tasks_at_once(self, episode: Episode) -> int:
        """How many tasks of this shape are best computed at once: by default, all of them."""
        return len(episode)

    def meta_parameters(self) -> dict[str, nn.Parameter]:
        """What the outer loop changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def after_step(self) -> None:
        """Called by the outer loop after every step: the place to update what is not learned by gradients."""

    def finish(self) -> None:
        """Drop what only the outer loop needed, before the parameters are recorded: by default, nothing."""

    def remembering(self) -> AbstractContextManager[None]:
        """What it may remember of images while it is evaluated, to be faster: by default, nothing."""
        return nullcontext()

    @property
    def device(self) -> torch.device:
        """The device it computes on."""
        return next((tensor.device for tensor in (*self.parameters(), *self.buffers())), torch.device("cpu"))

    def taken(self, episode: Episode) -> Episode:
        """The episode on its device and in the precision of its parameters, 32 bits if it has none."""
        return episode.to(self.device, next((p.dtype for p in self.parameters()), torch.float32))

    def predict(
        self, support_images: Any, support_labels: Sequence[Hashable] | Tensor, query_images: Any
    ) -> list[Hashable]:
        """Learn from some labelled images and classify others: one of the given labels for each query image.

        Args:
            support_images: tensors or arrays, `[image, channel, height, width]` or, with one channel,
                `[image, height, width]`; bytes from 0 to 255 or floats from 0 (paper) to 1 (ink), as in training.
            support_labels: one label per image, of any kind: names, numbers.
            query_images: the images to classify, in the same form.

        Raises:
            ValueError: if the images are in another form, or the labels do not match them; it says what to do.

        Example:
            >>> from metatutor import NearestPixels
            >>> black, white = torch.ones(28, 28), torch.eye(28)
            >>> NearestPixels().predict([black, white], ["a", "b"], [white, white, black])
            ['b', 'b', 'a']
        """
        episode, names = task_of(support_images, support_labels, query_images)
        with evaluating(self):
            logits = self(self.taken(episode))[0]
        if logits.shape[-1] != len(names):
            raise ValueError(
                f"there are {len(names)} classes but {logits.shape[-1]} outputs; give a network that has {len(names)}"
            )
        return [names[i] for i in logits.argmax(-1).tolist()]

    def with_arguments(self, **changes: Any) -> Any:
        """The same method with other arguments, but the same network, losses and learned state, in evaluation mode.

        A ValueError says so if what was learned does not fit the new arguments.
        """
        taken = signature(type(self).__init__).parameters
        kept = {n: getattr(self, n) for n in ("loss", "inner_loss") if n in taken and hasattr(self, n)}
        if kept.get("inner_loss") is getattr(self, "loss", None):
            kept.pop("inner_loss", None)  # what the inner loop minimises by default
        network = {"network": self.network} if hasattr(self, "network") else {}
        made = type(self)(**(network | kept | self.arguments | changes))
        load_parameters(made, self.state_dict(), "the learner")
        return made.eval()

    def description(self) -> dict[str, list[Any]]:
        """The names and arguments of its class and of its network's: what a file or a checkpoint says about it."""
        about = {"learner": [type(self).__name__, self.arguments]}
        if isinstance(network := getattr(self, "network", None), Network):
            about["network"] = [type(network).__name__, network.arguments]
        return about

    def save(self, path: Path | str) -> None:
        """Write parameters and arguments (not the loss) to a file that `metatutor.load` reads: safetensors, no
        pickle."""
        learned = {n: t for n, t in self.state_dict().items() if not n.startswith(("loss.", "inner_loss."))}
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in learned.items()}
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(save(tensors, {"metatutor": json.dumps(self.description())}))


@contextmanager
def evaluating(learner: Learner) -> Iterator[None]:
    """Within the block a learner is in evaluation mode without gradients; afterwards its mode is restored."""
    was_training = learner.training
    learner.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        learner.train(was_training)


@contextmanager
def computing(learner: Learner) -> Iterator[None]:
    """Within the block torch uses no more threads than a learner benefits from; from then on, freed memory is kept."""
    keep_freed_memory_once()
    with limited_threads(threads_for(sum(p.numel() for p in learner.parameters()))):
        yield


def load(path: Path | str, network: nn.Module | None = None) -> Learner:
    """Load a learner that `learner.save` wrote, in evaluation mode.

    Args:
        path: the file.
        network: one of the same architecture, if it is not one of the package's; its parameters are replaced.

    Raises:
        ValueError: if the file is not such a file, or its parameters do not fit.

    Example:
        >>> import tempfile
        >>> from metatutor import ConvNet, Prototypical
        >>> path = Path(tempfile.mkdtemp(), "prototypical.safetensors")
        >>> Prototypical(ConvNet(filters=8), distance="cosine").save(path)
        >>> load(path).distance
        'cosine'
    """
    with decoding(f"{path} is not a file that learner.save wrote"), safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})["metatutor"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    name, arguments = about.get("network", ("", {}))
    if network is None and name:
        network = _exported(path, name, arguments)
    elif network is not None and name == "Backbone":
        network = backbone(network, **arguments)
    learner = _exported(path, *about["learner"], **({} if network is None else {"network": network}))
    load_parameters(learner, tensors, path)
    return learner.eval()


def _exported(path: Path | str, name: str, arguments: dict[str, Any], **more: Any) -> Any:
    """One of the classes that the package exports, made with recorded arguments."""
    import metatutor

    if name == "Backbone":
        raise ValueError(f"{path} was saved with a network of your own; load it with load(path, network=that network)")
    made = getattr(metatutor, name, None) if name in metatutor.__all__ else None
    if not isinstance(made, type):
        raise ValueError(f"{path} holds a {name}, which metatutor does not export; build it and load_state_dict")
    lists = {n: tuple(value) if isinstance(value, list) else value for n, value in arguments.items()}
    return made(**more, **lists)


def load_parameters(learner: Learner, parameters: dict[str, Tensor], source: Path | str) -> None:
    """Put recorded parameters into a learner; a ValueError, and nothing is changed, if they do not fit."""
    expected, found = ({n: tuple(t.shape) for n, t in named.items()} for named in (learner.state_dict(), parameters))
    if expected != found:
        name = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))[0]
        raise ValueError(
            f"{source} holds another architecture: '{name}' is {found.get(name, 'absent')} there and "
            f"{expected.get(name, 'absent')} here; build the learner from the run's own config.json"
        )
    learner.load_state_dict(parameters)


class NetworkLearner(Learner):
    """A learner with one network, for which each task may have its own parameters, `[task, ...]` by name.

    Args:
        network: any module from images to logits, or to embeddings where those are enough (see `backbone`).
        loss: computed from the outputs for a task's query images and their labels; default: `task_loss`, which takes
            class labels or real-valued targets. A function or a module, such as
            `nn.CrossEntropyLoss(label_smoothing=0.1)`.

    Example:
        >>> class OneForAll(NetworkLearner):
        ...     def forward(self, episode):
        ...         everyones = {n: p.expand(len(episode), *p.shape) for n, p in self.network.named_parameters()}
        ...         return self.query_logits(episode, everyones)
        >>> from metatutor import ConvNet
        >>> images, labels = torch.rand(2, 5, 1, 28, 28), torch.arange(5).repeat(2, 1)
        >>> OneForAll(ConvNet(5, filters=4))(Episode(images, labels, images)).shape
        torch.Size([2, 5, 5])
    """

    network: Network

    def __init__(self, network: nn.Module, loss: Loss | None = None) -> None:
        super().__init__()
        self.network = backbone(network)
        self.loss: Loss = task_loss if loss is None else loss
        self.map_tasks = TaskMap()

    @property
    def transductive(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether queries are normalised together, so that one may change another's logits."""
        return self.network.transductive

    @property
    def normalization(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The network's normalisation policy."""
        return self.network.normalization

    def meta_loss(self, episode: Episode) -> Float[Tensor, ""]:
        """The mean loss of the query images."""
        return self.loss(self(episode).flatten(0, 1), episode.query_labels.flatten(0, 1))

    def call_network(self, parameters: Parameters, *images: Any) -> Float[Tensor, "n output"]:
        """The outputs for images, `[n, channel, height, width]` and perhaps `n_support`, under one task's
        parameters."""
        return functional_call(self.network, parameters, images)

    def check_outputs(self, n_outputs: int, episode: Episode) -> None:
        """Raise a `ValueError` if an episode has another number of ways than a network has outputs."""
        if n_outputs == episode.n_way:
            return
        if episode.support_labels.is_floating_point():
            raise ValueError(f"the network has {n_outputs} outputs but targets have {episode.n_way} numbers each")
        instead = f"build ConvNet(n_outputs={episode.n_way}){' and train it' if self.learns else ''}"
        if isinstance(self.network, Backbone):
            instead = "give one with that many, or name its last layer with backbone(network, head=its name)"
        raise ValueError(f"the network has {n_outputs} outputs but the episode is {episode.n_way}-way; {instead}")

    def support_losses(
        self, episode: Episode, parameters: Parameters, loss: Loss | None = None
    ) -> Float[Tensor, " task"]:
        """Each task's loss on its support set: what gradient descent on a task minimises."""
        of_outputs = self.loss if loss is None else loss
        if torch.is_inference_mode_enabled():
            raise ValueError("adapting needs gradients, which torch.inference_mode() rules out; use torch.no_grad()")

        def of_task(own: Parameters, images: Tensor, labels: Tensor) -> Tensor:
            outputs = self.call_network(own, images)
            if of_outputs is task_loss:  # another may want other outputs
                self.check_outputs(outputs.shape[-1], episode)
            return of_outputs(outputs, labels)

        return self.map_tasks(of_task, parameters, episode.support_images, episode.support_labels)

    def query_logits(self, episode: Episode, parameters: Parameters) -> Float[Tensor, "task query way"]:
        """The logits of the query images; support images are seen only by the `"support"` normalisation."""

        def of_task(own: Parameters, support: Tensor, query: Tensor) -> Tensor:
            if self.network.normalization != "support":
                return self.call_network(own, query)
            images = torch.cat([support, query])
            return self.call_network(own, images, len(support))[len(support) :]

        return self.map_tasks(of_task, parameters, episode.support_images, episode.query_images)
